"""The text that clients read ends before the first stop string, however its tokens arrive."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer

from trimode.cluster.text_stream import RequestText, StopFilter, TextPiece
from trimode.cluster.tokenizer import Tokenizer
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.stop_strings import StopScanner
from trimode.replicas.types import Chunk, Finish, FinishReason, Mode, Request, Timings

LOADED = Tokenizer.load(BUNDLED_CHECKPOINT, bos_id=1)
assert LOADED is not None
TOKENIZER = LOADED
RUST = RustTokenizer.from_file(str(BUNDLED_CHECKPOINT / "tokenizer.json"))

# Few characters, so that stop strings overlap and hold one another; two are of several bytes.
CHARACTERS = st.sampled_from("ab☃é")
STOP_STRINGS = st.lists(st.text(CHARACTERS, min_size=1, max_size=4), max_size=4).map(tuple)
SIZES = st.lists(st.integers(0, 4), max_size=30)


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, tuple[str, ...]]:
    """A text with stop strings that it may hold."""
    stop_strings = draw(STOP_STRINGS)
    parts = st.sampled_from(stop_strings) | CHARACTERS if stop_strings else CHARACTERS
    return "".join(draw(st.lists(parts, max_size=20))), stop_strings


def up_to_first_stop(text: str, stop_strings: tuple[str, ...]) -> str:
    """The definition: the first end of a stop string, then the longest that ends there."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


def pieces_of(text: str, sizes: list[int]) -> list[str]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(text[at : at + size])
        at += size
    return [*pieces, text[at:]]


def request(**fields: object) -> Request:
    prompt_ids = fields.pop("prompt_ids", (1,))
    return Request("r", prompt_ids, Mode.AUTOREGRESSIVE, 4096, **fields)  # type: ignore[arg-type]


def finish(reason: FinishReason) -> Finish:
    return Finish(reason, 1, 1, 1, (), Timings(0, 0, 0))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(cases(), SIZES)
def test_pieces_join_to_the_text_before_the_first_stop_string(
    case: tuple[str, tuple[str, ...]], sizes: list[int]
) -> None:
    text, stop_strings = case
    stop_filter = StopFilter(stop_strings)
    *pieces, end = pieces_of(text, sizes)
    shown = "".join(
        [*(stop_filter.push(piece) for piece in pieces), stop_filter.push(end, last=True)]
    )
    assert shown == up_to_first_stop(text, stop_strings)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases(), SIZES)
def test_at_any_moment_only_what_may_begin_a_stop_string_is_held(
    case: tuple[str, tuple[str, ...]], sizes: list[int]
) -> None:
    text, stop_strings = case
    stop_filter, shown, arrived = StopFilter(stop_strings), "", ""
    for piece in pieces_of(text, sizes):
        arrived += piece
        shown += stop_filter.push(piece)
        held = up_to_first_stop(arrived, stop_strings).removeprefix(shown)
        assert not held or any(stop.startswith(held) for stop in stop_strings)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cases(), SIZES)
def test_where_the_engine_stops_the_text_ends(
    case: tuple[str, tuple[str, ...]], sizes: list[int]
) -> None:
    text, stop_strings = case
    # The engine's own scanner ends the ids with the token that completes a stop string.
    scanner = StopScanner(RUST, stop_strings)
    ids: list[int] = []
    reason = FinishReason.LENGTH
    for token_id in TOKENIZER.encode(text)[1:]:
        ids.append(token_id)
        if scanner.push(token_id):
            reason = FinishReason.STOP
            break
    output, at, shown = RequestText(TOKENIZER, request(stop_strings=stop_strings)), 0, ""
    for size in sizes:
        shown += output.push(Chunk(tuple(ids[at : at + size]))).text
        at += size
    shown += output.push(Chunk(tuple(ids[at:]) or (2,), finish(reason))).text
    assert shown == up_to_first_stop(text, stop_strings)


