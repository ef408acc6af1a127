"""Tokenizer: text to ids, and ids back to text while they arrive."""

from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer
from tokenizers.decoders import DecodeStream

from trimode.cluster.chat_template import ChatTemplate, Conversation
from trimode.cluster.encoder import Encoder
from trimode.replicas.errors import CheckpointError, InvalidRequest


class Tokenizer:
    """The checkpoint's tokenizer.json and chat template. Text is text: special tokens spelled out
    in it are not recognised ("<|im_end|>" is ten characters); only a chat template writes them.
    """

    def __init__(
        self, rust: RustTokenizer, bos_id: int, chat_template: ChatTemplate | None = None
    ) -> None:
        self._encoder = Encoder(rust)
        self._rust = rust
        self._bos_id = bos_id
        self._chat_template = chat_template
        own_text = chat_template.own_text if chat_template else ""
        self._template_tokens = self._encoder.spelled_in(own_text)

    @classmethod
    def load(cls, folder: Path, bos_id: int) -> "Tokenizer | None":
        """The folder's tokenizer; None where it has none. Raises CheckpointError where it or the
        chat template is broken.
        """
        path = folder / "tokenizer.json"
        if not path.exists():
            return None
        try:
            rust = RustTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        return cls(rust, bos_id, ChatTemplate.load(folder))

    @property
    def thinking_ids(self) -> tuple[int, int] | None:
        """Ids of <think> and </think>; None where the vocabulary lacks one of them."""
        start, end = map(self._rust.token_to_id, ("<think>", "</think>"))
        return None if start is None or end is None else (start, end)

    def encode(self, text: str) -> list[int]:
        """Ids of a text to continue, beginning-of-sequence first."""
        return [self._bos_id, *self._encoder.encode(text)]

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def encode_chat(self, conversation: Conversation) -> list[int]:
        """Ids of a conversation as the chat template writes it, special tokens of its included;
        those spelled out in a message are text.

        Raises InvalidRequest where there is no template, where it cannot render the conversation,
        or where it treats text so that its own special tokens cannot be told from a message's.
        """
        template = self._chat_template
        if template is None:
            raise InvalidRequest("chat", "the model has no chat template; send text or token_ids")
        token_ids: list[int] = []
        texts: list[str] = []
        for part in self._encoder.split(template.render(conversation)):
            if isinstance(part, int):
                token_ids.append(part)
            else:
                token_ids += self._encoder.encode(part)
                texts.append(part)
        for spelling in self._template_tokens:
            written = any(spelling in text for text in texts)
            if written and not any(spelling in turn.content for turn in conversation.messages):
                raise InvalidRequest(
                    "chat",
                    f"the model's chat template treats text so that its own {spelling!r} cannot be "
                    "told from one in a message",
                )
        return token_ids

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
