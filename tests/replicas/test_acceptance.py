import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimode.replicas.acceptance import (
    BLOCK_SIZES,
    DEFAULT_PRIOR,
    GROUP_ENDS,
    Acceptance,
    load_prior,
)
from trimode.replicas.errors import ConfigError
from trimode.replicas.model.config import BUNDLED_CHECKPOINT

PROBABILITIES = st.tuples(*[st.floats(0, 1)] * 4)


def naive(prior: tuple[float, ...], block_size: int) -> float:
    total, reach = 1.0, 1.0
    for position in range(1, block_size):
        group = 0 if position < 4 else 1 if position < 8 else 2 if position < 16 else 3
        reach *= prior[group]
        total += reach
    return total


@given(PROBABILITIES, st.integers(1, 40))
def test_expected_tokens_are_the_sum_of_the_chances_to_get_so_far(
    prior: tuple[float, ...], block_size: int
) -> None:
    assert Acceptance(prior).expected(block_size) == pytest.approx(naive(prior, block_size), 1e-4)


@given(PROBABILITIES, st.lists(st.tuples(st.sampled_from(BLOCK_SIZES), st.floats(0, 1))))
def test_expected_tokens_stay_within_the_block_and_grow_with_it(
    prior: tuple[float, ...], rounds: list[tuple[int, float]]
) -> None:
    acceptance = Acceptance(prior)
    for size, part in rounds:
        if size == 1:
            acceptance.idle(prior)
        else:
            acceptance.observe(size, 1 + round(part * (size - 1)))
    expected = acceptance.expected_by_size
    assert expected == tuple(sorted(expected))
    assert all(1 <= value <= size + 1e-9 for value, size in zip(expected, BLOCK_SIZES, strict=True))


def test_it_learns_what_it_sees() -> None:
    good, bad = Acceptance(), Acceptance()
    for _ in range(40):
        good.observe(32, 32)
        bad.observe(32, 1)
    assert good.expected(32) > 20 and bad.expected(32) < 1.6


def test_a_wrong_draft_was_tried_and_those_behind_it_were_not() -> None:
    acceptance = Acceptance((0.5,) * 4)
    acceptance.observe(32, 5)  # drafts 1 to 4 were right, 5 was wrong
    first, second, third, fourth = acceptance.probabilities
    assert first == pytest.approx((16 * 0.5 + 3) / (16 + 3))
    moved = first  # the odds of the first group are what the second is believed to have
    assert second == pytest.approx((16 * moved + 1) / (16 + 2))
    assert third == fourth == pytest.approx(second)


def test_text_that_is_easy_near_the_known_token_is_believed_to_be_easy_further_on() -> None:
    easy, hard = Acceptance((0.6, 0.5, 0.4, 0.3)), Acceptance((0.6, 0.5, 0.4, 0.3))
    for _ in range(10):
        easy.observe(4, 4)
        hard.observe(4, 1)
    for good, prior, bad in zip(
        easy.probabilities, (0.6, 0.5, 0.4, 0.3), hard.probabilities, strict=True
    ):
        assert good > prior > bad
    assert easy.probabilities == tuple(sorted(easy.probabilities, reverse=True))


def test_rounds_of_size_1_lead_to_what_is_believed_of_any_text() -> None:
    acceptance = Acceptance()
    for _ in range(40):
        acceptance.observe(32, 1)
    before = acceptance.expected(32)
    for _ in range(200):
        acceptance.idle((0.9,) * 4)
    assert before < 1.6
    assert acceptance.expected(32) == pytest.approx(Acceptance((0.9,) * 4).expected(32), 0.1)


def test_one_without_evidence_believes_it_at_once() -> None:
    acceptance = Acceptance((0.1,) * 4)
    acceptance.idle((0.9,) * 4)
    assert acceptance.probabilities == (0.9,) * 4


def test_no_evidence_gives_the_prior() -> None:
    assert Acceptance((0.9, 0.8, 0.7, 0.6)).probabilities == (0.9, 0.8, 0.7, 0.6)


def test_a_checkpoint_may_carry_its_prior(tmp_path: Path) -> None:
    assert load_prior(tmp_path) == DEFAULT_PRIOR
    document = {"group_ends": GROUP_ENDS, "probabilities": [0.5, 0.4, 0.3, 1]}
    (tmp_path / "acceptance.json").write_text(json.dumps(document))
    assert load_prior(tmp_path) == (0.5, 0.4, 0.3, 1.0)


def test_the_bundled_checkpoint_does() -> None:
    assert (BUNDLED_CHECKPOINT / "acceptance.json").exists()
    prior = load_prior(BUNDLED_CHECKPOINT)
    assert 1.5 < Acceptance(prior).expected(32) < 4.5  # docs/checkpoint.md, from prose to tables


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group_ends": [3, 7]}, "group_ends must be"),
        ({"probabilities": None}, "probabilities must be 4 numbers"),
        ({"probabilities": [0.5] * 3}, "probabilities must be 4 numbers"),
        ({"probabilities": [0.5, 0.5, 0.5, 1.5]}, "probabilities must be 4 numbers"),
        ({"probabilities": [0.5, 0.5, 0.5, "x"]}, "probabilities must be 4 numbers"),
        ({"probabilities": [0.5, 0.5, 0.5, float("nan")]}, "probabilities must be 4 numbers"),
    ],
)
def test_a_bad_prior_is_refused_by_file_and_key(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    document = {"group_ends": GROUP_ENDS, "probabilities": [0.5] * 4} | change
    (tmp_path / "acceptance.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=rf"acceptance\.json: {words}"):
        load_prior(tmp_path)


def test_a_prior_that_is_not_json_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]"):
        (tmp_path / "acceptance.json").write_text(text)
        with pytest.raises(ConfigError, match=r"acceptance\.json"):
            load_prior(tmp_path)
