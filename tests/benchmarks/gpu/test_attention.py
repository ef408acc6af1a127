from collections.abc import Callable
from types import ModuleType

import pytest
import torch


@pytest.fixture
def attention(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("attention")


def test_every_shape_is_checked_and_timed_beside_others(attention: ModuleType) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = attention.run(device, attention.TINY)
    assert [row["kind"] for row in found["rows"]] == ["decode", "block", "prompt"]
    for row in found["rows"]:
        assert min(row["us"], row["gb_per_s"], row["tflop_per_s"]) > 0
        assert row["error"] < 0.01
        assert isinstance(row["others_us"].popitem()[1], float)
