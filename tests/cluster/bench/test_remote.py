"""A bench of a served engine over gRPC."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from trimode.cluster.bench.remote import RemoteTarget
from trimode.cluster.bench.settings import AR, AUTO, GOVERNOR, SPECULATION, Setting
from trimode.cluster.bench.workload import (
    DEFAULT_PROMPTS,
    Load,
    Sampling,
    closed_load,
    jobs_of,
    poisson_load,
)
from trimode.cluster.client import CallFailed
from trimode.replicas.errors import Unavailable

PROMPTS = DEFAULT_PROMPTS[:3]
GREEDY = Sampling(max_tokens=6, ignore_eos=True)


async def run(address: str, setting: Setting, load: Load, concurrency: int | None = None) -> Any:
    target, done = RemoteTarget(address), []
    jobs = jobs_of("run", setting, load)
    records = await target.run_async(
        jobs, concurrency or load.concurrency, lambda: done.append(None)
    )
    assert len(done) == len(records) == len(jobs)
    return records


@pytest.mark.parametrize("setting", [AR, SPECULATION[1], GOVERNOR, AUTO], ids=lambda s: s.name)
async def test_a_closed_loop_gives_a_record_a_request_in_order(
    served: Any, setting: Setting
) -> None:
    records = await run(served.address, setting, closed_load(PROMPTS, 2, 4, GREEDY))
    assert [record.tokens for record in records] == [6] * 4
    assert records[0].token_ids == records[3].token_ids != records[1].token_ids
    assert all(record.prompt_tokens and record.forwards for record in records)
    assert all(0 < record.ttft_s <= record.total_s for record in records)


async def test_a_run_finds_nothing_in_the_prefix_cache_but_what_it_put_there(served: Any) -> None:
    load = closed_load(["def main():\n    return 0\n" * 8], 1, 2, GREEDY)
    for _ in range(2):
        first, second = await run(served.address, AR, load)
        assert first.cached_tokens == 0 < second.cached_tokens


async def test_an_open_loop_sends_by_the_clock_and_counts_from_the_arrival(served: Any) -> None:
    load = poisson_load(PROMPTS, 40, 5, GREEDY)
    records = await run(served.address, AR, load)
    offsets = [record.sent_s - records[0].sent_s for record in records]
    wanted = [ask.arrival_s - load.asks[0].arrival_s for ask in load.asks]  # type: ignore[operator]
    assert offsets == pytest.approx(wanted)


async def test_who_waits_for_a_turn_waits_on_the_clock(served: Any) -> None:
    first, second, *_ = await run(
        served.address, AR, poisson_load(PROMPTS, 1000, 4, Sampling(32, ignore_eos=True)), 1
    )
    assert second.arrivals[0].at_s > first.arrivals[-1].at_s
    assert second.sent_s < first.arrivals[-1].at_s


async def test_what_a_full_cluster_refuses_is_counted_and_the_run_goes_on(served: Any) -> None:
    load = closed_load(PROMPTS, 40, 40, Sampling(24, ignore_eos=True))
    records = await run(served.address, AR, load)
    refused = [record for record in records if not record.arrivals]
    assert 0 < len(refused) < len(records)


async def test_a_request_that_the_server_finds_wrong_ends_the_run_with_its_words(
    served: Any,
) -> None:
    with pytest.raises(CallFailed, match=r"INVALID_ARGUMENT: max_tokens.*2048 positions"):
        await run(served.address, AR, closed_load(PROMPTS, 2, 4, Sampling(5000)))


def test_a_server_that_is_not_there_is_named(free_port: Any) -> None:
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(Unavailable, match=f"nobody serves at {address}"):
        RemoteTarget(address).describe()


async def test_the_command_measures_a_served_address(served: Any, tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "trimode.cluster", "bench", "--address", served.address,
        "--settings", "ar,auto", "--concurrency", "2", "--requests", "2", "--max-tokens", "6",
        "--repeats", "2", "--out", str(out),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    printed, _ = await process.communicate()
    assert process.returncode == 0, printed.decode()
    document = json.loads(out.read_text())
    assert document["model"] == "bundled"
    assert {name: list(rows) for name, rows in document["settings"].items()} == {
        "ar": ["2"], "auto": ["2"],
    }  # fmt: skip
    assert len(document["settings"]["auto"]["2"]["tokens_per_s_of_repeats"]) == 2
