"""PagePool: which pages of the KV cache are free. It moves numbers, never tensors."""

from collections.abc import Iterable

from trimode.replicas.errors import TrimodeError


class PagePool:
    """A free list of page numbers. A page has one owner from allocate() to free()."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page freed last is warm
        self._is_free = bytearray(b"\x01" * num_pages)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_slots: int) -> int:
        """How many pages hold num_slots slots."""
        return -(-num_slots // self.page_size)

    def allocate(self, num_pages: int) -> list[int] | None:
        """Take num_pages pages, or None (and nothing taken) where fewer are free."""
        if num_pages > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(num_pages)]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Give pages back. Raises TrimodeError where one of them is free already."""
        for page in pages:
            if self._is_free[page]:
                raise TrimodeError(f"page {page} was freed twice")
            self._is_free[page] = 1
            self._free.append(page)

    def check_integrity(self, page_tables: Iterable[list[int]]) -> None:
        """Assert that every page is either free or in exactly one of the given page tables."""
        owned = [page for table in page_tables for page in table]
        assert len(set(owned)) == len(owned), "a page has two owners"
        assert not set(owned) & set(self._free), "a page is owned and free"
        assert len(owned) + len(self._free) == self.num_pages, "a page was lost"
