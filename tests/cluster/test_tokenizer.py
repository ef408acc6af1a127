"""Text in, ids out, and back again while the ids arrive."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE

from trimode.cluster.tokenizer import Tokenizer
from trimode.replicas.errors import CheckpointError
from trimode.replicas.model.config import BUNDLED_CHECKPOINT

BOS = 1


def load() -> Tokenizer:
    tokenizer = Tokenizer.load(BUNDLED_CHECKPOINT, BOS)
    assert tokenizer is not None
    return tokenizer


TOKENIZER = load()


def test_a_prompt_begins_with_the_beginning_of_sequence() -> None:
    assert TOKENIZER.encode("def")[0] == BOS


def test_a_special_token_spelled_out_in_a_prompt_is_plain_text() -> None:
    assert 11 not in TOKENIZER.encode("a<|im_end|>b")
    assert TOKENIZER.decode(TOKENIZER.encode("a<|im_end|>b")) == "a<|im_end|>b"


def test_a_folder_without_a_tokenizer_gives_none(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path, BOS) is None


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path, BOS)


def test_the_tokens_around_a_thinking_are_known_by_name() -> None:
    assert TOKENIZER.thinking_ids == (12, 13)


def test_a_vocabulary_that_lacks_one_of_them_has_none() -> None:
    rust = RustTokenizer(BPE(vocab={"<think>": 0}, merges=[]))
    assert Tokenizer(rust, BOS).thinking_ids is None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(max_size=40), st.lists(st.integers(1, 5), max_size=60))
def test_pieces_join_to_the_whole_text(text: str, cuts: list[int]) -> None:
    ids = TOKENIZER.encode(text)
    stream, pieces, at = TOKENIZER.stream(), [], 0
    for size in cuts:
        pieces.append(stream.push(tuple(ids[at : at + size])))
        at += size
    pieces.append(stream.push(tuple(ids[at:]), last=True))
    assert "".join(pieces) == text


def test_an_unfinished_character_waits_for_its_last_byte() -> None:
    ids = TOKENIZER.encode("☃")[1:]
    assert len(ids) > 1, "the test needs a character of several tokens"
    stream = TOKENIZER.stream()
    assert stream.push(tuple(ids[:-1])) == ""
    assert stream.push((ids[-1],)) == "☃"


def test_bytes_that_never_became_a_character_are_shown_as_replaced_at_the_end() -> None:
    ids = TOKENIZER.encode("☃")[1:-1]
    assert TOKENIZER.stream().push(tuple(ids), last=True).strip("\N{REPLACEMENT CHARACTER}") == ""
