"""Governor: picks the block size of every self-speculating sequence that starts a round.

It maximises the tokens that a steady state of the present batch keeps per second. A sequence with
block size b > 1 brings b rows to each pass and keeps E(b) tokens every two passes (draft, verify);
with b = 1 it brings one row and keeps one token a pass, which is plain AR.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from trimode.replicas.acceptance import BLOCK_SIZES, DEFAULT_PRIOR, NUM_DRAFTS, Acceptance
from trimode.replicas.step_profile import Floats, StepProfile

Ints = NDArray[np.int64]

ROWS = np.array(BLOCK_SIZES, dtype=np.float64)
# Tokens a pass, given E(b) tokens a round.
PER_PASS = np.array([1.0] + [0.5] * (len(BLOCK_SIZES) - 1))
FORBIDDEN = -1e9  # tokens of a size that is not allowed
with np.errstate(divide="ignore"):
    PER_ROW = np.where(ROWS[:, None] < ROWS, 1 / (ROWS - ROWS[:, None]), 0)  # [from, to]
LARGER = np.where(ROWS[:, None] < ROWS, 0, -np.inf)  # a step leads to a larger size
MAX_ENUMERATED = 4  # sequences whose combinations are all tried
COMBINATIONS = {
    count: np.array(
        sorted(
            product(range(len(BLOCK_SIZES)), repeat=count),
            key=lambda sizes: sum(BLOCK_SIZES[size] for size in sizes),
        )
    )
    for count in range(1, MAX_ENUMERATED + 1)
}  # [num_combinations, count], fewest rows first: of equals the cheaper one wins
COMBINATION_ROWS = {count: ROWS[sizes].sum(axis=1) for count, sizes in COMBINATIONS.items()}
RATIO_DECAY = 0.98  # of measured over predicted seconds, a step
# The engine's own acceptance outlives that of any sequence.
ENGINE_DECAY, ENGINE_IDLE_DECAY = 0.998, 0.9995


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sequence that is about to start a round."""

    acceptance: Acceptance
    current: int  # the block size of its last round; 0: it had none
    tokens_left: int  # wanted still
    context_len: int  # slots it has cached


@dataclass(frozen=True, slots=True)
class Companions:
    """Everybody else in the batch, as an average pass sees them."""

    autoregressive: int = 0  # sequences with one row and one token a pass
    block_sequences: int = 0  # in the middle of a round, or with a size that is not ours to pick
    block_rows: int = 0
    block_tokens: float = 0.0  # expected a pass
    prefill_sequences: int = 0
    prefill_rows: int = 0
    context_tokens: int = 0  # slots cached by all of them


@dataclass(frozen=True, slots=True)
class GovernorStats:
    """Counts since the start; positions count from the first draft of a block."""

    rounds_by_size: Mapping[int, int]  # chosen
    tried_by_position: tuple[int, ...]  # drafts whose predecessors were all kept
    kept_by_position: tuple[int, ...]
    steps: int
    seconds_ratio: float  # measured over predicted step seconds, decayed; 1 before the first


