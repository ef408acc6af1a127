import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

Script = Callable[[str], ModuleType]


@pytest.fixture
def measure(script: Script, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("measure")
    monkeypatch.setattr(module, "describe", lambda commit: {"machine": {"cpus": 2}})
    return module


@pytest.fixture
def sections(measure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """sections(name=work, ...): the script has these instead of its own."""

    # On a GPU a failure replaces the process.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def replace(**works: Callable[..., None]) -> None:
        kept = {name: measure.Section(1.0, work) for name, work in works.items()}
        monkeypatch.setattr(measure, "SECTIONS", kept)

    return replace


def load(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def fail(run: Any, document: Any) -> None:
    document.append("rows", {"n": 1})
    raise RuntimeError("no such instruction")


def count(run: Any, document: Any) -> None:
    document.append("rows", {"n": 2})


def test_a_section_that_fails_keeps_what_it_had_and_the_next_one_runs(
    measure: ModuleType, sections: Callable[..., None], tmp_path: Path
) -> None:
    sections(first=fail, second=count)
    measure.main(["--tiny", "--out", str(tmp_path)])
    first, second = load(tmp_path, "first"), load(tmp_path, "second")
    assert (first["status"], first["rows"]) == ("failed", [{"n": 1}])
    assert "no such instruction" in first["error"]
    assert (second["status"], second["rows"]) == ("done", [{"n": 2}])
    assert second["machine"] == {"cpus": 2}
    assert "first: not complete" in (tmp_path / "summary.txt").read_text()


def test_what_is_done_is_not_run_again_unless_asked_to(
    measure: ModuleType, sections: Callable[..., None], tmp_path: Path
) -> None:
    runs = []

    def once(run: Any, document: Any) -> None:
        runs.append(1)
        document.write(n=len(runs))

    sections(only=once)
    for more, expected in (([], 1), ([], 1), (["--again"], 2)):
        measure.main(["--tiny", "--out", str(tmp_path), *more])
        assert load(tmp_path, "only")["n"] == expected


def test_a_section_that_does_not_fit_what_is_left_is_not_begun(
    measure: ModuleType, sections: Callable[..., None], tmp_path: Path
) -> None:
    sections(only=count)
    measure.main(["--tiny", "--out", str(tmp_path), "--budget-s", "0.4"])
    assert not (tmp_path / "only.json").exists()


def test_a_section_is_cut_off_when_its_time_is_up(
    measure: ModuleType, sections: Callable[..., None], tmp_path: Path
) -> None:
    def endless(run: Any, document: Any) -> None:
        while True:
            document.append("rows", {})

    sections(only=endless)
    measure.main(["--tiny", "--out", str(tmp_path), "--budget-s", "0.6"])
    found = load(tmp_path, "only")
    assert found["status"] == "cut"
    assert found["rows"]


def test_figures_of_one_card_are_not_held_against_the_floor_of_another(script: Script) -> None:
    card_of = script("card").card_of
    floor = {"copy_gb_per_s": 3000.0, "matmul_tflop_per_s": 700.0}
    machine = {"gpu": {"name": "one"}}
    found = card_of({"floor": floor | {"machine": machine}}, machine)
    assert (found.bytes_per_s, found.flops_per_s) == (3e12, 7e14)
    with pytest.raises(ValueError, match="another"):
        card_of({"floor": floor | {"machine": machine}}, {"gpu": {"name": "another"}})


def test_after_a_failure_on_a_gpu_the_rest_runs_in_a_new_process(
    measure: ModuleType,
    sections: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Replaced(BaseException):
        """The process is another one from here on."""

    commands: list[list[str]] = []

    def replace_process(path: str, command: list[str]) -> None:
        commands.append(command)
        raise Replaced

    sections(first=fail, second=count, third=count)
    monkeypatch.setattr(measure.os, "execv", replace_process)
    run = measure.Run(measure.Workbench(torch.device("cuda")), tmp_path)
    monkeypatch.setattr(measure.Workbench, "release", lambda bench: None)
    with pytest.raises(Replaced):
        measure.run_sections(run, ["first", "second", "third"], 100, again=False)
    (command,) = commands
    assert command[command.index("--sections") + 1] == "second,third"
    assert load(tmp_path, "first")["status"] == "failed"
    assert not (tmp_path / "second.json").exists()


def test_a_section_that_looks_at_no_clock_is_ended(measure: ModuleType, tmp_path: Path) -> None:
    document = measure.Document(tmp_path / "x.json", {})
    ended = threading.Event()
    with measure.overrun_watch(0.01, document, ended.set):
        assert ended.wait(10)
    assert load(tmp_path, "x")["status"] == "overran"
    in_time = measure.Document(tmp_path / "y.json", {})
    with measure.overrun_watch(0.04, in_time, ended.clear):
        pass
    time.sleep(0.1)
    assert ended.is_set()


def test_an_unknown_section_is_refused(
    measure: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        measure.main(["--tiny", "--out", str(tmp_path), "--sections", "steps-9B"])
    assert "steps-9B" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_section_runs(measure: ModuleType, tmp_path: Path) -> None:
    names = [name for name in measure.SECTIONS if name != "tests"]
    measure.main(["--tiny", "--out", str(tmp_path), "--sections", ",".join(names)])
    statuses = {name: load(tmp_path, name)["status"] for name in names}
    assert set(statuses.values()) == {"done"}
    written = (tmp_path / "summary.txt").read_text()
    assert "8B: 1 users, governor" in written


def test_the_first_sections_run_and_give_figures_beside_aims(
    measure: ModuleType, tmp_path: Path
) -> None:
    measure.main(["--tiny", "--out", str(tmp_path), "--sections", "floor,steps-8B"])
    rows = load(tmp_path, "steps-8B")["rows"]
    assert {(row["sequences"], row["block"]) for row in rows} == {(1, 1), (1, 8), (2, 1), (2, 8)}
    for row in rows:
        assert min(row["ms"], row["busy_ms"], row["floor_ms"], row["over_weight_read"]) > 0
    assert "AR step / weight read" in (tmp_path / "summary.txt").read_text()
