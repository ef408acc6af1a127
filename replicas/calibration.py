"""Calibration: measures a StepProfile on the hardware at hand, through the model runner itself."""

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from itertools import product
from typing import Any

import numpy as np

from trimode.replicas.config import EngineConfig
from trimode.replicas.decoding.modes import ALL_MODES
from trimode.replicas.decoding.strategy import DecodingContext, PassKind, Query, Stage
from trimode.replicas.machine import describe_machine
from trimode.replicas.model.weights import Progress
from trimode.replicas.model_runner import ModelRunner, run_pass
from trimode.replicas.scheduled import Scheduled
from trimode.replicas.sequence import Sequence
from trimode.replicas.step_profile import Floats, Grid, StepProfile
from trimode.replicas.types import Mode, ModelInfo, Request

NUM_SEQUENCES = (1, 4, 16, 64, 256)
ROWS_PER_SEQUENCE = (1, 4, 8, 16, 32)
CONTEXT_LENS = (64, 512, 2048)
MAX_ROWS = 512  # of a measured pass; larger ones are prolonged from smaller ones
NUM_SWEEPS = 4  # the fastest counts: whatever else the machine does only adds
LONG_PASS_S = 0.1  # measured once


def measure(
    runner: ModelRunner[Any],
    config: EngineConfig,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> StepProfile:
    """Takes seconds to minutes. The engine must be idle: its cache's slots are overwritten.

    progress(done, total) is called after each pass.
    """
    sequences, rows, contexts = axes(runner.info, config)
    points = list(_points(sequences, rows, config))
    grids = {True: _empty(sequences, rows, contexts), False: _empty(sequences, rows, contexts)}
    cells = [(d, n, r, c) for d in grids for n, r in points for c in range(len(contexts))]
    _fill(runner, config)
    _run(runner, _items(runner.info, config, 1, rows[-1], contexts[0], drafts=True))  # warm up
    # Sweep by sweep, so that a busy moment of the machine does not meet all tries of a point.
    for sweep in range(NUM_SWEEPS):
        for done, (drafts, n, r, c) in enumerate(cells, start=1 + sweep * len(cells)):
            if not grids[drafts][n, r, c] > LONG_PASS_S:  # NaN at first
                items = _items(runner.info, config, sequences[n], rows[r], contexts[c], drafts)
                grids[drafts][n, r, c] = np.fmin(
                    grids[drafts][n, r, c], _seconds(runner, items, clock)
                )
            if progress is not None:
                progress(done, NUM_SWEEPS * len(cells))
    info = runner.info
    return StepProfile(
        num_sequences=sequences,
        rows_per_sequence=rows,
        context_lens=contexts,
        causal_s=_prolonged(grids[False], rows),
        draft_s=_prolonged(grids[True], rows),
        machine=describe_machine("torch", "trimode"),
        model={
            "vocab_size": info.vocab_size,
            "dtype": info.dtype,
            "has_draft_adapter": info.has_draft_adapter,
        },
    )


def axes(
    info: ModelInfo, config: EngineConfig
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Sequences, rows a sequence and contexts that this engine can hold; at least one of each."""
    rows = tuple(r for r in ROWS_PER_SEQUENCE if r <= config.max_block_size)
    most = min(config.max_sequences, config.max_step_tokens // rows[:2][-1])
    sequences = tuple(n for n in NUM_SEQUENCES if n < most)
    slots = min(info.max_positions, config.num_pages * config.page_size)
    contexts = tuple(c for c in CONTEXT_LENS if c + rows[-1] <= slots)
    return (*sequences, max(1, most)), rows, contexts or (0,)


def _points(
    sequences: SequenceOf[int], rows: SequenceOf[int], config: EngineConfig
) -> Iterator[tuple[int, int]]:
    """Indices of the (sequences, rows) to measure: two for each number of sequences at least."""
    limit = min(MAX_ROWS, config.max_step_tokens)
    for n, r in product(range(len(sequences)), range(len(rows))):
        if r < 2 or sequences[n] * rows[r] <= limit:
            yield n, r


def _empty(*lists: SequenceOf[int]) -> Floats:
    return np.full([len(values) for values in lists], np.nan)


def _items(
    info: ModelInfo,
    config: EngineConfig,
    num_sequences: int,
    num_rows: int,
    context_len: int,
    drafts: bool,
) -> list[Scheduled]:
    """A pass of sequences that all look alike, on pages of their own while there are enough."""
    pages = -(-(context_len + num_rows) // config.page_size)
    kind = PassKind.CAUSAL
    if drafts:
        kind = PassKind.DRAFT if info.has_draft_adapter else PassKind.DENOISE
    query = Query(
        stage=Stage.DRAFT if drafts else Stage.VERIFY,
        kind=kind,
        token_ids=(0,) + (info.mask_id if drafts else 0,) * (num_rows - 1),
        start=context_len,
        answers=range(1 if drafts and num_rows > 1 else 0, num_rows),
    )
    scheduled = []
    for index in range(num_sequences):
        sequence = _sequence(info, context_len, num_rows)
        table = np.arange(index * pages, (index + 1) * pages) % config.num_pages
        sequence.page_table = table.tolist()
        sequence.num_committed = context_len
        scheduled.append(Scheduled(sequence, query))
    return scheduled


def _fill(runner: ModelRunner[Any], config: EngineConfig) -> None:
    """Write every slot once: memory that nobody wrote may read faster than memory is."""
    size = config.page_size
    together = max(1, min(MAX_ROWS, config.max_step_tokens) // size)
    query = Query(Stage.PREFILL, PassKind.CAUSAL, (0,) * size, start=0, answers=(size - 1,))
    for first in range(0, config.num_pages, together):
        items = []
        for page in range(first, min(first + together, config.num_pages)):
            sequence = _sequence(runner.info, size, 1)
            sequence.page_table = [page]
            items.append(Scheduled(sequence, query))
        _run(runner, items)


def _sequence(info: ModelInfo, context_len: int, num_rows: int) -> Sequence:
    prompt = (0,) * (context_len + 1)
    request = Request("calibration", prompt, Mode.AUTOREGRESSIVE, max_tokens=num_rows)
    context = DecodingContext(request, info.mask_id, frozenset(), block_size=1)
    return Sequence(
        request=request,
        strategy=ALL_MODES[request.mode](context),
        stop_ids=context.stop_ids,
        arrived_at=0.0,
    )


def _seconds(
    runner: ModelRunner[Any], items: SequenceOf[Scheduled], clock: Callable[[], float]
) -> float:
    begin = clock()
    _run(runner, items)
    return clock() - begin


def _run(runner: ModelRunner[Any], items: SequenceOf[Scheduled]) -> None:
    """One pass, until its answers are on the host."""
    run_pass(runner, items)


def _prolonged(grid: Floats, rows: SequenceOf[int]) -> Grid:
    """What was not measured, along the steeper of two lines: through the last two points that were
    measured, which sees a knee, and through the first and the last, which survives noise.
    """
    for r in range(2, len(rows)):
        last = grid[:, r - 1]
        slope = np.fmax(
            (last - grid[:, r - 2]) / (rows[r - 1] - rows[r - 2]),
            (last - grid[:, 0]) / (rows[r - 1] - rows[0]),
        )
        guess = last + np.maximum(slope, 0) * (rows[r] - rows[r - 1])
        grid[:, r] = np.where(np.isnan(grid[:, r]), guess, grid[:, r])
    return tuple(tuple(tuple(line) for line in plane) for plane in grid.tolist())
