import time
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.replicas.acceptance import BLOCK_SIZES, Acceptance
from trimode.replicas.governor import Candidate, Companions, Governor
from trimode.replicas.step_profile import StepProfile

SEQUENCES, ROWS = (1, 8, 64), (1, 4, 8, 16, 32)
ALONE = Companions()


def profile(
    causal: Callable[[int], float], draft: Callable[[int], float] | None = None
) -> StepProfile:
    """Of seconds as functions of a pass's rows; context costs nothing."""

    def grid(seconds: Callable[[int], float]) -> tuple[tuple[tuple[float, ...], ...], ...]:
        return tuple(tuple((seconds(n * r),) for r in ROWS) for n in SEQUENCES)

    return StepProfile(SEQUENCES, ROWS, (64,), grid(causal), grid(draft or causal))


FLAT = profile(lambda rows: 1.0)
LINEAR = profile(lambda rows: 0.01 * rows)
AFFINE = profile(lambda rows: 1 + 0.02 * rows)


def sure(probability: float) -> Acceptance:
    return Acceptance((probability,) * 4)


def candidate(probability: float = 0.9, current: int = 0, tokens_left: int = 1000) -> Candidate:
    return Candidate(sure(probability), current, tokens_left, 64)


def goodput(
    steps: StepProfile, starting: list[Candidate], sizes: tuple[int, ...], others: Companions
) -> float:
    """The definition, written out."""
    tokens = others.autoregressive + others.block_tokens
    rows = others.autoregressive + others.block_rows + others.prefill_rows
    count = len(starting) + others.autoregressive + others.block_sequences
    count += others.prefill_sequences
    for item, size in zip(starting, sizes, strict=True):
        tokens += 1 if size == 1 else item.acceptance.expected(size) / 2
        rows += size
    context = others.context_tokens + sum(item.context_len for item in starting)
    causal, draft = (steps.seconds(rows, count, context, drafts) for drafts in (False, True))
    speculates = others.block_sequences or any(size > 1 for size in sizes)
    return tokens / ((causal + draft) / 2 if speculates else causal)


def test_rows_that_cost_nothing_are_all_used() -> None:
    assert Governor(FLAT).choose([candidate()], ALONE) == [32]
    assert Governor(FLAT).choose([candidate()] * 40, ALONE) == [32] * 40


def test_rows_at_full_price_beside_many_others_are_not_used() -> None:
    others = Companions(autoregressive=60, context_tokens=60 * 64)
    assert Governor(LINEAR).choose([candidate()] * 4, others) == [1] * 4


@pytest.mark.parametrize("steps", [FLAT, LINEAR, AFFINE])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_drafts_that_are_never_kept_are_not_made(steps: StepProfile, count: int) -> None:
    assert Governor(steps).choose([candidate(0.0, current=32)] * count, ALONE) == [1] * count


def test_each_sequence_gets_the_size_that_suits_it() -> None:
    starting = [candidate(0.98), candidate(0.0), candidate(0.98), candidate(0.0)] * 4
    assert Governor(AFFINE).choose(starting, ALONE)[:2] in ([32, 1], [16, 1])


