"""`trimode generate` in process: output for people, output for programs, mistakes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trimode.cluster.__main__ import app
from trimode.replicas.errors import CheckpointError, InvalidRequest
from trimode.replicas.model.config import BUNDLED_CHECKPOINT

PROMPT = ["--prompt", "def __init__(self", "--max-tokens", "16"]


def generate(*options: str) -> str:
    result = CliRunner().invoke(app, ["generate", *options])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def document(*options: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(generate("--json", "--dtype", "float32", *options))
    return parsed


@pytest.mark.parametrize("mode", ["ar", "diffusion", "speculation"])
def test_json_holds_one_object_with_the_account(mode: str) -> None:
    answer = document(*PROMPT, "--mode", mode)
    assert set(answer) == {
        "token_ids", "text", "finish_reason", "mode", "forwards", "accepted", "timings",
    }  # fmt: skip
    assert (answer["mode"], answer["finish_reason"]) == (mode, "length")
    assert len(answer["token_ids"]) == 16
    assert bool(answer["accepted"]) == (mode == "speculation")


def test_speculation_gives_the_ids_of_ar_with_and_without_adapter_and_threshold() -> None:
    wanted = document(*PROMPT, "--mode", "ar")["token_ids"]
    for options in ([], ["--no-adapter"], ["--threshold", "0.6"], ["--block-size", "8"]):
        assert document(*PROMPT, "--mode", "speculation", *options)["token_ids"] == wanted


def test_ar_takes_one_forward_a_token() -> None:
    assert document(*PROMPT, "--mode", "ar")["forwards"] == 16


def test_speculation_takes_two_forwards_a_round_and_one_for_the_prefill() -> None:
    answer = document(*PROMPT, "--mode", "speculation")
    assert answer["forwards"] == 1 + 2 * len(answer["accepted"])


def test_a_seed_makes_a_sampled_output_repeatable() -> None:
    options = [*PROMPT, "--temperature", "0.9", "--seed", "5"]
    assert document(*options)["token_ids"] == document(*options)["token_ids"]


def test_a_prompt_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("def __init__(self")
    options = ["--prompt-file", str(tmp_path / "prompt.txt"), "--max-tokens", "16", "--mode", "ar"]
    assert document(*options)["token_ids"] == document(*PROMPT, "--mode", "ar")["token_ids"]


def test_a_folder_without_a_tokenizer_works_with_ids_and_has_no_text(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(BUNDLED_CHECKPOINT / name, tmp_path / name)
    answer = document("--model", str(tmp_path), "--prompt-ids", "1,200,300", "--max-tokens", "4")
    assert answer["text"] is None
    with pytest.raises(InvalidRequest, match="--prompt-ids"):
        generate("--model", str(tmp_path), *PROMPT)


def test_the_last_line_sums_up() -> None:
    last = generate(*PROMPT, "--mode", "speculation").strip().splitlines()[-1]
    assert last.startswith("speculation: 16 tokens (length)")
    assert "accepted per round" in last


def test_a_prompt_is_required() -> None:
    with pytest.raises(InvalidRequest, match="exactly one of"):
        generate("--max-tokens", "4")


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        generate("--model", str(tmp_path), *PROMPT)


def test_an_unknown_mode_is_refused_with_the_known_ones() -> None:
    assert "auto, ar, diffusion, speculation" in generate(*PROMPT, "--mode", "magic")
