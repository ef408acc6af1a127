"""PageTables: the pages of every seated sequence, from admission to the end.

A sequence is seated with the pages of its prefill, cached ones first, and gets one more whenever it
needs one. Pages that are full of final KV are published to the prefix cache while it runs.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from trimode.replicas.config import EngineConfig
from trimode.replicas.page_hash import root_hash
from trimode.replicas.page_pool import PagePool
from trimode.replicas.prefix_cache import KVEvent
from trimode.replicas.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PageCopy:
    """The KV of one page, to be copied into another before the next pass."""

    source: int
    target: int


class PageTables:
    """Moves pages between the pool and sequences; it never decides who should have them."""

    def __init__(self, config: EngineConfig, revision: str) -> None:
        """revision: of the model; pages of different ones are never confused."""
        self._pool = PagePool(config.pages, config.page_size)
        self._prefix_cache = config.prefix_cache
        self._revision = revision
        self._copies: list[PageCopy] = []

    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_cached(self) -> int:
        return len(self._pool.cache)

    def pages_for(self, num_slots: int) -> int:
        return self._pool.pages_for(num_slots)

    def seat(self, sequence: Sequence, siblings: Iterable[Sequence]) -> bool:
        """Give a sequence the pages of its prefill; False, and nothing, where too few are free.

        siblings: running samples of the same request, whose prompt pages it may share and copy.
        """
        root, salt = self._root(sequence), sequence.request.cache_salt
        # Of a new prompt's last token the logits are needed, so its page cannot be a hit.
        known = sequence.prefill_end - (sequence.num_output_tokens == 0)
        limit = known // self._pool.page_size if self._prefix_cache else 0
        slots = sequence.prefill_end + sequence.max_block_size
        if self._pool.pages_for(slots) - limit > self._pool.num_free:
            return False  # not even if all were cached
        hits = self._pool.match(root, salt, sequence.token_ids, limit)
        shared = [page for page, _ in hits]
        missing = self._pool.pages_for(slots) - len(hits)
        idle_hits = len(shared) - self._pool.num_in_use(shared)
        if missing > self._pool.num_free - idle_hits:
            return False
        self._pool.share(shared)
        pages = self._pool.allocate(missing)
        assert pages is not None, "counted above"
        sequence.num_seatings += 1
        # An array, as every pass copies it.
        sequence.page_table = array("i", shared + pages)
        sequence.page_hashes = [name for _, name in hits]
        sequence.num_committed = len(hits) * self._pool.page_size
        if sequence.num_output_tokens == 0:
            if len(hits) == limit:
                self._copy_partial_page(sequence, siblings)
            sequence.num_cached = sequence.num_committed
        return True

    def extend(self, sequence: Sequence, num_slots: int) -> bool:
        """Give a sequence pages for so many slots; False, and nothing, where too few are free."""
        missing = self._pool.pages_for(num_slots) - len(sequence.page_table)
        if missing <= 0:
            return True
        pages = self._pool.allocate(missing)
        sequence.page_table.extend(pages or ())
        return pages is not None

    def publish(self, sequence: Sequence) -> None:
        """Make the pages that are full of final KV known to the prefix cache."""
        if not self._prefix_cache:
            return
        size, hashes = self._pool.page_size, sequence.page_hashes
        # Not what lies behind a stop token, nor the slot of the last one, whose KV is to come.
        final = min(sequence.num_committed, len(sequence.token_ids))
        for index in range(len(hashes), final // size):
            parent = hashes[-1] if hashes else self._root(sequence)
            ids = sequence.token_ids[index * size : (index + 1) * size]
            page, name = self._pool.publish(
                sequence.page_table[index], parent, sequence.request.cache_salt, ids
            )
            sequence.page_table[index] = page
            hashes.append(name)

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's pages back. Passes that are under way may still write to them: whoever
        has them next writes what it reads, in a later pass.
        """
        self._pool.free(sequence.page_table)
        sequence.page_table = []
        sequence.page_hashes = []
        sequence.num_committed = 0

    def clear_cache(self, running: Iterable[Sequence]) -> None:
        """Forget what nobody uses; what running sequences hold is published anew, root first."""
        self._pool.clear_cache()
        for sequence in running:
            sequence.page_hashes = []
            self.publish(sequence)

    def drain_copies(self) -> list[PageCopy]:
        """What must be copied before the next pass, in this order."""
        copies, self._copies = self._copies, []
        return copies

    def drain_events(self) -> list[KVEvent]:
        """What became of cached pages since the last call."""
        return self._pool.cache.drain_events()

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Assert that every page is free, cached, or owned by exactly the sequences that use it."""
        self._pool.check_integrity(sequence.page_table for sequence in running)

    def _root(self, sequence: Sequence) -> int:
        return root_hash(self._revision, sequence.request.cache_salt)

    def _copy_partial_page(self, sequence: Sequence, siblings: Iterable[Sequence]) -> None:
        """Where a sibling has the prompt's KV, copy the page that is not full of it."""
        known = sequence.num_prompt_tokens - 1
        if known == sequence.num_committed:
            return
        index = known // self._pool.page_size
        for sibling in siblings:
            if sibling.num_committed > known:
                copy = PageCopy(sibling.page_table[index], sequence.page_table[index])
                self._copies.append(copy)
                sequence.num_committed = known
                return
