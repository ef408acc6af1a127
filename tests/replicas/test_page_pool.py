import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trimode.replicas.errors import TrimodeError
from trimode.replicas.page_pool import PagePool
from trimode.replicas.prefix_cache import KVEventKind

NUM_PAGES = 12


class PagePoolMachine(RuleBasedStateMachine):
    """Owners come, publish what they wrote, share what is cached, and go; after every operation
    each page is free, cached or used as often as it should be, and evictable leaves first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES, page_size=2)
        # Owners: (page table, hashes of what is published, token ids of the whole table)
        self.owners: list[tuple[list[int], list[int], list[int]]] = []

    @rule(text=st.lists(st.integers(0, 1), max_size=2 * NUM_PAGES + 4))
    def arrive(self, text: list[int]) -> None:
        text = text[: len(text) // 2 * 2]
        hits = self.pool.match(0, "", text, len(text) // 2)
        shared, free = [page for page, _ in hits], self.pool.num_free
        idle = len(shared) - self.pool.num_in_use(shared)
        missing = len(text) // 2 - len(hits)
        if missing > free - idle:
            return
        self.pool.share(shared)
        pages = self.pool.allocate(missing)
        assert pages is not None
        assert self.pool.num_free == free - idle - missing
        self.owners.append((shared + pages, [name for _, name in hits], text))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        table, hashes, text = data.draw(st.sampled_from(self.owners))
        index = len(hashes)
        if index == len(table):
            return
        parent = hashes[-1] if hashes else 0
        ids = text[2 * index : 2 * index + 2]
        table[index], name = self.pool.publish(table[index], parent, "", ids)
        hashes.append(name)
        assert self.pool.match(0, "", text, index + 1)[index] == (table[index], name)
        assert not self.pool.match(0, "other", text, index + 1)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(range(len(self.owners))))
        self.pool.free(self.owners.pop(owner)[0])

    @rule(num_pages=st.integers(NUM_PAGES + 1, NUM_PAGES + 3))
    def ask_too_much(self, num_pages: int) -> None:
        assert self.pool.allocate(num_pages) is None

    @invariant()
    def every_page_has_its_place(self) -> None:
        self.pool.check_integrity(table for table, _, _ in self.owners)

    @invariant()
    def events_tell_what_is_cached(self) -> None:
        numbers = [event.number for event in self.pool.cache._events]
        assert numbers == list(range(len(numbers)))
        known: set[int] = set()
        for event in self.pool.cache._events:
            if event.kind is KVEventKind.STORED:
                assert event.parent_hash in known or event.parent_hash == 0
                known.add(event.page_hash)
            else:
                known.remove(event.page_hash)
                parents = {e.parent_hash for e in self.pool.cache._by_hash.values()}
                assert event.page_hash not in parents
        assert len(known) == len(self.pool.cache)


TestPagePool = PagePoolMachine.TestCase
TestPagePool.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, derandomize=True
)


def test_too_many_pages_are_refused_and_none_is_taken() -> None:
    pool = PagePool(5, page_size=4)
    assert pool.allocate(6) is None
    assert pool.num_free == 5


def test_all_pages_can_be_had() -> None:
    pool = PagePool(5, page_size=4)
    assert sorted(pool.allocate(5) or []) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0


def test_a_double_free_names_the_page() -> None:
    pool = PagePool(5, page_size=4)
    pages = pool.allocate(2) or []
    pool.free(pages)
    with pytest.raises(TrimodeError, match=rf"page {pages[-1]} was freed twice"):
        pool.free(pages)


@pytest.mark.parametrize(
    ("num_slots", "num_pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)]
)
def test_a_started_page_counts_whole(num_slots: int, num_pages: int) -> None:
    assert PagePool(5, page_size=4).pages_for(num_slots) == num_pages


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([[0, 1], [1, 2]], "miscounted"),
        ([[0, 1]], "miscounted"),
        ([[0, 1], [2, 3]], "miscounted"),
        ([[0, 1, 1]], "twice"),
    ],
)
def test_integrity_finds_what_is_wrong(tables: list[list[int]], message: str) -> None:
    pool = PagePool(4, page_size=4)
    assert sorted(pool.allocate(3) or []) == [0, 1, 2]
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity(tables)
