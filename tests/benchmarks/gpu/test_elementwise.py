import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def elementwise() -> ModuleType:
    path = Path(__file__).with_name("elementwise.py")
    spec = importlib.util.spec_from_file_location("trimode_benchmark_elementwise", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kernel_is_checked_and_timed_at_every_size(elementwise: ModuleType) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = elementwise.run(device, elementwise.TINY)
    assert len(found["rows"]) == 5 * len(elementwise.TINY.num_tokens)
    for row in found["rows"]:
        assert min(row["us"], row["torch_us"], row["gb_per_s"]) > 0
        assert row["error"] < 0.01
