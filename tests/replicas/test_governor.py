import time
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimode.replicas.acceptance import BLOCK_SIZES, Acceptance
from trimode.replicas.governor import Governor
from trimode.replicas.size_problem import Candidate, Companions
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


def settled(steps: StepProfile, largest: int = 32) -> Governor:
    """One that makes no probes."""
    return Governor(steps, largest, explored=0.0)


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
        kept = item.acceptance.expected(min(size, item.tokens_left))
        tokens += 1 if size == 1 else kept / 2
        rows += size
    context = others.context_tokens + sum(item.context_len for item in starting)
    causal, draft = (steps.seconds(rows, count, context, drafts) for drafts in (False, True))
    speculates = others.block_sequences or any(size > 1 for size in sizes)
    return tokens / ((causal + draft) / 2 if speculates else causal)


def test_rows_that_cost_nothing_are_all_used() -> None:
    assert settled(FLAT).choose([candidate()], ALONE) == [32]
    assert settled(FLAT).choose([candidate()] * 40, ALONE) == [32] * 40


def test_rows_at_full_price_beside_many_others_are_not_used() -> None:
    others = Companions(autoregressive=60, context_tokens=60 * 64)
    assert settled(LINEAR).choose([candidate()] * 4, others) == [1] * 4


@pytest.mark.parametrize("steps", [FLAT, LINEAR, AFFINE])
@pytest.mark.parametrize("count", [1, 3, 20])
def test_drafts_that_are_never_kept_are_not_made(steps: StepProfile, count: int) -> None:
    assert settled(steps).choose([candidate(0.0, current=32)] * count, ALONE) == [1] * count


def test_each_sequence_gets_the_size_that_suits_it() -> None:
    starting = [candidate(0.98), candidate(0.0), candidate(0.98), candidate(0.0)] * 4
    assert settled(AFFINE).choose(starting, ALONE)[:2] in ([32, 1], [16, 1])


