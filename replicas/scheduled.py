"""What the scheduler gives a runner, and what it gets back."""

from dataclasses import dataclass, field

from trimode.replicas.decoding.strategy import Query
from trimode.replicas.sequence import Sequence
from trimode.replicas.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One sequence's place in a pass."""

    sequence: Sequence
    query: Query
    seating: int = 0  # the sequence's when this was scheduled; a later one voids the answers


@dataclass(frozen=True, slots=True)
class Answers:
    """What a pass answered to one query: an id per wanted position, confidences where they were
    wanted.
    """

    token_ids: list[int]
    confidences: list[float]
    candidates: list[list[int]] = field(default_factory=list)  # best ids of each, best first
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # where the request wants them
