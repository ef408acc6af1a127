"""A small grid of pass times, within a budget."""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from trimode.replicas.calibration import Point, axes, measure, plan
from trimode.replicas.decoding.strategy import PassKind
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.scheduled import Answers, Scheduled

# seconds of (rows, slots read by all sequences, rows that draft)
Cost = Callable[[int, int, int], float]


class TimedRunner:
    """A runner whose passes take virtual seconds, and the clock that shows them."""

    def __init__(self, info: Any, cost: Cost, noise: float = 0.0) -> None:
        self.info = replace(info, max_positions=4096)
        self.now = 0.0
        self.passes: list[list[Scheduled]] = []
        self._cost = cost
        self._random = np.random.default_rng(0)
        self._noise = noise

    def launch(self, scheduled: SequenceOf[Scheduled]) -> list[Answers]:
        self.passes.append(list(scheduled))
        queries = [item.query for item in scheduled]
        rows = [len(query.token_ids) for query in queries]
        drafts = sum(r for r, q in zip(rows, queries, strict=True) if q.kind is PassKind.DRAFT)
        seconds = self._cost(sum(rows), sum(query.start for query in queries), drafts)
        self.now += seconds * (1 + self._noise * float(self._random.exponential()))
        return [Answers([0] * len(query.answers), []) for query in queries]

    def read(self, launched: list[Answers]) -> list[Answers]:
        return launched

    def clock(self) -> float:
        return self.now


class AheadRunner(TimedRunner):
    """A device beside the host: a launch takes the host 2 ms, the pass the device as long as it
    costs.
    """

    def __init__(self, info: Any, cost: Cost) -> None:
        super().__init__(info, cost)
        self._free_at = 0.0  # when the device has done all passes

    def launch(self, scheduled: SequenceOf[Scheduled]) -> Any:
        host = self.now + 2e-3
        answers = super().launch(scheduled)  # moves the clock on by what the pass costs
        took, self.now = self.now - (host - 2e-3), host
        self._free_at = max(self._free_at, host) + took
        return answers, self._free_at

    def read(self, launched: Any) -> list[Answers]:
        answers, done_at = launched
        self.now = max(self.now, done_at)
        return answers


def cpu_like(rows: int, slots: int, drafts: int) -> float:
    return 1e-3 + 2e-4 * rows + 2e-6 * slots + 5e-5 * drafts


def gpu_like(rows: int, slots: int, drafts: int) -> float:
    """Bound by memory up to 256 rows, then by arithmetic."""
    return 8e-3 * max(1.0, rows / 256) + 2e-8 * slots + 1e-6 * drafts


@pytest.fixture
def timed(scripted_runner: Any) -> Callable[..., TimedRunner]:
    return lambda *args: TimedRunner(scripted_runner().info, *args)


