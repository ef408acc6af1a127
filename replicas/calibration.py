"""Calibration: measures a StepProfile on the hardware at hand, through the model runner itself.

A few sweeps over a small grid, cheap passes first, within a budget of seconds. What the budget does
not reach is left out of the grid, and the profile prolongs what it has.
"""

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimode.replicas.config import EngineConfig
from trimode.replicas.decoding.modes import ALL_MODES
from trimode.replicas.decoding.strategy import DecodingContext, PassKind, Query, Stage
from trimode.replicas.machine import describe_machine
from trimode.replicas.model.safetensors_reader import Progress
from trimode.replicas.model_runner import ModelRunner, run_pass
from trimode.replicas.scheduled import Scheduled
from trimode.replicas.sequence import Sequence
from trimode.replicas.step_profile import Floats, StepProfile
from trimode.replicas.types import Mode, ModelInfo, Request

NUM_SEQUENCES = (1, 2, 4, 16, 64, 256)
ROWS_PER_SEQUENCE = (1, 4, 8, 16, 32)
CONTEXT_LENS = (64, 512, 2048)
MAX_ROWS = 512  # of a measured pass; larger ones are prolonged from smaller ones
MAX_SLOTS = 4096  # that the passes read: more than a processor's cache holds of a real model
DEFAULT_SECONDS = 5.0
NUM_SWEEPS = 5  # the fastest counts: whatever else the machine does only adds
NUM_PIPELINED = 4  # passes of a measured row of them, where the engine launches ahead
CONTEXT_PER_ROW = 32  # slots of context that cost about as much as a row; only to plan with


@dataclass(frozen=True, slots=True)
class Point:
    """A pass to measure: sequences that all look alike."""

    num_sequences: int
    rows: int  # of each
    context_len: int  # of each
    drafts: bool

    @property
    def work(self) -> float:
        """What it costs, in rows, about."""
        return self.num_sequences * (self.rows + self.context_len / CONTEXT_PER_ROW)


Times = Mapping[Point, float]  # seconds of the points that were measured


