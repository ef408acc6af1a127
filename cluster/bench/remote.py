"""Runs jobs on a served cluster: one connection, a stream for each user."""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import aclosing

from trimode.cluster.bench.metrics import Arrival, Record
from trimode.cluster.bench.workload import Job
from trimode.cluster.client import AsyncClient, CallFailed
from trimode.cluster.messages import MODE_MESSAGES
from trimode.proto import inference_pb2 as pb
from trimode.replicas.errors import Unavailable

# What a cluster may answer when it has more to do than it can; the run goes on.
REFUSALS = ("RESOURCE_EXHAUSTED", "UNAVAILABLE")


class RemoteTarget:
    """One gateway. The clock is the client's, so the whole path is in the figures."""

    def __init__(self, address: str) -> None:
        self._address = address

    def describe(self) -> pb.GetModelResponse:
        """What is served. Raises Unavailable."""
        return asyncio.run(self._describe())

    def run(
        self, jobs: Sequence[Job], concurrency: int, on_done: Callable[[], None]
    ) -> list[Record]:
        """All jobs in order of arrival, at most `concurrency` at a time.

        A job that had to wait for its turn counts from its arrival. Raises Unavailable where
        nobody answers, CallFailed where a request is wrong or all were refused.
        """
        return asyncio.run(self.run_async(jobs, concurrency, on_done))

    async def run_async(
        self, jobs: Sequence[Job], concurrency: int, on_done: Callable[[], None]
    ) -> list[Record]:
        """As run, for a caller with an event loop."""
        try:
            return await _Run(self._address, jobs, on_done).go(concurrency)
        except ExceptionGroup as group:  # the first one cancelled the others
            raise group.exceptions[0] from None

    async def _describe(self) -> pb.GetModelResponse:
        async with AsyncClient(self._address) as client:
            return await _connect(client, self._address)


class _Run:
    """The jobs of one run, and what became of them."""

    def __init__(self, address: str, jobs: Sequence[Job], on_done: Callable[[], None]) -> None:
        self._address = address
        self._ahead = deque(enumerate(jobs))
        self._on_done = on_done
        # Not the job's, under which an earlier command may have left pages.
        self._salt = secrets.token_hex(8)
        self._records: dict[int, Record] = {}
        self._refusal: CallFailed | None = None

    async def go(self, concurrency: int) -> list[Record]:
        async with AsyncClient(self._address) as client:
            await _connect(client, self._address)  # before the clock starts
            begun = time.perf_counter()
            async with asyncio.TaskGroup() as users:
                for _ in range(min(concurrency, len(self._ahead))):
                    users.create_task(self._user(client, begun))
        if self._refusal is not None and not any(r.arrivals for r in self._records.values()):
            raise self._refusal
        return [record for _, record in sorted(self._records.items())]

    async def _user(self, client: AsyncClient, begun: float) -> None:
        """Take the next job when the one before is done, and send it when it is due."""
        while self._ahead:
            index, job = self._ahead.popleft()
            sent_s = time.perf_counter()
            if job.ask.arrival_s is not None:
                due = begun + job.ask.arrival_s
                await asyncio.sleep(due - sent_s)
                sent_s = due
            try:
                self._records[index] = await _record(client, job, self._salt, sent_s)
            except CallFailed as error:
                if error.status not in REFUSALS:
                    raise
                self._records[index], self._refusal = Record(sent_s), error
            self._on_done()


async def _connect(client: AsyncClient, address: str) -> pb.GetModelResponse:
    try:
        return await client.get_model()
    except CallFailed as error:
        raise Unavailable(f"nobody serves at {address}: {error}") from None


async def _record(client: AsyncClient, job: Job, cache_salt: str, sent_s: float) -> Record:
    arrivals: list[Arrival] = []
    token_ids: list[int] = []
    finish = pb.Finish()
    async with aclosing(client.generate(_message(job, cache_salt))) as replies:
        async for reply in replies:
            arrivals.append(Arrival(time.perf_counter(), len(reply.token_ids)))
            token_ids += reply.token_ids
            finish = reply.finish
    return Record(
        sent_s=sent_s,
        arrivals=tuple(arrivals),
        token_ids=tuple(token_ids),
        prompt_tokens=finish.usage.prompt_tokens,
        forwards=finish.forwards,
        accepted=tuple(finish.accepted),
        cached_tokens=finish.usage.cached_tokens,
    )


def _message(job: Job, cache_salt: str) -> pb.GenerateRequest:
    sampling = job.ask.sampling
    return pb.GenerateRequest(
        text=job.ask.prompt,
        mode=MODE_MESSAGES[job.setting.mode],
        block_size=job.setting.block_size,
        cache_salt=cache_salt,
        sampling=pb.Sampling(temperature=sampling.temperature, seed=sampling.seed),
        stop=pb.StopConditions(max_tokens=sampling.max_tokens, ignore_eos=sampling.ignore_eos),
    )
