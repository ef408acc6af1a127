from collections.abc import Callable

import pytest

from trimode.replicas.decoding.autoregressive import Autoregressive
from trimode.replicas.decoding.strategy import DecodingContext
from trimode.replicas.sequence import Sequence
from trimode.replicas.types import FinishReason, Mode, Request

STOP = 9


@pytest.fixture
def sequence(make_request: Callable[..., Request]) -> Sequence:
    """A prompt of 5, at most 6 new tokens, stop id 9, arrived at 100.0."""
    request = make_request(Mode.AUTOREGRESSIVE, num_prompt=5, max_tokens=6)
    stop_ids = frozenset({STOP})
    strategy = Autoregressive(DecodingContext(request, 3, stop_ids, 1))
    return Sequence(request, strategy, stop_ids, 100.0)


def test_a_new_sequence_has_no_output_and_all_of_its_prompt_to_prefill(sequence: Sequence) -> None:
    assert (sequence.num_prompt_tokens, sequence.num_output_tokens) == (5, 0)
    assert sequence.is_prefilling


def test_prefill_ends_with_the_last_prompt_token(sequence: Sequence) -> None:
    sequence.num_committed = 4
    assert sequence.is_prefilling
    sequence.num_committed = 5
    assert not sequence.is_prefilling


def test_tokens_below_the_limit_leave_the_sequence_open(sequence: Sequence) -> None:
    assert sequence.append([20, 21]) == [20, 21]
    assert list(sequence.token_ids[5:]) == [20, 21]
    assert sequence.finish_reason is None


def test_output_is_cut_at_max_tokens(sequence: Sequence) -> None:
    sequence.append([20, 21, 22, 23])
    assert sequence.append([24, 25, 26, 27]) == [24, 25]
    assert sequence.num_output_tokens == 6
    assert sequence.finish_reason is FinishReason.LENGTH


def test_output_that_ends_exactly_at_max_tokens_is_finished(sequence: Sequence) -> None:
    assert sequence.append([20, 21, 22, 23, 24, 25]) == [20, 21, 22, 23, 24, 25]
    assert sequence.finish_reason is FinishReason.LENGTH


def test_a_stop_token_is_the_last_one_taken(sequence: Sequence) -> None:
    assert sequence.append([20, STOP, 21, STOP]) == [20, STOP]
    assert list(sequence.token_ids[5:]) == [20, STOP]
    assert sequence.finish_reason is FinishReason.STOP


def test_a_stop_token_at_max_tokens_counts_as_stop(sequence: Sequence) -> None:
    sequence.append([20, 21, 22, 23, 24, STOP])
    assert sequence.finish_reason is FinishReason.STOP


def test_a_stop_token_past_max_tokens_does_not_count(sequence: Sequence) -> None:
    assert sequence.append([20, 21, 22, 23, 24, 25, STOP]) == [20, 21, 22, 23, 24, 25]
    assert sequence.finish_reason is FinishReason.LENGTH


def test_a_stop_id_in_the_prompt_stops_nothing(sequence: Sequence) -> None:
    sequence.token_ids[2] = STOP
    sequence.append([20])
    assert sequence.finish_reason is None


def test_the_account_tells_tokens_passes_and_times(sequence: Sequence) -> None:
    sequence.append([20, STOP])
    sequence.num_forwards, sequence.accepted = 3, [2]
    sequence.scheduled_at, sequence.first_token_at = 101.0, 103.0
    finish = sequence.account(now=107.0)
    assert (finish.prompt_tokens, finish.completion_tokens) == (5, 2)
    assert (finish.forwards, finish.accepted, finish.reason) == (3, (2,), FinishReason.STOP)
    timings = finish.timings
    assert (timings.queue_s, timings.first_token_s, timings.total_s) == (1.0, 3.0, 7.0)


def test_sequences_of_equal_requests_are_not_equal(sequence: Sequence) -> None:
    twin = Sequence(
        sequence.request,
        sequence.strategy,
        sequence.stop_ids,
        sequence.arrived_at,
    )
    assert twin != sequence
