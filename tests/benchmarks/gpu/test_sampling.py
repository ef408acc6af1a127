import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def sampling() -> ModuleType:
    path = Path(__file__).with_name("sampling.py")
    spec = importlib.util.spec_from_file_location("trimode_benchmark_sampling", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))  # as for a script
        spec.loader.exec_module(module)
    return module


def test_every_case_is_checked_and_timed_at_every_size(sampling: ModuleType) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = sampling.run(device, sampling.TINY)
    assert len(found["rows"]) == 7 * len(sampling.TINY.num_rows)
    for row in found["rows"]:
        assert min(row["us"], row["launched_us"], row["torch_us"], row["gb_per_s"]) > 0
