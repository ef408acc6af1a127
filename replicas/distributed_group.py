"""DistributedGroup: the collectives of a tensor-parallel group, by NCCL between GPUs and by gloo
between CPUs.

The group is an object, not torch's process-wide default: one process may hold several, and nobody
finds it who was not given it.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions

from trimode.replicas.addresses import listen

LOOPBACK = "127.0.0.1"


def serve_store(host: str, size: int, timeout_s: float) -> dist.TCPStore:
    """Where the ranks of a group find each other: rank 0's, on a free port of this address only.

    It holds addresses of ranks and no data of requests.
    """
    listener = listen(host)
    # Left to itself the store would listen on every interface.
    return dist.TCPStore(
        host,
        listener.getsockname()[1],
        size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def join_store(host: str, port: int, size: int, timeout_s: float) -> dist.TCPStore:
    """The store of rank 0, from another rank."""
    return dist.TCPStore(host, port, size, timeout=timedelta(seconds=timeout_s))


class DistributedGroup:
    """One rank's end of the group."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        device: torch.device,
        *,
        host: str = LOOPBACK,
        timeout_s: float,
        fixed_order: bool = False,
    ) -> None:
        """Waits until all ranks are here.

        host: this rank's own address, at which gloo listens. timeout_s: longest wait for another
        rank in one collective. fixed_order: sums are made in the order of the ranks, so that the
        same summands give the same bits whatever the number of rows; else in the library's order.
        """
        self.rank = rank
        self.size = size
        self._fixed_order = fixed_order
        timeout = timedelta(seconds=timeout_s)
        connect = _nccl if device.type == "cuda" else _gloo
        self._ranks = connect(store, rank, size, device, host, timeout)
        self._sum = dist.AllreduceOptions()
        self._gather = AllgatherOptions()
        for options in (self._sum, self._gather):
            options.asyncOp = False  # on the caller's own stream, so that a graph can hold it
            options.timeout = timeout
        self.all_reduce(torch.zeros(1, device=device))  # whoever is missing is missed here

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, the same bits on each. x is used up."""
        if self._fixed_order:
            parts = self.all_gather(x)
            total = parts[0]
            for part in parts[1:]:
                total += part
            return total
        x = x.contiguous()
        _finish(self._ranks.allreduce([x], self._sum))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """x of every rank, by rank: [size, *x.shape]."""
        parts = x.new_empty((self.size, *x.shape))
        _finish(self._ranks._allgather_base(parts.flatten(0, 1), x.contiguous(), self._gather))
        return parts

    def close(self) -> None:
        """Part without waiting for the others."""
        self._ranks.abort()


def _finish(work: dist.Work | None) -> None:
    """Wait for a collective; NCCL's are on the caller's stream and leave nothing to wait for."""
    if work is not None:
        work.wait()


def _nccl(
    store: dist.Store, rank: int, size: int, device: torch.device, host: str, timeout: timedelta
) -> dist.ProcessGroup:
    if host == LOOPBACK:  # data goes over NVLink or shared memory; this is where ranks meet
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    backend = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, options)
    backend.eager_connect_single_device(device)
    group = dist.ProcessGroup(store, rank, size)
    group._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
    group._register_backend(device, dist.ProcessGroup.BackendType.NCCL, backend)
    return group


def _gloo(
    store: dist.Store, rank: int, size: int, device: torch.device, host: str, timeout: timedelta
) -> dist.ProcessGroup:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined] # not in the stub
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    backend = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, options)
    group = dist.ProcessGroup(store, rank, size)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    group._register_backend(device, dist.ProcessGroup.BackendType.GLOO, backend)
    return group
