from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from trimode.replicas.model.config import ModelConfig
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel

Script = Callable[[str], ModuleType]


@pytest.fixture
def floors_of(script: Script) -> Callable[..., Any]:
    """floors_of(size, weight_itemsize): on a card of 3 TB/s and 600 TFLOP/s."""
    floors = script("floors")

    def of(size: str, weight_itemsize: int = 2) -> Any:
        config = ModelConfig.from_dict(script("workbench").raw_config(size))
        return floors.Floors(config, floors.Card(3e12, 600e12), weight_itemsize)

    return of


@pytest.mark.parametrize(
    ("size", "parameters", "weight_gb", "kv_bytes"),
    [("3B", 3_831_659_520, 6.86, 106_496), ("8B", 8_489_553_920, 15.91, 139_264),
     ("14B", 13_506_073_600, 25.67, 163_840)],
)  # fmt: skip
def test_the_published_sizes_have_their_published_parameters_and_bytes(
    script: Script, floors_of: Callable[..., Any], size: str,
    parameters: int, weight_gb: float, kv_bytes: int,
) -> None:  # fmt: skip
    floors = floors_of(size)
    with torch.device("meta"):
        model = NemotronLabsDiffusionModel(floors.config)
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert floors.weight_bytes / 1e9 == pytest.approx(weight_gb, abs=0.01)
    assert floors.kv_bytes_per_token == kv_bytes


def test_one_row_is_bound_by_reading_the_weights(
    script: Script, floors_of: Callable[..., Any]
) -> None:
    floors = floors_of("8B")
    shape = script("floors").PassShape(1, 1, 512, drafts=False)
    assert floors.seconds(shape) == pytest.approx(floors.weight_read_s, rel=0.01)


def test_many_rows_are_bound_by_arithmetic(script: Script, floors_of: Callable[..., Any]) -> None:
    floors = floors_of("8B")
    shape = script("floors").PassShape(128, 32, 512, drafts=True)
    assert floors.seconds(shape) == pytest.approx(floors.num_flops(shape) / 600e12)
    assert floors.num_flops(shape) > 4096 * 2 * 7.9e9


def test_float8_weights_are_half_the_bytes_but_for_the_head(
    script: Script, floors_of: Callable[..., Any]
) -> None:
    wide, narrow = floors_of("8B"), floors_of("8B", 1)
    assert wide.weight_bytes - narrow.weight_bytes == wide.decoder_weights


def test_drafts_read_the_adapter_too(script: Script, floors_of: Callable[..., Any]) -> None:
    floors = floors_of("8B")
    of = script("floors").PassShape
    added = floors.num_bytes(of(1, 8, 512, True)) - floors.num_bytes(of(1, 8, 512, False))
    assert added == 2 * 35_651_584  # 35.7M parameters, as published
