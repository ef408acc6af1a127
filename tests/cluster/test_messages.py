"""Messages become requests or a named mistake; chunks become messages."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.cluster.messages import FINISH_REASONS, Defaults, to_request, to_response
from trimode.cluster.text_stream import TextPiece
from trimode.cluster.tokenizer import Tokenizer
from trimode.proto import inference_pb2 as pb
from trimode.replicas.errors import InvalidRequest
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.types import (
    Chunk,
    Finish,
    FinishReason,
    Mode,
    Priority,
    Ranking,
    Request,
    ThinkingBudget,
    Timings,
    TokenLogprobs,
)

DEFAULTS = Defaults(max_tokens=256, max_positions=1024)
IDS = pb.TokenIds(ids=[5, 6])


def convert(message: pb.GenerateRequest) -> Request:
    return to_request(message, None, DEFAULTS, None)


def test_unset_fields_take_the_documented_defaults() -> None:
    request = convert(pb.GenerateRequest(token_ids=IDS))
    assert (request.mode, request.temperature, request.max_tokens) == (Mode.AUTO, 0.0, 256)
    assert (request.block_size, request.threshold, request.use_adapter) == (None, None, True)


def test_zero_is_kept_where_it_means_something() -> None:
    request = convert(
        pb.GenerateRequest(
            token_ids=IDS, threshold=0.0, use_draft_adapter=False, sampling=pb.Sampling(seed=0)
        )
    )
    assert (request.threshold, request.use_adapter, request.seed) == (0.0, False, 0)


def test_two_requests_without_a_seed_get_different_ones() -> None:
    message = pb.GenerateRequest(token_ids=IDS)
    assert convert(message).seed != convert(message).seed


def test_the_default_output_shrinks_to_what_the_model_has_room_for() -> None:
    request = convert(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 1000)))
    assert request.max_tokens == 24


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.GenerateRequest(), "prompt"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "prompt"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1] * 1024)), "prompt"),
        (pb.GenerateRequest(text="hello"), "text"),
        (pb.GenerateRequest(token_ids=IDS, mode=99), "mode"),
        (pb.GenerateRequest(token_ids=IDS, request_id="x" * 129), "request_id"),
        (pb.GenerateRequest(token_ids=IDS, sampling=pb.Sampling(temperature=-1)), "temperature"),
        (
            pb.GenerateRequest(token_ids=IDS, sampling=pb.Sampling(temperature=float("nan"))),
            "temperature",
        ),
        (pb.GenerateRequest(token_ids=IDS, sampling=pb.Sampling(seed=2**63)), "seed"),
        (pb.GenerateRequest(token_ids=IDS, stop=pb.StopConditions(max_tokens=0)), "max_tokens"),
        (
            pb.GenerateRequest(token_ids=IDS, stop=pb.StopConditions(stop_token_ids=[1] * 65)),
            "stop_token_ids",
        ),
        (
            pb.GenerateRequest(token_ids=IDS, stop=pb.StopConditions(stop_strings=["a"] * 17)),
            "stop_strings",
        ),
        (
            pb.GenerateRequest(token_ids=IDS, stop=pb.StopConditions(stop_strings=[""])),
            "stop_strings",
        ),
        (pb.GenerateRequest(token_ids=IDS, sampling=pb.Sampling(n=0)), "n"),
        (pb.GenerateRequest(token_ids=IDS, sampling=pb.Sampling(n=65)), "n"),
        (pb.GenerateRequest(token_ids=IDS, cache_salt="x" * 129), "cache_salt"),
        (pb.GenerateRequest(token_ids=IDS, thinking_budget=3), "thinking_budget"),
        (pb.GenerateRequest(token_ids=IDS, block_size=0), "block_size"),
        (pb.GenerateRequest(token_ids=IDS, threshold=1.5), "threshold"),
    ],
)
def test_a_mistake_is_named(message: pb.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        convert(message)
    assert caught.value.field == field


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=80))
def test_whatever_parses_becomes_a_request_or_a_named_mistake(wire: bytes) -> None:
    message = pb.GenerateRequest()
    try:
        message.ParseFromString(wire)
    except Exception:  # not a message at all: gRPC itself refuses it
        return
    try:
        request = convert(message)
    except InvalidRequest:
        return
    assert request.prompt_ids


def test_the_last_message_carries_the_account() -> None:
    ranking = Ranking("pool", (), "because")
    request = Request("r", (1,), Mode.SELF_SPECULATION, 8, ranking=ranking)
    finish = Finish(FinishReason.LENGTH, 1, 8, 5, (3, 5), Timings(0.1, 0.2, 0.3))
    message = to_response(request, Chunk((7, 8), finish), TextPiece("text"))
    assert message.mode == pb.MODE_SELF_SPECULATION
    assert message.finish.reason == pb.FINISH_REASON_LENGTH
    assert (list(message.finish.accepted), message.finish.forwards) == ([3, 5], 5)
    assert (message.finish.pool, message.finish.routing_reason) == ("pool", "because")


def test_a_message_in_between_has_no_finish() -> None:
    request = Request("r", (1,), Mode.AUTOREGRESSIVE, 8)
    assert not to_response(request, Chunk((7,)), TextPiece("t")).HasField("finish")


def test_every_finish_reason_has_a_message() -> None:
    assert set(FINISH_REASONS) == set(FinishReason)


def test_sampling_fields_arrive_in_the_request() -> None:
    sampling = pb.Sampling(
        top_k=4, top_p=0.5, min_p=0.25, repetition_penalty=1.5, presence_penalty=0.5,
        frequency_penalty=-1.0, logit_bias={9: 2.0, 3: -1.0},
    )  # fmt: skip
    request = convert(pb.GenerateRequest(token_ids=IDS, sampling=sampling))
    assert (request.top_k, request.top_p, request.min_p) == (4, 0.5, 0.25)
    assert request.repetition_penalty == 1.5
    assert (request.presence_penalty, request.frequency_penalty) == (0.5, -1.0)
    assert request.logit_bias == ((3, -1.0), (9, 2.0))


def test_unset_sampling_fields_choose_nothing() -> None:
    request = convert(pb.GenerateRequest(token_ids=IDS))
    assert (request.top_k, request.top_p, request.min_p) == (0, 1.0, 0.0)
    assert not request.has_penalties
    assert (request.priority, request.governed) == (Priority.INTERACTIVE, True)


def test_stops_priority_and_governor_arrive_in_the_request() -> None:
    stop = pb.StopConditions(max_tokens=9, min_tokens=3, ignore_eos=True)
    message = pb.GenerateRequest(
        token_ids=IDS, stop=stop, priority=pb.PRIORITY_BATCH, governed=False
    )
    request = convert(message)
    assert (request.min_tokens, request.ignore_eos) == (3, True)
    assert (request.priority, request.governed) == (Priority.BATCH, False)


def test_an_unknown_priority_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"^priority: "):
        convert(pb.GenerateRequest(token_ids=IDS, priority=99))


@pytest.mark.parametrize("kind", ["json_schema", "regex", "lark"])
def test_a_grammar_keeps_its_kind_and_text(kind: str) -> None:
    message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), **{kind: "x"})
    request = to_request(message, None, Defaults(8, 64), None)
    assert request.grammar is not None
    assert (request.grammar.kind.value, request.grammar.text) == (kind, "x")


def test_logprobs_are_asked_for_and_answered() -> None:
    sampling = pb.Sampling(logprobs=0)
    message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), sampling=sampling)
    request = to_request(message, None, Defaults(8, 64), None)
    assert request.num_logprobs == 0
    request = replace(request, mode=Mode.AUTOREGRESSIVE)
    chunk = Chunk((5,), logprobs=(TokenLogprobs(-0.5, ((5, -0.5), (6, -1.5))),))
    reply = to_response(request, chunk, TextPiece(""))
    assert reply.logprobs[0].logprob == -0.5
    assert [top.token_id for top in reply.logprobs[0].top] == [5, 6]


def test_samples_stop_strings_and_salt_arrive_in_the_request() -> None:
    message = pb.GenerateRequest(
        token_ids=IDS,
        sampling=pb.Sampling(n=3),
        stop=pb.StopConditions(stop_strings=["a", "bc"]),
        cache_salt="tenant",
    )
    request = convert(message)
    assert (request.n, request.stop_strings, request.cache_salt) == (3, ("a", "bc"), "tenant")


def test_unset_they_mean_one_sample_no_stop_string_and_no_salt() -> None:
    request = convert(pb.GenerateRequest(token_ids=IDS))
    assert (request.n, request.stop_strings, request.cache_salt) == (1, (), "")
    assert request.thinking is None


@pytest.mark.parametrize("budget", [0, 5])
def test_a_thinking_budget_knows_the_tokens_around_the_thinking(budget: int) -> None:
    tokenizer = Tokenizer.load(BUNDLED_CHECKPOINT, bos_id=1)
    message = pb.GenerateRequest(token_ids=IDS, thinking_budget=budget)
    request = to_request(message, tokenizer, DEFAULTS, None)
    assert request.thinking == ThinkingBudget(budget, start_id=12, end_id=13)


def test_a_message_names_its_sample() -> None:
    request = Request("r", (1,), Mode.AUTOREGRESSIVE, 8, n=3)
    assert to_response(request, Chunk((7,), index=2), TextPiece("t")).index == 2


@pytest.fixture(scope="session")
def chatting(chat_folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(chat_folder, bos_id=1)
    assert tokenizer is not None
    return tokenizer


def chat_ids(tokenizer: Tokenizer | None, *turns: Sequence[str], **fields: Any) -> tuple[int, ...]:
    messages = [pb.ChatMessage(role=role, content=content) for role, content in turns]
    message = pb.GenerateRequest(chat=pb.Chat(messages=messages, **fields))
    return to_request(message, tokenizer, DEFAULTS, None).prompt_ids


def test_a_chat_becomes_ids_in_the_template_s_form(chatting: Tokenizer) -> None:
    start, end, thinking = 10, 11, [12, 13]
    newline = chatting.encode("\n")[1:]
    system, user, ask = (
        [start, *chatting.encode(f"{name}\n")[1:]] for name in ("system", "user", "assistant")
    )
    content = chatting.encode("def main(")[1:]
    expected = [*system, end, *newline, *user, *content, end, *newline, *ask, *thinking]
    assert chat_ids(chatting, ("user", "def main(")) == tuple(expected)


def test_unset_a_chat_does_not_think_and_is_to_be_answered(chatting: Tokenizer) -> None:
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "bye")]
    unset = chat_ids(chatting, *turns)
    assert unset == chat_ids(chatting, *turns, enable_thinking=False, add_generation_prompt=True)
    assert chat_ids(chatting, *turns, enable_thinking=True)[-2] == 12
    closed = chat_ids(chatting, *turns, add_generation_prompt=False)
    assert unset[: len(closed)] == closed
    assert closed[-2] == 11


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "chat.messages: must be 1 to 1024, are 0"),
        ([("user", "hi"), ("user", "hi"), ("me", "hi")], "chat.messages[2].role: must be one of"),
        ([("tool", "42")], "chat: the model's chat template refuses this conversation: no turn of"),
        ([("user", "x " * 2000)], "prompt: 2019 tokens leave no room"),
    ],
)
def test_a_chat_s_mistake_is_named(
    chatting: Tokenizer, turns: list[tuple[str, str]], words: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat_ids(chatting, *turns)
    assert str(caught.value).startswith(words)


def test_a_chat_needs_a_tokenizer_and_a_template() -> None:
    with pytest.raises(InvalidRequest, match="chat: the model has no tokenizer"):
        chat_ids(None, ("user", "hi"))
    with pytest.raises(InvalidRequest, match="chat: the model has no chat template"):
        chat_ids(Tokenizer.load(BUNDLED_CHECKPOINT, bos_id=1), ("user", "hi"))


def test_what_was_thought_has_a_field_of_its_own() -> None:
    request = Request("r", (1,), Mode.AUTOREGRESSIVE, 8)
    message = to_response(request, Chunk((7,)), TextPiece("answer", "thought"))
    assert (message.text, message.thinking) == ("answer", "thought")
