"""Runs jobs on an engine in this process, which is stepped between arrivals."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from trimode.cluster.bench.metrics import Arrival, Record
from trimode.cluster.bench.workload import Job, Load
from trimode.cluster.tokenizer import Tokenizer
from trimode.replicas.config import EngineConfig
from trimode.replicas.engine import Engine
from trimode.replicas.errors import CheckpointError, InvalidRequest
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.types import Chunk, Request

PAGE_SIZE = 16

Encode = Callable[[str], list[int]]  # text to ids


class LocalTarget:
    """One engine."""

    def __init__(
        self,
        engine: Engine,
        encode: Encode,
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
        seen: dict[str, list[tuple[float, Chunk]]] = {}
        records: dict[str, Record] = {}
        begun = self._clock()
        while ahead or self._engine.has_work:
            now = self._clock()
            while ahead and len(sent) < concurrency:
                job, request = ahead[0]
                # In a closed loop a user sends when the one before is done: that is now.
                due = now if job.ask.arrival_s is None else begun + job.ask.arrival_s
                if due > now:
                    break
                ahead.popleft()
                self._engine.add(request)
                sent[job.job_id], seen[job.job_id] = due, []
            if not self._engine.has_work:
                self._sleep(due - now)
                continue
            chunks = self._engine.step()
            now = self._clock()
            for job_id, chunk in chunks:
                seen[job_id].append((now, chunk))
                if chunk.finish is not None:
                    records[job_id] = _record(sent.pop(job_id), seen.pop(job_id))
                    on_done()
        return [records[job.job_id] for job in jobs]

    def _request(self, job: Job) -> Request:
        sampling = job.ask.sampling
        return Request(
            request_id=job.job_id,
            prompt_ids=tuple(self._encode(job.ask.prompt)),
            mode=job.setting.mode,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=sampling.seed,
            ignore_eos=sampling.ignore_eos,
            block_size=job.setting.block_size,
            cache_salt=job.cache_salt,
        )


def load_encoder(folder: Path) -> Encode:
    """The encoder of a model folder. Raises CheckpointError."""
    tokenizer = Tokenizer.load(folder, ModelConfig.load(folder).bos_id)
    if tokenizer is None:
        raise CheckpointError(f"{folder} has no tokenizer.json; bench needs text prompts")
    return tokenizer.encode


def engine_config(folder: Path, encode: Encode, loads: Iterable[Load]) -> EngineConfig:
    """An engine with room for the heaviest load.

    Raises InvalidRequest where a request is longer than the model's positions.
    """
    model = ModelConfig.load(folder)
    users = longest = 0
    for load in loads:
        users = max(users, min(load.concurrency, len(load.asks)))
        for prompt, max_tokens in {(ask.prompt, ask.sampling.max_tokens) for ask in load.asks}:
            num_prompt = len(encode(prompt))
            if num_prompt + max_tokens > model.max_positions:
                raise InvalidRequest(
                    "prompts",
                    f"{num_prompt} tokens ({prompt[:30]!r}...) and {max_tokens} new ones exceed "
                    f"the model's {model.max_positions} positions",
                )
            longest = max(longest, num_prompt + max_tokens)
    pages = (longest + model.block_size) // PAGE_SIZE + 1
    return EngineConfig(
        page_size=PAGE_SIZE,
        num_pages=users * pages,
        max_sequences=users,
        max_waiting=users,
        max_block_size=model.block_size,
    )


def _record(sent_s: float, chunks: list[tuple[float, Chunk]]) -> Record:
    finish = chunks[-1][1].finish
    assert finish is not None, "the stream ended without its last chunk"
    return Record(
        sent_s=sent_s,
        arrivals=tuple(Arrival(at_s, len(chunk.token_ids)) for at_s, chunk in chunks),
        token_ids=tuple(token_id for _, chunk in chunks for token_id in chunk.token_ids),
        prompt_tokens=finish.prompt_tokens,
        forwards=finish.forwards,
        accepted=finish.accepted,
        cached_tokens=finish.cached_tokens,
    )
