from typing import Any

import pytest

from trimode.replicas.decoding.block_diffusion import BlockDiffusion
from trimode.replicas.decoding.strategy import Outcome, PassKind, Position, Stage

MASK = 3
HERE = Position(known_id=20, start=7)


def test_a_new_block_is_denoised_with_its_confidences(make_context: Any) -> None:
    query = BlockDiffusion(make_context(block_size=4, temperature=0.7)).next_query(HERE)
    assert (query.stage, query.kind) == (Stage.DENOISE, PassKind.DENOISE)
    assert list(query.token_ids) == [20, MASK, MASK, MASK]
    assert (query.start, list(query.answers)) == (7, [1, 2, 3])
    assert query.wants_confidence
    assert query.confidence_temperature == 1.0


def test_only_confident_answers_are_kept(make_context: Any) -> None:
    strategy = BlockDiffusion(make_context(block_size=4, threshold=0.5))
    strategy.next_query(HERE)
    assert strategy.accept([30, 31, 32], [0.2, 0.6, 0.4]) == Outcome()
    query = strategy.next_query(HERE)
    assert list(query.token_ids) == [20, MASK, 31, MASK]
    assert list(query.answers) == [1, 3]


@pytest.mark.parametrize("threshold", [None, 0.9])
def test_the_default_threshold_is_nine_tenths(make_context: Any, threshold: float | None) -> None:
    strategy = BlockDiffusion(make_context(block_size=4, threshold=threshold))
    strategy.next_query(HERE)
    strategy.accept([30, 31, 32], [0.95, 0.9, 0.89])
    assert list(strategy.next_query(HERE).answers) == [3]


def test_a_denoise_pass_always_fills_one_place(make_context: Any) -> None:
    strategy = BlockDiffusion(make_context(block_size=8, threshold=1.0))
    for left in range(7, 0, -1):
        assert len(strategy.next_query(HERE).answers) == left
        strategy.accept([30] * left, [0.0] * left)
    assert strategy.next_query(HERE).stage is Stage.COMMIT


def test_the_block_is_emitted_when_its_last_mask_falls(make_context: Any) -> None:
    strategy = BlockDiffusion(make_context(block_size=4, threshold=0.0))
    strategy.next_query(HERE)
    assert strategy.accept([30, 31, 32], [0.1] * 3) == Outcome(emitted=[30, 31, 32])


def test_a_full_block_is_committed_by_one_causal_pass(make_context: Any) -> None:
    strategy = BlockDiffusion(make_context(block_size=4, threshold=0.0))
    strategy.next_query(HERE)
    strategy.accept([30, 31, 32], [0.1] * 3)
    query = strategy.next_query(HERE)
    assert (query.stage, query.kind) == (Stage.COMMIT, PassKind.CAUSAL)
    assert (list(query.token_ids), list(query.answers)) == ([20, 30, 31, 32], [3])
    assert not query.wants_confidence
    assert strategy.accept([40], []) == Outcome(emitted=[40], num_committed=4)


def test_the_next_block_starts_where_the_commit_ended(make_context: Any) -> None:
    strategy = BlockDiffusion(make_context(block_size=2, threshold=0.0))
    for answers in ([30], [40]):
        strategy.next_query(HERE)
        strategy.accept(answers, [0.5])
    query = strategy.next_query(Position(40, 9))
    assert (list(query.token_ids), query.start) == ([40, MASK], 9)


def test_a_stop_token_without_a_mask_before_it_ends_the_block_early(make_context: Any) -> None:
    strategy = BlockDiffusion(make_context(block_size=5, threshold=0.5, stop_ids=(9,)))
    strategy.next_query(HERE)
    assert strategy.accept([30, 9, 31, 32], [0.9, 0.8, 0.1, 0.7]) == Outcome(emitted=[30, 9])


def test_a_stop_token_behind_a_mask_waits(make_context: Any) -> None:
    strategy = BlockDiffusion(make_context(block_size=5, threshold=0.5, stop_ids=(9,)))
    strategy.next_query(HERE)
    assert strategy.accept([30, 9, 31, 32], [0.1, 0.8, 0.1, 0.7]) == Outcome()


def test_a_block_of_1_is_committed_at_once(make_context: Any) -> None:
    strategy = BlockDiffusion(make_context(block_size=1))
    assert strategy.next_query(HERE).stage is Stage.COMMIT
    assert strategy.accept([40], []) == Outcome(emitted=[40], num_committed=1)


def test_asking_twice_gives_the_same_query(make_context: Any) -> None:
    strategy = BlockDiffusion(make_context())
    assert strategy.next_query(HERE) == strategy.next_query(HERE)
