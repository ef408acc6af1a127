"""The thread around the engine: nothing hangs, nothing leaks, one failure is everybody's news."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from trimode.replicas.config import EngineConfig
from trimode.replicas.engine import Engine
from trimode.replicas.engine_loop import EngineLoop
from trimode.replicas.errors import InvalidRequest, Unavailable
from trimode.replicas.types import Mode, Request

LONG = Request("long", (5, 6), Mode.AUTOREGRESSIVE, 400)


@pytest.fixture
def make_engine(
    scripted_runner: Any, small_engine: Callable[..., EngineConfig]
) -> Callable[[], Engine]:
    class Unhurried(scripted_runner):  # type: ignore[misc]
        """Slow enough that a stream is still going on when the test looks at it."""

        def launch(self, scheduled: Any, *rest: Any) -> Any:
            time.sleep(0.002)
            return super().launch(scheduled, *rest)

    return lambda: Engine(Unhurried(), small_engine())


@pytest.fixture
async def loop(make_engine: Callable[[], Engine]) -> AsyncIterator[EngineLoop]:
    loop = EngineLoop(make_engine())
    loop.start()
    yield loop
    loop.stop()


async def until_idle(loop: EngineLoop) -> None:
    async with asyncio.timeout(10):
        while loop.load.running or loop.load.waiting:
            await asyncio.sleep(0.01)


async def tokens_of(loop: EngineLoop, request: Request) -> list[int]:
    return [i async for chunk in loop.generate(request) for i in chunk.token_ids]


async def test_a_stream_ends_with_its_finish(loop: EngineLoop) -> None:
    request = Request("r", (5, 6), Mode.AUTOREGRESSIVE, 6)
    assert 1 <= len(await tokens_of(loop, request)) <= 6


async def test_leaving_a_stream_frees_all_its_pages(loop: EngineLoop) -> None:
    stream = loop.generate(LONG)
    await anext(stream)
    await stream.aclose()
    await until_idle(loop)
    assert loop.load.free_pages == loop.load.total_pages


async def test_a_refused_request_is_its_own_error_only(loop: EngineLoop) -> None:
    stream = loop.generate(LONG)
    await anext(stream)
    with pytest.raises(InvalidRequest):
        await tokens_of(loop, Request("bad", (10**6,), Mode.AUTOREGRESSIVE, 6))
    assert (await anext(stream)).token_ids
    await stream.aclose()


async def test_a_refused_duplicate_does_not_abort_the_owner_of_the_id(loop: EngineLoop) -> None:
    stream = loop.generate(LONG)
    await anext(stream)
    with pytest.raises(InvalidRequest, match="request_id"):
        await tokens_of(loop, LONG)
    assert (await anext(stream)).token_ids
    await stream.aclose()


async def test_a_failed_step_ends_every_stream_and_the_health(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = loop.generate(LONG)
    await anext(stream)
    loop.check_health()

    def broken(*given: Any) -> None:
        raise MemoryError("the device is gone")

    monkeypatch.setattr(loop._engine._runner, "launch", broken)
    with pytest.raises(Unavailable):
        async for _ in stream:
            pass
    with pytest.raises(RuntimeError, match="the engine failed"):
        loop.check_health()


async def test_a_request_that_comes_after_a_failure_is_refused_at_once(
    loop: EngineLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop._engine._runner, "launch", None)  # not callable
    for _ in range(2):
        with pytest.raises(Unavailable):
            await tokens_of(loop, LONG)


async def test_stopping_tells_those_who_still_wait(make_engine: Callable[[], Engine]) -> None:
    loop = EngineLoop(make_engine())
    loop.start()
    stream = loop.generate(LONG)
    await anext(stream)
    await asyncio.to_thread(loop.stop)
    with pytest.raises(Unavailable):
        async for _ in stream:
            pass


async def test_a_loop_can_fail_from_outside_while_its_thread_hangs(
    make_engine: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = EngineLoop(make_engine())
    loop.start()
    stream = loop.generate(LONG)
    await anext(stream)
    released = threading.Event()
    monkeypatch.setattr(loop._engine._runner, "read", lambda launched: released.wait())
    loop.fail(TimeoutError("rank 1 does not answer"))
    async with asyncio.timeout(2):
        with pytest.raises(Unavailable):
            async for _ in stream:
                pass
        with pytest.raises(Unavailable):
            await tokens_of(loop, Request("late", (5, 6), Mode.AUTOREGRESSIVE, 6))
    with pytest.raises(RuntimeError, match="rank 1 does not answer"):
        loop.check_health()
    await asyncio.to_thread(loop.stop)
    released.set()


async def test_the_first_failure_is_the_one_that_is_told(loop: EngineLoop) -> None:
    loop.fail(TimeoutError("the cause"))
    loop.fail(ValueError("its consequence"))
    with pytest.raises(RuntimeError, match="the cause"):
        loop.check_health()


async def test_who_is_refused_hears_what_ended_the_engine(loop: EngineLoop) -> None:
    stream = loop.generate(LONG)
    await anext(stream)
    loop.fail(Unavailable("rank 1 has left"))
    with pytest.raises(Unavailable, match="has stopped: rank 1 has left"):
        async for _ in stream:
            pass


async def test_a_slow_reader_gets_several_steps_in_one_chunk(loop: EngineLoop) -> None:
    request = Request("r", (5, 6), Mode.AUTOREGRESSIVE, 30, ignore_eos=True, num_logprobs=None)
    wanted = await tokens_of(loop, request)
    stream = loop.generate(request)
    chunks = [await anext(stream)]
    await asyncio.sleep(0.5)  # the engine needs a tenth of that for all
    chunks += [chunk async for chunk in stream]
    assert len(chunks) == 2
    assert [token for chunk in chunks for token in chunk.token_ids] == wanted
    assert chunks[-1].finish is not None


async def test_what_was_committed_before_a_failure_is_still_delivered(loop: EngineLoop) -> None:
    stream = loop.generate(LONG)
    first = await anext(stream)
    await asyncio.sleep(0.1)
    loop.fail(Unavailable("gone"))
    later = await anext(stream)
    assert later.token_ids and later.finish is None
    with pytest.raises(Unavailable):
        await anext(stream)
    assert first.token_ids


async def test_who_has_all_its_chunks_hears_of_no_failure(loop: EngineLoop) -> None:
    request = Request("r", (5, 6), Mode.AUTOREGRESSIVE, 6, ignore_eos=True)
    stream = loop.generate(request)
    chunks = [await anext(stream)]
    await until_idle(loop)
    loop.fail(Unavailable("gone"))
    await asyncio.sleep(0.01)  # behind the last chunk in the same mailbox
    chunks += [chunk async for chunk in stream]
    assert chunks[-1].finish is not None
