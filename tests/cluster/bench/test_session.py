"""`trimode bench` in process, end to end on the bundled checkpoint."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trimode.cluster.__main__ import app
from trimode.replicas.errors import ConfigError, InvalidRequest

SMALL = ["--requests", "2", "--max-tokens", "6"]


def bench(*options: str) -> str:
    result = CliRunner().invoke(app, ["bench", *SMALL, *options])
    if result.exception is not None:
        raise result.exception
    return result.output


def document(tmp_path: Path, *options: str) -> dict[str, Any]:
    out = tmp_path / "b.json"
    bench(*options, "--out", str(out))
    parsed: dict[str, Any] = json.loads(out.read_text())
    return parsed


def test_a_closed_loop_writes_figures_of_every_setting_and_load_and_a_picture(
    tmp_path: Path,
) -> None:
    written = document(
        tmp_path, "--settings", "ar,speculation-8", "--concurrency", "1,2",
        "--repeats", "2", "--threads", "1",
    )  # fmt: skip
    settings = written["settings"]
    assert {name: list(rows) for name, rows in settings.items()} == {
        "ar": ["1", "2"], "speculation-8": ["1", "2"],
    }  # fmt: skip
    assert settings["ar"]["1"]["tokens_per_forward"] == 1
    assert settings["speculation-8"]["2"]["requests"] == 4
    row = settings["ar"]["1"]
    assert row["tokens_per_s"] == min(row["tokens_per_s_of_repeats"])
    assert (written["repeats"], written["threads"], written["dtype"]) == (2, 1, "float32")
    assert set(written["machine"]["versions"]) == {"torch", "trimode"}
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_a_quantised_model_is_measured_and_named(tmp_path: Path) -> None:
    written = document(
        tmp_path, "--settings", "ar", "--concurrency", "1", "--quantization", "fp8",
        "--threads", "1",
    )  # fmt: skip
    assert (written["dtype"], written["quantization"]) == ("float32", "fp8")


def test_an_open_loop_sends_all_requests(tmp_path: Path) -> None:
    written = document(tmp_path, "--settings", "ar", "--rate", "50")
    assert written["loop"] == "open"
    assert written["settings"]["ar"]["50/s"]["requests"] == 2


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text(
        '{"at": 0, "prompt": "def a"}\n{"at": 0.1, "prompt": "def b", "max_tokens": 2}'
    )
    written = document(tmp_path, "--settings", "ar", "--ignore-eos", "--trace", str(trace))
    row = written["settings"]["ar"]["trace"]
    assert (row["requests"], row["tokens"], written["prompts"]) == (2, 6 + 2, 2)


def test_a_system_text_is_found_in_the_prefix_cache(tmp_path: Path) -> None:
    system = tmp_path / "s.txt"
    system.write_text("# A module of the standard library, and what it is for.\n" * 2)
    written = document(
        tmp_path, "--settings", "ar", "--concurrency", "1", "--system-file", str(system)
    )
    assert written["settings"]["ar"]["1"]["prefix_hit_rate"] > 0.2
    assert written["system_characters"] == len(system.read_text())


def test_a_comparison_with_transformers_is_written_and_printed(tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    printed = bench("--against", "transformers", "--concurrency", "1,2", "--out", str(out))
    written = json.loads(out.read_text())
    assert list(written["settings"]) == ["ar", "transformers"]
    assert list(written["against"]["ratios"]) == ["1", "2"]
    assert written["against"]["equal_tokens"] == [6, 6]
    assert "transformers" in written["machine"]["versions"]
    assert "2 of 2 greedy outputs are those of transformers" in printed


def test_transformers_that_is_not_installed_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "trimode.cluster.bench.transformers_baseline", raising=False)
    with pytest.raises(ConfigError, match="pip install transformers"):
        bench("--against", "transformers", "--out", str(tmp_path / "b.json"))


def test_a_request_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="2048 positions"):
        bench("--max-tokens", "5000", "--out", str(tmp_path / "b.json"))
