"""The wire contract: streams, deadlines, cancels, errors, health, reflection."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from trimode.cluster.grpc_server import SERVICE_NAME
from trimode.proto import inference_pb2 as pb

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


async def test_a_deadline_ends_the_call_and_frees_everything(served: Any) -> None:
    error = await failure_of(served, endless(), timeout=0.5)
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: idle(served))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": None}, "prompt: is required"),
        ({"block_size": 33}, "block_size: at most 32"),
        ({"threshold": 2.0}, "threshold: must be in [0, 1]"),
        ({"sampling": pb.Sampling(temperature=11)}, "temperature: must be in [0, 10]"),
        ({"stop": pb.StopConditions(max_tokens=5000)}, "2048 positions"),
        ({"stop": pb.StopConditions(stop_token_ids=[9999])}, "stop_token_ids: ids must be in"),
        ({"text": None, "token_ids": pb.TokenIds(ids=[2048])}, "prompt_token_ids: ids must be in"),
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
