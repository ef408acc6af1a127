"""RankedRequestRouter: Ray Serve's hook, which obeys the ranking that the gateway put on the
request.

It lives in the gateway's process, one a pool, and does no I/O. What it learns from Serve (which
replicas are live, which one took a request) it tells the gateway's load board.
"""

from typing import Any, Protocol, runtime_checkable

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from trimode.replicas.types import EngineLoad, Request
from trimode.router.load_board import LoadBoard


@runtime_checkable
class HasLoadBoard(Protocol):
    """The deployment in whose process the router lives, if it routes by a load board."""

    load_board: LoadBoard


class RankedRequestRouter(RequestRouter):  # type: ignore[misc] # Ray ships no types
    """Live replicas in the request's order; those that the ranking does not know come last."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._pool: str = kwargs["pool"]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's list of live replicas changed."""
        super().update_replicas(replicas)
        self._see(replicas)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        self._see(candidate_replicas)  # also after a start at which no board was there yet
        request = _request_of(pending_request)
        if request is None or request.ranking is None or not request.ranking.replica_ids:
            return [candidate_replicas]  # one rank: Serve takes the shortest queue
        live = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        ranked = [[live.pop(name)] for name in request.ranking.replica_ids if name in live]
        return [*ranked, list(live.values())]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        request, board = _request_of(pending_request), _load_board()
        if request is not None and board is not None:
            board.routed(request.request_id, replica_id.unique_id)

    def _see(self, replicas: list[RunningReplica]) -> None:
        board = _load_board()
        if board is not None:
            board.see(self._pool, {r.replica_id.unique_id: _report_of(r) for r in replicas})


def _request_of(pending_request: PendingRequest | None) -> Request | None:
    first = pending_request.args[0] if pending_request and pending_request.args else None
    return first if isinstance(first, Request) else None


def _report_of(replica: RunningReplica) -> EngineLoad | None:
    """What the replica's record_routing_stats said last; Serve gives {} before the first time."""
    return EngineLoad(**replica.routing_stats) if replica.routing_stats else None


def _load_board() -> LoadBoard | None:
    """The board of the deployment around us; None while it starts, or outside any deployment."""
    try:
        owner = serve.get_replica_context().servable_object
    except RayServeException:
        return None
    return owner.load_board if isinstance(owner, HasLoadBoard) else None
