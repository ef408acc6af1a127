"""Loads and the jobs of a run."""

import pytest

from trimode.cluster.bench.prompt_files import TraceLine
from trimode.cluster.bench.settings import AR
from trimode.cluster.bench.workload import (
    Sampling,
    closed_load,
    jobs_of,
    poisson_arrivals,
    poisson_load,
    trace_load,
    warm_up_jobs,
)

GREEDY = Sampling(max_tokens=32, seed=5)


def test_a_closed_load_has_two_requests_for_each_user_and_at_least_those_wanted() -> None:
    assert len(closed_load(["a"], 8, 3, GREEDY).asks) == 16
    asks = closed_load(["a", "b"], 1, 3, GREEDY).asks
    assert [(ask.prompt, ask.sampling.seed, ask.arrival_s) for ask in asks] == [
        ("a", 5, None), ("b", 6, None), ("a", 7, None),
    ]  # fmt: skip


def test_arrivals_come_at_the_rate_and_repeat_with_the_seed() -> None:
    arrivals = poisson_arrivals(20, 4000, seed=1)
    assert arrivals == sorted(arrivals) == poisson_arrivals(20, 4000, seed=1)
    assert arrivals[-1] == pytest.approx(200, rel=0.1)
    asks = poisson_load(["a", "b"], 20, 3, GREEDY).asks
    assert [ask.arrival_s for ask in asks] == poisson_arrivals(20, 3, seed=5)


def test_a_trace_keeps_its_times_and_lengths_behind_the_system_text() -> None:
    asks = trace_load([TraceLine(0.0, "a"), TraceLine(1.5, "b", 7)], "be ", GREEDY).asks
    assert [(ask.prompt, ask.arrival_s, ask.sampling.max_tokens) for ask in asks] == [
        ("be a", 0.0, 32), ("be b", 1.5, 7),
    ]  # fmt: skip


def test_every_run_has_a_cache_salt_of_its_own_and_shares_it_with_nobody() -> None:
    load = closed_load(["a", "b"], 2, 4, GREEDY)
    first, second = jobs_of("ar/2/0", AR, load), jobs_of("ar/2/1", AR, load)
    assert {job.cache_salt for job in first} == {"ar/2/0"}
    assert {job.cache_salt for job in second} == {"ar/2/1"}
    assert len({job.job_id for job in first + second}) == 8


def test_a_warm_up_is_short_and_asks_each_prompt_once_at_once() -> None:
    load = trace_load([TraceLine(float(at), "ab"[at % 2]) for at in range(9)], "", GREEDY)
    jobs = warm_up_jobs(AR, load)
    assert [(job.ask.prompt, job.ask.arrival_s) for job in jobs] == [("a", None), ("b", None)]
    assert {job.ask.sampling.max_tokens for job in jobs} == {16}