def test_load_makes_blocks_smaller() -> None:
    steps = profile(lambda rows: max(1.0, rows / 100))
    sizes = [settled(steps).choose([candidate(0.9)] * count, ALONE)[0] for count in (1, 8, 24, 64)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 32 and sizes[-1] == 1


def test_a_block_is_no_larger_than_what_is_wanted_or_the_engine_allows() -> None:
    """Where rows cost nothing: the smallest that reaches the last token."""
    starting = [candidate(1.0, tokens_left=left) for left in (1, 4, 5, 15, 17, 1000)]
    assert settled(FLAT).choose(starting, ALONE) == [1, 4, 8, 16, 32, 32]
    one_by_one = [settled(FLAT).choose([each], ALONE)[0] for each in starting]
    assert one_by_one == [1, 4, 8, 16, 32, 32]
    assert settled(FLAT, 10).choose([candidate()], ALONE) == [8]
    assert settled(FLAT, 1).choose([candidate()], ALONE) == [1]


def test_nobody_starting_is_nothing_to_choose() -> None:
    assert settled(FLAT).choose([], Companions(autoregressive=3)) == []


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
    sizes = settled(steps, largest).choose(starting, others)
    assert len(sizes) == len(starting)
    for item, size in zip(starting, sizes, strict=True):
        smaller = [b for b in BLOCK_SIZES if b < size]
        assert size in BLOCK_SIZES and size <= largest
        assert not smaller or smaller[-1] < item.tokens_left


@given(
    profiles(), st.lists(st.floats(0, 1).map(candidate), min_size=1, max_size=4), COMPANIONS
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_the_choice_is_as_good_as_any_other(
    steps: StepProfile, starting: list[Candidate], others: Companions
) -> None:
    sizes = tuple(settled(steps).choose(starting, others))
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
    sizes = tuple(settled(steps).choose(starting, others))
    best = max(goodput(steps, starting, (b,) * len(starting), others) for b in BLOCK_SIZES)
    assert goodput(steps, starting, sizes, others) >= best * (1 - 1e-9)


@given(profiles(), st.lists(CANDIDATES, min_size=1, max_size=12), COMPANIONS)
@settings(deadline=None, max_examples=60)
def test_holding_on_costs_little(
    steps: StepProfile, starting: list[Candidate], others: Companions
) -> None:
    fresh = [Candidate(c.acceptance, 0, c.tokens_left, c.context_len) for c in starting]
    held = tuple(settled(steps).choose(starting, others))
    free = tuple(settled(steps).choose(fresh, others))
    assert goodput(steps, fresh, held, others) * 1.0201 >= goodput(steps, fresh, free, others)


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
    sizes = settled(profile(lambda rows: 1 + 0.002 * rows)).choose(starting, ALONE)
    assert sizes[-1] == 1 and set(sizes[:-1]) <= {16, 32}


def test_a_small_gain_does_not_change_the_size() -> None:
    fresh = settled(AFFINE).choose([candidate(0.78)], ALONE)
    held = [settled(AFFINE).choose([candidate(0.78, current=b)], ALONE)[0] for b in BLOCK_SIZES]
    kept = [b for b, size in zip(BLOCK_SIZES, held, strict=True) if b == size]
    assert kept == [8, 16] and set(held) - set(kept) <= set(fresh)


def decode(
    governor: Governor, acceptance: Acceptance, keeps: float, rounds: int, current: int = 1
) -> list[int]:
    """The sizes of so many rounds of one sequence, that part of whose drafts is kept."""
    random, sizes = np.random.default_rng(1), []
    for _ in range(rounds):
        governor.revisits()
        current = governor.choose([Candidate(acceptance, current, 1000, 64)], ALONE)[0]
        sizes.append(current)
        wrong = np.flatnonzero(random.random(current - 1) >= keeps)
        governor.observe(acceptance, current, 1 + int(wrong[0]) if len(wrong) else current)
    return sizes


@pytest.mark.parametrize("prior", [0.05, 0.3])
def test_a_prior_that_is_too_low_is_found_out(prior: float) -> None:
    governor = Governor(AFFINE, prior=(prior,) * 4)
    sizes = decode(governor, governor.new_acceptance(), 0.97, 400)
    assert min(sizes[-50:]) > 1
    assert governor.stats().probes > 0 or prior > 0.1


def test_without_probes_it_is_not() -> None:
    governor = Governor(AFFINE, prior=(0.05,) * 4, explored=0.0)
    assert set(decode(governor, governor.new_acceptance(), 0.97, 400)) == {1}


@pytest.mark.parametrize("count", [1, 16])
def test_probes_cost_no_more_than_the_part_that_was_granted(count: int) -> None:
    """No draft is ever kept: all that is lost to probes is lost."""
    governor = Governor(LINEAR, explored=0.01)
    acceptances = [governor.new_acceptance() for _ in range(count)]
    current, lost, rounds = [1] * count, 0.0, 3000 // count
    for _ in range(rounds):
        starting = [
            Candidate(a, size, 1000, 64) for a, size in zip(acceptances, current, strict=True)
        ]
        current = governor.choose(starting, ALONE)
        for acceptance, size in zip(acceptances, current, strict=True):
            governor.observe(acceptance, size, 1)
            # A round of b rows twice, in the time of which AR keeps a token a row.
            lost += 2 * size - 1 if size > 1 else 0
    assert 0 < lost <= 8 + 1.5 * 0.01 * rounds * count


def test_a_text_that_grows_easy_is_drafted_again() -> None:
    governor = Governor(AFFINE)
    acceptance = governor.new_acceptance()
    assert decode(governor, acceptance, 0.0, 200)[-1] == 1
    assert min(decode(governor, acceptance, 0.97, 800)[-50:]) > 1


def test_sequences_of_size_1_are_asked_again_every_eighth_pass() -> None:
    governor = Governor(FLAT)
    assert [governor.revisits() for _ in range(16)] == ([False] * 7 + [True]) * 2


def test_new_sequences_start_from_what_the_engine_saw() -> None:
    governor = settled(FLAT)
    before = governor.new_acceptance().expected(32)
    for _ in range(200):
        governor.observe(governor.new_acceptance(), 32, 32)
    assert governor.new_acceptance().expected(32) > 2 * before


def test_what_it_decides_can_be_counted() -> None:
    governor = settled(FLAT)
    assert governor.stats().seconds_ratio == 1
    acceptance = governor.new_acceptance()
    for size, accepted in ((1, 1), (4, 2), (4, 4), (8, 1)):
        governor.observe(acceptance, size, accepted)
    for seconds in (1.5, 2.5):
        governor.observe_step(32, 1, 64, True, seconds)
    stats = governor.stats()
    assert stats.rounds_by_size == {1: 1, 4: 2, 8: 1} and stats.probes == 0
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


def test_one_pass_in_seven_is_measured() -> None:
    governor = Governor(AFFINE)
    measured = []
    for _ in range(21):
        governor.revisits()
        measured.append(governor.wants_step_time)
    assert measured == ([False] * 5 + [True, False]) * 3
