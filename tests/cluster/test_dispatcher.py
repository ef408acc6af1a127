"""Placing requests, passing over replicas that refuse, and leaving nothing on the board."""

from collections.abc import AsyncGenerator

import pytest

from trimode.cluster.config import ClusterConfig
from trimode.cluster.dispatcher import Dispatcher
from trimode.replicas.errors import InvalidRequest, Overloaded
from trimode.replicas.types import Chunk, Mode, Request
from trimode.router.load_board import LoadBoard

REQUEST = Request("r", (1,), Mode.SELF_SPECULATION, 4)


class FakePool:
    """Answers with one chunk, unless the replica first in the ranking is one that refuses."""

    def __init__(self, board: LoadBoard, refusing: tuple[str, ...] = ()) -> None:
        self.board = board
        self.refusing = refusing
        self.tried: list[str] = []

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        assert request.ranking is not None
        replica = request.ranking.replica_ids[0]
        self.tried.append(replica)
        self.board.routed(request.request_id, replica)
        if replica in self.refusing:
            raise Overloaded("full")
        yield Chunk((1,))
        yield Chunk((2,))


def dispatcher(*refusing: str, max_streams: int = 8) -> tuple[Dispatcher, FakePool]:
    board = LoadBoard()
    board.see("speculation", {"a": None, "b": None})
    pool = FakePool(board, refusing)
    pools = {"speculation": pool, "autoregressive": pool}
    return Dispatcher(pools, ClusterConfig().pools, board, 4, max_streams), pool


async def test_a_refusing_replica_is_passed_over() -> None:
    dispatch, pool = dispatcher("a")
    dispatch.board.started("other", "speculation")
    dispatch.board.routed("other", "b")  # so that "a" is ranked first
    chunks = [chunk async for chunk in dispatch.stream(dispatch.place(REQUEST))]
    assert pool.tried == ["a", "b"]
    assert [chunk.token_ids for chunk in chunks] == [(1,), (2,)]


async def test_when_every_replica_refuses_the_client_is_told() -> None:
    dispatch, pool = dispatcher("a", "b")
    with pytest.raises(Overloaded):
        _ = [chunk async for chunk in dispatch.stream(dispatch.place(REQUEST))]
    assert sorted(pool.tried) == ["a", "b"]
    assert dispatch.board.num_in_flight == 0


async def test_a_stream_that_is_left_early_is_off_the_board() -> None:
    dispatch, _ = dispatcher()
    stream = dispatch.stream(dispatch.place(REQUEST))
    await anext(stream)
    assert dispatch.board.num_in_flight == 1
    await stream.aclose()
    assert dispatch.board.num_in_flight == 0


async def test_an_id_in_progress_is_refused_and_its_stream_goes_on() -> None:
    dispatch, _ = dispatcher()
    first = dispatch.stream(dispatch.place(REQUEST))
    await anext(first)
    with pytest.raises(InvalidRequest, match="request_id"):
        await anext(dispatch.stream(dispatch.place(REQUEST)))
    assert (await anext(first)).token_ids == (2,)
    await first.aclose()


async def test_one_stream_more_than_the_gateway_holds_is_refused() -> None:
    dispatch, _ = dispatcher(max_streams=1)
    first = dispatch.stream(dispatch.place(REQUEST))
    await anext(first)
    other = Request("other", (1,), Mode.SELF_SPECULATION, 4)
    with pytest.raises(Overloaded, match="max_streams"):
        await anext(dispatch.stream(dispatch.place(other)))
    await first.aclose()


def test_placing_resolves_auto_and_ranks_the_live_replicas() -> None:
    dispatch, _ = dispatcher()
    placed = dispatch.place(Request("r", (1,), Mode.AUTO, 4))
    assert placed.mode is Mode.SELF_SPECULATION
    assert placed.ranking is not None
    assert sorted(placed.ranking.replica_ids) == ["a", "b"]
