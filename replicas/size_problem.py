"""SizeProblem: one choice of block sizes, solved for the most tokens a second.

In a steady state of the present batch a sequence with block size b > 1 brings b rows to each pass
and keeps E(b) tokens every two passes (draft, verify); with b = 1 it brings one row and keeps one
token a pass, which is plain AR.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product

import numpy as np
from numpy.typing import NDArray

from trimode.replicas.acceptance import BLOCK_SIZES, Acceptance
from trimode.replicas.step_profile import Floats, RowCurve

Ints = NDArray[np.int64]

NUM_SIZES = len(BLOCK_SIZES)
SIZES = np.arange(NUM_SIZES)
INDEX_OF = {size: index for index, size in enumerate(BLOCK_SIZES)}
ROWS = np.array(BLOCK_SIZES, dtype=np.float64)
# Tokens a pass, given E(b) tokens a round.
PER_PASS = np.array([1.0] + [0.5] * (NUM_SIZES - 1))
FORBIDDEN = -1e9  # tokens of a size that is not allowed
MAX_ENUMERATED = 4  # sequences whose combinations are all tried
COMBINATIONS = {
    count: np.array(
        sorted(
            product(range(NUM_SIZES), repeat=count),
            key=lambda sizes: sum(BLOCK_SIZES[size] for size in sizes),
        )
    )
    for count in range(1, MAX_ENUMERATED + 1)
}  # [num_combinations, count], fewest rows first: of equals the cheaper one wins
COMBINATION_ROWS = {count: ROWS[sizes].sum(axis=1) for count, sizes in COMBINATIONS.items()}
STEP_ROWS = np.diff(ROWS)
# Tokens by size -> tokens a row from each size to each other: [from * to, size], a product away.
SLOPES = np.array(
    [
        (np.eye(NUM_SIZES)[high] - np.eye(NUM_SIZES)[low]) / (ROWS[high] - ROWS[low])
        if low < high
        else np.zeros(NUM_SIZES)
        for low in range(NUM_SIZES - 1)
        for high in range(1, NUM_SIZES)
    ]
)


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


class SizeProblem:
    """Tokens and rows of each candidate by size, and the seconds that rows cost."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        companions: Companions,
        curve: RowCurve,
        max_block_size: int,
    ) -> None:
        num_sizes = sum(size <= max_block_size for size in BLOCK_SIZES)
        whole = BLOCK_SIZES[-1] if num_sizes == NUM_SIZES else np.inf
        expected = np.fromiter(
            chain.from_iterable(
                [
                    c.acceptance.expected_by_size
                    if c.tokens_left >= whole
                    else _expected(c, num_sizes)
                    for c in candidates
                ]
            ),
            np.float64,
            len(candidates) * NUM_SIZES,
        )
        self.tokens = expected.reshape(-1, NUM_SIZES) * PER_PASS  # [num_candidates, num_sizes]
        self.indices = np.arange(len(candidates))
        self._base_tokens = companions.autoregressive + companions.block_tokens
        self._base_rows = (
            companions.autoregressive + companions.block_rows + companions.prefill_rows
        )
        self._always_drafts = companions.block_sequences > 0
        self._knots = curve.rows
        self._causal_s = curve.causal_s
        # Of sequences in mid-round half draft and half verify, one by one or pass by pass.
        self._mixed_s = (curve.causal_s + curve.draft_s) / 2

    def favour(self, sizes: Sequence[int], part: float) -> None:
        """Count that part of its tokens more for each candidate's size (0: none): hysteresis."""
        held = [i * NUM_SIZES + INDEX_OF[size] for i, size in enumerate(sizes) if size]
        self.tokens.reshape(-1)[np.array(held, dtype=np.int64)] *= 1 + part

    def best(self) -> Ints:
        """Size indices [num_candidates] of the most tokens a second."""
        count = len(self.tokens)
        if count <= MAX_ENUMERATED:
            combinations = COMBINATIONS[count]
            total = self.tokens[self.indices, combinations].sum(axis=1)
            return np.asarray(combinations[self._goodput(total, COMBINATION_ROWS[count]).argmax()])
        return self._best_of_many()

    def round_loss(self, sizes: Ints, others: Ints) -> float:
        """Tokens that the second sizes keep less than the first in the time of one round."""
        tokens = self.tokens[self.indices, others].sum() + self._base_tokens
        return float(2 * tokens * (self._goodput_of(sizes) / self._goodput_of(others) - 1))

    def _goodput(self, tokens: Floats, rows: Floats) -> Floats:
        """Tokens a second, the candidates bringing these tokens and rows to a pass."""
        total = rows + self._base_rows
        seconds = np.interp(total, self._knots, self._mixed_s)
        if not self._always_drafts:
            rows_of_plain = len(self.tokens)
            plain_s = np.interp(rows_of_plain + self._base_rows, self._knots, self._causal_s)
            seconds = np.where(rows == rows_of_plain, plain_s, seconds)
        return np.asarray((tokens + self._base_tokens) / seconds)

    def _goodput_of(self, sizes: Ints) -> float:
        tokens = self.tokens[self.indices, sizes].sum()
        return float(self._goodput(tokens, np.asarray(ROWS[sizes].sum())))

    def _best_of_many(self) -> Ints:
        """Greedy along every candidate's least concave majorant, best tokens per row first: one of
        many candidates is all that this may get wrong. Beside it, the same size for all: a
        governor should not lose to a fixed setting.
        """
        count = len(self.tokens)
        gains = self._gains()  # [num_candidates, steps], descending along the steps
        order = np.argsort(-gains, axis=None, kind="stable")
        order = order[: np.count_nonzero(gains > 0)]
        added = STEP_ROWS[order % len(STEP_ROWS)]
        first = (self.tokens[:, 0].sum(),)
        total = np.cumsum(np.concatenate((first, gains.ravel()[order] * added)))
        rows = np.cumsum(np.concatenate(((count,), added)))

        # Where a size is not allowed, the largest that is.
        largest = (self.tokens > 0).sum(axis=1) - 1
        uniform = np.minimum(SIZES[:, None], largest)  # [num_sizes, num_candidates]
        goodput = self._goodput(
            np.concatenate((total, self.tokens[self.indices, uniform].sum(axis=1))),
            np.concatenate((rows, ROWS[uniform].sum(axis=1))),
        )
        best = int(goodput.argmax())
        if best > len(order):
            return np.asarray(uniform[best - len(order) - 1])
        return np.bincount(order[:best] // len(STEP_ROWS), minlength=count)

    def _gains(self) -> Floats:
        """Tokens a row of each step from a size to the next, along the majorant: the
        steepest way on from the flattest way here.
        """
        slopes = (SLOPES @ self.tokens.T).reshape(NUM_SIZES - 1, NUM_SIZES - 1, -1)
        flattest = slopes[0]  # [later sizes, num_candidates]
        gains = [flattest.max(axis=0)]
        for step in range(1, NUM_SIZES - 1):
            flattest = np.minimum(flattest[1:], slopes[step, step:])
            gains.append(flattest.max(axis=0))
        return np.stack(gains, axis=1)


def _expected(candidate: Candidate, num_sizes: int) -> tuple[float, ...]:
    """Tokens a round of each size: no more than what is wanted still, and none of a size that is
    forbidden or has a smaller one that reaches as far.
    """
    expected, left = candidate.acceptance.expected_by_size, candidate.tokens_left
    needed = min(num_sizes, 1 + sum(size < left for size in BLOCK_SIZES))
    if BLOCK_SIZES[needed - 1] > left:
        expected = (*expected[: needed - 1], candidate.acceptance.expected(left))
    return (*expected[:needed], *(FORBIDDEN,) * (NUM_SIZES - needed))
