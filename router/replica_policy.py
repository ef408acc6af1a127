"""In which order the replicas of a pool should be tried: a pure function over plain data."""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from trimode.router.load_board import ReplicaLoad

MAX_RANKED = 8  # replicas beyond these would only be tried after so many refusals


def rank_replicas(
    loads: SequenceOf[ReplicaLoad], tie_break: Callable[[str], float]
) -> tuple[str, ...]:
    """Replica ids, least loaded first. tie_break orders equals, so that gateways do not herd."""
    ranked = sorted(loads, key=lambda load: (load.in_flight, tie_break(load.replica_id)))
    return tuple(load.replica_id for load in ranked[:MAX_RANKED])
