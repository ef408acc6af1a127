"""Ranks: the other ranks of a tensor-parallel replica, as Ray actors in the other bundles of the
replica's placement group. They are started together, watched, and ended together.

A group that lacks a rank can do nothing, and a new one can start only once the resources of the old
one are free: so whoever is missed for some seconds takes all others with it.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray
import structlog
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from trimode.replicas.config import RankConfig
from trimode.replicas.distributed_group import LOOPBACK, DistributedGroup, serve_store
from trimode.replicas.errors import Unavailable
from trimode.replicas.loading import default_device
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.model.parallel import Shard
from trimode.replicas.rank_actor import (
    COLLECTIVE_TIMEOUT_S,
    JOIN_TIMEOUT_S,
    Meeting,
    RankActor,
    WorkerOptions,
)
from trimode.replicas.step_channel import StepListener, new_secret
from trimode.replicas.tensor_parallel import Peers, StepClock

logger = structlog.get_logger(__name__)

PLACE_TIMEOUT_S = 300.0  # for the workers' processes to run
PING_PERIOD_S = 1.0
PING_TIMEOUT_S = 3.0  # how late a worker's answer may be


@dataclass(slots=True)
class _Ping:
    """The question that one worker has been asked."""

    worker: ActorHandle
    answer: ObjectRef | None = None
    asked_at: float = 0.0
    num_steps: int = 0  # as of its last answer

    def ask(self) -> None:
        self.answer = self.worker.ping.options(concurrency_group="watch").remote()
        self.asked_at = time.monotonic()

    def problem(self) -> str | None:
        """Looks after the answer and asks again; says what is wrong with the worker, if anything
        is.
        """
        try:
            self.num_steps = ray.get(self.answer, timeout=0)
        except GetTimeoutError:
            late_s = time.monotonic() - self.asked_at
            return f"has not answered for {late_s:.1f} s" if late_s > PING_TIMEOUT_S else None
        except RayError as error:
            return f"is gone: {_first_line(error)}"
        self.ask()
        return None


class Ranks:
    """Rank 0's hold on the others."""

    def __init__(self, config: RankConfig, options: WorkerOptions, folder: Path) -> None:
        """Start the workers' processes; for the actor that is rank 0, in bundle 0 of its placement
        group. folder: the model's, on this node.

        Raises ConfigError where the model cannot be split so.
        """
        Shard.of(ModelConfig.load(folder), 0, config.size)
        self._config = config
        self._fixed_order = options.engine.batch_invariant
        self._loading: list[ObjectRef] = []
        self._running: list[ObjectRef] = []
        self._clock = StepClock()
        self._stopped = threading.Event()
        group = ray.util.get_current_placement_group()
        actor = ray.remote(concurrency_groups={"watch": 1})(RankActor)
        own_handle = ray.get_runtime_context().current_actor
        self._workers: list[ActorHandle] = [
            actor.options(
                num_cpus=config.cpus,
                num_gpus=config.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=rank
                ),
            ).remote(options, own_handle)
            for rank in range(1, config.size)
        ]

    def meet(self) -> Peers:
        """Bring all ranks together; the workers go on to load their parts.

        Raises Unavailable where one does not come.
        """
        size, secret = self._config.size, new_secret()
        try:
            nodes = ray.get([w.node.remote() for w in self._workers], timeout=PLACE_TIMEOUT_S)
        except GetTimeoutError:
            raise Unavailable(
                f"{size - 1} workers did not start in {PLACE_TIMEOUT_S:g} s"
            ) from None
        own_node = ray.util.get_node_ip_address()
        is_local = set(nodes) == {own_node}
        host = LOOPBACK if is_local else own_node
        store = serve_store(host, size, JOIN_TIMEOUT_S)
        listener = StepListener(host)
        meeting = Meeting(size, is_local, host, store.port, listener.port, secret)
        self._loading = [w.load.remote(r, meeting) for r, w in enumerate(self._workers, 1)]
        group = DistributedGroup(
            store, 0, size, default_device(),
            host=host,
            timeout_s=COLLECTIVE_TIMEOUT_S,
            fixed_order=self._fixed_order,
        )  # fmt: skip
        steps = listener.accept(size - 1, secret, JOIN_TIMEOUT_S)
        return Peers(group, steps, self._clock, self._wait)

    def watch(self, on_failure: Callable[[Unavailable], None]) -> None:
        """From now on, tell once, on another thread, that the group can do nothing any more. The
        workers watch rank 0 in their turn.
        """
        pings = [_Ping(worker) for worker in self._workers]
        for ping in pings:
            ping.ask()
        ray.get([ping.answer for ping in pings])  # whoever was asked once expects to be asked again
        thread = threading.Thread(
            target=self._watch, args=(pings, on_failure), daemon=True, name="ranks"
        )
        thread.start()

    def stop(self) -> None:
        """End the workers; nobody is told."""
        self._stopped.set()
        for worker in self._workers:
            ray.kill(worker)

    def failure(self) -> Exception | None:
        """What another rank failed of before the group served; rank 0's own error comes of it."""
        refs = self._loading + self._running
        for ref in ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else ():
            try:
                ray.get(ref)
            except RayError as theirs:
                cause: Exception = theirs.cause if isinstance(theirs, RayTaskError) else theirs
                return cause
        return None

    def _wait(self) -> None:
        ray.get(self._loading)
        self._running = [worker.run.remote() for worker in self._workers]

    def _watch(self, pings: list[_Ping], on_failure: Callable[[Unavailable], None]) -> None:
        while not self._stopped.is_set():
            problem = self._problem(pings)
            if problem is not None and not self._stopped.is_set():
                logger.error("the group has failed", problem=problem)
                on_failure(Unavailable(problem))
                return

    def _problem(self, pings: list[_Ping]) -> str | None:
        """Takes a period, unless a worker ends before."""
        ended, _ = ray.wait(self._running, timeout=PING_PERIOD_S)
        for ref in ended:
            return f"rank {self._running.index(ref) + 1} {_ending(ref)}"
        for rank, ping in enumerate(pings, 1):
            problem = ping.problem()
            if problem is not None:
                return f"rank {rank} {problem}"
        if self._clock.waiting_s > self._config.step_timeout_s:
            reached = ", ".join(str(ping.num_steps) for ping in pings)
            return (
                f"step {self._clock.num_steps} has not ended in {self._config.step_timeout_s:g} s; "
                f"the workers have begun {reached}"
            )
        return None


def _ending(run: ObjectRef) -> str:
    try:
        ray.get(run)
    except RayError as error:
        return f"has ended: {_first_line(error)}"
    return "has left"


def _first_line(error: RayError) -> str:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
