"""Runs what is compared in turns, so that a slow minute of the machine meets all of it alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trimode.cluster.bench.metrics import Limits, Record, Summary, summarise
from trimode.cluster.bench.settings import Setting
from trimode.cluster.bench.workload import Job, Load, jobs_of, warm_up_jobs


class Target(Protocol):
    """What answers: an engine here, a cluster elsewhere, another library."""

    def run(
        self, jobs: Sequence[Job], concurrency: int, on_done: Callable[[], None]
    ) -> list[Record]:
        """One Record a job, in order; at least one of them was answered. Raises TrimodeError."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One point of one curve, yet to be measured."""

    curve: str
    setting: Setting
    load: Load
    target: Target


@dataclass(frozen=True, slots=True)
class Point:
    """One point measured: the figures of each repeat, and what the first one generated."""

    label: str  # of the load
    repeats: tuple[Summary, ...]
    outputs: tuple[tuple[int, ...], ...]  # token ids by request

    @property
    def summary(self) -> Summary:
        """Of the repeat with the median tokens/s; of an even number, the lower one of the two."""
        ordered = sorted(self.repeats, key=lambda repeat: repeat.tokens_per_s)
        return ordered[(len(ordered) - 1) // 2]

    @property
    def speeds(self) -> tuple[float, ...]:
        """Tokens a second of each repeat, in order: those of two points were taken in turns."""
        return tuple(repeat.tokens_per_s for repeat in self.repeats)


Curves = dict[str, list[Point]]


def measure(
    groups: Sequence[Sequence[Entry]], repeats: int, limits: Limits, console: Console
) -> Curves:
    """Each entry so many times, those of a group in turns; prints a line a point."""
    curves: Curves = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    total = repeats * sum(len(entry.load.asks) for group in groups for entry in group)
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("bench", total=total)

        def show(entry: Entry) -> None:
            bar.update(task, description=f"{entry.curve} at {entry.load.label}")

        for group in groups:
            points = _take_turns(group, repeats, limits, show, lambda: bar.advance(task))
            for entry, point in zip(group, points, strict=True):
                curves.setdefault(entry.curve, []).append(point)
                console.print(_line(entry.curve, point), highlight=False, markup=False)
    return curves


def _take_turns(
    group: Sequence[Entry],
    repeats: int,
    limits: Limits,
    on_run: Callable[[Entry], None],
    on_done: Callable[[], None],
) -> list[Point]:
    for entry in group:
        on_run(entry)
        warm_up = warm_up_jobs(entry.setting, entry.load)
        entry.target.run(warm_up, entry.load.concurrency, lambda: None)
    summaries: list[list[Summary]] = [[] for _ in group]
    outputs: list[tuple[tuple[int, ...], ...]] = [()] * len(group)
    for repeat in range(repeats):
        # There and back, so that a steady drift favours nobody.
        for index in range(len(group))[:: -1 if repeat % 2 else 1]:
            entry = group[index]
            on_run(entry)
            jobs = jobs_of(f"{entry.curve}/{entry.load.label}/{repeat}", entry.setting, entry.load)
            records = entry.target.run(jobs, entry.load.concurrency, on_done)
            summaries[index].append(summarise(records, limits))
            if repeat == 0:
                outputs[index] = tuple(record.token_ids for record in records)
    return [
        Point(entry.load.label, tuple(figures), ids)
        for entry, figures, ids in zip(group, summaries, outputs, strict=True)
    ]


def _line(curve: str, point: Point) -> str:
    summary = point.summary
    ttft = summary.ttft_ms.p50 if summary.ttft_ms else 0.0
    refused = f", {summary.refused} refused" if summary.refused else ""
    return (
        f"{curve:>15} at {point.label:>5}: "
        f"{summary.tokens_per_s_per_user:7.1f} tokens/s/user, "
        f"{summary.tokens_per_s:8.1f} in total, first token {ttft:6.1f} ms, "
        f"{summary.tokens_per_forward:.2f} tokens/forward, "
        f"prefix hits {summary.prefix_hit_rate:.0%}, good {summary.good_share:.0%}{refused}"
    )
