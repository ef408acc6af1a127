"""Scheduler: which sequences take part in the next pass, with what query, on which pages.

Sequences of any mode in any stage share a pass. Decoding comes first, in turn, and leaves a quarter
of the token budget to prefill while prefill has work; prefill takes what is left, oldest first, in
chunks. Neither can starve the other, and nobody waits for anybody's round to end: a decoding
sequence is left out of fewer passes in a row than sequences run, and the prompts before and of a
sequence are prefilled at max_step_tokens / 4 a pass, at least.

A sequence gets pages for its prefill when it is admitted and one more whenever it needs one. Where
none is left, the youngest sequence of the lowest class gives its pages back and later computes its
KV anew; its strategy keeps its state, so nothing that was decoded changes. The oldest of the
highest class is never the victim of another, so somebody always gets on.

A pass may be scheduled while the one before it is unread. What its sequences ask then has ids that
only the device knows, and what they turn out not to need is dropped when it is read.
"""

import math
from bisect import insort
from collections.abc import Callable, Iterable

from trimode.replicas.config import EngineConfig
from trimode.replicas.decoding.strategy import Pending, Query
from trimode.replicas.errors import InvalidRequest, Overloaded
from trimode.replicas.governor import Governor
from trimode.replicas.page_tables import PageCopy, PageTables
from trimode.replicas.prefix_cache import KVEvent
from trimode.replicas.queries import next_query, prefill_query, take
from trimode.replicas.round_sizes import set_block_sizes
from trimode.replicas.scheduled import Answers, Scheduled
from trimode.replicas.sequence import Sequence
from trimode.replicas.types import Chunk, EngineLoad, FinishReason