def test_a_profile_is_measured_of_a_model(tiny_model: Any, small_engine: Any) -> None:
    config = small_engine(max_sequences=4, max_step_tokens=64, max_block_size=8)
    calls: list[tuple[int, int]] = []
    profile = measure(
        TorchModelRunner(tiny_model(torch.float32), config),
        config,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert profile.num_sequences == (1, 2, 4) and profile.rows_per_sequence == (1, 4, 8)
    assert profile.context_lens == (64,)  # 512 and 8 rows are beyond the model's positions
    assert 0 < profile.seconds(1, 1, 64, False) <= profile.seconds(8, 1, 64, False)
    assert calls == [(done, 90) for done in range(1, 91)]  # five sweeps of 18 points
    assert profile.model["dtype"] == "float32" and "torch" in profile.machine["versions"]


def test_passes_are_what_their_point_says(timed: Any, small_engine: Any) -> None:
    runner = timed(cpu_like)
    config = small_engine(max_sequences=2, max_step_tokens=64, max_block_size=4, num_pages=64)
    measure(runner, config, clock=runner.clock)
    shapes = {
        (len(items), len(items[0].query.token_ids), items[0].query.kind, items[0].query.start)
        for items in runner.passes
        if items[0].query.start > 0
    }
    kinds = (PassKind.CAUSAL, PassKind.DRAFT)
    assert shapes == {(n, r, kind, 64) for n in (1, 2) for r in (1, 4) for kind in kinds}
    for items in runner.passes:
        for item in items:
            last = item.query.start + len(item.query.token_ids)
            assert len(item.sequence.page_table) * config.page_size >= last


def test_no_page_is_read_before_it_was_written(timed: Any, small_engine: Any) -> None:
    runner = timed(cpu_like)
    measure(runner, small_engine(max_sequences=8), clock=runner.clock)
    written: set[int] = set()
    for items in runner.passes:
        for item in items:
            if item.query.start == 0:
                written |= set(item.sequence.page_table)
            assert set(item.sequence.page_table) <= written


@pytest.mark.parametrize("block_size", [1, 4, 32])
@pytest.mark.parametrize("max_sequences", [1, 3, 64])
def test_the_grid_fits_the_engine(
    scripted_runner: Any, small_engine: Any, block_size: int, max_sequences: int
) -> None:
    config = small_engine(max_sequences=max_sequences, max_block_size=block_size, num_pages=8)
    sequences, rows, contexts = axes(scripted_runner().info, config)
    assert sequences[0] == 1 and sequences[-1] == max_sequences
    assert rows[0] == 1 and rows[-1] == block_size
    assert contexts == (0,)  # a cache of 32 slots has room for no more


def test_cheap_passes_are_measured_first(small_engine: Any) -> None:
    points = plan((1, 4, 16, 64), (1, 4, 8, 16, 32), (64, 512), small_engine(max_step_tokens=2048))
    assert points[:2] == [Point(1, 1, 64, False), Point(1, 1, 64, True)]
    assert max(point.num_sequences * point.rows for point in points) == 512
    assert len(points) < 60


@pytest.mark.parametrize("cost", [cpu_like, gpu_like])
@pytest.mark.parametrize("seconds", [0.5, 2.0, 5.0])
def test_it_keeps_to_its_seconds(timed: Any, small_engine: Any, cost: Cost, seconds: float) -> None:
    runner = timed(cost)
    measure(runner, small_engine(max_step_tokens=2048, num_pages=1024), seconds, clock=runner.clock)
    assert runner.now < 1.1 * seconds


def test_a_slow_model_has_a_profile_of_few_passes(timed: Any, small_engine: Any) -> None:
    runner = timed(lambda rows, slots, drafts: 1.0 + rows)
    profile = measure(runner, small_engine(num_pages=1024), clock=runner.clock)
    assert profile.num_sequences == (1,) and profile.context_lens == (64,)
    assert profile.seconds(32, 1, 64, True) == pytest.approx(33)


@pytest.mark.parametrize(("cost", "seconds"), [(cpu_like, 5.0), (gpu_like, 5.0), (cpu_like, 1.0)])
@pytest.mark.parametrize(("noise", "error"), [(0.0, 0.02), (0.1, 0.5)])
def test_random_mixes_take_what_the_profile_says(
    timed: Any, small_engine: Any, cost: Cost, seconds: float, noise: float, error: float
) -> None:
    runner = timed(cost, noise)
    config = small_engine(max_sequences=64, max_step_tokens=2048, num_pages=4096)
    profile = measure(runner, config, seconds, clock=runner.clock)
    random, errors = np.random.default_rng(3), []
    for _ in range(200):
        sequences = int(random.integers(1, 65))
        rows = int(random.choice([1, 4, 8, 16, 32], sequences).sum())
        slots = int(random.integers(10, 500, sequences).sum())
        drafts = bool(random.integers(2))
        real = cost(rows, slots, rows if drafts else 0)
        errors.append(profile.seconds(rows, sequences, slots, drafts) / real - 1)
    assert abs(float(np.median(errors))) < error / 2
    assert np.abs(errors).max() < error


def test_a_longer_context_that_was_faster_is_noise(timed: Any, small_engine: Any) -> None:
    runner = timed(lambda rows, slots, drafts: 1e-3 + 1e-5 * rows - 1e-9 * slots)
    profile = measure(runner, small_engine(num_pages=1024), clock=runner.clock)
    assert profile.seconds(1, 1, 400, False) >= profile.seconds(1, 1, 64, False)


def test_passes_that_are_launched_ahead_are_measured_so(
    scripted_runner: Any, small_engine: Any
) -> None:
    """The host's share of a pass is hidden behind the device's."""
    runner = AheadRunner(scripted_runner().info, gpu_like)
    config = small_engine(num_pages=1024, max_step_tokens=2048, launch_ahead=True)
    profile = measure(runner, config, clock=runner.clock)
    assert profile.seconds(1, 1, 64, False) == pytest.approx(gpu_like(1, 64, 0))
    assert profile.seconds(32, 1, 64, True) == pytest.approx(gpu_like(32, 64, 31), rel=1e-2)
