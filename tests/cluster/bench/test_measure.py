"""The order of runs, and what is kept of them."""

import io
from collections.abc import Callable, Sequence

from rich.console import Console

from trimode.cluster.bench.measure import Curves, Entry, measure
from trimode.cluster.bench.metrics import Arrival, Limits, Record
from trimode.cluster.bench.settings import AR
from trimode.cluster.bench.workload import Job, Sampling, closed_load

QUIET = Console(file=io.StringIO())


class ScriptedTarget:
    """Each run after the warm-up takes the next of its seconds; all targets share one log."""

    def __init__(self, log: list[str], seconds: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
        self._log = log
        self._seconds = iter((0.0, *seconds))

    def run(
        self, jobs: Sequence[Job], concurrency: int, on_done: Callable[[], None]
    ) -> list[Record]:
        self._log.append(jobs[0].job_id.rpartition("/")[0])
        seconds = next(self._seconds)
        return [
            Record(0.0, (Arrival(seconds, 2),), (number, 7), prompt_tokens=1, forwards=2)
            for number, _ in enumerate(jobs)
        ]


def entry(curve: str, users: int, target: ScriptedTarget) -> Entry:
    return Entry(curve, AR, closed_load(["a"], users, 2, Sampling(2)), target)


def run(groups: list[list[Entry]], repeats: int) -> Curves:
    return measure(groups, repeats, Limits(), QUIET)


def test_the_entries_of_a_group_take_turns_there_and_back() -> None:
    log: list[str] = []
    groups = [[entry(curve, 1, ScriptedTarget(log)) for curve in ("a", "b")]]
    run(groups, 3)
    assert log == ["warm-up", "warm-up", "a/1/0", "b/1/0", "b/1/1", "a/1/1", "a/1/2", "b/1/2"]


def test_the_figures_are_of_the_median_repeat_and_all_speeds_are_kept() -> None:
    point = run([[entry("a", 1, ScriptedTarget([], (1.0, 4.0, 2.0)))]], 3)["a"][0]
    assert point.speeds == (4.0, 1.0, 2.0)
    assert point.summary.tokens_per_s == 2.0


def test_of_two_repeats_the_slower_one_counts() -> None:
    point = run([[entry("a", 1, ScriptedTarget([], (1.0, 2.0)))]], 2)["a"][0]
    assert point.summary.tokens_per_s == 2.0


def test_a_curve_has_its_points_in_the_order_of_the_loads() -> None:
    groups = [[entry("a", users, ScriptedTarget([]))] for users in (1, 4)]
    assert [point.label for point in run(groups, 1)["a"]] == ["1", "4"]


def test_the_outputs_are_kept_by_request() -> None:
    point = run([[entry("a", 1, ScriptedTarget([]))]], 2)["a"][0]
    assert point.outputs == ((0, 7), (1, 7))