def measure(
    runner: ModelRunner[Any],
    config: EngineConfig,
    seconds: float = DEFAULT_SECONDS,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> StepProfile:
    """Takes about the seconds given, or less; with a slow model at least a few passes of one
    sequence. The engine must be idle: its cache's slots are overwritten.

    progress(done, total) is called after each pass, made or left out.
    """
    ends = clock() + seconds
    sequences, rows, contexts = axes(runner.info, config)
    points = plan(sequences, rows, contexts, config)
    stopwatch = _Stopwatch(runner, config, clock)
    stopwatch.seconds(points[0])  # warm up
    times: dict[Point, float] = {}
    second_a_unit = 0.0
    # Sweep by sweep, so that a busy moment of the machine does not meet all tries of a point.
    for sweep in range(NUM_SWEEPS):
        for done, point in enumerate(points, start=1 + sweep * len(points)):
            known = times.get(point, np.inf)
            units = point.work + stopwatch.slots_to_write(point)
            expected = stopwatch.num_passes * (known if point in times else second_a_unit * units)
            is_needed = sweep == 0 and _is_needed(point, rows, contexts)
            if is_needed or clock() + expected <= ends:
                times[point] = min(known, stopwatch.seconds(point))
                second_a_unit = times[point] / point.work
            if progress is not None:
                progress(done, NUM_SWEEPS * len(points))
    return _profile(times, sequences, rows, contexts, runner.info)


def axes(
    info: ModelInfo, config: EngineConfig
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Sequences, rows a sequence and contexts that this engine can hold; at least one of each."""
    rows = tuple(r for r in ROWS_PER_SEQUENCE if r <= config.max_block_size)
    most = min(config.max_sequences, config.max_step_tokens // rows[:2][-1])
    sequences = tuple(n for n in NUM_SEQUENCES if n < most)
    slots = min(info.max_positions, config.pages * config.page_size)
    contexts = tuple(c for c in CONTEXT_LENS if c + rows[-1] <= slots)
    return (*sequences, max(1, most)), rows, contexts or (0,)


def plan(
    sequences: SequenceOf[int],
    rows: SequenceOf[int],
    contexts: SequenceOf[int],
    config: EngineConfig,
) -> list[Point]:
    """The points to measure, cheap ones first: all rows at the shortest context, and what more
    context adds to the fewest and the most of them. It adds the same to a draft.
    """
    limit = min(MAX_ROWS, config.max_step_tokens)
    points = []
    for n in sequences:
        measured = [r for r in rows if r in rows[:2] or n * r <= limit]
        points += [Point(n, r, contexts[0], d) for r in measured for d in (False, True)]
        ends = dict.fromkeys((measured[0], measured[-1]))
        points += [Point(n, r, c, False) for c in contexts[1:] for r in ends]
    return sorted(points, key=lambda point: point.work)


def _is_needed(point: Point, rows: SequenceOf[int], contexts: SequenceOf[int]) -> bool:
    """Whether there is no profile without it."""
    return point.num_sequences == 1 and point.rows in rows[:2] and point.context_len == contexts[0]


class _Stopwatch:
    """Takes the time of passes. Pages are written before they are first read: memory that nobody
    wrote may read faster than memory is.
    """

    def __init__(
        self, runner: ModelRunner[Any], config: EngineConfig, clock: Callable[[], float]
    ) -> None:
        self._runner = runner
        self._size = config.page_size
        self._max_pages = min(config.pages, max(1, MAX_SLOTS // config.page_size))
        self._together = max(1, min(MAX_ROWS, config.max_step_tokens) // config.page_size)
        self._written = 0  # pages, from the first
        self._clock = clock
        self.num_passes = NUM_PIPELINED if config.launch_ahead else 1  # that one measurement takes

    def seconds(self, point: Point) -> float:
        """Of one pass as the engine runs it: until its answers are on the host or, where passes are
        launched ahead, from one pass's answers to the next one's.
        """
        self._write(self._pages(point))
        items = self._items(point)
        begin = self._clock()
        launched = self._runner.launch(items)
        if self.num_passes == 1:
            self._runner.read(launched)
            return self._clock() - begin
        for index in range(self.num_passes - 1):
            following = self._runner.launch(items)
            self._runner.read(launched)
            launched = following
            if index == 0:
                begin = self._clock()
        self._runner.read(launched)
        return (self._clock() - begin) / (self.num_passes - 1)

    def slots_to_write(self, point: Point) -> int:
        """Before it can be measured."""
        return max(0, self._pages(point) - self._written) * self._size

    def _pages(self, point: Point) -> int:
        return min(self._max_pages, point.num_sequences * self._pages_each(point))

    def _pages_each(self, point: Point) -> int:
        return -(-(point.context_len + point.rows) // self._size)

    def _items(self, point: Point) -> list[Scheduled]:
        """On pages of their own while there are enough."""
        info, rows, drafts = self._runner.info, point.rows, point.drafts
        kind = PassKind.CAUSAL
        if drafts:
            kind = PassKind.DRAFT if info.has_draft_adapter else PassKind.DENOISE
        query = Query(
            stage=Stage.DRAFT if drafts else Stage.VERIFY,
            kind=kind,
            token_ids=(0,) + (info.mask_id if drafts else 0,) * (rows - 1),
            start=point.context_len,
            answers=range(1 if drafts and rows > 1 else 0, rows),
        )
        each = self._pages_each(point)
        scheduled = []
        for index in range(point.num_sequences):
            sequence = _sequence(info, point.context_len, rows)
            table = np.arange(index * each, (index + 1) * each) % self._max_pages
            sequence.page_table = table.tolist()
            sequence.num_committed = point.context_len
            scheduled.append(Scheduled(sequence, query))
        return scheduled

    def _write(self, num_pages: int) -> None:
        size = self._size
        query = Query(Stage.PREFILL, PassKind.CAUSAL, (0,) * size, start=0, answers=(size - 1,))
        while self._written < num_pages:
            items = []
            for page in range(self._written, min(self._written + self._together, num_pages)):
                sequence = _sequence(self._runner.info, size, 1)
                sequence.page_table = [page]
                items.append(Scheduled(sequence, query))
            run_pass(self._runner, items)
            self._written += len(items)


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


def _profile(
    times: Times,
    sequences: SequenceOf[int],
    rows: SequenceOf[int],
    contexts: SequenceOf[int],
    info: ModelInfo,
) -> StepProfile:
    """Of the sequences and contexts that were reached."""
    first = contexts[0]
    reached = tuple(
        n
        for n in sequences
        if all(Point(n, r, first, d) in times for r in rows[:2] for d in (False, True))
    )
    far = [c for c in contexts[1:] if _added(times, 1, rows, first, c) is not None]
    context_s = np.zeros((len(reached), len(rows), 1 + len(far)))
    for n, count in enumerate(reached):
        for c, context in enumerate(far, start=1):
            added = _added(times, count, rows, first, context)
            # Each sequence reads its own context, so it costs so much more for more of them.
            before = context_s[n - 1, :, c] * count / reached[n - 1]
            context_s[n, :, c] = before if added is None else added
    context_s = np.maximum.accumulate(context_s, axis=2)  # a longer one that was faster is noise
    causal, draft = (
        np.array([[times.get(Point(n, r, first, d), np.nan) for r in rows] for n in reached])
        for d in (False, True)
    )
    return StepProfile(
        num_sequences=reached,
        rows_per_sequence=tuple(rows),
        context_lens=(first, *far),
        causal_s=(_prolonged(causal, rows)[:, :, None] + context_s).tolist(),
        draft_s=(_prolonged(draft, rows)[:, :, None] + context_s).tolist(),
        machine=describe_machine("torch", "trimode"),
        model={
            "vocab_size": info.vocab_size,
            "dtype": info.dtype,
            "quantization": info.quantization,
            "has_draft_adapter": info.has_draft_adapter,
        },
    )


def _added(
    times: Times, num_sequences: int, rows: SequenceOf[int], first: int, context: int
) -> Floats | None:
    """What a context adds to the first one's seconds, for all rows: a line through what it adds to
    the fewest and to the most. None where that was not measured.
    """
    known = [r for r in rows if Point(num_sequences, r, context, False) in times]
    known = [r for r in known if Point(num_sequences, r, first, False) in times]
    if rows[0] not in known:
        return None
    low, high = (
        times[Point(num_sequences, r, context, False)]
        - times[Point(num_sequences, r, first, False)]
        for r in (known[0], known[-1])
    )
    slope = max(0.0, high - low) / max(1, known[-1] - known[0])
    return max(0.0, low) + slope * (np.array(rows, dtype=np.float64) - rows[0])


def _prolonged(grid: Floats, rows: SequenceOf[int]) -> Floats:
    """What was not measured of [sequences, rows], along the steeper of two lines: through the last
    two points that were measured, which sees a knee, and through the first and the last, which
    survives noise.
    """
    for r in range(2, len(rows)):
        last = grid[:, r - 1]
        slope = np.fmax(
            (last - grid[:, r - 2]) / (rows[r - 1] - rows[r - 2]),
            (last - grid[:, 0]) / (rows[r - 1] - rows[0]),
        )
        guess = last + np.maximum(slope, 0) * (rows[r] - rows[r - 1])
        grid[:, r] = np.where(np.isnan(grid[:, r]), guess, grid[:, r])
    return grid
