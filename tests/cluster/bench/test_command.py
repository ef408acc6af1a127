"""`trimode bench` in process, end to end on the bundled checkpoint."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trimode.cluster.__main__ import app
from trimode.cluster.bench.workload import load_prompts, poisson_arrivals
from trimode.replicas.errors import ConfigError, InvalidRequest

SMALL = ["--requests", "2", "--max-tokens", "6"]


def bench(*options: str) -> None:
    result = CliRunner().invoke(app, ["bench", *SMALL, *options])
    if result.exception is not None:
        raise result.exception


def test_a_closed_loop_writes_figures_of_every_setting_and_load_and_a_picture(
    tmp_path: Path,
) -> None:
    out = tmp_path / "b.json"
    bench("--settings", "ar,speculation-8", "--concurrency", "1,2", "--out", str(out))
    settings = json.loads(out.read_text())["settings"]
    assert {name: list(rows) for name, rows in settings.items()} == {
        "ar": ["1", "2"], "speculation-8": ["1", "2"],
    }  # fmt: skip
    assert settings["ar"]["1"]["tokens_per_forward"] == 1
    assert settings["speculation-8"]["2"]["requests"] == 4
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_an_open_loop_sends_all_requests(tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    bench("--settings", "ar", "--rate", "50", "--out", str(out))
    document = json.loads(out.read_text())
    assert document["loop"] == "open"
    assert document["settings"]["ar"]["50/s"]["requests"] == 2


def test_an_unknown_setting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'fast' is not one of ar, diffusion"):
        bench("--settings", "fast")


def test_prompts_are_lines_or_json_lines(tmp_path: Path) -> None:
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("a\n\nb\n")
    lines.write_text('"a\\nb"\n{"prompt": "c"}\n')
    assert load_prompts(text) == ("a", "b")
    assert load_prompts(lines) == ("a\nb", "c")


def test_a_broken_prompt_file_is_named_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('"a"\n{"text": "c"}\n')
    with pytest.raises(InvalidRequest, match=r"p\.jsonl:2"):
        load_prompts(path)


def test_arrivals_come_at_the_rate_and_repeat_with_the_seed() -> None:
    arrivals = poisson_arrivals(20, 4000, seed=1)
    assert arrivals == sorted(arrivals) == poisson_arrivals(20, 4000, seed=1)
    assert arrivals[-1] == pytest.approx(200, rel=0.1)
