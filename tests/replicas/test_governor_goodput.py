"""The governor against fixed block sizes, in simulated time (tests/benchmarks/governor.py)."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from trimode.replicas.step_profile import StepProfile

COUNTS, ROWS = (1, 4, 16, 64), (1, 4, 8, 16, 32)


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "governor.py"
    spec = importlib.util.spec_from_file_location("trimode_governor_benchmark", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for themselves
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["memory_bound", "compute_bound"])
def profile(request: pytest.FixtureRequest, bench: ModuleType) -> StepProfile:
    if request.param == "memory_bound":
        return bench.memory_bound()
    grid = tuple(tuple((3e-3 + 4e-4 * n * r,) for r in ROWS) for n in COUNTS)
    return StepProfile(COUNTS, ROWS, (64,), grid, grid)


@pytest.mark.parametrize("count", [1, 8, 32])
@pytest.mark.parametrize("text", ["0.00 kept", "0.60 kept", "0.90 kept", "mixed", "changing"])
def test_no_fixed_size_serves_a_population_better(
    bench: ModuleType, profile: StepProfile, text: str, count: int
) -> None:
    """Within what probes, hysteresis and a short run cost; longer runs are in docs/governor.md."""
    texts = {each.name: each for each in bench.TEXTS}
    best, _ = bench.best_fixed(profile, texts[text], count, 1500)
    run = bench.governed(profile, texts[text], count, tokens=1500)
    assert run.goodput > best * (0.9 if text == "changing" else 0.94)


def test_each_sequence_of_a_mixed_population_gets_what_suits_it(bench: ModuleType) -> None:
    texts = {each.name: each for each in bench.TEXTS}
    best, _ = bench.best_fixed(bench.memory_bound(), texts["mixed"], 16, 2500)
    run = bench.governed(bench.memory_bound(), texts["mixed"], 16, tokens=2500)
    assert run.goodput > 1.05 * best and len(run.rounds) > 2


@pytest.mark.parametrize("prior", [0.1, 0.95])
def test_a_wrong_prior_is_outgrown(bench: ModuleType, profile: StepProfile, prior: float) -> None:
    texts = {each.name: each for each in bench.TEXTS}
    text = texts["0.90 kept" if prior < 0.5 else "0.00 kept"]
    best, _ = bench.best_fixed(profile, text, 4, 6000)
    assert bench.governed(profile, text, 4, (prior,) * 4, 6000).goodput > 0.9 * best
