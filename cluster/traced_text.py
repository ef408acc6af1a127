"""TracedText: text that knows which of its characters a chat template wrote itself."""

from bisect import bisect_right
from collections.abc import Iterable
from itertools import chain, repeat
from typing import Any, SupportsIndex

MAX_TEXT_CHARS = 4 * 1024 * 1024  # of what a template renders, and of every text on the way to it

Span = tuple[int, int]  # start and end of neighbouring characters


class TextTooLong(ValueError):
    """A template made more text than MAX_TEXT_CHARS."""

    def __init__(self) -> None:
        super().__init__(f"more than {MAX_TEXT_CHARS} characters of text")


class TracedText(str):
    """A str whose `spans` are what the template wrote; the rest came with the request.

    Joining, cutting, stripping and replacing keep the spans. What other methods return is a plain
    str, thus text of which nothing counts as the template's: an origin can be lost, never gained.
    """

    __slots__ = ("spans",)
    spans: tuple[Span, ...]  # ascending; neighbours do not touch

    def __new__(cls, text: str, spans: tuple[Span, ...] = ()) -> "TracedText":
        self = super().__new__(cls, text)
        self.spans = spans
        return self

    @classmethod
    def written(cls, text: str) -> "TracedText":
        """Text of the template's own."""
        return cls(text, ((0, len(text)),) if text else ())

    @classmethod
    def of(cls, text: str) -> "TracedText":
        """The same text; a plain one came with the request."""
        return text if isinstance(text, TracedText) else cls(text)

    @classmethod
    def concat(cls, pieces: Iterable[str]) -> "TracedText":
        """All pieces in one. Raises TextTooLong as soon as that is certain."""
        texts: list[str] = []
        spans: list[Span] = []
        size = 0
        for piece in pieces:
            if not isinstance(piece, str):
                raise TypeError(f"can only join text, not {type(piece).__name__}")
            for start, end in piece.spans if isinstance(piece, TracedText) else ():
                if spans and spans[-1][1] == size + start:
                    spans[-1] = (spans[-1][0], size + end)
                else:
                    spans.append((size + start, size + end))
            texts.append(piece)
            size += len(piece)
            if size > MAX_TEXT_CHARS:
                raise TextTooLong()
        return cls("".join(texts), tuple(spans))

    def __str__(self) -> "TracedText":
        return self  # Jinja calls str() on all that it puts out

    def __add__(self, other: str) -> "TracedText":
        return TracedText.concat((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> "TracedText":
        return TracedText.concat((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> "TracedText":
        if len(self) * count.__index__() > MAX_TEXT_CHARS:
            raise TextTooLong()
        return TracedText.concat(repeat(self, count.__index__()) if self else ())

    __rmul__ = __mul__

    def __getitem__(self, key: Any) -> str:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._cut(start, stop)
        return super().__getitem__(key)

    def strip(self, chars: str | None = None, /) -> "TracedText":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> "TracedText":
        return self._cut(len(self) - len(super().lstrip(chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> "TracedText":
        return self._cut(0, len(super().rstrip(chars)))

    def join(self, pieces: Iterable[str], /) -> "TracedText":
        """Raises TextTooLong."""
        first, *others = tuple(pieces) or ("",)
        return TracedText.concat(chain((first,), *((self, other) for other in others)))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> "TracedText":
        """Raises TextTooLong; ValueError where `old` is empty."""
        if not old:
            raise ValueError("replace needs text to look for")
        pieces: list[str] = []
        at, left = 0, count.__index__()
        while left and (found := self.find(old, at)) >= 0:
            pieces += (self._cut(at, found), new)
            at, left = found + len(old), left - 1
        return TracedText.concat((*pieces, self._cut(at, len(self))))

    def _cut(self, start: int, stop: int) -> "TracedText":
        """The characters from start to before stop."""
        stop = max(start, stop)
        # Of the spans that begin at or before start only the last can reach beyond it.
        first = max(0, bisect_right(self.spans, start, key=lambda span: span[0]) - 1)
        last = bisect_right(self.spans, stop, key=lambda span: span[0])
        clipped = ((max(a, start), min(b, stop)) for a, b in self.spans[first:last])
        return TracedText(
            super().__getitem__(slice(start, stop)),
            tuple((a - start, b - start) for a, b in clipped if a < b),
        )
