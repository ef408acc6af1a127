"""PagePool: which pages of the KV cache are free, who shares the others. It moves numbers, never
tensors.
"""

from collections.abc import Iterable, Sequence

from trimode.replicas.errors import TrimodeError
from trimode.replicas.page_hash import page_bytes, page_hash
from trimode.replicas.prefix_cache import CachedPage, PrefixCache


class PagePool:
    """Free list and reference counts. A page with users is theirs; one without is free, and while
    the prefix cache knows it, it is handed out last.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.cache = PrefixCache()
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is warm
        self._users = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free) + self.cache.num_idle

    def pages_for(self, num_slots: int) -> int:
        """How many pages hold num_slots slots."""
        return -(-num_slots // self.page_size)

    def allocate(self, num_pages: int) -> list[int] | None:
        """Take num_pages pages, or None (and nothing taken) where fewer are free."""
        if num_pages > self.num_free:
            return None
        pages = [self._free.pop() if self._free else self.cache.evict() for _ in range(num_pages)]
        for page in pages:
            self._users[page] = 1
        return pages

    def match(
        self, root: int, salt: str, token_ids: Sequence[int], limit: int
    ) -> list[tuple[int, int]]:
        """(page, page hash) of the longest cached prefix of token_ids, at most limit pages. Nothing
        is taken.
        """
        found, parent = [], root
        for index in range(limit):
            text = page_bytes(token_ids[index * self.page_size : (index + 1) * self.page_size])
            name = page_hash(parent, text)
            page = self.cache.find(name, parent, salt, text)
            if page is None:
                break
            found.append((page, name))
            parent = name
        return found

    def num_in_use(self, pages: Iterable[int]) -> int:
        return sum(self._users[page] > 0 for page in pages)

    def share(self, pages: Iterable[int]) -> None:
        """Become one more user of cached pages."""
        for page in pages:
            if self._users[page] == 0:
                self.cache.revive(page)
            self._users[page] += 1

    def publish(
        self, page: int, parent: int, salt: str, token_ids: Sequence[int]
    ) -> tuple[int, int]:
        """Make a full page of final, causal KV known; returns (page, page hash) to use from now on.

        Where the cache has the same text already, that page is shared and the given one freed, so
        that users of a page always use its cached ancestors, too.
        """
        text = page_bytes(token_ids)
        name = page_hash(parent, text)
        known = self.cache.find(name, parent, salt, text)
        if known is None:
            self.cache.add(CachedPage(page, name, parent, salt, text))
            return page, name
        if known != page:
            self.share([known])
            self.free([page])
        return known, name

    def free(self, pages: Sequence[int]) -> None:
        """Give back a page table, in its order. Raises TrimodeError where a page has no user."""
        for page in reversed(pages):  # leaves first
            if self._users[page] == 0:
                raise TrimodeError(f"page {page} was freed twice")
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self.cache:
                self.cache.retire(page)
            else:
                self._free.append(page)

    def clear_cache(self) -> None:
        """Forget what is cached; idle pages become free. Users of the others publish them anew."""
        self._free += self.cache.clear()

    def check_integrity(self, page_tables: Iterable[Sequence[int]]) -> None:
        """Assert that every page is free, idle in the cache, or used as often as counted; and that
        only cached pages are shared.
        """
        users = [0] * self.num_pages
        for table in page_tables:
            assert len(set(table)) == len(table), "a page twice in one table"
            for page in table:
                users[page] += 1
        assert users == self._users, "a page's users were miscounted"
        assert all(count < 2 or page in self.cache for page, count in enumerate(users)), (
            "a page has two owners"
        )
        assert not any(users[page] for page in self._free), "a page is owned and free"
        assert not any(page in self.cache for page in self._free), "a page is cached and free"
        used = sum(count > 0 for count in users)
        assert used + self.num_free == self.num_pages, "a page was lost"
        self.cache.check_integrity()
