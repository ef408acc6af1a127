import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trimode.replicas.errors import TrimodeError
from trimode.replicas.page_pool import PagePool

NUM_PAGES = 12


class PagePoolMachine(RuleBasedStateMachine):
    """Owners come and go; after every operation each page is free or has exactly one owner."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES, page_size=4)
        self.tables: list[list[int]] = []

    @rule(num_pages=st.integers(0, NUM_PAGES + 2))
    def allocate(self, num_pages: int) -> None:
        free = self.pool.num_free
        pages = self.pool.allocate(num_pages)
        assert (pages is None) == (num_pages > free)
        if pages is not None:
            assert len(pages) == num_pages
            self.tables.append(pages)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        before = self.pool.num_free
        self.pool.free(table)
        assert self.pool.num_free == before + len(table)

    @precondition(lambda self: any(self.tables))
    @rule()
    def free_twice(self) -> None:
        table = next(table for table in self.tables if table)
        self.tables.remove(table)
        self.pool.free(table)
        with pytest.raises(TrimodeError):
            self.pool.free(table)

    @invariant()
    def every_page_has_one_place(self) -> None:
        self.pool.check_integrity(self.tables)
        owned = sum(len(table) for table in self.tables)
        assert self.pool.num_free == NUM_PAGES - owned


TestPagePool = PagePoolMachine.TestCase
TestPagePool.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, derandomize=True
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
    with pytest.raises(TrimodeError, match=rf"page {pages[0]} was freed twice"):
        pool.free(pages)


@pytest.mark.parametrize(
    ("num_slots", "num_pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2), (9, 3)]
)
def test_a_started_page_counts_whole(num_slots: int, num_pages: int) -> None:
    assert PagePool(5, page_size=4).pages_for(num_slots) == num_pages


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ([[0, 1], [1]], "two owners"),
        ([[0, 1]], "lost"),
        ([[0, 1], [2, 3]], "owned and free"),
    ],
)
def test_integrity_finds_what_is_wrong(tables: list[list[int]], message: str) -> None:
    pool = PagePool(4, page_size=4)
    assert sorted(pool.allocate(3) or []) == [0, 1, 2]
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity(tables)
