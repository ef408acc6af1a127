"""`trimode check`: what a checkpoint holds, or one line that says what is wrong with it."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trimode.cluster import check
from trimode.cluster.__main__ import app
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.model.source import HubModel


def test_a_good_checkpoint_is_described() -> None:
    result = CliRunner().invoke(app, ["check", str(BUNDLED_CHECKPOINT)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "can be served" in result.output
    for line in (
        "layers                      6",
        "heads / KV heads / head size  4 / 2 / 64",
        "KV per token, 16 bits         3,072 B",
        "chat template                 none",
        "rank 64",
    ):
        assert " ".join(line.split()) in " ".join(result.output.split())


def test_a_bad_checkpoint_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_CHECKPOINT, folder)
    (folder / "linear_spec_lora" / "adapter_model.safetensors").unlink()
    result = subprocess.run(
        [sys.executable, "-m", "trimode.cluster", "check", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (1, "")
    missing = folder / "linear_spec_lora" / "adapter_model.safetensors"
    assert result.stderr == f"trimode: {missing} is missing\n"


def test_a_checkpoint_goes_by_the_name_of_a_hub_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def fetch(source: Any) -> Path:
        asked.append(source)
        return BUNDLED_CHECKPOINT

    monkeypatch.setattr(check, "fetch", fetch)
    result = CliRunner().invoke(app, ["check", f"org/model@{'a' * 40}"])
    assert result.exit_code == 0, result.output
    assert asked == [HubModel("org/model", "a" * 40)]
    assert "model can be served" in result.output
