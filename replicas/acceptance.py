"""Acceptance: how likely the next draft of a sequence is kept, learnt from its own rounds."""

import json
from collections.abc import Sequence
from pathlib import Path

from trimode.replicas.errors import ConfigError

BLOCK_SIZES = (1, 4, 8, 16, 32)  # what the governor chooses among
NUM_DRAFTS = BLOCK_SIZES[-1] - 1
# Drafts get worse with the distance from the known token. A group ends where a block size does.
GROUP_ENDS = (3, 7, 15, 31)  # the last draft of each group, counted from 1

DEFAULT_PRIOR = (0.75, 0.7, 0.65, 0.6)  # of a checkpoint that nothing is known of
PRIOR_FILE = "acceptance.json"  # in a checkpoint's folder, where it was measured

PRIOR_WEIGHT = 16.0  # trials that the prior of a sequence is worth
IDLE_ROUNDS = 8  # rounds of size 1 are counted in so many at a time: AR pays next to nothing
# Beyond, odds say too much.
LOWEST, HIGHEST = 0.01, 0.99


class Acceptance:
    """Decayed counts of drafts tried and kept, by position group, beside a prior.

    A draft is tried when all before it were kept: the ratio is conditional. Text that is easy near
    the known token is easy further on, too: the prior of a group is moved by as much (of its odds)
    as the group before was found to differ from its own. Memory is bounded: a round tells
    `1 - decay` of what is known of the groups that it tried; a round of size 1, which tries
    nothing, takes `1 - idle_decay` of what is known of all.
    """

    __slots__ = (
        "_decay", "_expected", "_idle_decay", "_kept", "_prior", "_probabilities", "_tried",
        "_weight", "rounds_untried",
    )  # fmt: skip

    def __init__(
        self,
        prior: Sequence[float] = DEFAULT_PRIOR,
        decay: float = 0.97,
        idle_decay: float = 0.98,
        weight: float = PRIOR_WEIGHT,
    ) -> None:
        """prior: the probability of each group, in [0, 1]. weight: trials that it is worth."""
        assert len(prior) == len(GROUP_ENDS)
        self._prior = tuple(prior)
        self._decay = decay
        self._idle_decay = idle_decay
        self._weight = weight
        self._tried = [0.0] * len(GROUP_ENDS)
        self._kept = [0.0] * len(GROUP_ENDS)
        self._probabilities: tuple[float, ...] | None = None  # None: not computed since the last
        self._expected: tuple[float, ...] = ()  # round
        self.rounds_untried = 0  # rounds of size 1 since the last that drafted

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Of each group: that a draft is kept when all before it were."""
        if self._probabilities is None:
            self._compute()
            assert self._probabilities is not None
        return self._probabilities

    @property
    def expected_by_size(self) -> tuple[float, ...]:
        """expected() of each of BLOCK_SIZES."""
        if self._probabilities is None:
            self._compute()
        return self._expected

    def idle(self, prior: tuple[float, ...]) -> None:
        """IDLE_ROUNDS of size 1 ended. prior: what is believed meanwhile of any text."""
        factor = self._idle_decay**IDLE_ROUNDS
        self._tried = [count * factor for count in self._tried]
        self._kept = [count * factor for count in self._kept]
        self._prior = prior
        self._probabilities = None

    def observe(self, block_size: int, accepted: int) -> None:
        """A round ended that drafted: accepted of its block_size tokens were kept, the bonus token
        included.
        """
        self.rounds_untried = 0
        last = min(accepted, block_size - 1)  # the first wrong draft was tried, too
        start, tried, kept, decay = 0, self._tried, self._kept, self._decay
        for group, end in enumerate(GROUP_ENDS):
            if last <= start:
                break
            tried[group] = tried[group] * decay + (end if end < last else last) - start
            right = end if end < accepted else accepted - 1
            kept[group] = kept[group] * decay + right - start
            start = end
        self._probabilities = None

    def expected(self, block_size: int) -> float:
        """Tokens that a round of this size keeps, the bonus token included: 1 to block_size."""
        if block_size in BLOCK_SIZES:
            return self.expected_by_size[BLOCK_SIZES.index(block_size)]
        total, reach, start = 1.0, 1.0, 0
        ends = (*GROUP_ENDS[:-1], block_size)  # the last group is open
        for probability, end in zip(self.probabilities, ends, strict=True):
            count = min(end, block_size - 1) - start
            if count <= 0:
                break
            power = probability**count
            total += reach * _series(probability, power, count)
            reach *= power
            start = end
        return total

    def _compute(self) -> None:
        probabilities, expected = [], [1.0]
        total = reach = odds = 1.0
        start, weight = 0, self._weight
        for group, end in enumerate(GROUP_ENDS):
            prior, tried = self._prior[group], self._tried[group]
            moved = odds * prior / (1 - prior + odds * prior) if odds != 1.0 else prior
            probability = (self._kept[group] + weight * moved) / (tried + weight)
            probabilities.append(probability)
            if tried and LOWEST < prior < HIGHEST:
                found = min(max(probability, LOWEST), HIGHEST)
                odds = found * (1 - prior) / ((1 - found) * prior)
            power = probability ** (end - start)
            total += reach * _series(probability, power, end - start)
            reach *= power
            start = end
            expected.append(total)
        self._probabilities = tuple(probabilities)
        self._expected = tuple(expected)


def _series(probability: float, power: float, count: int) -> float:
    """p + p^2 + ... + p^count, power being the last of them."""
    if probability > 1 - 1e-6:  # where the closed form loses all its digits
        return float(count)
    return probability * (1 - power) / (1 - probability)


def load_prior(folder: Path) -> tuple[float, ...]:
    """What was measured of a checkpoint: PRIOR_FILE in its folder, else DEFAULT_PRIOR.

    Raises ConfigError that names the file and the key.
    """
    path = folder / PRIOR_FILE
    if not path.exists():
        return DEFAULT_PRIOR
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must be a JSON object")
    if document.get("group_ends") != list(GROUP_ENDS):
        raise ConfigError(f"{path}: group_ends must be {list(GROUP_ENDS)}")
    values = document.get("probabilities")
    if (
        not isinstance(values, list)
        or len(values) != len(GROUP_ENDS)
        or not all(type(value) in (int, float) and 0 <= value <= 1 for value in values)
    ):
        raise ConfigError(f"{path}: probabilities must be {len(GROUP_ENDS)} numbers in [0, 1]")
    return tuple(map(float, values))
