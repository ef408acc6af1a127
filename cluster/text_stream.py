"""What clients read of an output while it is made: text up to the first stop string."""

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


class RequestText:
    """The text of all samples of one request, each a stream of its own."""

    def __init__(self, tokenizer: Tokenizer | None, request: Request) -> None:
        self._stop_ids = request.stop_ids
        streams = [tokenizer.stream() for _ in range(request.n)] if tokenizer else []
        self._samples = [(stream, StopFilter(request.stop_strings)) for stream in streams]

    def push(self, chunk: Chunk) -> str:
        """The text that a chunk adds to its sample; none without a tokenizer."""
        if not self._samples:
            return ""
        decoded, stop_filter = self._samples[chunk.index]
        token_ids, finish = chunk.token_ids, chunk.finish
        stopped = finish is not None and finish.reason is FinishReason.STOP
        if stopped and token_ids[-1] in self._stop_ids:
            token_ids = token_ids[:-1]  # end-of-sequence has no text anyway
        last = finish is not None
        return stop_filter.push(decoded.push(token_ids, last=last), last=last)
