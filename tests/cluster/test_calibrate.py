from pathlib import Path
from typing import Any

import pytest

from trimode.cluster import calibrate
from trimode.replicas.errors import ConfigError
from trimode.replicas.step_profile import StepProfile

PROFILE = StepProfile(
    (1, 4), (1, 8), (0, 64), (((1.0, 2.0), (3.0, 4.0)),) * 2, (((2.0, 2.0), (4.0, 4.0)),) * 2
)


def test_a_profile_and_its_picture_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "_measure", lambda *_: PROFILE)
    calibrate.run(tmp_path, "auto", tmp_path / "profile.json", 5.0)
    assert StepProfile.load(tmp_path / "profile.json") == PROFILE
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_is_what_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def build_runner(*args: Any, **settings: Any) -> None:
        asked.append((settings["dtype"], settings["quantization"]))

    monkeypatch.setattr(calibrate, "build_runner", build_runner)
    monkeypatch.setattr(calibrate, "measure", lambda *_: PROFILE)
    calibrate.run(tmp_path, "bfloat16", tmp_path / "profile.json", 5.0, "fp8")
    assert asked == [("bfloat16", "fp8")]


@pytest.mark.parametrize("out", ["missing/profile.json", "profile.txt"])
def test_a_place_that_cannot_be_written_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    monkeypatch.setattr(calibrate, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ConfigError, match="--out"):
        calibrate.run(tmp_path, "auto", tmp_path / out, 5.0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_that_is_none_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(calibrate, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(ConfigError, match="--seconds must be over 0"):
        calibrate.run(tmp_path, "auto", tmp_path / "profile.json", seconds)
