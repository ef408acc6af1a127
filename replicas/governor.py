"""Governor: picks the block size of every self-speculating sequence that starts a round.

It takes the sizes that keep the most tokens a second by the step-time profile and each sequence's
own acceptance, holds on to them while another choice promises little more, and spends a small part
of its tokens on finding out about sequences that decode plainly.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trimode.replicas.acceptance import (
    BLOCK_SIZES,
    DEFAULT_PRIOR,
    IDLE_ROUNDS,
    NUM_DRAFTS,
    Acceptance,
)
from trimode.replicas.size_problem import Candidate, Companions, Ints, SizeProblem
from trimode.replicas.step_profile import RowCurve, StepProfile

MEASURED_EVERY = 7  # passes; prime to IDLE_ROUNDS, so that every kind of pass has its turn
RATIO_DECAY = 0.98  # of measured over predicted seconds, a step
# The engine's own acceptance outlives that of any sequence; its prior is only where it starts.
ENGINE_DECAY, ENGINE_IDLE_DECAY, ENGINE_PRIOR_WEIGHT = 0.998, 0.998, 8.0
MAX_CREDIT = 16.0  # tokens that may be saved up to be lost to probes
PROBE = 1  # index of a probe's size
CONTEXT_BUCKET = 32  # slots a sequence, on average, that one row curve stands for
MAX_CURVES = 256  # kept


@dataclass(frozen=True, slots=True)
class GovernorStats:
    """Counts since the start; positions count from the first draft of a block."""

    rounds_by_size: Mapping[int, int]  # ended
    probes: int  # rounds that were only there to learn
    tried_by_position: tuple[int, ...]  # drafts whose predecessors were all kept
    kept_by_position: tuple[int, ...]
    steps: int  # measured, one in MEASURED_EVERY
    seconds_ratio: float  # measured over predicted step seconds, decayed; 1 before the first


class Governor:
    """Chooses for one engine. Not thread-safe: it belongs to the engine's thread."""

    def __init__(
        self,
        profile: StepProfile,
        max_block_size: int = BLOCK_SIZES[-1],
        prior: Sequence[float] = DEFAULT_PRIOR,
        hysteresis: float = 0.04,
        explored: float = 0.005,
    ) -> None:
        """hysteresis: the gain that a change must promise, as a part of what there is. explored:
        tokens that may be lost to probes, as a part of all; 0 makes none.
        """
        self._profile = profile
        self._max_block_size = max_block_size
        self._hysteresis = hysteresis
        self._engine = Acceptance(prior, ENGINE_DECAY, ENGINE_IDLE_DECAY, ENGINE_PRIOR_WEIGHT)
        self._explored = explored
        self._credit = MAX_CREDIT if explored else 0.0  # tokens that may be lost to probes now
        self._curves: dict[tuple[int, int], RowCurve] = {}
        self._rounds: Counter[int] = Counter()
        # One more than there are drafts: differences, summed up only for a snapshot.
        self._tried = [0] * (NUM_DRAFTS + 1)
        self._kept = [0] * (NUM_DRAFTS + 1)
        self._probes = 0
        self._passes = 0
        self._has_drafted = False  # since the last revisit
        self._steps = 0
        self._predicted_s = 0.0
        self._measured_s = 0.0

    def revisits(self) -> bool:
        """Called once a pass: whether sequences of size 1 are asked again, too. They decode as AR
        does meanwhile, at no cost.
        """
        self._passes += 1
        if self._passes % IDLE_ROUNDS:
            return False
        if not self._has_drafted:
            # What was learnt long ago is still believed, but a few probes may change it.
            self._engine.idle(self._engine.probabilities)
        self._has_drafted = False
        return True

    @property
    def wants_step_time(self) -> bool:
        """Whether the present pass should be told to observe_step: some are enough, and each costs
        what a part of a small model's pass does.
        """
        return self._passes % MEASURED_EVERY == MEASURED_EVERY - 1

    def new_acceptance(self) -> Acceptance:
        """Of a new sequence: what the engine saw of late is its prior."""
        return Acceptance(self._engine.probabilities)

    def choose(self, starting: Sequence[Candidate], companions: Companions) -> list[int]:
        """The block size of each starting sequence's round."""
        if not starting:
            return []
        problem = SizeProblem(
            starting, companions, self._curve(starting, companions), self._max_block_size
        )
        problem.favour([c.current for c in starting], self._hysteresis)
        chosen = problem.best()
        if self._credit > 0:
            chosen = self._probe(problem, chosen, starting)
        return [BLOCK_SIZES[index] for index in chosen.tolist()]

    def _probe(self, problem: SizeProblem, chosen: Ints, starting: Sequence[Candidate]) -> Ints:
        """Who decodes plainly learns nothing of its drafts: let the one that has done so for the
        longest time draft a little, where the tokens that this may cost have been saved up.
        """
        plain = (chosen == 0) & (problem.tokens[:, PROBE] > 0)
        if not plain.any():
            return chosen
        index = max(
            plain.nonzero()[0].tolist(), key=lambda i: starting[i].acceptance.rounds_untried
        )
        probed = chosen.copy()
        probed[index] = PROBE
        lost = problem.round_loss(chosen, probed)
        if lost > self._credit:
            return chosen
        self._credit -= max(lost, 0.0)
        self._probes += 1
        return probed

    def _curve(self, starting: Sequence[Candidate], companions: Companions) -> RowCurve:
        """Of this batch; contexts of a like length share one."""
        sequences = len(starting) + companions.autoregressive + companions.block_sequences
        sequences += companions.prefill_sequences
        context = companions.context_tokens + sum([c.context_len for c in starting])
        key = (sequences, round(context / sequences / CONTEXT_BUCKET))
        curve = self._curves.get(key)
        if curve is None:
            if len(self._curves) == MAX_CURVES:
                self._curves.clear()
            average = key[1] * CONTEXT_BUCKET
            curve = self._profile.row_curve(sequences, average * sequences)
            self._curves[key] = curve
        return curve

    def observe(self, acceptance: Acceptance, block_size: int, accepted: int) -> None:
        """A round of a sequence ended, with so many tokens kept, the bonus token included."""
        self._rounds[block_size] += 1
        self._credit = min(MAX_CREDIT, self._credit + self._explored * accepted)
        if block_size == 1:
            acceptance.rounds_untried += 1
            if acceptance.rounds_untried % IDLE_ROUNDS == 0:
                acceptance.idle(self._engine.probabilities)
            return
        self._has_drafted = True
        acceptance.observe(block_size, accepted)
        self._engine.observe(block_size, accepted)
        self._tried[min(accepted, block_size - 1, NUM_DRAFTS)] += 1
        self._kept[min(accepted - 1, NUM_DRAFTS)] += 1

    def observe_step(
        self,
        num_rows: int,
        num_sequences: int,
        context_tokens: int,
        drafts: bool,
        seconds: float,
    ) -> None:
        """A pass took so long; arguments as StepProfile.seconds takes them."""
        predicted = self._profile.seconds(num_rows, num_sequences, context_tokens, drafts)
        self._steps += 1
        self._predicted_s = self._predicted_s * RATIO_DECAY + predicted
        self._measured_s = self._measured_s * RATIO_DECAY + seconds

    def stats(self) -> GovernorStats:
        """A snapshot."""

        def reached(counts: list[int]) -> tuple[int, ...]:
            return tuple(np.cumsum(counts[:0:-1])[::-1].tolist())

        return GovernorStats(
            rounds_by_size=dict(self._rounds),
            probes=self._probes,
            tried_by_position=reached(self._tried),
            kept_by_position=reached(self._kept),
            steps=self._steps,
            seconds_ratio=self._measured_s / self._predicted_s if self._steps else 1.0,
        )
