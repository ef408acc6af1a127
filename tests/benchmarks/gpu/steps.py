"""Step times: AR passes, and pairs of a draft and a verify pass, through the model runner.

Passes are launched one ahead, as the engine does it, so `ms` is what a step takes where the host
keeps up, and `launch_ms` is what the host spends on one. `alone_ms` is from launch to answers with
nothing in flight. `busy_ms` is how long kernels and copies ran, by the profiler's trace.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from documents import Document, Facts
from floors import Card, Floors, PassShape
from gpu_time import busy_seconds, synchronize
from workbench import MAX_USERS, Spec, Workbench

from trimode.replicas.decoding.modes import ALL_MODES
from trimode.replicas.decoding.strategy import DecodingContext, PassKind, Query, Stage
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.scheduled import Scheduled
from trimode.replicas.sequence import Sequence
from trimode.replicas.types import Mode, Request

USERS = tuple(1 << exponent for exponent in range(MAX_USERS.bit_length()))
BLOCK_SIZES = (8, 16, 32)
CONTEXT_LENS = (512, 4096)
SECONDS = 0.4  # of a figure, about
MIN_CYCLES, MAX_CYCLES = 6, 60
PROFILED_CYCLES = 5


@dataclass(frozen=True, slots=True)
class Point:
    """block_size 1: an AR step; else a draft and a verify pass by turns."""

    num_sequences: int
    block_size: int
    context_len: int

    def shapes(self) -> list[PassShape]:
        kinds = (False,) if self.block_size == 1 else (True, False)
        return [
            PassShape(self.num_sequences, self.block_size, self.context_len, drafts)
            for drafts in kinds
        ]


def points(bench: Workbench, users: tuple[int, ...] = USERS) -> Iterator[Point]:
    """Those that goals are set for first."""
    contexts: tuple[int, ...] = CONTEXT_LENS
    blocks: tuple[int, ...] = (1, *BLOCK_SIZES)
    if bench.is_tiny:
        contexts, blocks, users = (24,), (1, 8), tuple(n for n in users if n <= 2)
    for context_len in contexts:
        for num_sequences in sorted(users, key=lambda n: (n not in (1, users[-1]), n)):
            for block_size in sorted(blocks, key=lambda size: (size > 1, -size)):
                yield Point(num_sequences, block_size, context_len)


def measure_steps(
    bench: Workbench,
    document: Document,
    spec: Spec,
    card: Card,
    users: tuple[int, ...] = USERS,
) -> None:
    """A row a point."""
    runner, rank = bench.runner(spec)
    rank.draw(None)
    document.write(model=spec.size, **bench.start_facts)
    floors = Floors(bench.config(spec.size), card, spec.weight_itemsize)
    document.write(weight_read_ms=1e3 * floors.weight_read_s, weight_bytes=floors.weight_bytes)
    for point in points(bench, users):
        document.append("rows", row(bench, runner, floors, point))


def row(bench: Workbench, runner: TorchModelRunner, floors: Floors, point: Point) -> Facts:
    passes = [scheduled(runner, shape) for shape in point.shapes()]
    found = time_passes(bench, runner, passes)
    slots = point.num_sequences * (point.context_len + point.block_size)
    return {
        "sequences": point.num_sequences,
        "block": point.block_size,
        "context": point.context_len,
        "passes": len(passes),
        **found,
        "floor_ms": 1e3 * sum(map(floors.seconds, point.shapes())),
        "over_weight_read": found["ms"] / (1e3 * floors.weight_read_s * len(passes)),
        # Sequences then read one another's pages: there are not enough for all.
        "shares_pages": slots > runner.config.pages * runner.config.page_size,
    }


def time_passes(
    bench: Workbench, runner: TorchModelRunner, passes: list[list[Scheduled]]
) -> dict[str, float]:
    """Milliseconds of one cycle over the passes."""
    alone = min(_alone_s(runner, passes) for _ in range(3))
    cycles = min(MAX_CYCLES, max(MIN_CYCLES, int(SECONDS / alone)))
    if bench.is_tiny:
        cycles = 2
    best = (float("inf"), float("inf"))
    for _ in range(2):  # the better of two counts: whatever else the host does only adds
        synchronize(bench.device)
        begun = time.perf_counter()
        launching = _run_ahead(runner, passes, cycles)
        best = min(best, (time.perf_counter() - begun, launching))
    busy = busy_seconds(lambda: _run_ahead(runner, passes, PROFILED_CYCLES), bench.device)
    ms, launch_ms = (1e3 * seconds / cycles for seconds in best)
    busy_ms = 1e3 * busy / PROFILED_CYCLES
    return {
        "ms": ms,
        "launch_ms": launch_ms,
        "alone_ms": 1e3 * alone,
        "busy_ms": busy_ms,
        "busy_share": busy_ms / ms,
    }


def scheduled(runner: TorchModelRunner, shape: PassShape) -> list[Scheduled]:
    """A pass of random ids; sequences have pages of their own while there are enough."""
    info, page_size, num_pages = runner.info, runner.config.page_size, runner.config.pages
    rng = np.random.default_rng(0)
    kind = PassKind.DRAFT if shape.drafts else PassKind.CAUSAL
    each = -(-(shape.context_len + shape.rows) // page_size)
    items = []
    for index in range(shape.num_sequences):
        known, *ids = rng.integers(0, info.vocab_size, shape.rows).tolist()
        sequence = _sequence(runner, shape)
        table = np.arange(index * each, (index + 1) * each) % num_pages
        sequence.page_table, sequence.num_committed = table.tolist(), shape.context_len
        query = Query(
            stage=Stage.DRAFT if shape.drafts else Stage.VERIFY,
            kind=kind,
            token_ids=(known, *([info.mask_id] * len(ids) if shape.drafts else ids)),
            start=shape.context_len,
            answers=range(1 if shape.drafts else 0, shape.rows),
        )
        items.append(Scheduled(sequence, query))
    return items


def _sequence(runner: TorchModelRunner, shape: PassShape) -> Sequence:
    info = runner.info
    request = Request(
        "step", (0,) * (shape.context_len + 1), Mode.AUTOREGRESSIVE, max_tokens=shape.rows
    )
    context = DecodingContext(request, info.mask_id, frozenset(), block_size=1)
    return Sequence(request, ALL_MODES[request.mode](context), context.stop_ids, arrived_at=0.0)


def _alone_s(runner: TorchModelRunner, passes: list[list[Scheduled]]) -> float:
    """Each pass read before the next is launched."""
    begun = time.perf_counter()
    for items in passes:
        runner.read(runner.launch(items))
    return time.perf_counter() - begun


def _run_ahead(runner: TorchModelRunner, passes: list[list[Scheduled]], cycles: int) -> float:
    """Each pass launched before the one before it is read; the seconds that launching took."""
    launching, before = 0.0, None
    for items, _ in zip(cycle(passes), range(cycles * len(passes)), strict=False):
        begun = time.perf_counter()
        launched = runner.launch(items)
        launching += time.perf_counter() - begun
        if before is not None:
            runner.read(before)
        before = launched
    if before is not None:
        runner.read(before)
    return launching
