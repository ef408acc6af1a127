"""The hook obeys the ranking, among the replicas that are live."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from trimode.replicas.types import Mode, Ranking, Request
from trimode.router.request_router import RankedRequestRouter


@dataclass
class Named:
    unique_id: str


@dataclass
class LiveReplica:
    """As much of Serve's RunningReplica as the router looks at."""

    replica_id: Named
    routing_stats: dict[str, Any] = field(default_factory=dict)


@dataclass
class Pending:
    args: list[Any]


@pytest.fixture
def router() -> RankedRequestRouter:
    router = object.__new__(RankedRequestRouter)  # Serve's own state plays no part in the order
    router.initialize_state(pool="pool")
    return router


def replicas(*names: str) -> list[LiveReplica]:
    return [LiveReplica(Named(name)) for name in names]


def request_ranked(*names: str) -> Pending:
    ranking = Ranking("pool", names, "test")
    return Pending([Request("r", (1,), Mode.AUTOREGRESSIVE, 1, ranking=ranking)])


async def order(
    router: RankedRequestRouter, live: list[LiveReplica], pending: Any
) -> list[list[str]]:
    ranks = await router.choose_replicas(live, pending)
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


async def test_live_replicas_are_tried_in_the_order_of_the_ranking(
    router: RankedRequestRouter,
) -> None:
    ranks = await order(router, replicas("a", "b", "c"), request_ranked("c", "a", "b"))
    assert ranks == [["c"], ["a"], ["b"], []]


async def test_a_ranked_replica_that_is_gone_is_passed_over(router: RankedRequestRouter) -> None:
    assert await order(router, replicas("b"), request_ranked("a", "b")) == [["b"], []]


async def test_a_replica_that_the_ranking_does_not_know_comes_last(
    router: RankedRequestRouter,
) -> None:
    assert await order(router, replicas("new", "a"), request_ranked("a")) == [["a"], ["new"]]


async def test_without_a_ranking_all_live_replicas_are_one_rank(
    router: RankedRequestRouter,
) -> None:
    assert await order(router, replicas("a", "b"), None) == [["a", "b"]]
    assert await order(router, replicas("a", "b"), Pending([])) == [["a", "b"]]
