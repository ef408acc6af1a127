import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimode.replicas.acceptance import BLOCK_SIZES, Acceptance

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


def test_a_wrong_draft_says_nothing_of_those_behind_it() -> None:
    acceptance = Acceptance((0.5,) * 4)
    acceptance.observe(32, 5)  # drafts 1 to 4 were right, 5 was wrong
    first, second, *rest = acceptance.probabilities
    assert first > 0.5 and second == pytest.approx((4 * 0.5 + 1) / (4 + 2))
    assert rest == [0.5, 0.5]


def test_a_draft_that_was_not_there_was_not_wrong() -> None:
    acceptance = Acceptance((0.5,) * 4)
    acceptance.observe(4, 4)
    assert acceptance.probabilities[0] > 0.5 and acceptance.probabilities[1] == 0.5


def test_rounds_of_size_1_lead_back_to_the_prior() -> None:
    acceptance = Acceptance()
    for _ in range(40):
        acceptance.observe(32, 1)
    before = acceptance.expected(32)
    for _ in range(400):
        acceptance.observe(1, 1)
    assert before < 1.6 and acceptance.expected(32) == pytest.approx(Acceptance().expected(32), 0.1)


def test_no_evidence_gives_the_prior() -> None:
    assert Acceptance((0.9, 0.8, 0.7, 0.6)).probabilities == (0.9, 0.8, 0.7, 0.6)
