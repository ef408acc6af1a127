"""Passes over padding, which no request sees: to measure what a pass takes, and to compile what
requests will ask of it before the first one waits for that.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from trimode.kernels.choice import Draws
from trimode.kernels.logit_edits import LogitEdits
from trimode.kernels.pending import PendingInputs
from trimode.kernels.sampling import SamplingInputs
from trimode.kernels.truncation import Truncation
from trimode.replicas.config import EngineConfig
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.pass_inputs import AcceptInputs, PassInputs
from trimode.replicas.pass_size import Size
from trimode.replicas.rank_runner import RankPass, RankRunner

# numpy's here, as in replicas/sampling.py.
Array = Any


def blank_pass(
    model: NemotronLabsDiffusionModel, config: EngineConfig, size: Size, num_answers: int
) -> PassInputs:
    """A greedy pass of a size that sees and writes nothing; numpy arrays."""
    nothing = np.zeros(size.num_tokens, dtype=np.int64)
    return PassInputs(
        token_ids=nothing,
        positions=nothing.copy(),
        slots=nothing - 1,
        attention=size.attention(
            np.zeros(1, dtype=np.int64),
            nothing,
            np.zeros((size.num_sequences, 1), dtype=np.int32),
            config.page_size,
            config.batch_invariant,
        ),
        answer_rows=np.arange(num_answers),
        draft_mask=nothing.astype(bool) if model.has_draft_adapter else None,
        sampling=SamplingInputs(mask_id=model.config.mask_id),
    )


def largest_pass(model: NemotronLabsDiffusionModel, config: EngineConfig) -> PassInputs:
    """The pass of an engine that takes most memory, but for what requests ask of its answers."""
    size = Size(config.max_step_tokens, min(config.max_sequences, config.max_step_tokens))
    answers = min(size.num_tokens, size.num_sequences * config.max_block_size)
    return blank_pass(model, config, size, answers)


def warm_up(rank: RankRunner, model: NemotronLabsDiffusionModel, config: EngineConfig) -> None:
    """Run what most requests ask of their answers once; on a GPU that compiles it."""
    num_rows = config.max_block_size
    blank = blank_pass(model, config, Size(num_rows, 1), num_rows)
    before: RankPass | None = None
    counts = [1 << n for n in range((num_rows - 1).bit_length() + 1)]
    inputs = [replace(blank, accept=_accepting(min(count, num_rows))) for count in counts]
    inputs += [
        replace(blank, sampling=sampling, accept=_accepting(1))
        for sampling in samplings(model.config.mask_id, model.config.vocab_size, num_rows)
    ]
    for one in inputs:
        pending = None if before is None else _nothing_pending(one)
        before = rank.launch(replace(one, token_ids=one.token_ids.copy(), pending=pending), before)


def samplings(mask_id: int, vocab_size: int, num_rows: int) -> Iterator[SamplingInputs]:
    """The usual requests: greedy, drawn, drawn from a part; of them with confidences, with edits or
    with log-probabilities.
    """
    draws = _draws(vocab_size, num_rows)
    rows, hot = draws.rows, draws.temperatures
    for drawn in (None, replace(draws, truncation=None), draws):
        plain = SamplingInputs(mask_id=mask_id, draws=drawn)
        yield plain
        yield replace(plain, confident_rows=rows, confidence_temperatures=hot)
        yield replace(plain, edits=_edits())
        yield replace(plain, logprob_rows=rows, num_top=1)


def _draws(vocab_size: int, num_rows: int) -> Draws:
    rows: Array = np.arange(num_rows)
    hot: Array = np.ones(num_rows, dtype=np.float32)
    kept = Truncation(rows, np.full_like(rows, min(2, vocab_size)), hot / 2, hot * 0)
    return Draws(rows, hot, seeds=rows * 0, positions=rows * 0, samples=rows * 0, truncation=kept)


def _edits() -> LogitEdits:
    """A row with a penalty and a bias, and nothing that is rare."""
    row: Array = np.zeros(1, dtype=np.int64)
    one: Array = np.ones(1)
    nothing: Array = np.empty(0, dtype=np.int64)
    return LogitEdits(
        row, row, row, one, row, row, one, nothing, nothing, nothing, allowed=None
    )  # fmt: skip


def _accepting(count: int) -> AcceptInputs:
    """Of one sequence with so many answers."""
    first = np.zeros(1, dtype=np.int64)
    return AcceptInputs(first, first, first + count, count)


def _nothing_pending(inputs: PassInputs) -> PendingInputs:
    """As where a pass is launched before the one before it was read."""
    rows: Array = np.zeros(inputs.num_tokens, dtype=np.int64)
    draws = inputs.sampling.draws
    owner: Array = None if draws is None else np.zeros(len(draws.rows), dtype=np.int64)
    nobody: Array = np.full(2, -1)
    return PendingInputs(sources=rows - 1, owner=rows, before=nobody, draw_owner=owner)
