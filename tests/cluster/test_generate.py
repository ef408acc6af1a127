"""`trimode generate`: output for people, output for programs, in process and on a cluster."""

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trimode.cluster.__main__ import app
from trimode.cluster.client import CallFailed
from trimode.replicas.errors import CheckpointError, ConfigError, InvalidRequest
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
    with pytest.raises(InvalidRequest, match="no tokenizer; send token_ids"):
        generate("--model", str(tmp_path), *PROMPT)


def test_the_last_line_sums_up() -> None:
    last = generate(*PROMPT, "--mode", "speculation").strip().splitlines()[-1]
    assert last.startswith("speculation: 16 tokens (length)")
    assert "accepted per round" in last


def test_a_quantised_model_answers_in_every_mode_that_verifies() -> None:
    modes = ("ar", "speculation")
    answers = [document(*PROMPT, "--mode", mode, "--quantization", "fp8") for mode in modes]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]
    assert len(answers[0]["token_ids"]) == 16


def test_an_unknown_quantization_is_named_with_the_known() -> None:
    with pytest.raises(ConfigError, match=r"'int3'.*fp8"):
        generate(*PROMPT, "--quantization", "int3")


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        generate("--model", str(tmp_path), *PROMPT)


SAMPLES = ["--n", "3", "--temperature", "1.0", "--seed", "4"]


def test_several_samples_are_a_list_of_the_objects_of_one() -> None:
    answer = document(*PROMPT, *SAMPLES)
    assert set(answer) == {"samples"}
    keys = set(document(*PROMPT))
    assert [set(sample) for sample in answer["samples"]] == [keys] * 3
    assert len({sample["text"] for sample in answer["samples"]}) == 3


def test_several_samples_are_printed_one_after_the_other() -> None:
    shown = generate(*PROMPT, *SAMPLES)
    for index, sample in enumerate(document(*PROMPT, *SAMPLES)["samples"]):
        assert sample["text"] in shown
        assert f"sample {index}, speculation: 16 tokens (length)" in shown


def test_logprobs_stand_beside_each_token() -> None:
    answer = document(*PROMPT, "--logprobs", "2")
    assert len(answer["logprobs"]) == 16
    for token_id, token in zip(answer["token_ids"], answer["logprobs"], strict=True):
        assert len(token["top"]) == 2
        assert token["top"][0] == {"token_id": token_id, "logprob": token["logprob"]}


def test_text_ends_before_a_stop_string() -> None:
    whole = document(*PROMPT)["text"]
    answer = document(*PROMPT, "--stop", "never in it", "--stop", whole[10:14])
    assert (answer["text"], answer["finish_reason"]) == (whole[: whole.index(whole[10:14])], "stop")


def test_a_regex_in_a_file_holds_the_output_to_it(tmp_path: Path) -> None:
    (tmp_path / "regex").write_text("[0-9]{3}-[0-9]{2}\n")
    assert re.fullmatch(r"\d{3}-\d{2}", document(*PROMPT, "--regex", f"@{tmp_path}/regex")["text"])


def test_more_tokens_than_the_model_has_positions_are_refused_with_the_numbers() -> None:
    with pytest.raises(InvalidRequest, match="2048 positions"):
        generate("--prompt", "def", "--max-tokens", "4000000000")


@pytest.mark.parametrize(
    "options",
    [
        ["--mode", "ar", "--logprobs", "1"],
        ["--mode", "speculation", *SAMPLES, "--top-k", "20", "--frequency-penalty", "0.5"],
        ["--mode", "diffusion", "--stop", "self", "--threshold", "0.7"],
        ["--mode", "speculation", "--regex", "[a-z]{4}"],
    ],
)
async def test_a_cluster_answers_as_this_process_does(served: Any, options: list[str]) -> None:
    here = await asyncio.to_thread(document, *PROMPT, *options)
    there = await asyncio.to_thread(document, *PROMPT, *options, "--address", served.address)
    for sample in (*here.get("samples", [here]), *there.get("samples", [there])):
        del sample["timings"]
    assert here == there


async def test_a_cluster_refuses_in_the_words_of_this_process(served: Any) -> None:
    options = [*PROMPT, "--top-p", "3"]
    with pytest.raises(InvalidRequest) as here:
        await asyncio.to_thread(generate, *options)
    with pytest.raises(CallFailed) as there:
        await asyncio.to_thread(generate, *options, "--address", served.address)
    assert there.value.message == str(here.value)
