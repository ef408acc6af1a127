"""LoadBoard: which replicas of which pool are live, and how much this gateway has in progress on
each.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from trimode.replicas.types import EngineLoad


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One replica as this gateway sees it."""

    replica_id: str
    in_flight: int  # of this gateway's requests, at this moment
    engine: EngineLoad | None  # what the replica last reported itself, if it has yet


class LoadBoard:
    """One gateway's view. Bounded by the live replicas and the requests that the gateway holds
    itself.
    """

    def __init__(self) -> None:
        # By pool, then by replica id.
        self._live: dict[str, dict[str, EngineLoad | None]] = {}
        self._routed: dict[str, tuple[str, str | None]] = {}  # request id -> pool, replica

    def see(self, pool: str, reports: Mapping[str, EngineLoad | None]) -> None:
        """Take the live replicas of a pool and what each last reported; replaces what was."""
        self._live[pool] = dict(reports)

    def started(self, request_id: str, pool: str) -> None:
        """A request was given to a pool; which replica takes it is not known yet."""
        self._routed[request_id] = (pool, None)

    def routed(self, request_id: str, replica_id: str) -> None:
        """A replica took a request that is in progress."""
        if request_id in self._routed:
            self._routed[request_id] = (self._routed[request_id][0], replica_id)

    def replica_of(self, request_id: str) -> str | None:
        """The replica that took a request in progress, where that is known."""
        return self._routed.get(request_id, ("", None))[1]

    def __contains__(self, request_id: str) -> bool:
        """Whether the request is in progress."""
        return request_id in self._routed

    def finished(self, request_id: str) -> None:
        """A request is over, however it ended; unknown ones are no error."""
        self._routed.pop(request_id, None)

    @property
    def num_in_flight(self) -> int:
        return len(self._routed)

    def in_flight(self, pool: str) -> int:
        """Requests in progress in a pool."""
        return sum(1 for routed_pool, _ in self._routed.values() if routed_pool == pool)

    def loads(self, pool: str) -> list[ReplicaLoad]:
        """The live replicas of a pool with what they have in progress, in a fixed order."""
        live = self._live.get(pool, {})
        counts = dict.fromkeys(sorted(live), 0)
        for _, replica_id in self._routed.values():
            if replica_id in counts:
                counts[replica_id] += 1
        return [ReplicaLoad(name, count, live[name]) for name, count in counts.items()]
