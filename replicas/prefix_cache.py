"""PrefixCache: which full pages hold the KV of which text, and which of them may be evicted.

A tree of pages by chained hash. A page that a sequence uses keeps its ancestors in use, and pages
are given back leaf first, so the oldest idle page never has a cached child: evicting in that order
leaves every cached prefix whole.
"""

from collections import OrderedDict, deque
from dataclasses import dataclass
from enum import Enum


class KVEventKind(Enum):
    """What became of cached pages."""

    STORED = "stored"  # root first
    REMOVED = "removed"  # leaf first
    CLEARED = "cleared"  # all of them


@dataclass(frozen=True, slots=True)
class KVEvent:
    """One change of what a replica has cached. A gap in the numbers is a lost event."""

    number: int
    kind: KVEventKind
    page_hash: int = 0
    parent_hash: int = 0


@dataclass(frozen=True, slots=True)
class CachedPage:
    """A full page and the text that it is for."""

    page: int
    page_hash: int
    parent_hash: int
    salt: str
    text: bytes  # its token ids (page_hash.page_bytes)


class PrefixCache:
    """Bounded by the page pool; its events by max_events, the oldest of which are lost first."""

    def __init__(self, max_events: int = 65536) -> None:
        self._by_hash: dict[int, CachedPage] = {}
        self._by_page: dict[int, CachedPage] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # pages nobody uses, oldest first
        self._events: deque[KVEvent] = deque(maxlen=max_events)
        self._num_events = 0

    def __len__(self) -> int:
        return len(self._by_page)

    def __contains__(self, page: int) -> bool:
        return page in self._by_page

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def find(self, page_hash: int, parent_hash: int, salt: str, text: bytes) -> int | None:
        """The page of this text; None also where another text has the same hash."""
        entry = self._by_hash.get(page_hash)
        if entry is None or (entry.parent_hash, entry.salt) != (parent_hash, salt):
            return None
        return entry.page if entry.text == text else None

    def add(self, entry: CachedPage) -> None:
        """Take a page in use into the cache, unless its hash is taken."""
        if entry.page_hash in self._by_hash:
            return
        self._by_hash[entry.page_hash] = self._by_page[entry.page] = entry
        self._tell(KVEventKind.STORED, entry.page_hash, entry.parent_hash)

    def retire(self, page: int) -> None:
        """The last user of a cached page has left; callers give back leaves first."""
        self._idle[page] = None

    def revive(self, page: int) -> None:
        """An idle page is used again."""
        del self._idle[page]

    def evict(self) -> int:
        """Forget the page that has been idle longest, a leaf; raises KeyError where none is."""
        page, _ = self._idle.popitem(last=False)
        entry = self._by_page.pop(page)
        del self._by_hash[entry.page_hash]
        self._tell(KVEventKind.REMOVED, entry.page_hash, entry.parent_hash)
        return page

    def clear(self) -> list[int]:
        """Forget everything; returns the pages that were idle."""
        idle = list(self._idle)
        self._by_hash.clear()
        self._by_page.clear()
        self._idle.clear()
        self._tell(KVEventKind.CLEARED)
        return idle

    def drain_events(self) -> list[KVEvent]:
        """Everything since the last call, in order."""
        events = list(self._events)
        self._events.clear()
        return events

    def check_integrity(self) -> None:
        """Assert that the tables agree and that no idle page has a younger idle parent."""
        assert {entry.page for entry in self._by_hash.values()} == set(self._by_page)
        age = {page: index for index, page in enumerate(self._idle)}
        for page, index in age.items():
            parent = self._by_hash.get(self._by_page[page].parent_hash)
            if parent is not None and parent.page in age:
                assert age[parent.page] > index, "a parent would be evicted before its child"

    def _tell(self, kind: KVEventKind, page_hash: int = 0, parent_hash: int = 0) -> None:
        self._events.append(KVEvent(self._num_events, kind, page_hash, parent_hash))
        self._num_events += 1
