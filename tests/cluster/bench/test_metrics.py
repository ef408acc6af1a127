"""The figures of a run, by hand."""

from trimode.cluster.bench.metrics import (
    Arrival,
    Limits,
    Ratio,
    Record,
    percentile,
    summarise,
)


def record(sent_s: float = 0.0, *arrivals: tuple[float, int], **fields: int) -> Record:
    return Record(
        sent_s=sent_s,
        arrivals=tuple(Arrival(at_s, num) for at_s, num in arrivals),
        prompt_tokens=10,
        forwards=fields.get("forwards", 4),
        cached_tokens=fields.get("cached", 0),
    )


def test_a_percentile_is_a_value_that_was_seen() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99)] == [50, 90, 99]
    assert percentile([7.0], 0.99) == 7


def test_time_per_token_leaves_the_first_chunk_out() -> None:
    assert record(1.0, (3.0, 4), (4.0, 2), (5.0, 2)).tpot_s == 0.5
    assert record(1.0, (3.0, 4)).tpot_s is None


def test_the_total_runs_from_the_first_send_to_the_last_chunk() -> None:
    summary = summarise([record(1.0, (2.0, 4)), record(2.0, (3.0, 2), (5.0, 6))], Limits())
    assert (summary.tokens, summary.seconds, summary.tokens_per_s) == (12, 4.0, 3.0)
    assert summary.tokens_per_s_per_user == (4 / 1 + 8 / 3) / 2
    assert summary.tokens_per_forward == 1.5
    assert summary.chunk_gap_ms is not None and summary.chunk_gap_ms.p99 == 2000


def test_goodput_counts_only_requests_within_the_limits() -> None:
    quick, late = record(0.0, (1.0, 2), (2.0, 2)), record(0.0, (3.0, 2), (4.0, 2))
    summary = summarise([quick, late], Limits(ttft_s=2.0))
    assert (summary.good_share, summary.goodput_tokens_per_s) == (0.5, 1.0)
    assert summarise([quick, late], Limits(tpot_s=0.4)).good_share == 0


def test_the_hit_rate_is_a_share_of_prompt_tokens() -> None:
    summary = summarise([record(0.0, (1.0, 1), cached=5), record(0.0, (1.0, 1))], Limits())
    assert summary.prefix_hit_rate == 0.25
    assert summary.accepted_per_round is None


def test_a_refused_request_counts_against_the_good_ones_and_nowhere_else() -> None:
    answered = record(0.0, (1.0, 2), (2.0, 2))
    summary = summarise([answered, Record(5.0)], Limits())
    assert (summary.requests, summary.refused, summary.good_share) == (2, 1, 0.5)
    assert (summary.seconds, summary.tokens_per_s) == (2.0, 2.0)


def test_a_ratio_is_of_each_turn_and_not_of_the_medians() -> None:
    ratio = Ratio.of([1.0, 20.0, 3.0, 4.0], [1.0, 10.0, 1.0, 1.0])
    assert (ratio.median, ratio.lower, ratio.upper) == (2.5, 1.0, 3.0)
    assert str(ratio) == "2.500 (1.000 to 3.000)"