class _Problem:
    """One choice: tokens and rows of each candidate by size, and the seconds that rows cost."""

    def __init__(
        self, profile: StepProfile, candidates: Sequence[Candidate], companions: Companions
    ) -> None:
        expected = np.array([c.acceptance.expected_by_size for c in candidates])
        self.tokens = expected * PER_PASS  # [num_candidates, num_sizes]
        self.base_tokens = companions.autoregressive + companions.block_tokens
        self.base_rows = companions.autoregressive + companions.block_rows + companions.prefill_rows
        self.always_drafts = companions.block_sequences > 0
        self.indices = np.arange(len(candidates))
        sequences = len(candidates) + companions.autoregressive + companions.block_sequences
        curve = profile.row_curve(
            sequences + companions.prefill_sequences,
            companions.context_tokens + sum(c.context_len for c in candidates),
        )
        self._knots = curve.rows
        self._causal_s = curve.causal_s
        # Of sequences in mid-round half draft and half verify, one by one or pass by pass.
        self._mixed_s = (curve.causal_s + curve.draft_s) / 2

    def goodput(self, tokens: Floats, rows: Floats) -> Floats:
        """Tokens a second, the candidates bringing these tokens and rows to a pass."""
        rows = rows + self.base_rows
        seconds = np.interp(rows, self._knots, self._mixed_s)
        if not self.always_drafts:
            plain = rows == self.base_rows + len(self.indices)
            seconds = np.where(plain, np.interp(rows, self._knots, self._causal_s), seconds)
        return np.asarray((tokens + self.base_tokens) / seconds)

    def goodput_of(self, sizes: Ints) -> float:
        """Of one size index for each candidate."""
        tokens, rows = self.tokens[self.indices, sizes].sum(), ROWS[sizes].sum()
        return float(self.goodput(tokens, rows))

    def best(self, allowed: NDArray[np.bool_]) -> Ints:
        """Size indices [num_candidates] of the best goodput; allowed is [num_candidates,
        num_sizes], with at least one True in a row.
        """
        tokens = np.where(allowed, self.tokens, FORBIDDEN)
        if len(tokens) <= MAX_ENUMERATED:
            combinations = COMBINATIONS[len(tokens)]
            total = tokens[self.indices, combinations].sum(axis=1)
            rows = COMBINATION_ROWS[len(tokens)]
            return np.asarray(combinations[self.goodput(total, rows).argmax()])
        return self._best_of_many(tokens, allowed)

    def _best_of_many(self, tokens: Floats, allowed: NDArray[np.bool_]) -> Ints:
        """Greedy along every candidate's concave hull, best tokens per row first: exact for each
        number of rows that it passes, and one of many candidates is all that lies between two.
        Beside it, the same size for all: a governor should not lose to a fixed setting.
        """
        start = allowed.argmax(axis=1)
        gains, costs, owners, sizes = _hull_steps(tokens, start)
        order = np.argsort(-gains / costs, kind="stable")
        total = np.cumsum(np.append(tokens[self.indices, start].sum(), gains[order]))
        rows = np.cumsum(np.append(ROWS[start].sum(), costs[order]))
        greedy = self.goodput(total, rows)
        stop = int(greedy.argmax())
        chosen = start.copy()
        taken = order[:stop]
        np.maximum.at(chosen, owners[taken], sizes[taken])

        # Where a size is not allowed, the largest one below it, or the smallest that is.
        order_of = np.where(allowed, np.arange(len(BLOCK_SIZES)), -1)
        uniform = np.maximum(np.maximum.accumulate(order_of, axis=1), start[:, None])
        total = np.take_along_axis(tokens, uniform, axis=1).sum(axis=0)
        same = self.goodput(total, ROWS[uniform].sum(axis=0))
        if same.max() > greedy[stop]:
            return np.asarray(uniform[:, same.argmax()])
        return np.asarray(chosen)


def _hull_steps(tokens: Floats, start: Ints) -> tuple[Floats, Floats, Ints, Ints]:
    """Steps up the upper concave hulls: tokens gained, rows added, candidate, size reached. Those
    of a candidate ascend.
    """
    # [num_candidates, from, to]
    slopes = (tokens[:, None, :] - tokens[:, :, None]) * PER_ROW + LARGER
    reached = slopes.argmax(axis=2)
    indices = np.arange(len(tokens))
    flat = slopes.reshape(-1, len(BLOCK_SIZES))  # gathering is quicker than another max
    rising = (flat[np.arange(len(flat)), reached.ravel()] > 0).reshape(reached.shape)
    steps = np.zeros_like(rising)
    steps[indices, start] = True
    for size in range(len(BLOCK_SIZES) - 1):
        steps[:, size] &= rising[:, size]
        climbing = indices[steps[:, size]]
        steps[climbing, reached[climbing, size]] = True
    steps[:, -1] = False
    owners, sizes = steps.nonzero()
    goals = reached[owners, sizes]
    gains = tokens[owners, goals] - tokens[owners, sizes]
    return gains, ROWS[goals] - ROWS[sizes], owners, goals


