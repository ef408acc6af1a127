"""Stop strings are found wherever tokens happen to break the text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.stop_strings import StopScanner

FILE = BUNDLED_CHECKPOINT / "tokenizer.json"
TOKENIZER = Tokenizer.from_file(str(FILE))
EOS = 11


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


def first_hit(token_ids: list[int], *stops: str) -> int | None:
    """Number of tokens pushed when the scanner first said yes."""
    scanner = StopScanner(TOKENIZER, stops)
    return next((n for n, token_id in enumerate(token_ids, 1) if scanner.push(token_id)), None)


def test_a_stop_string_across_tokens_is_found_with_its_last_token() -> None:
    token_ids = encode("One two three four")
    hit = first_hit(token_ids, "wo thr")
    assert hit is not None
    assert "wo thr" in TOKENIZER.decode(token_ids[:hit])
    assert "wo thr" not in TOKENIZER.decode(token_ids[: hit - 1])


def test_a_stop_string_within_one_token_is_found() -> None:
    token_ids = encode("the")
    assert len(token_ids) == 1
    assert first_hit(token_ids, "h") == 1


@pytest.mark.parametrize("stop", ["é", "日本", "🦊", "a🦊b"])
def test_a_stop_string_of_several_bytes_a_character_is_found(stop: str) -> None:
    token_ids = encode(f"xx a{stop}b yy")
    hit = first_hit(token_ids, stop)
    assert hit is not None
    assert stop in TOKENIZER.decode(token_ids[:hit])


def test_half_a_character_is_no_match() -> None:
    token_ids = encode("🦊")
    assert len(token_ids) > 1
    assert first_hit(token_ids[:-1], "\ufffd") is None


def test_special_tokens_have_no_text() -> None:
    token_ids = [*encode("ab"), EOS, *encode("cd")]
    assert first_hit([EOS], "<") is None
    assert first_hit(token_ids, "abcd") == len(token_ids)


def test_a_match_is_reported_once() -> None:
    scanner = StopScanner(TOKENIZER, ("e", "a long one that keeps a tail"))
    assert [scanner.push(token_id) for token_id in encode("the")] == [True]
    assert not any(scanner.push(token_id) for token_id in encode(" dog"))


def test_the_tail_kept_is_shorter_than_the_longest_stop_string() -> None:
    scanner = StopScanner(TOKENIZER, ("zz", "qqqqq"))
    for token_id in encode("a long text that goes on and on " * 20):
        scanner.push(token_id)
    assert len(scanner._tail) == 4


def test_a_path_is_read() -> None:
    assert StopScanner(FILE, ("the",)).push(*encode("the"))


@settings(deadline=None, max_examples=50)
@given(
    text=st.text("ab é🦊\n", min_size=1, max_size=30),
    stop=st.text("ab é🦊", min_size=1, max_size=4),
)
def test_a_stop_string_is_found_exactly_where_the_text_has_it(text: str, stop: str) -> None:
    token_ids = encode(text)
    assert (first_hit(token_ids, stop) is not None) == (stop in TOKENIZER.decode(token_ids))
