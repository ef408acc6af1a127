from itertools import count
from typing import Any

import pytest
import torch

from trimode.replicas.calibration import axes, measure
from trimode.replicas.decoding.strategy import PassKind
from trimode.replicas.model_runner import TorchModelRunner


def test_a_profile_is_measured_of_a_model(tiny_model: Any, small_engine: Any) -> None:
    config = small_engine(max_sequences=4, max_step_tokens=64, max_block_size=8)
    calls: list[tuple[int, int]] = []
    profile = measure(
        TorchModelRunner(tiny_model(torch.float32), config),
        config,
        lambda done, total: calls.append((done, total)),
    )
    assert profile.num_sequences == (1, 4) and profile.rows_per_sequence == (1, 4, 8)
    assert profile.context_lens == (64,)  # 512 and 8 rows are beyond the model's positions
    assert 0 < profile.seconds(1, 1, 64, False) <= profile.seconds(8, 1, 64, False)
    assert calls == [(done, 48) for done in range(1, 49)]  # four sweeps of 12 points
    assert profile.model["dtype"] == "float32" and "torch" in profile.machine["versions"]


def test_passes_are_what_their_point_says(scripted_runner: Any, small_engine: Any) -> None:
    runner, ticks = scripted_runner(), count()
    config = small_engine(max_sequences=2, max_step_tokens=64, max_block_size=4)
    profile = measure(runner, config, clock=lambda: float(next(ticks)))
    assert profile.seconds(2, 2, 128, True) == 1.0  # a clock that ticks once a look
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


def test_passes_too_large_to_measure_are_prolonged(scripted_runner: Any, small_engine: Any) -> None:
    runner, ticks = scripted_runner(), count()
    config = small_engine(max_sequences=64)
    profile = measure(runner, config, clock=lambda: float(next(ticks)))
    assert max(len(p) * len(p[0].query.token_ids) for p in runner.passes) <= 512
    assert profile.seconds(64 * 32, 64, 64, False) == 1.0
