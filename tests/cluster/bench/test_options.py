"""What is refused before anything slow starts, and what the options mean."""

import math
from pathlib import Path
from typing import Any

import pytest

from trimode.cluster.bench.options import Options
from trimode.cluster.bench.prompt_files import TraceLine
from trimode.cluster.bench.settings import (
    AR,
    AUTO,
    CLUSTER_SETTINGS,
    ENGINE_SETTINGS,
    SPECULATION,
)
from trimode.cluster.bench.workload import Sampling
from trimode.replicas.errors import ConfigError


def options(**fields: Any) -> Options:
    defaults: dict[str, Any] = {
        "model": Path("m"), "out": Path("b.json"), "sampling": Sampling(max_tokens=8),
    }  # fmt: skip
    return Options(**(defaults | fields))


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize(
    ("field", "option", "listed"),
    [
        ("rates", "--rate", True),
        ("concurrencies", "--concurrency", True),
        ("requests", "--requests", False),
        ("repeats", "--repeats", False),
        ("threads", "--threads", False),
        ("goodput_ttft_ms", "--goodput-ttft-ms", False),
        ("goodput_tpot_ms", "--goodput-tpot-ms", False),
    ],
)
def test_a_number_that_cannot_be_is_refused_by_name(
    field: str, option: str, listed: bool, value: float
) -> None:
    with pytest.raises(
        ConfigError, match=f"{option} must be a finite number above 0.*is {value:g}"
    ):
        options(**{field: (1, value) if listed else value})


@pytest.mark.parametrize(
    ("sampling", "option"),
    [
        (Sampling(max_tokens=0), "--max-tokens"),
        (Sampling(8, temperature=math.nan), "--temperature"),
        (Sampling(8, temperature=11), "--temperature"),
        (Sampling(8, seed=-1), "--seed"),
        (Sampling(8, seed=2**63), "--seed"),
    ],
)
def test_sampling_that_cannot_be_is_refused_by_name(sampling: Sampling, option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        options(sampling=sampling)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"concurrencies": (2000,)}, "--concurrency .* at most 1024, is 2000"),
        ({"concurrencies": (1,), "rates": (1.0,)}, "one of --concurrency, --rate and --trace"),
        ({"rates": (1.0,), "trace": (TraceLine(0, "a"),)}, "one of"),
        ({"out": Path("b.png")}, r"--out must end in \.json"),
        ({"settings": (AUTO,)}, "give --address"),
        ({"address": "a:1", "threads": 1}, "--threads is for an engine in this process"),
        ({"address": "a:1", "profile": Path("p")}, "--profile is for"),
        ({"address": "a:1", "quantization": "fp8"}, "--quantization is for"),
        ({"against": "transformers", "quantization": "fp8"}, "no --quantization"),
        ({"address": "a:1", "against": "transformers"}, "--against is for"),
        ({"against": "others"}, "'others' is not transformers"),
        ({"against": "transformers", "rates": (1.0,)}, "closed loop"),
        ({"against": "transformers", "sampling": Sampling(8, temperature=1)}, "greedy"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        options(**fields)


def test_without_settings_all_are_measured_that_can_be() -> None:
    assert options().settings_for(32) == ENGINE_SETTINGS
    assert options(address="a:1").settings_for(32) == CLUSTER_SETTINGS
    assert options(against="transformers").settings_for(32) == (AR,)
    names = [setting.name for setting in options().settings_for(8)]
    assert names == ["ar", "diffusion", "speculation-4", "speculation-8", "governor"]
    assert options(address="a:1").settings_for(1) == (AR, AUTO)


def test_a_setting_with_blocks_that_nobody_runs_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"speculation-32 needs blocks of 32; .* at most 16"):
        options(settings=(SPECULATION[-1],)).settings_for(16)


def test_loads_ascend_and_are_closed_unless_told_otherwise() -> None:
    assert [load.label for load in options().loads()] == ["1", "2", "4", "8", "16", "32"]
    assert [load.label for load in options(concurrencies=(4, 1, 4)).loads()] == ["1", "4"]
    assert [load.label for load in options(rates=(2.0, 0.5)).loads()] == ["0.5/s", "2/s"]
    assert [load.label for load in options(trace=(TraceLine(0, "a"),)).loads()] == ["trace"]
    assert (options().loop, options(rates=(1.0,)).loop) == ("closed", "open")


def test_the_system_text_stands_before_every_prompt() -> None:
    (load,) = options(system="S ", prompts=("a", "b"), rates=(1.0,), requests=2).loads()
    assert [ask.prompt for ask in load.asks] == ["S a", "S b"]
