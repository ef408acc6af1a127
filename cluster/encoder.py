"""Encoder: text to ids, and special tokens only where a chat template wrote them."""

import re
from collections.abc import Iterator

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from trimode.cluster.traced_text import TracedText


class Encoder:
    """One tokenizer's way from text to ids.

    Special are all tokens that it knows beside its vocabulary, as <|im_start|>, <|im_end|> and
    <think>, whether decoding shows them or not.
    """

    def __init__(self, rust: RustTokenizer) -> None:
        tokens = {i: token for i, token in rust.get_added_tokens_decoder().items() if token.content}
        self._special = {token.content: (token_id, token) for token_id, token in tokens.items()}
        self._special_ids = frozenset(tokens)
        # Where several begin at one place, the longest counts.
        spellings = sorted(self._special, key=len, reverse=True)
        self._spelling = re.compile("|".join(map(re.escape, spellings)) or r"\Z\A")
        self._rust = _blind(rust, list(tokens.values()))

    def spelled_in(self, text: str) -> frozenset[str]:
        """The special tokens whose spelling occurs in a text."""
        return frozenset(spelling for spelling in self._special if spelling in text)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which nothing is special."""
        token_ids = self._ids(text)
        if self._special_ids.isdisjoint(token_ids):
            return token_ids
        # The vocabulary holds a spelling as a word, too: no word reaches across a cut.
        cuts = [match.start() + 1 for match in self._spelling.finditer(text)]
        pieces = zip([0, *cuts], [*cuts, len(text)], strict=True)
        return [token_id for start, end in pieces for token_id in self._ids(text[start:end])]

    def split(self, text: TracedText) -> Iterator[int | str]:
        """Ids of the special tokens that the template wrote whole, and the text between them."""
        at = 0
        strip_next = False
        for start, end in text.spans:
            for match in self._spelling.finditer(text, start, end):
                token_id, token = self._special[match.group()]
                between: str = text[at : match.start()]
                between = between.lstrip() if strip_next else between
                between = between.rstrip() if token.lstrip else between
                if between:
                    yield between
                yield token_id
                at, strip_next = match.end(), token.rstrip
        rest: str = text[at:]
        rest = rest.lstrip() if strip_next else rest
        if rest:
            yield rest

    def _ids(self, text: str) -> list[int]:
        token_ids: list[int] = self._rust.encode(text, add_special_tokens=False).ids
        return token_ids


def _blind(rust: RustTokenizer, tokens: list[AddedToken]) -> RustTokenizer:
    """A tokenizer that does not see these tokens in a text: this one or a copy."""
    if not all(token.special for token in tokens):
        # Those that decoding shows are seen in any text, too, unless they are declared special. In
        # a copy: decoding must go on to show them.
        rust = RustTokenizer.from_str(rust.to_str())
        rust.add_special_tokens(
            [AddedToken(token.content, special=True, normalized=False) for token in tokens]
        )
    rust.encode_special_tokens = True
    return rust
