"""How many drafts a round keeps, from published figures: what random weights cannot tell.

Of a block size are published the mean number of tokens that a round keeps and the share of rounds
that keep the whole block. The distribution between is a discrete Weibull one:

    P(at least k drafts are kept) = full ** ((k / (block_size - 1)) ** shape)

whose shape is the one that gives the mean.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from trimode.replicas.acceptance import GROUP_ENDS, HIGHEST

LABEL = "acceptance drawn from published figures, weights random"


@dataclass(frozen=True, slots=True)
class Rounds:
    """Published of one block size."""

    mean: float  # tokens kept a round, the bonus token included
    full_share: float | None  # of rounds that keep the whole block; None: every draft is alike


# Self-speculation of the 8B model with the draft adapter, greedy. `measured` are means over six
# sets, mostly mathematics, code and instructions, by block size; `hard` is what SPEED-Bench's mean
# (arXiv 2607.05722, table 10: 6.82 at block 32) gives where every draft is kept as often.
PUBLISHED: Mapping[str, Mapping[int, Rounds]] = {
    "measured": {
        4: Rounds(3.67, 0.815),
        8: Rounds(6.36, 0.597),
        16: Rounds(10.22, 0.406),
        32: Rounds(15.50, 0.272),
    },
    "hard": {32: Rounds(6.82, None)},
}
BLOCK_SIZES = (4, 8, 16, 32)


def survival(name: str, block_size: int) -> list[float]:
    """P(at least k drafts are kept) for k = 1 ... block_size - 1."""
    rounds = PUBLISHED[name]
    largest = rounds[max(rounds)]
    if largest.full_share is None:
        kept = _bisect(lambda p: 1 + sum(p**k for k in range(1, max(rounds))), largest.mean)
        return [kept**k for k in range(1, block_size)]
    if block_size in rounds:
        return _weibull(block_size, rounds[block_size])
    # Early drafts are kept as often in a shorter block: the next larger one's beginning.
    larger = min(size for size in rounds if size > block_size)
    return _weibull(larger, rounds[larger])[: block_size - 1]


def mean_kept(name: str, block_size: int) -> float:
    """Tokens a round of this size keeps, the bonus token included."""
    return 1 + sum(survival(name, block_size))


def prior(name: str) -> tuple[float, ...]:
    """What a governor is told: of each position group, how often a draft is kept when all before it
    were; read off the largest block.
    """
    reached = [1.0, *survival(name, BLOCK_SIZES[-1])]
    starts = (0, *GROUP_ENDS[:-1])
    return tuple(
        min(HIGHEST, (reached[end] / reached[start]) ** (1 / (end - start)))
        for start, end in zip(starts, GROUP_ENDS, strict=True)
    )


def _weibull(block_size: int, rounds: Rounds) -> list[float]:
    full = rounds.full_share
    assert full is not None
    drafts = block_size - 1

    def of(shape: float) -> list[float]:
        return [full ** ((k / drafts) ** shape) for k in range(1, block_size)]

    return of(_bisect(lambda shape: 1 + sum(of(shape)), rounds.mean, highest=8.0))


def _bisect(value_of: Callable[[float], float], wanted: float, highest: float = 1.0) -> float:
    """Where an ascending function has this value, between 0 and highest."""
    low, high = 1e-9, highest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if value_of(middle) < wanted else (low, middle)
    return (low + high) / 2
