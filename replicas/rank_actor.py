"""RankActor: the process of one worker, as Ray starts it for replicas/ranks.py."""

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import ray
import structlog
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError

from trimode.replicas.config import EngineConfig
from trimode.replicas.distributed_group import LOOPBACK, DistributedGroup, join_store
from trimode.replicas.loading import default_device, torch_dtype
from trimode.replicas.model.hub import local_folder
from trimode.replicas.model.source import ModelSource
from trimode.replicas.model.weights import load_model
from trimode.replicas.startup import settle, start_rank
from trimode.replicas.step_channel import StepReceiver
from trimode.replicas.worker import Worker

logger = structlog.get_logger(__name__)

JOIN_TIMEOUT_S = 60.0  # for all ranks to find each other, once their processes run
# Longest wait inside one collective: at the start, ranks compile and warm up at different speeds.
# A group that serves is ended before that, by its step_timeout_s.
COLLECTIVE_TIMEOUT_S = 120.0
RANK_0_TIMEOUT_S = 6.0  # how long rank 0 may ask nothing


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What every worker of a group loads, and with how many threads it computes."""

    model: ModelSource  # each node has it, or downloads it once
    dtype: str
    quantization: str | None
    engine: EngineConfig
    num_threads: int


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the ranks of one group meet."""

    size: int
    is_local: bool  # all on one node: nobody listens but on loopback
    host: str  # rank 0's
    store_port: int
    step_port: int
    secret: bytes  # without it nobody is let in as a worker


class RankActor:
    """`load` and `run` have one thread after the other, `ping` always another."""

    def __init__(self, options: WorkerOptions, rank_0: ActorHandle) -> None:
        self._options = options
        self._rank_0 = rank_0
        self._worker: Worker | None = None
        self._pinged_at: float | None = None

    def node(self) -> str:
        """The address of the node that it runs on."""
        return str(ray.util.get_node_ip_address())

    def load(self, rank: int, meeting: Meeting) -> None:
        """Meet the other ranks and load this one's part of the model."""
        options, device = self._options, default_device()
        torch.set_num_threads(options.num_threads)
        store = join_store(meeting.host, meeting.store_port, meeting.size, JOIN_TIMEOUT_S)
        self._group = DistributedGroup(
            store, rank, meeting.size, device,
            host=LOOPBACK if meeting.is_local else self.node(),
            timeout_s=COLLECTIVE_TIMEOUT_S,
            fixed_order=options.engine.batch_invariant,
        )  # fmt: skip
        self._steps = StepReceiver.connect(
            meeting.host, meeting.step_port, meeting.secret, JOIN_TIMEOUT_S
        )
        self._model = load_model(
            local_folder(options.model),
            torch_dtype(options.dtype, device),
            device,
            quantization=options.quantization,
            group=self._group,
        )

    def run(self) -> None:
        """Get ready beside rank 0, and run its steps until it has no more. Raises where one cannot
        be run.
        """
        try:
            config = settle(self._model, self._options.engine)
            runner, _ = start_rank(self._model, config)
            self._worker = Worker(runner, self._steps)
            self._worker.run()
        finally:
            self._group.close()  # so that nobody waits for this rank

    def ping(self) -> int:
        """The number of steps that it has begun."""
        is_first = self._pinged_at is None
        self._pinged_at = time.monotonic()
        if is_first:
            threading.Thread(target=self._watch_rank_0, name="watch", daemon=True).start()
        return 0 if self._worker is None else self._worker.num_steps

    def _watch_rank_0(self) -> None:
        """End with rank 0, and end it where it lives but does nothing any more."""
        while time.monotonic() - (self._pinged_at or 0.0) < RANK_0_TIMEOUT_S:
            time.sleep(1)
        logger.error("rank 0 is not heard of", for_s=RANK_0_TIMEOUT_S)
        with suppress(RayError):
            ray.kill(self._rank_0)
        os._exit(1)
