"""Tokenizer: text to ids, and ids back to text while they arrive."""

from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer
from tokenizers.decoders import DecodeStream

from trimode.replicas.errors import CheckpointError


class Tokenizer:
    """The checkpoint's tokenizer.json. Text is text: special tokens spelled out in it are not
    recognised.
    """

    def __init__(self, rust: RustTokenizer, bos_id: int) -> None:
        rust.encode_special_tokens = (
            True  # "<|im_end|>" in a prompt is nine characters, not a token
        )
        self._rust = rust
        self._bos_id = bos_id

    @classmethod
    def load(cls, folder: Path, bos_id: int) -> "Tokenizer | None":
        """The folder's tokenizer; None where it has none. Raises CheckpointError where it is
        broken.
        """
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        try:
            return cls(RustTokenizer.from_file(str(path)), bos_id)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read: {error}") from None

    @property
    def thinking_ids(self) -> tuple[int, int] | None:
        """Ids of <think> and </think>; None where the vocabulary lacks one of them."""
        start, end = map(self._rust.token_to_id, ("<think>", "</think>"))
        return None if start is None or end is None else (start, end)

    def encode(self, text: str) -> list[int]:
        """Ids of a text to continue, beginning-of-sequence first."""
        return [self._bos_id, *self._rust.encode(text, add_special_tokens=False).ids]

    def decode(self, token_ids: list[int]) -> str:
        """The text of ids; special tokens have none."""
        text: str = self._rust.decode(token_ids, skip_special_tokens=True)
        return text

    def stream(self) -> "TextStream":
        return TextStream(self)


class TextStream:
    """Decodes one output piece by piece; the pieces join to what decoding it whole would give."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._sent = ""

    def push(self, token_ids: tuple[int, ...], *, last: bool = False) -> str:
        """The text that these ids complete; the last call also gives what never became whole
        characters.
        """
        pieces = [self._stream.step(self._tokenizer._rust, token_id) for token_id in token_ids]
        text = "".join(piece for piece in pieces if piece is not None)
        self._token_ids += token_ids
        self._sent += text
        if last:
            whole = self._tokenizer.decode(self._token_ids)
            if whole.startswith(self._sent):
                text += whole[len(self._sent) :]
        return text
