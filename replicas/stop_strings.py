"""Does the text of an output contain a stop string yet? Asked token by token."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class StopScanner:
    """Watches one sample's output. Holds the end of its text only, so memory does not grow with it.

    Special tokens have no text; characters count once all their bytes have arrived.
    """

    def __init__(self, tokenizer_file: Path | Tokenizer, stop_strings: tuple[str, ...]) -> None:
        if isinstance(tokenizer_file, Path):
            tokenizer_file = Tokenizer.from_file(str(tokenizer_file))
        self._tokenizer = tokenizer_file
        self._stop_strings = stop_strings
        self._stream = DecodeStream(skip_special_tokens=True)
        # What may be the beginning of a stop string is one character shorter than it, at most.
        self._max_tail = max((len(stop) for stop in stop_strings), default=1) - 1
        self._tail = ""

    def push(self, token_id: int) -> bool:
        """Whether the text that this token completes ends a stop string or holds one."""
        piece = self._stream.step(self._tokenizer, token_id)
        if not piece:
            return False
        found = any(stop in _last(self._tail, len(stop) - 1) + piece for stop in self._stop_strings)
        self._tail = _last(self._tail + piece, self._max_tail)
        return found


def _last(text: str, num_chars: int) -> str:
    return text[max(len(text) - num_chars, 0) :]
