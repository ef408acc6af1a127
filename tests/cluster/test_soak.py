"""A minute of everything at once; afterwards the server is as it was."""

import asyncio
import random
import time
from typing import Any

import grpc
import pytest

from trimode.proto import inference_pb2 as pb

SECONDS, CLIENTS = 60, 12
MODES = (pb.MODE_AUTO, pb.MODE_AUTOREGRESSIVE, pb.MODE_BLOCK_DIFFUSION, pb.MODE_SELF_SPECULATION)
EXPECTED = {
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INVALID_ARGUMENT,
}


async def client(served: Any, chance: random.Random, end: float) -> None:
    while time.monotonic() < end:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(
                ids=[chance.randrange(200, 2048) for _ in range(chance.randrange(1, 80))]
            ),
            mode=chance.choice(MODES),
            stop=pb.StopConditions(max_tokens=chance.randrange(1, 120)),
            sampling=pb.Sampling(temperature=chance.choice((0, 0.8)), seed=chance.randrange(99)),
            block_size=chance.choice((1, 4, 8, 32, 40)),
        )
        call = served.stub.Generate(request, timeout=chance.choice((0.05, 5)))
        try:
            for _ in range(chance.randrange(20)):
                if await call.read() is grpc.aio.EOF:
                    break
        except grpc.aio.AioRpcError as error:
            assert error.code() in EXPECTED
        call.cancel()


async def answer(served: Any) -> list[int]:
    request = pb.GenerateRequest(text="def main(", mode=pb.MODE_SELF_SPECULATION)
    return [i async for reply in served.stub.Generate(request) for i in reply.token_ids]


@pytest.mark.slow
async def test_a_minute_of_mixed_load_and_cancels_leaves_nothing_behind(served: Any) -> None:
    before = await answer(served)
    end = time.monotonic() + SECONDS
    await asyncio.gather(*(client(served, random.Random(i), end) for i in range(CLIENTS)))
    async with asyncio.timeout(20):
        while served.loop.load.running or served.loop.load.waiting or served.board.num_in_flight:
            await asyncio.sleep(0.05)
    assert served.loop.load.free_pages == served.loop.load.total_pages
    assert await answer(served) == before
