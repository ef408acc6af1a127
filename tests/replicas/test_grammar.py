"""Masks and drafts follow the grammar, and looking ahead leaves no trace."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from trimode.replicas.errors import CheckpointError, InvalidRequest
from trimode.replicas.grammar import GrammarCompiler, GrammarState
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.types import MAX_GRAMMAR_CHARS, Grammar, GrammarKind

FILE = BUNDLED_CHECKPOINT / "tokenizer.json"
TOKENIZER = Tokenizer.from_file(str(FILE))
EOS, MASK_ID, VOCAB = 11, 100, 2048
COMPILER = GrammarCompiler.load(FILE, VOCAB, EOS)
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


def encode(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


def regex(text: str) -> GrammarState:
    return COMPILER.compile(Grammar(GrammarKind.REGEX, text))


def allowed(state: GrammarState) -> list[int]:
    return [int(i) for i in np.flatnonzero(state.masks(())[0])]


def walk(state: GrammarState, seed: int, max_tokens: int) -> list[int]:
    """A random output of the grammar."""
    rng, out = np.random.default_rng(seed), []
    while len(out) < max_tokens and (not out or out[-1] != EOS):
        out.append(int(rng.choice(allowed(state))))
        state.advance(out[-1:])
    return out


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32))
def test_a_random_walk_through_a_schema_gives_a_document_of_it(seed: int) -> None:
    # Whitespace is free in JSON, so a walk may take long; one that has not ended proves nothing.
    out = walk(COMPILER.compile(Grammar(GrammarKind.JSON_SCHEMA, SCHEMA)), seed, 200)
    if out[-1] == EOS:
        document = json.loads(TOKENIZER.decode(out))
        assert document["name"] in ("Ada", "Bob") and document["age"] <= 99


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32))
def test_a_random_walk_through_a_regex_matches_it(seed: int) -> None:
    out = walk(regex("(ab|cd){2,4}x?"), seed, 50)
    assert out[-1] == EOS
    assert re.fullmatch("(ab|cd){2,4}x?", TOKENIZER.decode(out))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32), cut=st.integers(0, 8))
def test_rows_ahead_are_those_after_committing_and_leave_no_trace(seed: int, cut: int) -> None:
    out = walk(regex("(ab|cd){2,4}x?"), seed, 50)
    state, drafts = regex("(ab|cd){2,4}x?"), out[cut:]
    state.advance(out[:cut])
    rows = state.masks(drafts)
    assert rows.shape == (len(drafts) + 1, VOCAB)
    for i, token_id in enumerate(drafts):
        assert (rows[i] == state.masks(())[0]).all()
        state.advance([token_id])


def test_rows_after_a_draft_outside_the_grammar_allow_everything() -> None:
    rows = regex("ab+").masks([*encode("q"), *encode("b")])
    assert not rows[0].all()
    assert rows[1:].all()


def test_eos_is_allowed_only_where_the_text_may_end() -> None:
    state = regex("a{3}")
    assert EOS not in allowed(state)
    state.advance(encode("aaa"))
    assert allowed(state) == [EOS]


def test_nothing_but_eos_follows_the_end_and_advancing_is_harmless() -> None:
    state = regex("a*")
    state.advance([EOS])
    state.advance([5, EOS, *encode("zzz")])
    assert allowed(state) == [EOS]
    assert not state.is_broken


@pytest.mark.parametrize("text", [r"[^x]*", r"(.|\n)*"])
def test_special_tokens_are_never_allowed(text: str) -> None:
    specials = {i for i, token in TOKENIZER.get_added_tokens_decoder().items() if token.special}
    assert MASK_ID in specials
    assert specials & set(allowed(regex(text))) == {EOS}


def test_a_grammar_that_needs_a_special_token_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="grammar: no output"):
        COMPILER.compile(Grammar(GrammarKind.LARK, "start: <|mask|>"))


def test_a_lark_grammar_is_followed() -> None:
    state = COMPILER.compile(Grammar(GrammarKind.LARK, 'start: "yes" | "no"'))
    state.advance(encode("no"))
    assert allowed(state) == [EOS]


def test_a_token_outside_the_grammar_breaks_the_state_without_an_error() -> None:
    state = regex("ab")
    state.advance(encode("q"))
    assert state.is_broken
    assert allowed(state) == [EOS]


def test_a_draft_takes_forced_tokens_over_candidates() -> None:
    """Its own tokens are forced one by one; nobody proposed them."""
    state = COMPILER.compile(Grammar(GrammarKind.JSON_SCHEMA, SCHEMA))
    first = allowed(state)
    assert len(first) == 1
    assert state.draft([encode("q"), []]) == first


def test_a_draft_takes_the_first_candidate_allowed_and_stops_where_none_is() -> None:
    state = regex("[ab][cd][ef]")
    a, d, q = encode("a")[0], encode("d")[0], encode("q")[0]
    before = state.masks(())
    assert state.draft([[q, a], [d, q], [q, -1, VOCAB]]) == [a, d]
    assert (state.masks(()) == before).all()


def test_a_draft_ends_with_eos() -> None:
    a = encode("a")[0]
    assert regex("a").draft([[a], [a], [a]]) == [a, EOS]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (GrammarKind.JSON_SCHEMA, ""),
        (GrammarKind.JSON_SCHEMA, "nonsense"),
        (GrammarKind.JSON_SCHEMA, '{"type": "foo"}'),
        (GrammarKind.JSON_SCHEMA, '{"$ref": "http://x"}'),
        (GrammarKind.REGEX, "a("),
        (GrammarKind.REGEX, "(?=a)"),
        (GrammarKind.LARK, ""),
        (GrammarKind.LARK, "start: foo"),
        (GrammarKind.LARK, '{"grammars": []}'),
        (GrammarKind.REGEX, "a" * (MAX_GRAMMAR_CHARS + 1)),
    ],
)
def test_a_malformed_grammar_names_the_field(kind: GrammarKind, text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^grammar: "):
        # The record is not checked; only a Request is.
        COMPILER.compile(Grammar(kind, text))


def test_a_model_with_more_logits_than_tokens_never_gets_the_rest() -> None:
    state = GrammarCompiler.load(FILE, VOCAB + 64, EOS).compile(Grammar(GrammarKind.REGEX, ".*"))
    assert not state.masks(())[0, VOCAB:].any()


def test_a_file_that_is_no_tokenizer_names_it(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        GrammarCompiler.load(path, VOCAB, EOS)