class Governor:
    """Chooses for one engine. Not thread-safe: it belongs to the engine's thread."""

    def __init__(
        self,
        profile: StepProfile,
        max_block_size: int = BLOCK_SIZES[-1],
        prior: Sequence[float] = DEFAULT_PRIOR,
        hysteresis: float = 0.05,
    ) -> None:
        """hysteresis: the gain that a change must promise, as a part of what there is."""
        self._profile = profile
        self._max_block_size = max_block_size
        self._hysteresis = hysteresis
        self._engine = Acceptance(prior, ENGINE_DECAY, ENGINE_IDLE_DECAY)
        self._rounds: Counter[int] = Counter()
        # One more than there are drafts: differences, summed up only for a snapshot.
        self._tried = [0] * (NUM_DRAFTS + 1)
        self._kept = [0] * (NUM_DRAFTS + 1)
        self._steps = 0
        self._predicted_s = 0.0
        self._measured_s = 0.0

    def new_acceptance(self) -> Acceptance:
        """Of a new sequence: what the engine saw of late is its prior."""
        return Acceptance(self._engine.probabilities)

    def choose(self, starting: Sequence[Candidate], companions: Companions) -> list[int]:
        """The block size of each starting sequence's round."""
        if not starting:
            return []
        problem = _Problem(self._profile, starting, companions)
        limits = np.minimum([c.tokens_left for c in starting], self._max_block_size)
        allowed: NDArray[np.bool_] = np.maximum(limits, 1).reshape(-1, 1) >= ROWS
        chosen = problem.best(allowed)
        current = np.array([c.current for c in starting])
        held = (current[:, None] == ROWS) & allowed
        if held.any():
            chosen = self._hold(problem, chosen, held, allowed)
        sizes = [BLOCK_SIZES[index] for index in chosen.tolist()]
        self._rounds.update(sizes)
        return sizes

    def _hold(
        self,
        problem: _Problem,
        best: Ints,
        held: NDArray[np.bool_],
        allowed: NDArray[np.bool_],
    ) -> Ints:
        """Change sizes only where it pays: for the whole batch, or for a sequence by itself, whose
        part in the batch may be too small to be seen.
        """
        is_held: NDArray[np.bool_] = np.any(held, axis=1)
        if not (is_held & (best != held.argmax(axis=1))).any():
            return best
        keep = held.argmax(axis=1)
        if not is_held.all():
            keep = problem.best(np.where(is_held[:, None], held, allowed))
        before = problem.goodput_of(keep)
        if problem.goodput_of(best) > before * (1 + self._hysteresis):
            return best
        old, new = problem.tokens[problem.indices, keep], problem.tokens[problem.indices, best]
        tokens = old.sum() - old + new
        rows = ROWS[keep].sum() - ROWS[keep] + ROWS[best]
        gain = problem.goodput(tokens, rows) / before - 1
        part = np.maximum(old, new) / (old.sum() + problem.base_tokens)
        changed = np.where(gain > self._hysteresis * part, best, keep)
        return changed if problem.goodput_of(changed) > before else keep

    def observe(self, acceptance: Acceptance, block_size: int, accepted: int) -> None:
        """A round of a sequence ended, with so many tokens kept, the bonus token included."""
        acceptance.observe(block_size, accepted)
        self._engine.observe(block_size, accepted)
        if block_size > 1:
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
            tried_by_position=reached(self._tried),
            kept_by_position=reached(self._kept),
            steps=self._steps,
            seconds_ratio=self._measured_s / self._predicted_s if self._steps else 1.0,
        )
