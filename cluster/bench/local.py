"""Runs jobs on an engine in this process, which is stepped between arrivals."""

import time
from collections import deque
from collections.abc import Callable, Sequence

from trimode.cluster.bench.metrics import Arrival, Record
from trimode.cluster.bench.workload import Job
from trimode.replicas.engine import Engine
from trimode.replicas.types import Finish, Request


class LocalTarget:
    """One engine. encode: text to ids."""

    def __init__(
        self,
        engine: Engine,
        encode: Callable[[str], list[int]],
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._engine = engine
        self._encode = encode
        self._clock = clock
        self._sleep = sleep

    def run(
        self, jobs: Sequence[Job], concurrency: int, on_done: Callable[[], None]
    ) -> list[Record]:
        """All jobs in order of arrival, at most `concurrency` at a time.

        A job that had to wait for its turn counts from its arrival. Raises InvalidRequest.
        """
        ahead = deque((job, self._request(job)) for job in jobs)
        sent: dict[str, float] = {}
        seen: dict[str, list[Arrival]] = {}
        records = []
        begun = self._clock()
        while ahead or self._engine.has_work:
            now = self._clock()
            while ahead and len(sent) < concurrency and begun + ahead[0][0].arrival_s <= now:
                job, request = ahead.popleft()
                self._engine.add(request)
                # In a closed loop a user sends when the one before is done: that is now.
                sent[job.job_id] = begun + job.arrival_s if job.arrival_s else now
                seen[job.job_id] = []
            if not self._engine.has_work:
                self._sleep(max(0.0, begun + ahead[0][0].arrival_s - now))
                continue
            chunks = self._engine.step()
            now = self._clock()
            for job_id, chunk in chunks:
                seen[job_id].append(Arrival(now, len(chunk.token_ids)))
                if chunk.finish is not None:
                    records.append(_record(sent.pop(job_id), seen.pop(job_id), chunk.finish))
                    on_done()
        return records

    def _request(self, job: Job) -> Request:
        return Request(
            request_id=job.job_id,
            prompt_ids=tuple(self._encode(job.prompt)),
            mode=job.setting.mode,
            max_tokens=job.max_tokens,
            temperature=job.temperature,
            seed=job.seed,
            block_size=job.setting.block_size,
            cache_salt=job.cache_salt,
        )


def _record(sent_s: float, arrivals: list[Arrival], finish: Finish) -> Record:
    return Record(
        sent_s=sent_s,
        arrivals=tuple(arrivals),
        prompt_tokens=finish.prompt_tokens,
        forwards=finish.forwards,
        accepted=finish.accepted,
        cached_tokens=finish.cached_tokens,
    )
