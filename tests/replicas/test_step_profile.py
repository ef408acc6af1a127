import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimode.replicas.errors import ConfigError
from trimode.replicas.step_profile import StepProfile

AXES = ((1, 4), (1, 8, 32), (0, 100))


def made(causal: Any, draft_factor: float = 2.0, **fields: Any) -> StepProfile:
    """Of causal(num_sequences, rows per sequence, context) seconds."""

    def grid(factor: float) -> Any:
        return tuple(
            tuple(tuple(factor * causal(n, r, c) for c in AXES[2]) for r in AXES[1])
            for n in AXES[0]
        )

    return StepProfile(*AXES, grid(1.0), grid(draft_factor), **fields)


def linear(n: int, r: int, c: int) -> float:
    return 1 + 0.5 * n * r + 0.01 * c


NOISY = made(lambda n, r, c: 1 + (n * 7 + r * 5 + c) % 11)


@pytest.mark.parametrize(
    ("rows", "sequences", "context", "seconds"),
    [
        (1, 1, 0, 1.5),  # a measured point
        (32, 4, 400, 1 + 0.5 * 32 + 1),  # another; context is summed over the sequences
        (4, 1, 50, 1 + 0.5 * 4 + 0.5),  # between points
        (1000, 1, 0, 501),  # beyond the last rows
        (16, 16, 0, 9),  # beyond the last sequences
        (1, 1, 300, 4.5),  # beyond the last context
    ],
)
def test_seconds_are_linear_between_and_beyond_the_points(
    rows: int, sequences: int, context: int, seconds: float
) -> None:
    assert made(linear).seconds(rows, sequences, context, False) == pytest.approx(seconds)


def test_draft_passes_have_times_of_their_own() -> None:
    profile = made(linear)
    causal, draft = (profile.seconds(8, 2, 10, drafts) for drafts in (False, True))
    assert draft == pytest.approx(2 * causal)


@given(
    st.integers(1, 4096), st.integers(0, 4096), st.integers(1, 128), st.integers(0, 10**6),
    st.booleans(),
)  # fmt: skip
def test_more_rows_never_take_less(
    rows: int, more: int, sequences: int, context: int, drafts: bool
) -> None:
    first, second = (
        NOISY.seconds(count, sequences, context, drafts) for count in (rows, rows + more)
    )
    assert second >= first


def test_a_grid_of_one_point_is_a_constant() -> None:
    profile = StepProfile((1,), (1,), (0,), (((0.5,),),), (((0.7,),),))
    assert profile.seconds(100, 9, 5000, False) == 0.5
    assert profile.seconds(1, 1, 0, True) == 0.7


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    profile = made(linear, machine={"processor": "p"}, model={"dtype": "float32"})
    profile.save(tmp_path / "profile.json")
    assert StepProfile.load(tmp_path / "profile.json") == profile


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_sequences": []}, "num_sequences"),
        ({"num_sequences": 3}, "num_sequences"),
        ({"rows_per_sequence": [1, 1, 8]}, "rows_per_sequence must ascend"),
        ({"context_lens": [-1, 5]}, "context_lens must ascend from at least 0"),
        ({"causal_s": [[[1.0]]]}, "causal_s has shape"),
        ({"causal_s": [[[1.0], [1.0, 2.0]]]}, "causal_s must hold numbers"),
        ({"draft_s": [[["x"] * 2] * 3] * 2}, "draft_s must hold numbers"),
        ({"draft_s": [[[0.0] * 2] * 3] * 2}, "draft_s must hold seconds over 0"),
        ({"draft_s": [[[float("nan")] * 2] * 3] * 2}, "draft_s must hold seconds over 0"),
    ],
)
def test_a_bad_file_is_refused_by_file_and_key(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "profile.json"
    made(linear).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=rf"profile\.json: .*{words}"):
        StepProfile.load(path)


def test_a_missing_key_or_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(ConfigError, match=r"profile\.json"):
        StepProfile.load(path)
    for text, words in (("{", r"profile\.json"), ("[]", "object"), ("{}", "num_sequences")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            StepProfile.load(path)


def test_between_two_numbers_of_sequences_the_rows_of_the_whole_pass_are_alike() -> None:
    """A knee at 256 rows is met at 256 rows, however many sequences bring them."""

    def knee(n: int, r: int) -> float:
        return max(1.0, n * r / 256)

    counts, rows = (1, 16, 64), (1, 4, 8, 16, 32)
    grid = tuple(tuple((knee(n, r),) for r in rows) for n in counts)
    profile = StepProfile(counts, rows, (0,), grid, grid)
    for sequences in (2, 17, 40, 64, 100):
        assert profile.seconds(256, sequences, 0, False) == pytest.approx(1)
        assert profile.seconds(512, sequences, 0, False) == pytest.approx(2)


def test_a_profile_of_one_sequence_is_prolonged_by_rows() -> None:
    profile = StepProfile((1,), (1, 8), (0,), (((1.0,), (8.0,)),), (((1.0,), (8.0,)),))
    assert profile.seconds(64, 64, 0, False) == pytest.approx(64)