def test_load_makes_blocks_smaller() -> None:
    steps = profile(lambda rows: max(1.0, rows / 100))
    sizes = [Governor(steps).choose([candidate(0.9)] * count, ALONE)[0] for count in (1, 8, 24, 64)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 32 and sizes[-1] == 1


def test_a_block_is_no_larger_than_what_is_wanted_or_the_engine_allows() -> None:
    starting = [candidate(tokens_left=left) for left in (1, 3, 4, 15, 31, 32)]
    assert Governor(FLAT).choose(starting, ALONE) == [1, 1, 4, 8, 16, 32]
    assert Governor(FLAT, max_block_size=10).choose([candidate()], ALONE) == [8]
    assert Governor(FLAT, max_block_size=1).choose([candidate()], ALONE) == [1]


def test_nobody_starting_is_nothing_to_choose() -> None:
    assert Governor(FLAT).choose([], Companions(autoregressive=3)) == []


COMPANIONS = st.builds(
    Companions,
    autoregressive=st.integers(0, 40),
    block_sequences=st.just(0),
    prefill_sequences=st.integers(0, 2),
    prefill_rows=st.integers(0, 512),
    context_tokens=st.integers(0, 10_000),
) | st.integers(1, 20).map(
    lambda n: Companions(block_sequences=n, block_rows=16 * n, block_tokens=2.5 * n)
)
CANDIDATES = st.builds(
    candidate, st.floats(0, 1), st.sampled_from((0, *BLOCK_SIZES)), st.integers(1, 64)
)


@st.composite
def profiles(draw: st.DrawFn) -> StepProfile:
    """Fixed cost, then a price per row with a knee: memory-bound, then compute-bound."""
    fixed, price = draw(st.floats(0.01, 2)), draw(st.floats(0, 0.1))
    knee, steep = draw(st.integers(0, 300)), draw(st.floats(0, 0.1))
    factor = draw(st.floats(1, 2))

    def causal(rows: int) -> float:
        return fixed + price * rows + steep * max(0, rows - knee)

    return profile(causal, lambda rows: factor * causal(rows))


@given(profiles(), st.lists(CANDIDATES, max_size=12), COMPANIONS, st.sampled_from((1, 8, 16, 32)))
@settings(deadline=None)
def test_the_size_is_always_one_of_those_allowed(
    steps: StepProfile, starting: list[Candidate], others: Companions, largest: int
) -> None:
    sizes = Governor(steps, largest).choose(starting, others)
    assert len(sizes) == len(starting)
    for item, size in zip(starting, sizes, strict=True):
        assert size in BLOCK_SIZES and size <= largest and size <= item.tokens_left


@given(
    profiles(), st.lists(st.floats(0, 1).map(candidate), min_size=1, max_size=4), COMPANIONS
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_the_choice_is_as_good_as_any_other(
    steps: StepProfile, starting: list[Candidate], others: Companions
) -> None:
    sizes = tuple(Governor(steps).choose(starting, others))
    best = max(
        goodput(steps, starting, combination, others)
        for combination in product(BLOCK_SIZES, repeat=len(starting))
    )
    assert goodput(steps, starting, sizes, others) >= 0.98 * best


@given(
    profiles(), st.lists(st.floats(0, 1).map(candidate), min_size=5, max_size=40), COMPANIONS
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_no_fixed_size_is_better_for_many(
    steps: StepProfile, starting: list[Candidate], others: Companions
) -> None:
    sizes = tuple(Governor(steps).choose(starting, others))
    best = max(goodput(steps, starting, (b,) * len(starting), others) for b in BLOCK_SIZES)
    assert goodput(steps, starting, sizes, others) >= best * (1 - 1e-9)


@given(profiles(), st.lists(CANDIDATES, min_size=1, max_size=12), COMPANIONS)
@settings(deadline=None, max_examples=60)
def test_holding_on_costs_little(
    steps: StepProfile, starting: list[Candidate], others: Companions
) -> None:
    fresh = [Candidate(c.acceptance, 0, c.tokens_left, c.context_len) for c in starting]
    held = tuple(Governor(steps).choose(starting, others))
    free = tuple(Governor(steps).choose(fresh, others))
    assert goodput(steps, fresh, held, others) * 1.0501 >= goodput(steps, fresh, free, others)


def changes(probability: float, steps: StepProfile, count: int, rounds: int = 150) -> int:
    """How often sizes change while every draft is kept with that probability."""
    random = np.random.default_rng(1)
    governor = Governor(steps)
    acceptances = [governor.new_acceptance() for _ in range(count)]
    current = [0] * count
    number = 0
    for turn in range(rounds):
        starting = [
            Candidate(a, size, 1000, 64) for a, size in zip(acceptances, current, strict=True)
        ]
        sizes = governor.choose(starting, ALONE)
        if turn >= 20:  # the first rounds are there to learn
            number += sum(a != b for a, b in zip(sizes, current, strict=True))
        current = sizes
        for acceptance, size in zip(acceptances, sizes, strict=True):
            wrong = np.flatnonzero(random.random(size - 1) > probability)
            accepted = 1 + int(wrong[0]) if len(wrong) else size
            governor.observe(acceptance, size, accepted)
    return number


@pytest.mark.parametrize("probability", [0.5, 0.7, 0.85, 0.95])
@pytest.mark.parametrize("count", [1, 8])
def test_noise_in_acceptance_does_not_make_it_flap(probability: float, count: int) -> None:
    assert changes(probability, AFFINE, count) <= 0.1 * 130 * count


def test_one_bad_sequence_among_many_is_given_up() -> None:
    """Though it is too small a part of the batch for the batch's goodput to show it."""
    starting = [candidate(0.95, current=16)] * 39 + [candidate(0.0, current=16)]
    sizes = Governor(profile(lambda rows: 1 + 0.002 * rows)).choose(starting, ALONE)
    assert sizes[-1] == 1 and set(sizes[:-1]) <= {16, 32}


def test_a_small_gain_does_not_change_the_size() -> None:
    fresh = Governor(AFFINE).choose([candidate(0.8)], ALONE)
    held = [Governor(AFFINE).choose([candidate(0.8, current=b)], ALONE)[0] for b in BLOCK_SIZES]
    kept = [b for b, size in zip(BLOCK_SIZES, held, strict=True) if b == size]
    assert len(kept) > 1 and set(held) - set(kept) <= set(fresh)


def test_speculation_is_tried_again_after_a_while() -> None:
    governor = Governor(profile(lambda rows: 1 + 0.001 * rows))
    acceptance, current, sizes = governor.new_acceptance(), 0, []
    for _ in range(300):
        current = governor.choose([Candidate(acceptance, current, 1000, 64)], ALONE)[0]
        sizes.append(current)
        governor.observe(acceptance, current, 1)  # no draft is ever right
    assert sizes[0] > 1 and 0 < sum(size > 1 for size in sizes[50:]) <= 25


def test_new_sequences_start_from_what_the_engine_saw() -> None:
    governor = Governor(FLAT)
    before = governor.new_acceptance().expected(32)
    for _ in range(200):
        governor.observe(Acceptance(), 32, 32)
    assert governor.new_acceptance().expected(32) > 2 * before


def test_what_it_decides_can_be_counted() -> None:
    governor = Governor(FLAT)
    assert governor.stats().seconds_ratio == 1
    governor.choose([candidate(), candidate(0.0), candidate(tokens_left=5)], ALONE)
    acceptance = governor.new_acceptance()
    for size, accepted in ((1, 1), (4, 2), (4, 4), (8, 1)):
        governor.observe(acceptance, size, accepted)
    for seconds in (1.5, 2.5):
        governor.observe_step(32, 1, 64, True, seconds)
    stats = governor.stats()
    assert stats.rounds_by_size == {32: 1, 1: 1, 4: 1}
    assert stats.tried_by_position[:5] == (3, 2, 1, 0, 0)
    assert stats.kept_by_position[:5] == (2, 1, 1, 0, 0)
    assert len(stats.tried_by_position) == len(stats.kept_by_position) == 31
    assert stats.steps == 2 and stats.seconds_ratio == pytest.approx(2, 0.02)


def test_a_choice_for_64_sequences_is_quick() -> None:
    governor = Governor(AFFINE)
    probabilities = np.random.default_rng(0).random(64)
    starting = [candidate(p, current=(1, 8, 32)[i % 3]) for i, p in enumerate(probabilities)]
    seconds = []
    for _ in range(50):
        begin = time.perf_counter()
        governor.choose(starting, ALONE)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1e-3  # far above what it takes, far below a step
