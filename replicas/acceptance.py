"""Acceptance: how likely the next draft of a sequence is kept, learnt from its own rounds."""

from collections.abc import Sequence

BLOCK_SIZES = (1, 4, 8, 16, 32)  # what the governor chooses among
NUM_DRAFTS = BLOCK_SIZES[-1] - 1
# Drafts get worse with the distance from the known token. A group ends where a block size does.
GROUP_ENDS = (3, 7, 15, 31)  # the last draft of each group, counted from 1

DEFAULT_PRIOR = (0.75, 0.7, 0.65, 0.6)  # of a checkpoint that nothing is known of

PRIOR_WEIGHT = 4.0  # trials that the prior is worth
IDLE_ROUNDS = 8  # rounds of size 1 are counted in so many at a time


class Acceptance:
    """Decayed counts of drafts tried and kept, by position group, beside a prior.

    A draft is tried when all before it were kept: the ratio is conditional. Memory is bounded: a
    round tells `1 - decay` of what is known of the groups that it tried. Whatever a round did not
    try fades towards the prior by `idle_decay`, so that speculation is tried again in the end.
    """

    __slots__ = ("_decay", "_expected", "_idle", "_idle_decay", "_kept", "_prior", "_tried")

    def __init__(
        self,
        prior: Sequence[float] = DEFAULT_PRIOR,
        decay: float = 0.9,
        idle_decay: float = 0.98,
    ) -> None:
        """prior: the probability of each group, in [0, 1]."""
        assert len(prior) == len(GROUP_ENDS)
        self._prior = tuple(prior)
        self._decay = decay
        self._idle_decay = idle_decay
        self._tried = [0.0] * len(GROUP_ENDS)
        self._kept = [0.0] * len(GROUP_ENDS)
        self._idle = 0
        self._expected = _expected_by_size(self.probabilities)

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Of each group: that a draft is kept when all before it were."""
        return tuple(
            (kept + PRIOR_WEIGHT * prior) / (tried + PRIOR_WEIGHT)
            for kept, tried, prior in zip(self._kept, self._tried, self._prior, strict=True)
        )

    @property
    def expected_by_size(self) -> tuple[float, ...]:
        """expected() of each of BLOCK_SIZES."""
        return self._expected

    def observe(self, block_size: int, accepted: int) -> None:
        """A round ended: accepted of its block_size tokens were kept, the bonus token included."""
        if block_size == 1:
            self._idle += 1
            if self._idle < IDLE_ROUNDS:
                return  # plain AR pays next to nothing for this
            factors = [self._idle_decay**self._idle] * len(GROUP_ENDS)
            self._idle = 0
            tried = kept = (0,) * len(GROUP_ENDS)
        else:
            kept = _split(accepted - 1)
            tried = _split(min(accepted, block_size - 1))  # the first wrong draft was tried, too
            factors = [self._decay if count else self._idle_decay for count in tried]
        for group, factor in enumerate(factors):
            self._tried[group] = self._tried[group] * factor + tried[group]
            self._kept[group] = self._kept[group] * factor + kept[group]
        self._expected = _expected_by_size(self.probabilities)

    def expected(self, block_size: int) -> float:
        """Tokens that a round of this size keeps, the bonus token included: 1 to block_size."""
        if block_size in BLOCK_SIZES:
            return self._expected[BLOCK_SIZES.index(block_size)]
        return _expected(self.probabilities, _split(block_size - 1))


def _split(num_drafts: int) -> tuple[int, ...]:
    """How many of the first num_drafts positions lie in each group; the last one is open."""
    counts, start = [], 0
    for end in GROUP_ENDS[:-1]:
        counts.append(max(0, min(num_drafts, end) - start))
        start = end
    return (*counts, max(0, num_drafts - start))


SPLITS = tuple(_split(size - 1) for size in BLOCK_SIZES)


def _expected(probabilities: Sequence[float], counts: Sequence[int]) -> float:
    """1 + p1 + p1 p2 + ..., each group a geometric series."""
    total, reach = 1.0, 1.0
    for probability, count in zip(probabilities, counts, strict=True):
        if count == 0:
            break
        power = probability**count
        # Beside 1 the closed form loses all its digits.
        steep = probability < 1 - 1e-6
        series = probability * (1 - power) / (1 - probability) if steep else float(count)
        total += reach * series
        reach *= power
    return total


def _expected_by_size(probabilities: Sequence[float]) -> tuple[float, ...]:
    return tuple(_expected(probabilities, counts) for counts in SPLITS)
