"""What clients read of an output while it is made: text up to the first stop string, and of a chat
what was thought before it.
"""

from collections import deque
from dataclasses import dataclass

from trimode.cluster.tokenizer import Tokenizer
from trimode.replicas.types import Chunk, FinishReason, Request


class StopFilter:
    """Passes text on up to the first stop string; what may become one waits until it is decided.

    The first is the one that is complete first, the longest where several are: the pieces in which
    the text arrives make no difference.
    """

    def __init__(self, stop_strings: tuple[str, ...]) -> None:
        self._stop_strings = stop_strings
        # What may become a stop string is shorter than it.
        self._max_held = max(map(len, stop_strings), default=1) - 1
        self._held = ""
        self._stopped = False

    def push(self, piece: str, *, last: bool = False) -> str:
        """The text that is certain now; the last call also gives what was held and became none."""
        if self._stopped:
            return ""
        text = self._held + piece
        found = [
            (start + len(stop), start)
            for stop in self._stop_strings
            if (start := text.find(stop)) >= 0
        ]
        if found:
            self._stopped = True
            _, start = min(found)
            return text[:start]
        certain = len(text) if last else len(text) - self._num_undecided(text)
        self._held = text[certain:]
        return text[:certain]

    def _num_undecided(self, text: str) -> int:
        """Of the characters at the end, those that may begin a stop string."""
        for size in range(min(len(text), self._max_held), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop_strings):
                return size
        return 0


@dataclass(frozen=True, slots=True)
class TextPiece:
    """What one chunk adds to what a client reads."""

    text: str
    thinking: str = ""


class RequestText:
    """The text of all samples of one request, each a stream of its own."""

    def __init__(
        self, tokenizer: Tokenizer | None, request: Request, *, is_chat: bool = False
    ) -> None:
        """is_chat: what stands between <think> and </think> is told apart."""
        self._stop_ids = request.stop_ids
        self._samples = (
            [_SampleText(tokenizer, request, is_chat) for _ in range(request.n)]
            if tokenizer
            else []
        )

    def push(self, chunk: Chunk) -> TextPiece:
        """What a chunk adds to its sample; nothing without a tokenizer."""
        if not self._samples:
            return TextPiece("")
        token_ids, finish = chunk.token_ids, chunk.finish
        stopped = finish is not None and finish.reason is FinishReason.STOP
        if stopped and token_ids[-1] in self._stop_ids:
            token_ids = token_ids[:-1]  # end-of-sequence has no text anyway
        return self._samples[chunk.index].push(token_ids, last=finish is not None)


class _SampleText:
    def __init__(self, tokenizer: Tokenizer, request: Request, is_chat: bool) -> None:
        self._decoded = tokenizer.stream()
        self._stop_filter = StopFilter(request.stop_strings)
        self._marks = (tokenizer.thinking_ids if is_chat else None) or (-1, -1)
        marks = [token_id for token_id in request.prompt_ids if token_id in self._marks]
        self._is_thinking = bool(marks) and marks[-1] == self._marks[0]
        self._shows_thinking = self._is_thinking
        self._num_decoded = self._num_shown = 0
        # Where the thinking begins or ends, of what was decoded and is not shown yet.
        self._changes: deque[int] = deque()

    def push(self, token_ids: tuple[int, ...], *, last: bool) -> TextPiece:
        decoded, begin = "", 0
        for at, token_id in enumerate(token_ids):
            if token_id in self._marks:
                decoded += self._decoded.push(token_ids[begin:at])
                begin = at + 1
                if self._is_thinking != (token_id == self._marks[0]):
                    self._is_thinking = not self._is_thinking
                    self._changes.append(self._num_decoded + len(decoded))
        decoded += self._decoded.push(token_ids[begin:], last=last)
        self._num_decoded += len(decoded)
        return self._split(self._stop_filter.push(decoded, last=last))

    def _split(self, shown: str) -> TextPiece:
        """The stop filter may hold text back, so a change may lie further on."""
        parts = {True: "", False: ""}
        while shown:
            if self._changes and self._changes[0] == self._num_shown:
                self._changes.popleft()
                self._shows_thinking = not self._shows_thinking
                continue
            until = self._changes[0] - self._num_shown if self._changes else len(shown)
            part, shown = shown[:until], shown[until:]
            parts[self._shows_thinking] += part
            self._num_shown += len(part)
        return TextPiece(text=parts[False], thinking=parts[True])
