"""A comparison, by hand."""

from trimode.cluster.bench.against import compare
from trimode.cluster.bench.measure import Point
from trimode.cluster.bench.metrics import Arrival, Limits, Record, summarise

OURS = ((1, 2, 3), (4, 5, 6))


def point(label: str, speeds: tuple[float, ...], outputs: tuple[tuple[int, ...], ...]) -> Point:
    repeats = tuple(
        summarise([Record(0.0, (Arrival(6 / speed, 6),), prompt_tokens=1)], Limits())
        for speed in speeds
    )
    return Point(label, repeats, outputs)


def test_ratios_are_of_the_runs_that_were_taken_in_turns() -> None:
    ours = [point("1", (2.0, 6.0, 4.0), OURS), point("32", (20.0, 20.0, 20.0), OURS)]
    comparison = compare("other", "sdpa", ours, point("1", (1.0, 2.0, 4.0), OURS), 2)
    assert comparison.ratios["1"].median == 2.0
    assert (comparison.ratios["32"].lower, comparison.ratios["32"].upper) == (5.0, 20.0)
    assert comparison.lines() == [
        "ar with 1 at once / other one at a time: 2.000 (1.000 to 3.000)",
        "ar with 32 at once / other one at a time: 10.000 (5.000 to 20.000)",
        "2 of 2 greedy outputs are those of other",
    ]


def test_outputs_that_differ_are_counted_to_where_they_do() -> None:
    theirs = point("1", (1.0,), ((1, 2, 9), (4, 5, 6)))
    comparison = compare("other", "sdpa", [point("1", (1.0,), OURS)], theirs, 2)
    assert comparison.equal_tokens == (2, 3)
    assert comparison.lines()[-1] == (
        "1 of 2 greedy outputs are those of other; the others are for 2 tokens"
    )
