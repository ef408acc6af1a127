"""Scheduler: which sequences take part in the next pass, with what query, on which pages.

Sequences of any mode in any stage share a pass. Decoding comes first, in turn, and leaves a quarter
of the token budget to prefill while prefill has work; prefill takes what is left, oldest first, in
chunks. Neither can starve the other, and nobody waits for anybody's round to end.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from trimode.replicas.config import EngineConfig
from trimode.replicas.decoding.strategy import Outcome, PassKind, Position, Query, Stage
from trimode.replicas.errors import InvalidRequest, Overloaded
from trimode.replicas.page_pool import PagePool
from trimode.replicas.sequence import Sequence
from trimode.replicas.types import Chunk, EngineLoad, FinishReason


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One sequence's place in a pass."""

    sequence: Sequence
    query: Query


@dataclass(frozen=True, slots=True)
class Answers:
    """What a pass answered to one query: an id per wanted position, confidences where they were
    wanted.
    """

    token_ids: list[int]
    confidences: list[float]


class Scheduler:
    """Owns every Sequence and the page pool."""

    def __init__(self, config: EngineConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._clock = clock
        self._pool = PagePool(config.num_pages, config.page_size)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in the order of their turn

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def load(self) -> EngineLoad:
        by_mode: dict[str, int] = {}
        for sequence in self._running:
            mode = sequence.request.mode.value
            by_mode[mode] = by_mode.get(mode, 0) + 1
        return EngineLoad(
            waiting=len(self._waiting),
            running=len(self._running),
            free_pages=self._pool.num_free,
            total_pages=self._pool.num_pages,
            running_by_mode=by_mode,
        )

    def add(self, sequence: Sequence, block_size: int) -> None:
        """Queue a sequence whose blocks have at most block_size tokens.

        Raises InvalidRequest where its pages could never be had, Overloaded where the queue is
        full.
        """
        needed = self._pages_for(sequence, block_size)
        if needed > self._pool.num_pages:
            raise InvalidRequest(
                "max_tokens",
                f"prompt of {sequence.num_prompt_tokens} and {sequence.request.max_tokens} new "
                f"tokens need {needed} pages of {self._pool.page_size} slots; the cache has "
                f"{self._pool.num_pages}",
            )
        self._admit()  # what has room now does not count as waiting
        if len(self._waiting) >= self._config.max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests are waiting, the limit (max_waiting)")
        sequence.num_pages = needed
        self._waiting.append(sequence)
        self._admit()  # at once where there is room: a burst on an idle engine is not a queue

    def abort(self, sequence: Sequence) -> None:
        """Drop a sequence at any stage and free all it holds."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = FinishReason.ABORTED
        if sequence in self._running:
            self._leave(sequence)
        else:
            self._waiting.remove(sequence)

    def schedule(self) -> list[Scheduled]:
        """The queries of the next pass; empty when there is nothing to do."""
        self._admit()
        prefilling = [s for s in self._running if s.is_prefilling]
        wanted = sum(s.num_prompt_tokens - s.num_committed for s in prefilling)
        reserved = min(wanted, self._config.prefill_tokens)
        scheduled, left = self._decode_queries(self._config.max_step_tokens - reserved)
        left += reserved
        for sequence in prefilling:
            if left == 0:
                break
            query = _prefill_query(sequence, left)
            left -= len(query.token_ids)
            scheduled.append(Scheduled(sequence, query))
        now = self._clock()
        for item in scheduled:
            if item.sequence.scheduled_at is None:
                item.sequence.scheduled_at = now
        return scheduled

    def update(
        self, scheduled: Iterable[Scheduled], answers: Iterable[Answers]
    ) -> list[tuple[Sequence, Chunk]]:
        """Take a pass's answers; returns the chunks that it brought, and frees what ended."""
        now = self._clock()
        chunks = []
        for item, answer in zip(scheduled, answers, strict=True):
            sequence = item.sequence
            outcome = _take(sequence, item.query, answer)
            sequence.num_committed += outcome.num_committed
            if outcome.accepted is not None:
                sequence.accepted.append(outcome.accepted)
            if not outcome.emitted:
                continue
            taken = sequence.append(list(outcome.emitted))
            if sequence.first_token_at is None:
                sequence.first_token_at = now
            finish = None
            if sequence.finish_reason is not None:
                self._leave(sequence)
                finish = sequence.account(now)
            chunks.append((sequence, Chunk(tuple(taken), finish)))
        return chunks

    def check_integrity(self) -> None:
        """Assert that every page is free or owned by exactly one running sequence."""
        self._pool.check_integrity(sequence.page_table for sequence in self._running)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._config.max_sequences:
            pages = self._pool.allocate(self._waiting[0].num_pages)
            if pages is None:
                return  # first come, first served: a large request is not overtaken for ever
            sequence = self._waiting.popleft()
            sequence.page_table = pages
            self._running.append(sequence)

    def _decode_queries(self, budget: int) -> tuple[list[Scheduled], int]:
        """Queries of the sequences past their prefill; those that did not fit are first in the next
        pass.
        """
        scheduled: list[Scheduled] = []
        skipped: list[Sequence] = []
        for sequence in self._running:
            if sequence.is_prefilling:
                continue
            query = sequence.strategy.next_query(
                Position(sequence.token_ids[sequence.num_committed], sequence.num_committed)
            )
            if len(query.token_ids) > budget:
                skipped.append(sequence)
                continue
            budget -= len(query.token_ids)
            scheduled.append(Scheduled(sequence, query))
        if skipped:
            self._running = skipped + [s for s in self._running if s not in skipped]
        return scheduled, budget

    def _pages_for(self, sequence: Sequence, block_size: int) -> int:
        # A block starts at a token that is known and may reach block_size - 1 past the last one
        # wanted. All pages are taken on admission, so that a running sequence never waits for
        # memory.
        slots = sequence.num_prompt_tokens + sequence.request.max_tokens + block_size - 1
        return self._pool.pages_for(slots)

    def _leave(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._pool.free(sequence.page_table)
        sequence.page_table = []


def _prefill_query(sequence: Sequence, budget: int) -> Query:
    """The next chunk of the prompt; its last token's answer is the first output token."""
    start = sequence.num_committed
    end = min(sequence.num_prompt_tokens, start + budget)
    answers = (end - start - 1,) if end == sequence.num_prompt_tokens else ()
    token_ids = sequence.token_ids[start:end]
    return Query(Stage.PREFILL, PassKind.CAUSAL, token_ids, start, answers)


def _take(sequence: Sequence, query: Query, answer: Answers) -> Outcome:
    """Hand the answers to whoever asked, and count the pass."""
    if query.stage is Stage.PREFILL:
        if query.answers:  # all chunks of a prefill count as one forward
            sequence.num_forwards += 1
        return Outcome(emitted=answer.token_ids, num_committed=len(query.token_ids))
    sequence.num_forwards += 1
    return sequence.strategy.accept(answer.token_ids, answer.confidences)
