"""From a folder to an engine: what a dtype's name stands for, and who has a governor."""

from pathlib import Path
from typing import Any

import pytest
import torch

from trimode.replicas import loading
from trimode.replicas.config import EngineConfig
from trimode.replicas.errors import CheckpointError, ConfigError
from trimode.replicas.loading import build_engine, torch_dtype
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.step_profile import StepProfile

SMALL = EngineConfig(num_pages=64, max_sequences=2)
PROFILE = StepProfile((1,), (1, 32), (0,), (((1.0,), (2.0,)),), (((1.0,), (2.0,)),))


@pytest.fixture
def governors(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The profile of every governor that is made; measuring one takes no time."""
    made: list[Any] = []
    monkeypatch.setattr(loading, "measure", lambda *_: "measured")
    monkeypatch.setattr(loading, "Governor", lambda profile, *_, **__: made.append(profile))
    return made


def test_dtypes_go_by_name() -> None:
    assert torch_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(CheckpointError, match=r"'int8'.*'bfloat16', 'float16', 'float32'"):
        torch_dtype("int8")


def test_an_engine_without_a_profile_measures_one(governors: list[Any]) -> None:
    build_engine(BUNDLED_CHECKPOINT, SMALL, governed=True)
    assert governors == ["measured"]


def test_an_engine_with_a_profile_uses_it(governors: list[Any], tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "profile.json")
    build_engine(BUNDLED_CHECKPOINT, SMALL, governed=True, profile=tmp_path / "profile.json")
    assert governors == [PROFILE]


def test_a_profile_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json"):
        build_engine(BUNDLED_CHECKPOINT, SMALL, governed=True, profile=tmp_path / "absent.json")


def test_who_speculates_nothing_or_is_told_so_has_no_governor(governors: list[Any]) -> None:
    build_engine(BUNDLED_CHECKPOINT, SMALL, governed=False)
    single = EngineConfig(num_pages=64, max_sequences=2, max_block_size=1)
    build_engine(BUNDLED_CHECKPOINT, single, governed=True)
    assert governors == []


def test_engines_run_on_the_cpu_in_float32_unless_told_otherwise() -> None:
    expected = "bfloat16" if torch.cuda.is_available() else "float32"
    assert build_engine(BUNDLED_CHECKPOINT, SMALL).info.dtype == expected


def test_pages_that_hold_no_block_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_pages is 2; a block of 32 .* take 3 pages of 16"):
        build_engine(BUNDLED_CHECKPOINT, EngineConfig(num_pages=2))
