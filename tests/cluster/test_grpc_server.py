"""The wire contract: streams, deadlines, cancels, errors, health, reflection."""

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from trimode.cluster.grpc_server import SERVICE_NAME
from trimode.cluster.tokenizer import Tokenizer
from trimode.proto import inference_pb2 as pb
from trimode.replicas.model.config import BUNDLED_CHECKPOINT

LOADED = Tokenizer.load(BUNDLED_CHECKPOINT, bos_id=1)
assert LOADED is not None
TOKENIZER = LOADED
PROMPT = "def __init__(self"
ALL_MODES = (pb.MODE_AUTOREGRESSIVE, pb.MODE_BLOCK_DIFFUSION, pb.MODE_SELF_SPECULATION)


def message(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(**({"text": PROMPT} | fields))


def endless(**fields: Any) -> pb.GenerateRequest:
    """A request that would run for thousands of passes."""
    return message(mode=pb.MODE_AUTOREGRESSIVE, stop=pb.StopConditions(max_tokens=1900), **fields)


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def idle(served: Any) -> bool:
    load = served.loop.load
    return bool(
        load.running == load.waiting == 0
        and load.free_pages == load.total_pages
        and served.board.num_in_flight == 0
    )


async def rest_of(call: Any) -> list[pb.GenerateResponse]:
    """What is left of a call that was begun with read(); the two styles do not mix."""
    replies = []
    while (reply := await call.read()) is not grpc.aio.EOF:
        replies.append(reply)
    return replies


async def replies_of(served: Any, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    return [reply async for reply in served.stub.Generate(request)]


def ids_of(replies: Iterable[pb.GenerateResponse]) -> list[int]:
    return [token_id for reply in replies for token_id in reply.token_ids]


def text_of(replies: Iterable[pb.GenerateResponse]) -> str:
    return "".join(reply.text for reply in replies)


async def failure_of(
    served: Any, request: pb.GenerateRequest, **options: Any
) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in served.stub.Generate(request, **options):
            pass
    return caught.value


@pytest.mark.parametrize("mode", ALL_MODES)
async def test_every_mode_streams_to_a_finish(served: Any, mode: pb.Mode) -> None:
    replies = [reply async for reply in served.stub.Generate(message(mode=mode))]
    assert all(reply.mode == mode for reply in replies)
    assert [reply.HasField("finish") for reply in replies] == [False] * (len(replies) - 1) + [True]
    finish = replies[-1].finish
    assert sum(len(reply.token_ids) for reply in replies) == finish.usage.completion_tokens
    assert "".join(reply.text for reply in replies)


async def test_a_message_holds_all_tokens_of_a_step(served: Any) -> None:
    request = message(mode=pb.MODE_BLOCK_DIFFUSION, block_size=8)
    replies = [reply async for reply in served.stub.Generate(request)]
    # The prefill's token, then of each block seven tokens and, with its commit, the next known one.
    assert [len(reply.token_ids) for reply in replies[:5]] == [1, 7, 1, 7, 1]


async def test_the_same_seed_gives_the_same_tokens_in_ar_and_speculation(served: Any) -> None:
    sampling = pb.Sampling(temperature=0.8, seed=7)
    outputs = []
    for mode in (pb.MODE_AUTOREGRESSIVE, pb.MODE_SELF_SPECULATION):
        replies = served.stub.Generate(message(mode=mode, sampling=sampling))
        outputs.append([i async for reply in replies for i in reply.token_ids])
    assert outputs[0] == outputs[1]


async def test_a_cancelled_call_frees_everything(served: Any) -> None:
    call = served.stub.Generate(endless())
    await call.read()
    assert not idle(served)
    call.cancel()
    await until(lambda: idle(served))


async def test_every_sample_has_an_index_and_a_finish_of_its_own(served: Any) -> None:
    sampling = pb.Sampling(n=3, temperature=1.0, seed=3)
    replies = await replies_of(served, message(mode=pb.MODE_SELF_SPECULATION, sampling=sampling))
    by_sample = [[reply for reply in replies if reply.index == index] for index in range(3)]
    for own in by_sample:
        assert [reply.HasField("finish") for reply in own] == [False] * (len(own) - 1) + [True]
        assert len(ids_of(own)) == own[-1].finish.usage.completion_tokens
        assert text_of(own) == TOKENIZER.decode(ids_of(own))
    assert len({text_of(own) for own in by_sample}) == 3
    await until(lambda: idle(served))


async def test_the_samples_are_the_same_in_ar_and_speculation(served: Any) -> None:
    outputs = []
    for mode in (pb.MODE_AUTOREGRESSIVE, pb.MODE_SELF_SPECULATION):
        sampling = pb.Sampling(n=3, temperature=0.9, seed=11)
        replies = await replies_of(served, message(mode=mode, sampling=sampling))
        outputs.append([ids_of(r for r in replies if r.index == index) for index in range(3)])
    assert outputs[0] == outputs[1]


async def test_a_sample_is_the_same_whatever_their_number(served: Any) -> None:
    outputs = []
    for n in (1, 3):
        sampling = pb.Sampling(n=n, temperature=0.9, seed=12)
        replies = await replies_of(
            served, message(mode=pb.MODE_SELF_SPECULATION, sampling=sampling)
        )
        outputs.append(ids_of(reply for reply in replies if reply.index == 0))
    assert outputs[0] == outputs[1]


async def test_cancelling_a_call_frees_all_its_samples(served: Any) -> None:
    call = served.stub.Generate(endless(sampling=pb.Sampling(n=3, temperature=1.0)))
    seen = set()
    while len(seen) < 3:
        seen.add((await call.read()).index)
    await until(lambda: served.loop.load.running == 3)
    assert served.board.num_in_flight == 1
    call.cancel()
    await until(lambda: idle(served))


async def test_samples_that_finish_early_leave_the_others_to_be_cancelled(served: Any) -> None:
    # At this seed the samples come to the stop string at different steps.
    sampling = pb.Sampling(n=3, temperature=1.0, seed=1)
    stop = pb.StopConditions(max_tokens=1900, stop_strings=["self"], ignore_eos=True)
    call = served.stub.Generate(message(mode=pb.MODE_AUTOREGRESSIVE, sampling=sampling, stop=stop))
    while not (await call.read()).HasField("finish"):
        pass
    assert not idle(served)
    call.cancel()
    await until(lambda: idle(served))


async def test_samples_that_the_queue_cannot_hold_are_refused_together(served: Any) -> None:
    error = await failure_of(served, message(sampling=pb.Sampling(n=64)))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    await until(lambda: idle(served))


@pytest.mark.parametrize("mode", ALL_MODES)
async def test_a_stop_string_is_never_shown_and_its_ids_are(served: Any, mode: pb.Mode) -> None:
    free = await replies_of(served, message(mode=mode))
    text = text_of(free)
    stop_string = text[len(text) // 3 :][:5]  # it lies across tokens wherever they are cut
    stop = pb.StopConditions(stop_strings=["never in it", stop_string])
    replies = await replies_of(served, message(mode=mode, stop=stop))
    assert text_of(replies) == text[: text.index(stop_string)]
    assert replies[-1].finish.reason == pb.FINISH_REASON_STOP
    ids = ids_of(replies)
    assert ids == ids_of(free)[: len(ids)]
    assert stop_string in TOKENIZER.decode(ids)
    assert stop_string not in TOKENIZER.decode(ids[:-1])


async def test_text_that_only_began_like_a_stop_string_is_shown_at_the_end(served: Any) -> None:
    text = text_of(await replies_of(served, message()))
    stop = pb.StopConditions(stop_strings=[text[-4:] + "never"])
    replies = await replies_of(served, message(stop=stop))
    assert text_of(replies) == text
    assert replies[-1].finish.reason == pb.FINISH_REASON_LENGTH


async def test_a_stop_id_ends_the_ids_and_has_no_text(served: Any) -> None:
    free = ids_of(await replies_of(served, message()))
    stop = pb.StopConditions(stop_token_ids=[free[5]])
    replies = await replies_of(served, message(stop=stop))
    ids = ids_of(replies)
    assert ids == free[: free.index(free[5]) + 1]
    assert text_of(replies) == TOKENIZER.decode(ids[:-1])


@pytest.mark.parametrize("mode", ALL_MODES)
async def test_a_thinking_budget_ends_the_thinking_of_a_prompt(served: Any, mode: pb.Mode) -> None:
    think, end = TOKENIZER.thinking_ids or (0, 0)
    prompt = pb.TokenIds(ids=[*TOKENIZER.encode("def"), think])
    request = pb.GenerateRequest(token_ids=prompt, mode=mode, thinking_budget=6)
    ids = ids_of(await replies_of(served, request))
    assert ids.index(end) == 6
    assert len(ids) > 7


async def test_a_prompt_is_cached_for_its_own_salt_only(served: Any) -> None:
    prompt = "# a prompt that no other test has sent, of more than a page of tokens\n"
    cached = []
    for salt in ("mine", "yours", "mine"):
        replies = await replies_of(served, message(text=prompt, cache_salt=salt))
        cached.append(replies[-1].finish.usage.cached_tokens)
    assert cached[:2] == [0, 0]
    assert cached[2] > 0


async def test_a_chat_is_answered_and_its_thoughts_are_told_apart(served: Any) -> None:
    chat = pb.Chat(
        messages=[pb.ChatMessage(role="user", content="def main(")], enable_thinking=True
    )
    asked = message(text=None, chat=chat, thinking_budget=6)
    replies = await replies_of(served, asked)
    ids = ids_of(replies)
    _, end = TOKENIZER.thinking_ids or (0, 0)
    assert TOKENIZER.decode(ids[: ids.index(end)]) == "".join(reply.thinking for reply in replies)
    assert TOKENIZER.decode(ids[ids.index(end) :]) == text_of(replies)


async def test_a_deadline_ends_the_call_and_frees_everything(served: Any) -> None:
    replies = []
    try:
        async for reply in served.stub.Generate(endless(), timeout=0.5):
            replies.append(reply)
    except grpc.aio.AioRpcError as error:
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    else:  # the server was quicker to see it
        assert replies[-1].finish.reason == pb.FINISH_REASON_DEADLINE
    await until(lambda: idle(served))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": None}, "prompt: is required"),
        ({"text": None, "chat": pb.Chat()}, "chat.messages: must be 1 to 1024, are 0"),
        (
            {"text": None, "chat": pb.Chat(messages=[pb.ChatMessage(role="me")])},
            "chat.messages[0].role: must be one of system, developer, user, assistant, tool",
        ),
        ({"block_size": 33}, "block_size: at most 32"),
        ({"threshold": 2.0}, "threshold: must be in [0, 1]"),
        ({"sampling": pb.Sampling(temperature=11)}, "temperature: must be in [0, 10]"),
        ({"stop": pb.StopConditions(max_tokens=5000)}, "2048 positions"),
        ({"stop": pb.StopConditions(stop_token_ids=[9999])}, "stop_token_ids: ids must be in"),
        ({"text": None, "token_ids": pb.TokenIds(ids=[2048])}, "prompt_token_ids: ids must be in"),
        ({"sampling": pb.Sampling(n=65)}, "n: must be in [1, 64]"),
        ({"stop": pb.StopConditions(stop_strings=["x" * 129])}, "stop_strings: each must have 1"),
        ({"regex": "(", "mode": pb.MODE_AUTOREGRESSIVE}, "grammar"),
        ({"regex": "a", "thinking_budget": 1}, "thinking_budget: cannot be combined"),
    ],
)
async def test_a_mistake_is_invalid_argument_with_field_and_limit(
    served: Any, fields: dict[str, Any], words: str
) -> None:
    error = await failure_of(served, message(**fields))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert words in error.details()
    assert "Traceback" not in error.details()


async def test_a_mistake_harms_nobody_else(served: Any) -> None:
    call = served.stub.Generate(message(mode=pb.MODE_AUTOREGRESSIVE))
    await call.read()
    await failure_of(served, message(block_size=99))
    rest = await rest_of(call)
    assert rest[-1].finish.reason == pb.FINISH_REASON_LENGTH


async def test_a_request_id_in_use_is_refused_and_its_owner_goes_on(served: Any) -> None:
    call = served.stub.Generate(endless(request_id="mine"))
    await call.read()
    error = await failure_of(served, message(request_id="mine"))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (await call.read()).token_ids
    call.cancel()


async def test_a_full_queue_is_resource_exhausted(served: Any) -> None:
    calls = [served.stub.Generate(endless()) for _ in range(8)]  # fills the pages
    await asyncio.gather(*(call.read() for call in calls[:3]))
    waiting = [served.stub.Generate(endless()) for _ in range(8)]
    codes = set()
    for call in waiting:
        try:
            await asyncio.wait_for(call.read(), 0.5)
        except grpc.aio.AioRpcError as error:
            codes.add(error.code())
        except TimeoutError:
            pass
    for call in calls + waiting:
        call.cancel()
    assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED}


async def test_a_message_over_the_limit_is_refused(served: Any) -> None:
    error = await failure_of(served, message(text="x" * 70_000))
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_internal_error_shows_no_trace(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(request: Any) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(served.loop, "generate", broken)
    error = await failure_of(served, message())
    assert error.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in error.details()


@pytest.mark.parametrize("name", ["", SERVICE_NAME])
async def test_health_follows_the_server(served: Any, name: str) -> None:
    health = health_pb2_grpc.HealthStub(served.channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_service(served: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([ask])):
        names = [service.name for service in answer.list_services_response.service]
        break
    assert SERVICE_NAME in names


async def test_stopping_lets_running_streams_finish_and_refuses_new_ones(served: Any) -> None:
    call = served.stub.Generate(message(mode=pb.MODE_AUTOREGRESSIVE))
    await call.read()
    stopping = asyncio.create_task(served.server.stop())
    await asyncio.sleep(0.05)
    error = await failure_of(served, message())
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    rest = await rest_of(call)
    assert rest[-1].HasField("finish")
    await stopping
