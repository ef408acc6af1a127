"""The GPU measurement of the products runs, checks before it times, and finds what is wrong."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from torch import Tensor


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "gpu" / "linear.py"
    spec = importlib.util.spec_from_file_location("trimode_benchmark_linear", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_form_is_measured_at_every_size(benchmark: ModuleType) -> None:
    result = benchmark.run("cpu")
    assert result["tiny"]["rows"].keys() == {"1", "3"}
    for forms in result["tiny"]["rows"].values():
        assert forms.keys() == {"cublas", "fp8", "batch_invariant", "batch_invariant_fp8"}
        assert all(figures["us"] > 0 for figures in forms.values())


def test_a_wrong_product_is_not_timed(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(x: Tensor, weight: object) -> Tensor:
        return benchmark.cublas(x, weight) * 1.01

    monkeypatch.setattr(benchmark, "FORMS", (wrong,))
    with pytest.raises(RuntimeError, match="wrong is off by"):
        benchmark.run("cpu")