class Scheduler:
    """Owns every Sequence and its pages."""

    def __init__(
        self,
        config: EngineConfig,
        clock: Callable[[], float],
        revision: str = "",
        governor: Governor | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._governor = governor
        self._tables = PageTables(config, revision)
        self._waiting: list[Sequence] = []  # by rank
        self._running: list[Sequence] = []  # in the order of their turn
        self._num_added = 0
        self._num_governed = 0  # of the running ones
        self._num_preemptions = 0
        self._next_deadline = math.inf

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
            free_pages=self._tables.num_free,
            total_pages=self._tables.num_pages,
            cached_pages=self._tables.num_cached,
            num_preemptions=self._num_preemptions,
            running_by_mode=by_mode,
        )

    def add(self, sequence: Sequence, block_size: int) -> None:
        """Queue a sequence whose blocks have at most block_size tokens.

        Raises InvalidRequest where its pages could never be had, Overloaded where the queue is
        full.
        """
        # A block starts at a token that is known and may reach block_size - 1 past the last one.
        slots = sequence.num_prompt_tokens + sequence.request.max_tokens + block_size - 1
        needed = self._tables.pages_for(slots)
        if needed > self._tables.num_pages:
            raise InvalidRequest(
                "max_tokens",
                f"prompt of {sequence.num_prompt_tokens} and {sequence.request.max_tokens} new "
                f"tokens need {needed} pages of {self._config.page_size} slots; the cache has "
                f"{self._tables.num_pages}",
            )
        self._admit()  # what has room now does not count as waiting
        if len(self._waiting) >= self._config.max_waiting:
            raise Overloaded(f"{len(self._waiting)} requests are waiting, the limit (max_waiting)")
        self._next_deadline = min(self._next_deadline, sequence.deadline)
        sequence.max_block_size = block_size
        sequence.order = self._num_added
        self._num_added += 1
        insort(self._waiting, sequence, key=_rank)
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

    def expire(self) -> list[tuple[Sequence, Chunk]]:
        """End the sequences whose deadline has passed; their last chunks."""
        now = self._clock()
        if now < self._next_deadline:
            return []
        everybody = (*self._waiting, *self._running)
        late = [s for s in everybody if s.deadline <= now]
        self._next_deadline = min(
            (s.deadline for s in everybody if s.deadline > now), default=math.inf
        )
        for sequence in late:
            self.abort(sequence)
            sequence.finish_reason = FinishReason.DEADLINE
        return [(s, Chunk((), s.account(now), s.sample_index)) for s in late]

    @property
    def can_look_ahead(self) -> bool:
        """Whether the next pass can be scheduled before the last one's answers are read."""
        return not any(s.needs_host and s.awaits_answers for s in self._running)

    def schedule(self) -> list[Scheduled]:
        """The queries of the next pass; empty when there is nothing to do."""
        self._admit()
        queries = self._decode_queries()
        prefilling = [s for s in self._running if s.is_prefilling]
        wanted = sum(s.prefill_end - s.num_launched for s in prefilling)
        reserved = min(wanted, self._config.prefill_tokens)
        scheduled, left = self._decode(queries, self._config.max_step_tokens - reserved)
        left += reserved
        for sequence in prefilling:
            if left == 0:
                break
            query = prefill_query(sequence, left)
            left -= len(query.token_ids)
            scheduled.append(Scheduled(sequence, query, sequence.num_seatings))
        now = self._clock()
        for item in scheduled:
            if item.sequence.scheduled_at is None:
                item.sequence.scheduled_at = now
        return scheduled

    def update(
        self, scheduled: Iterable[Scheduled], answers: Iterable[Answers]
    ) -> list[tuple[Sequence, Chunk]]:
        """Take a pass's answers; returns the chunks that it brought, and frees what ended.

        Answers to a sequence that has ended or lost its pages since are dropped; it asks again.
        """
        now = self._clock()
        chunks = []
        for item, answer in zip(scheduled, answers, strict=True):
            sequence = item.sequence
            if item.seating != sequence.num_seatings or not sequence.page_table:
                continue
            query, sequence.unread = sequence.unread or item.query, None
            outcome = take(sequence, query, answer)
            sequence.num_committed += outcome.num_committed
            if outcome.accepted is not None:
                sequence.accepted.append(outcome.accepted)
                self._learn(sequence, len(query.token_ids), outcome.accepted)
            taken = sequence.append(list(outcome.emitted)) if outcome.emitted else []
            self._tables.publish(sequence)
            if not taken and sequence.finish_reason is None:
                continue
            if sequence.first_token_at is None:
                sequence.first_token_at = now
            finish = None
            if sequence.finish_reason is not None:
                self._leave(sequence)
                finish = sequence.account(now)
            logprobs = tuple(outcome.logprobs[: len(taken)])
            wanted = sequence.request.num_logprobs is not None
            chunk = Chunk(tuple(taken), finish, sequence.sample_index, logprobs if wanted else None)
            chunks.append((sequence, chunk))
        return chunks

    def expect(self, scheduled: Iterable[Scheduled]) -> None:
        """These were launched and will be read after the next schedule(); the pass before them has
        been read.
        """
        for item in scheduled:
            sequence = item.sequence
            if item.seating == sequence.num_seatings and sequence.page_table:
                resolved = item.query if item.query.pending is None else next_query(sequence)
                sequence.unread = resolved

    def drain_copies(self) -> list[PageCopy]:
        """What must be copied before the pass that was just scheduled, in this order."""
        return self._tables.drain_copies()

    def clear_cache(self) -> None:
        """Empty the prefix cache of what no running sequence uses."""
        self._tables.clear_cache(self._running)

    def drain_events(self) -> list[KVEvent]:
        """What became of cached pages since the last call."""
        return self._tables.drain_events()

    def check_integrity(self) -> None:
        """Assert that every page is free, cached, or owned by exactly the sequences that use it."""
        self._tables.check_integrity(self._running)

    def _admit(self) -> None:
        """Seat waiting sequences, best rank first; a large one is not overtaken for ever."""
        for sequence in list(self._waiting):
            if self._waits_for_sibling(sequence):
                continue
            while not self._seat(sequence):
                victim = max(self._running, key=_rank, default=None)
                if victim is None or victim.request.priority <= sequence.request.priority:
                    return
                self._preempt(victim)

    def _waits_for_sibling(self, sequence: Sequence) -> bool:
        """Samples of one request wait for the first to prefill, and then find its pages cached."""
        if not (self._config.prefix_cache and sequence.sample_index):
            return False
        return any(
            s.request is sequence.request
            and s.sample_index == 0
            and s.num_committed < s.prefill_end
            for s in self._running
        )

    def _seat(self, sequence: Sequence) -> bool:
        """Let a waiting sequence run, where a seat and pages are free."""
        if len(self._running) >= self._config.max_sequences:
            return False
        siblings: tuple[Sequence, ...] = ()
        if sequence.request.n > 1:
            siblings = tuple(s for s in self._running if s.request is sequence.request)
        if not self._tables.seat(sequence, siblings):
            return False
        self._waiting.remove(sequence)
        self._running.append(sequence)
        self._num_governed += sequence.is_governed
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages; it will prefill again what it had committed."""
        sequence.prefill_end = max(sequence.prefill_end, sequence.num_committed)
        self._leave(sequence)
        self._num_preemptions += 1
        insort(self._waiting, sequence, key=_rank)

    def _decode_queries(self) -> dict[Sequence, Query]:
        """What each decoding sequence wants, with its pages; who lost its own is left out."""
        if self._governor is not None and self._num_governed:
            set_block_sizes(self._governor, self._running)
        queries: dict[Sequence, Query] = {}
        for sequence in list(self._running):
            if sequence.is_prefilling or not sequence.page_table:
                continue
            if sequence.awaits_answers:
                query = self._query_ahead(sequence)
                if query is not None:
                    queries[sequence] = query
                continue
            queries[sequence] = query = next_query(sequence)
            while sequence.page_table and not self._tables.extend(sequence, query.end):
                victim = max(self._running, key=_rank)
                self._preempt(victim)
                queries.pop(victim, None)
        return queries

    def _query_ahead(self, sequence: Sequence) -> Query | None:
        """What a sequence asks after a pass that nobody has read. None where it surely has ended by
        then, or where pages are short: nobody is preempted for a pass that may be void.
        """
        before = sequence.unread
        assert before is not None
        query = sequence.strategy.query_ahead(before, sequence.block_size)
        num_kept = len(before.answers) if query.pending is Pending.KNOWN else 1
        last = sequence.num_prompt_tokens + sequence.request.max_tokens - 1
        if query.pending is Pending.KNOWN and query.start >= last:
            return None
        return query if self._tables.extend(sequence, query.end + num_kept - 1) else None

    def _decode(self, queries: dict[Sequence, Query], budget: int) -> tuple[list[Scheduled], int]:
        """Those whose query fits the budget; the others are first in the next pass."""
        scheduled: list[Scheduled] = []
        skipped: list[Sequence] = []
        for sequence, query in queries.items():
            if len(query.token_ids) > budget:
                skipped.append(sequence)
                continue
            budget -= len(query.token_ids)
            scheduled.append(Scheduled(sequence, query, sequence.num_seatings))
        if skipped:
            late = set(skipped)
            self._running = skipped + [s for s in self._running if s not in late]
        return scheduled, budget

    def _learn(self, sequence: Sequence, block_size: int, accepted: int) -> None:
        if self._governor is not None and sequence.acceptance is not None:
            self._governor.observe(sequence.acceptance, block_size, accepted)

    def _leave(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._num_governed -= sequence.is_governed
        self._tables.release(sequence)
        sequence.unread = None


def _rank(sequence: Sequence) -> tuple[int, int]:
    """Lower is served first and preempted last."""
    return sequence.request.priority, sequence.order
