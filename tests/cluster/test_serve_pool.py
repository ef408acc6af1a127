"""A pool behind a Serve handle: streams, and when the replica is told that nobody reads on."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from ray.serve.exceptions import BackPressureError

from trimode.cluster.serve_pool import ServePool
from trimode.replicas.errors import Overloaded
from trimode.replicas.types import Chunk, Finish, FinishReason, Mode, Request, Timings

LAST = Finish(FinishReason.LENGTH, 1, 1, 1, (), Timings(0, 0, 0))


class FakeHandle:
    """A deployment handle whose one response holds the given chunks, then an error."""

    def __init__(self, chunks: list[Chunk], error: Exception | None = None) -> None:
        self.chunks = chunks
        self.error = error
        self.cancelled = False

    def options(self, **_: Any) -> "FakeHandle":
        return self

    @property
    def generate(self) -> "FakeHandle":
        return self

    def remote(self, _: Request) -> "FakeHandle":
        return self

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        for chunk in self.chunks:
            yield chunk
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        self.cancelled = True


def request(n: int) -> Request:
    return Request("r", (1,), Mode.AUTOREGRESSIVE, 4, n=n)


async def test_a_stream_whose_samples_have_all_finished_is_not_cancelled() -> None:
    handle = FakeHandle([Chunk((5,), LAST, index=0), Chunk((6,), LAST, index=1)])
    pool = ServePool("pool", handle)
    assert [chunk.index async for chunk in pool.generate(request(n=2))] == [0, 1]
    assert not handle.cancelled


async def test_leaving_while_one_sample_still_runs_cancels_it() -> None:
    handle = FakeHandle([Chunk((5,), LAST, index=0), Chunk((6,), LAST, index=1)])
    stream = ServePool("pool", handle).generate(request(n=2))
    assert (await anext(stream)).finish is not None
    await stream.aclose()
    assert handle.cancelled


async def test_rays_full_queue_is_our_overload() -> None:
    handle = FakeHandle([], BackPressureError(num_queued_requests=1, max_queued_requests=1))
    with pytest.raises(Overloaded, match="pool p: every replica's queue is full"):
        await anext(ServePool("p", handle).generate(request(n=1)))
    assert not handle.cancelled
