"""A model as it was named becomes a folder; a terminal sees how far that is."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest

from trimode.cluster import model_folder
from trimode.cluster.model_folder import fetch
from trimode.replicas.model.source import HubModel

MODEL = HubModel("org/small", "0" * 40)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A download that is told of twice."""

    def local_folder(source: Any, report: Any) -> Path:
        report("downloading", 1, 2)
        report("checking", 2, 2)
        return tmp_path

    monkeypatch.setattr(model_folder, "local_folder", local_folder)


def test_a_folder_is_there_and_shows_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch(tmp_path) == tmp_path
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("downloads")
def test_a_terminal_sees_what_is_done_to_which_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert fetch(MODEL) == tmp_path
    assert "checking small" in terminal.getvalue()


@pytest.mark.usefixtures("downloads")
def test_a_log_sees_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch(MODEL) == tmp_path
    assert capsys.readouterr() == ("", "")
