from typing import Any

import pytest

from trimode.replicas.decoding.self_speculation import SelfSpeculation, num_agreeing
from trimode.replicas.decoding.strategy import Outcome, PassKind, Position, Stage

MASK = 3
HERE = Position(known_id=20, start=7)


def drafted(make_context: Any, drafts: list[int], **own: Any) -> SelfSpeculation:
    """A round whose one draft pass answered with `drafts`."""
    strategy = SelfSpeculation(make_context(block_size=len(drafts) + 1, **own))
    strategy.next_query(HERE)
    assert strategy.accept(drafts, []) == Outcome()
    return strategy


def test_a_round_begins_with_a_draft_pass_over_masks(make_context: Any) -> None:
    query = SelfSpeculation(make_context(block_size=4)).next_query(HERE)
    assert (query.stage, query.kind) == (Stage.DRAFT, PassKind.DRAFT)
    assert (list(query.token_ids), query.start) == ([20, MASK, MASK, MASK], 7)
    assert list(query.answers) == [1, 2, 3]
    assert not query.wants_confidence


def test_without_the_adapter_a_draft_is_a_denoise_pass(make_context: Any) -> None:
    query = SelfSpeculation(make_context(use_adapter=False)).next_query(HERE)
    assert (query.stage, query.kind) == (Stage.DRAFT, PassKind.DENOISE)


def test_one_draft_pass_fills_the_block_and_a_causal_pass_verifies_it(make_context: Any) -> None:
    query = drafted(make_context, [30, 31, 32]).next_query(HERE)
    assert (query.stage, query.kind) == (Stage.VERIFY, PassKind.CAUSAL)
    assert (list(query.token_ids), query.start) == ([20, 30, 31, 32], 7)
    assert list(query.answers) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("answers", "accepted"),
    [
        ([30, 31, 32, 50], 4),
        ([30, 31, 51, 50], 3),
        ([30, 51, 32, 50], 2),
        ([51, 31, 32, 50], 1),
    ],
)
def test_answers_are_kept_up_to_the_first_that_a_draft_missed(
    make_context: Any, answers: list[int], accepted: int
) -> None:
    strategy = drafted(make_context, [30, 31, 32])
    strategy.next_query(HERE)
    wanted = Outcome(emitted=answers[:accepted], num_committed=accepted, accepted=accepted)
    assert strategy.accept(answers, []) == wanted


def test_the_next_round_starts_at_the_bonus_token(make_context: Any) -> None:
    strategy = drafted(make_context, [30, 31, 32])
    strategy.next_query(HERE)
    strategy.accept([30, 51, 32, 50], [])
    query = strategy.next_query(Position(51, 9))
    assert query.stage is Stage.DRAFT
    assert (list(query.token_ids), query.start) == ([51, MASK, MASK, MASK], 9)


def test_iterative_drafts_keep_the_confident_and_ask_again(make_context: Any) -> None:
    strategy = SelfSpeculation(make_context(block_size=4, threshold=0.5))
    assert strategy.next_query(HERE).wants_confidence
    assert strategy.accept([30, 31, 32], [0.1, 0.9, 0.6]) == Outcome()
    query = strategy.next_query(HERE)
    assert query.stage is Stage.DRAFT
    assert (list(query.token_ids), list(query.answers)) == ([20, MASK, 31, 32], [1])
    strategy.accept([40], [0.0])
    assert list(strategy.next_query(HERE).token_ids) == [20, 40, 31, 32]


@pytest.mark.parametrize(("temperature", "softness"), [(0.0, 1.0), (0.7, 0.7), (1.5, 1.5)])
def test_confidences_of_drafts_are_read_at_the_requests_temperature(
    make_context: Any, temperature: float, softness: float
) -> None:
    strategy = SelfSpeculation(make_context(threshold=0.5, temperature=temperature))
    assert strategy.next_query(HERE).confidence_temperature == softness


def test_a_block_of_1_is_autoregressive(make_context: Any) -> None:
    strategy = SelfSpeculation(make_context(block_size=1))
    query = strategy.next_query(HERE)
    assert (query.stage, list(query.token_ids)) == (Stage.DECODE, [20])
    assert strategy.accept([50], []) == Outcome(emitted=[50], num_committed=1, accepted=1)


def test_asking_twice_gives_the_same_query(make_context: Any) -> None:
    strategy = SelfSpeculation(make_context())
    assert strategy.next_query(HERE) == strategy.next_query(HERE)


@pytest.mark.parametrize(
    ("drafts", "answers", "agreeing"),
    [([], [5], 0), ([5], [5, 6], 1), ([5, 6], [5, 7, 8], 1), ([5, 6], [7, 6, 8], 0)],
)
def test_agreement_ends_at_the_first_difference(
    drafts: list[int], answers: list[int], agreeing: int
) -> None:
    assert num_agreeing(drafts, answers) == agreeing
