from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

Script = Callable[[str], ModuleType]


@pytest.fixture
def lines(script: Script) -> Callable[..., dict[str, str]]:
    """lines(section=document, ...): by the beginning of each, met, MISSED or nothing."""
    summary = script("summary")

    def of(**documents: dict[str, Any]) -> dict[str, str]:
        named = {name.replace("_", "-"): document for name, document in documents.items()}
        return {
            figure.name: {True: "met", False: "MISSED", None: ""}[figure.is_met]
            for figure in summary.figures(named)
        }

    return of


def step(block: int, over: float, sequences: int = 1, busy: float = 1.0) -> dict[str, Any]:
    return {
        "sequences": sequences, "block": block, "context": 512, "over_weight_read": over,
        "busy_share": busy, "busy_ms": 10.0, "ms": 10.0 * over,
    }  # fmt: skip


def run(setting: str, users: int, speed: float, kept: float | None = None) -> dict[str, Any]:
    return {"setting": setting, "users": users, "tokens_per_s": speed, "accepted_per_round": kept}


def test_step_times_are_held_against_the_reading_of_the_weights(
    lines: Callable[..., dict[str, str]],
) -> None:
    rows = [step(1, 1.05), step(32, 1.3), step(8, 9.0), step(1, 3.0, 128, 0.95)]
    assert lines(steps_8B={"rows": rows}) == {
        "steps-8B: 1 seq., context 512, AR step / weight read": "met",
        "steps-8B: 1 seq., context 512, block 32, pair / 2 weight reads": "MISSED",
        "steps-8B: 128 seq., context 512, block 1, busy share of a step": "met",
    }


def test_a_share_that_the_profiler_did_not_see_is_not_judged(
    lines: Callable[..., dict[str, str]],
) -> None:
    found = lines(steps_8B={"rows": [step(1, 3.0, 128, float("nan"))]})
    assert found == {"steps-8B: 128 seq., context 512, block 1, busy share of a step": ""}


def test_the_governor_is_held_against_the_best_fixed_setting_of_each_load(
    lines: Callable[..., dict[str, str]],
) -> None:
    rows = [
        run("ar", 1, 100), run("speculation-8", 1, 300), run("governor", 1, 299),
        run("ar", 8, 800), run("speculation-8", 8, 700), run("governor", 8, 700),
    ]  # fmt: skip
    found = lines(end_to_end_8B={"rows": rows})
    assert found["end-to-end-8B: 1 users, governor / speculation-8"] == "met"
    assert found["end-to-end-8B: 8 users, governor / ar"] == "MISSED"


def test_the_engine_is_held_against_what_pairs_alone_would_give(script: Script) -> None:
    summary = script("summary")
    documents = {
        "steps-8B": {"rows": [step(8, 1.0, sequences=4)]},
        "end-to-end-8B": {"rows": [run("speculation-8", 4, 1000.0, kept=5.0)]},
    }
    (figure,) = summary.shares_of_bound("8B", *documents.values())
    assert figure.value == pytest.approx(0.5)  # 4 users x 5 tokens in 10 ms are 2,000 tokens/s


def test_float8_is_held_against_the_same_steps_in_bfloat16(script: Script) -> None:
    wide, narrow = [step(1, 1.2), step(8, 2.0)], [step(1, 0.8)]
    found = script("summary").figures(
        {"steps-8B": {"rows": wide}, "steps-8B-fp8": {"rows": narrow}}
    )
    values = {figure.name: figure.value for figure in found}
    name = "steps-8B-fp8: 1 seq., block 1, context 512, bfloat16 / float8"
    assert values[name] == pytest.approx(1.5)


def test_kernels_are_told_by_their_best(lines: Callable[..., dict[str, str]]) -> None:
    rows = [
        {"kind": "decode", "share_of_copy": 0.8},
        {"kind": "decode", "share_of_copy": 0.9},
        {"kind": "prompt", "share_of_copy": 0.1, "share_of_matmul": 0.6},
        {"product": "head", "form": "fp8", "gb_per_s": 2000.0},
    ]
    assert list(lines(kernel_attention={"rows": rows})) == [
        "kernel-attention: decode, best share_of_copy",
        "kernel-attention: prompt, best share_of_matmul",
        "kernel-attention: fp8, best gb_per_s",
    ]


def test_what_is_not_complete_is_named(lines: Callable[..., dict[str, str]]) -> None:
    assert lines(cold_start={"status": "cut"}) == {"cold-start: not complete": "MISSED"}


def test_tokens_that_hang_on_the_batch_miss_the_aim_only_where_that_was_excluded(
    lines: Callable[..., dict[str, str]],
) -> None:
    counts = {"per_10000_tokens": 2.0}
    rows = [{"batch_invariant": is_set, "alone": counts} for is_set in (False, True)]
    assert lines(invariance={"divergences": rows}) == {
        "invariance: without, alone, per 10,000 tokens": "",
        "invariance: with, alone, per 10,000 tokens": "MISSED",
    }


def test_time_that_two_kernels_share_counts_once(script: Script) -> None:
    union_length = script("gpu_time").union_length
    assert union_length([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4
    assert union_length([]) == 0


def test_the_counts_of_a_test_run_are_read_off_its_last_line(script: Script) -> None:
    outcome = script("gpu_tests").outcome
    text = "..F\nFAILED tests/kernels/test_norm.py::test_x - assert\n1 failed, 12 passed in 3s\n"
    found = outcome(text)
    assert found["counts"] == {"failed": 1, "passed": 12}
    assert found["failed"] == ["FAILED tests/kernels/test_norm.py::test_x - assert"]
