from collections.abc import Callable
from types import ModuleType

import pytest
import torch


@pytest.fixture
def elementwise(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("elementwise")


def test_every_kernel_is_checked_and_timed_at_every_size(elementwise: ModuleType) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = elementwise.run(device, elementwise.TINY)
    assert len(found["rows"]) == 5 * len(elementwise.TINY.num_tokens)
    for row in found["rows"]:
        assert min(row["us"], row["torch_us"], row["gb_per_s"]) > 0
        assert row["error"] < 0.01