def test_held_text_is_given_at_any_other_end() -> None:
    for reason in set(FinishReason) - {FinishReason.STOP}:
        output = RequestText(TOKENIZER, request(stop_strings=("close it",)))
        assert output.push(Chunk(tuple(TOKENIZER.encode("I close")[1:]))).text == "I "
        assert output.push(Chunk((), finish(reason))).text == "close"


def test_each_sample_has_a_text_of_its_own() -> None:
    output = RequestText(TOKENIZER, request(n=2, stop_strings=("lose it",)))
    close, it = TOKENIZER.encode("close")[1:], TOKENIZER.encode(" it")[1:]
    assert output.push(Chunk(tuple(close), index=0)).text == "c"
    assert output.push(Chunk(tuple(it), index=1)).text == " it"
    assert output.push(Chunk((), finish(FinishReason.LENGTH), index=1)).text == ""
    assert output.push(Chunk(tuple(it), finish(FinishReason.STOP), index=0)).text == ""


def test_a_stop_id_has_no_text() -> None:
    last = TOKENIZER.encode("def")[-1]
    output = RequestText(TOKENIZER, request(stop_ids=(last,)))
    ids = tuple(TOKENIZER.encode("class")[1:])
    assert output.push(Chunk((*ids, last), finish(FinishReason.STOP))).text == "class"


def test_without_a_tokenizer_there_is_no_text() -> None:
    assert RequestText(None, request()).push(
        Chunk((300,), finish(FinishReason.LENGTH))
    ) == TextPiece("")


THINK, END_THINK = TOKENIZER.thinking_ids or (0, 0)


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text)[1:])


def read(output: RequestText, *chunks: tuple[int, ...]) -> TextPiece:
    """What the chunks of one sample add, and an empty last one."""
    pieces = [output.push(Chunk(chunk)) for chunk in chunks]
    pieces.append(output.push(Chunk((), finish(FinishReason.LENGTH))))
    return TextPiece("".join(p.text for p in pieces), "".join(p.thinking for p in pieces))


OUTPUT = (*ids("I close it. "), END_THINK, *ids("It is closed."))


@pytest.mark.parametrize("size", [1, 2, 3, 99])
def test_what_a_chat_thinks_is_told_apart(size: int) -> None:
    output = RequestText(TOKENIZER, request(prompt_ids=(10, THINK)), is_chat=True)
    chunks = [OUTPUT[at : at + size] for at in range(0, len(OUTPUT), size)]
    assert read(output, *chunks) == TextPiece("It is closed.", "I close it. ")


@pytest.mark.parametrize("prompt_ids", [(10,), (10, THINK, END_THINK), (THINK, END_THINK, 10)])
def test_a_chat_that_does_not_think_answers_at_once(prompt_ids: tuple[int, ...]) -> None:
    output = RequestText(TOKENIZER, request(prompt_ids=prompt_ids), is_chat=True)
    assert read(output, OUTPUT) == TextPiece("I close it. It is closed.")


def test_a_chat_may_begin_to_think_by_itself() -> None:
    output = RequestText(TOKENIZER, request(prompt_ids=(10,)), is_chat=True)
    assert read(output, (THINK, *OUTPUT)) == TextPiece("It is closed.", "I close it. ")


def test_what_is_no_chat_has_one_text() -> None:
    output = RequestText(TOKENIZER, request(prompt_ids=(10, THINK)))
    assert read(output, OUTPUT) == TextPiece("I close it. It is closed.")


def test_what_is_held_back_is_told_apart_when_it_is_given() -> None:
    asked = request(prompt_ids=(10, THINK), stop_strings=("it. It isn't",))
    output = RequestText(TOKENIZER, asked, is_chat=True)
    assert read(output, OUTPUT) == TextPiece("It is closed.", "I close it. ")


def test_a_stop_string_ends_thinking_too() -> None:
    asked = request(prompt_ids=(10, THINK), stop_strings=("se it",))
    output = RequestText(TOKENIZER, asked, is_chat=True)
    assert output.push(Chunk(OUTPUT[:-1], finish(FinishReason.STOP))) == TextPiece("", "I clo")
