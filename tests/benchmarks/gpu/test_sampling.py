from collections.abc import Callable
from types import ModuleType

import pytest
import torch


@pytest.fixture
def sampling(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("sampling")


def test_every_case_is_checked_and_timed_at_every_size(sampling: ModuleType) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = sampling.run(device, sampling.TINY)
    assert len(found["rows"]) == 7 * len(sampling.TINY.num_rows)
    for row in found["rows"]:
        assert min(row["us"], row["launched_us"], row["torch_us"], row["gb_per_s"]) > 0
