"""Dispatcher: one ranking a request, then its chunks from whichever replica takes it."""

import random
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Protocol

from trimode.cluster.config import PoolSettings
from trimode.replicas.errors import InvalidRequest, Overloaded
from trimode.replicas.types import Chunk, Ranking, Request
from trimode.router.load_board import LoadBoard
from trimode.router.mode_policy import PoolView, choose_mode
from trimode.router.replica_policy import rank_replicas


class Pool(Protocol):
    """Replicas that can be asked for a request's chunks."""

    def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        """Raises InvalidRequest, Overloaded or Unavailable; closing the iterator frees all."""
        ...


@dataclass(frozen=True, slots=True)
class Dispatcher:
    """Places requests on pools by the load board and the policies."""

    pools: Mapping[str, Pool]
    settings: tuple[PoolSettings, ...]
    board: LoadBoard
    auto_concurrency: int
    max_streams: int

    def views(self) -> list[PoolView]:
        """The pools as the policy sees them at this moment."""
        return [
            PoolView(
                pool.name,
                pool.decoding_mode,
                pool.max_block_size,
                num_replicas=len(self.board.loads(pool.name)),
                in_flight=self.board.in_flight(pool.name),
            )
            for pool in self.settings
        ]

    def place(self, request: Request) -> Request:
        """The request with its mode resolved and its ranking set."""
        choice = choose_mode(request.mode, request.block_size, self.views(), self.auto_concurrency)
        replica_ids = rank_replicas(self.board.loads(choice.pool), lambda _: random.random())
        ranking = Ranking(choice.pool, replica_ids, choice.reason)
        return replace(request, mode=choice.mode, ranking=ranking)

    async def stream(self, request: Request) -> AsyncGenerator[Chunk]:
        """The chunks of a placed request; a replica that refuses for lack of room is passed over.

        Raises what `Pool.generate` raises, InvalidRequest where the request's id is in use,
        Overloaded where the gateway itself is full.
        """
        ranking = request.ranking
        assert ranking is not None, "place() comes first"
        board = self.board
        if request.request_id in board:
            raise InvalidRequest("request_id", f"{request.request_id!r} is already in progress")
        if board.num_in_flight >= self.max_streams:
            raise Overloaded(f"{self.max_streams} streams are in progress, the limit (max_streams)")
        board.started(request.request_id, ranking.pool)
        try:
            for left in range(max(1, len(ranking.replica_ids)) - 1, -1, -1):
                try:
                    pool = self.pools[ranking.pool]
                    async with aclosing(pool.generate(request)) as chunks:
                        async for chunk in chunks:
                            yield chunk
                    return
                except Overloaded:  # only ever before the first chunk
                    if not left:
                        raise
                    request = _without(request, board.replica_of(request.request_id))
        finally:
            board.finished(request.request_id)


def _without(request: Request, replica_id: str | None) -> Request:
    """The request with one replica struck from its ranking."""
    ranking = request.ranking
    assert ranking is not None
    rest = tuple(name for name in ranking.replica_ids if name != replica_id)
    return replace(request, ranking=replace(ranking, replica_ids=rest))
