"""Grammars on the bundled checkpoint: the output belongs to them, and is the same in both modes."""

import json
import re
from typing import Any

import pytest
from tokenizers import Tokenizer

from trimode.replicas.config import EngineConfig
from trimode.replicas.engine import Engine
from trimode.replicas.errors import InvalidRequest
from trimode.replicas.loading import build_engine
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.types import FinishReason, Grammar, GrammarKind, Mode, Request

SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)
GRAMMARS = [
    Grammar(GrammarKind.REGEX, r"(ab|cd){3,5}[0-9]{2}"),
    Grammar(GrammarKind.JSON_SCHEMA, SCHEMA),
]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return build_engine(BUNDLED_CHECKPOINT, EngineConfig(num_pages=512), dtype="float32")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BUNDLED_CHECKPOINT / "tokenizer.json"))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("grammar", GRAMMARS, ids=["regex", "json_schema"])
def test_the_output_belongs_to_the_grammar_and_is_the_same_in_both_modes(
    engine: Engine, tokenizer: Tokenizer, drain: Any, grammar: Grammar, temperature: float
) -> None:
    prompt = (1, *tokenizer.encode("the answer is: ").ids)
    own = {"grammar": grammar, "temperature": temperature, "seed": 3}
    requests = [
        Request(mode.value, prompt, mode, 120, **own)
        for mode in (Mode.AUTOREGRESSIVE, Mode.SELF_SPECULATION)
    ]
    plain, speculated = drain(engine, requests).values()
    assert plain.token_ids == speculated.token_ids
    text = tokenizer.decode(list(plain.token_ids))
    if grammar.kind is GrammarKind.REGEX:
        assert plain.finish.reason is FinishReason.STOP
        assert re.fullmatch(grammar.text, text)
    elif plain.finish.reason is FinishReason.STOP:
        assert set(json.loads(text)) == {"name", "age"}
    else:
        assert text.startswith("{")


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_drafts_are_what_the_grammar_forces(
    engine: Engine, tokenizer: Tokenizer, drain: Any, temperature: float
) -> None:
    text = "qxzjk vwpfm 91735 hgbqz" * 3
    request = Request(
        "r", (1, *tokenizer.encode("so: ").ids), Mode.SELF_SPECULATION, 90,
        block_size=8, temperature=temperature, seed=5,
        grammar=Grammar(GrammarKind.REGEX, text),
    )  # fmt: skip
    got = drain(engine, [request])["r"]
    assert tokenizer.decode(list(got.token_ids)) == text
    # A text can be cut into tokens in more than one way, so not every draft is forced.
    assert sum(got.finish.accepted) / len(got.finish.accepted) > 2.5


@pytest.mark.parametrize("mode", [Mode.AUTOREGRESSIVE, Mode.SELF_SPECULATION])
def test_a_grammar_that_meets_a_limit_ends_its_request_and_says_so(
    engine: Engine, drain: Any, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = Grammar(GrammarKind.REGEX, "[a-z]{40}")
    request = Request("r", (1, 300), mode, 60, grammar=grammar, block_size=4)
    engine.add(request)
    engine.add(Request("mate", (1, 300), mode, 30))
    chunks = engine.step()
    (sequence,) = engine._sequences["r"]
    assert sequence.grammar is not None
    sequence.grammar.is_broken = True
    while engine.has_work:
        chunks += engine.step()
        engine.check_integrity()
    finishes = {name: chunk.finish for name, chunk in chunks if chunk.finish is not None}
    assert finishes["r"].reason is FinishReason.GRAMMAR
    assert finishes["mate"].completion_tokens == 30


def test_samples_of_a_grammar_go_their_own_ways(
    engine: Engine, tokenizer: Tokenizer, drain: Any
) -> None:
    grammar = Grammar(GrammarKind.REGEX, r"(ab|cd|ef|gh){6}")
    engine.add(Request("r", (1, 300), Mode.SELF_SPECULATION, 60, grammar=grammar, n=4,
                       temperature=3.0, block_size=8))  # fmt: skip
    outputs: dict[int, list[int]] = {}
    while engine.has_work:
        for _, chunk in engine.step():
            outputs.setdefault(chunk.index, []).extend(chunk.token_ids)
    texts = {tokenizer.decode(ids) for ids in outputs.values()}
    assert len(texts) > 1
    assert all(re.fullmatch(grammar.text, text) for text in texts)


def test_a_malformed_grammar_is_its_own_requests_error(engine: Engine, drain: Any) -> None:
    good = Request("good", (1, 300), Mode.AUTOREGRESSIVE, 5)
    engine.add(good)
    bad = Grammar(GrammarKind.REGEX, "(((")
    with pytest.raises(InvalidRequest, match="grammar"):
        engine.add(Request("bad", (1, 300), Mode.AUTOREGRESSIVE, 5, grammar=bad))
    assert len(drain(engine)["good"].token_ids) == 5


@pytest.mark.parametrize("mode", [Mode.AUTOREGRESSIVE, Mode.SELF_SPECULATION])
def test_a_stop_string_ends_the_output_at_the_token_that_completes_it(
    engine: Engine, tokenizer: Tokenizer, drain: Any, mode: Mode
) -> None:
    prompt = (1, *tokenizer.encode("class Queue:\n    def __init__(self, maxsize=0):\n").ids)
    whole = drain(engine, [Request("w", prompt, mode, 60)])["w"].token_ids
    text = tokenizer.decode(list(whole))
    stop = text[20:25]
    cut = drain(engine, [Request("c", prompt, mode, 60, stop_strings=(stop,))])["c"]
    assert cut.finish.reason is FinishReason.STOP
    assert cut.token_ids == whole[: len(cut.token_ids)]
    assert stop in tokenizer.decode(list(cut.token_ids))
    assert stop not in tokenizer.decode(list(cut.token_ids[:-1]))
