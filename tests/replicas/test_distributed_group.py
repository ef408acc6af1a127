"""Collectives over gloo, one thread a rank."""

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from trimode.replicas.distributed_group import (
    LOOPBACK,
    DistributedGroup,
    join_store,
    serve_store,
)

TIMEOUT_S = 20.0
CPU = torch.device("cpu")


def on_ranks(size: int, part: Callable[[DistributedGroup], Any], **settings: Any) -> list[Any]:
    """What part(group) returns on each rank of a new group."""
    store, results = dist.HashStore(), [None] * size

    def run(rank: int) -> None:
        group = DistributedGroup(store, rank, size, CPU, timeout_s=TIMEOUT_S, **settings)
        results[rank] = part(group)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def numbers(rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(3, 5, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("fixed_order", [False, True], ids=["library", "fixed"])
def test_all_reduce_gives_every_rank_the_sum(dtype: torch.dtype, fixed_order: bool) -> None:
    sums = on_ranks(
        3, lambda group: group.all_reduce(numbers(group.rank, dtype)), fixed_order=fixed_order
    )
    wanted = sum(numbers(rank, dtype).double() for rank in range(3))
    for total in sums:
        torch.testing.assert_close(total.double(), wanted, rtol=0, atol=0.05)
        assert torch.equal(total, sums[0])


def test_sums_in_fixed_order_have_the_same_bits_whatever_the_number_of_rows() -> None:
    def part(group: DistributedGroup) -> tuple[Tensor, Tensor]:
        x = numbers(group.rank)
        return group.all_reduce(x.clone()), group.all_reduce(x[1:2].clone())

    for whole, row in on_ranks(4, part, fixed_order=True):
        assert torch.equal(whole[1:2], row)
        expected = ((numbers(0) + numbers(1)) + numbers(2)) + numbers(3)
        assert torch.equal(whole, expected)


def test_all_gather_gives_every_rank_all_parts_by_rank() -> None:
    for parts in on_ranks(3, lambda group: group.all_gather(numbers(group.rank).t())):
        assert torch.equal(parts, torch.stack([numbers(rank).t() for rank in range(3)]))


def test_a_rank_that_stays_away_ends_the_others_wait() -> None:
    def part(group: DistributedGroup) -> str:
        if group.rank == 1:
            group.close()
            return ""
        with pytest.raises(RuntimeError) as caught:
            group.all_reduce(numbers(0))
        return str(caught.value)

    assert on_ranks(2, part)[0]


def test_all_that_a_group_on_one_node_listens_on_is_loopback() -> None:
    seen: list[set[str]] = []
    store = serve_store(LOOPBACK, 2, TIMEOUT_S)

    def run(rank: int, own: Any) -> None:
        group = DistributedGroup(own, rank, 2, CPU, timeout_s=TIMEOUT_S)
        if rank == 0:
            seen.append(listened_addresses())
        group.all_reduce(numbers(rank))

    other = join_store(LOOPBACK, store.port, 2, TIMEOUT_S)
    before = listened_addresses()
    thread = threading.Thread(target=run, args=(1, other))
    thread.start()
    run(0, store)
    thread.join()
    assert seen[0] and "0100007F" in before
    assert seen[0] - {"0100007F"} == set()


def listened_addresses() -> set[str]:
    """Of this process's listening TCP sockets, as the kernel writes them."""
    own = set()
    for entry in Path(f"/proc/{os.getpid()}/fd").iterdir():
        try:
            own.add(os.readlink(entry))
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.add(fields[1].split(":")[0])
    return found


def test_a_store_that_nobody_serves_is_missed_in_time() -> None:
    store = serve_store(LOOPBACK, 1, TIMEOUT_S)
    store.set_timeout(timedelta(milliseconds=100))
    with pytest.raises(dist.DistStoreError):
        store.get("what no rank has said")


def test_ranks_on_other_addresses_than_loopbacks_first_meet_there() -> None:
    """As ranks of different nodes do, each at its own."""
    host = "127.0.0.2"
    store = serve_store(host, 2, TIMEOUT_S)
    results: list[Any] = [None, None]

    def run(rank: int) -> None:
        own = store if rank == 0 else join_store(host, store.port, 2, TIMEOUT_S)
        group = DistributedGroup(own, rank, 2, CPU, host=f"127.0.0.{2 + rank}", timeout_s=TIMEOUT_S)
        results[rank] = group.all_reduce(torch.ones(2)).tolist()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[2, 2], [2, 2]]


@pytest.mark.gpu
def test_nccl_sums_over_every_gpu_here_also_in_a_captured_graph() -> None:
    size, store = torch.cuda.device_count(), dist.HashStore()
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        group = DistributedGroup(store, rank, size, device, timeout_s=TIMEOUT_S)
        x = torch.zeros(4, 8, device=device, dtype=torch.bfloat16)
        group.all_reduce(x.clone())
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)  # torch would share one among the threads
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            total = group.all_reduce(x + 1)
        x.fill_(rank)
        graph.replay()
        gathered = group.all_gather(x)
        torch.cuda.synchronize()
        results[rank] = (total.tolist(), gathered[:, 0, 0].tolist())

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = size * (size + 1) / 2
    assert results == [([[wanted] * 8] * 4, [float(rank) for rank in range(size)])] * size
