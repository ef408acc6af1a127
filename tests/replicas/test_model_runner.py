from collections.abc import Callable
from typing import Any

import pytest
import torch

from trimode.replicas.config import EngineConfig
from trimode.replicas.engine import Engine
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.types import Mode


def test_info_tells_what_is_served(
    tiny_model: Callable[..., NemotronLabsDiffusionModel], small_engine: Any
) -> None:
    info = TorchModelRunner(tiny_model(torch.float64), small_engine()).info
    assert (info.vocab_size, info.max_positions, info.block_size) == (64, 512, 32)
    assert (info.eos_id, info.mask_id, info.has_draft_adapter) == (2, 3, True)
    assert info.dtype == "float64"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", list(Mode)[1:])
def test_every_mode_runs_in_the_dtypes_of_real_weights(
    tiny_model: Any, make_request: Any, drain: Any, dtype: torch.dtype, mode: Mode
) -> None:
    config = EngineConfig(num_pages=16)
    engine = Engine(TorchModelRunner(tiny_model(dtype), config), config)
    got = drain(engine, [make_request(mode, max_tokens=12, temperature=0.7, block_size=8)])["r"]
    assert len(got.token_ids) == 12 or got.token_ids[-1] == 2
    assert 3 not in got.token_ids


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_chunk_that_asks_nothing_is_answered_with_nothing(
    tiny_model: Any, make_request: Any, small_engine: Any, dtype: torch.dtype
) -> None:
    config = small_engine(max_step_tokens=12, max_block_size=8)
    engine = Engine(TorchModelRunner(tiny_model(dtype), config), config)
    engine.add(make_request(num_prompt=30, max_tokens=1))
    assert [len(engine.step()) for _ in range(3)] == [0, 0, 1]
