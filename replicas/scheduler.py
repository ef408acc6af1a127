"""Scheduler: which sequences take part in the next pass, with what query, on which pages.

Sequences of any mode in any stage share a pass. Decoding comes first, in turn, and leaves a quarter
of the token budget to prefill while prefill has work; prefill takes what is left, oldest first, in
chunks. Neither can starve the other, and nobody waits for anybody's round to end.

A sequence gets pages for its prefill when it is admitted and one more whenever it needs one. Where
none is left, the youngest sequence of the lowest class gives its pages back and later computes its
KV anew; its strategy keeps its state, so nothing that was decoded changes. The oldest of the
highest class is never the victim of another, so somebody always gets on.
"""

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from trimode.replicas.config import EngineConfig
from trimode.replicas.decoding.strategy import Outcome, PassKind, Position, Query, Stage
from trimode.replicas.errors import InvalidRequest, Overloaded
from trimode.replicas.governor import Governor
from trimode.replicas.page_hash import root_hash
from trimode.replicas.page_pool import PagePool
from trimode.replicas.prefix_cache import KVEvent
from trimode.replicas.round_sizes import set_block_sizes
from trimode.replicas.sequence import Sequence
from trimode.replicas.types import Chunk, EngineLoad, FinishReason, TokenLogprobs


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
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # where the request wants them


class Scheduler:
    """Owns every Sequence and the page pool."""

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
        self._revision = revision  # of the model; pages of different ones are never confused
        self._pool = PagePool(config.num_pages, config.page_size)
        self._waiting: list[Sequence] = []  # by rank
        self._running: list[Sequence] = []  # in the order of their turn
        self._num_added = 0
        self._num_preemptions = 0

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
            cached_pages=len(self._pool.cache),
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
        needed = self._pool.pages_for(slots)
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
        late = [s for s in (*self._waiting, *self._running) if s.deadline <= now]
        for sequence in late:
            self.abort(sequence)
            sequence.finish_reason = FinishReason.DEADLINE
        return [(s, Chunk((), s.account(now), s.sample_index)) for s in late]

    def schedule(self) -> list[Scheduled]:
        """The queries of the next pass; empty when there is nothing to do."""
        self._admit()
        queries = self._decode_queries()
        prefilling = [s for s in self._running if s.is_prefilling]
        wanted = sum(s.prefill_end - s.num_committed for s in prefilling)
        reserved = min(wanted, self._config.prefill_tokens)
        scheduled, left = self._decode(queries, self._config.max_step_tokens - reserved)
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
                self._learn(sequence, outcome.accepted)
            taken = sequence.append(list(outcome.emitted))
            self._publish(sequence)
            if not taken:
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

    def drain_events(self) -> list[KVEvent]:
        """What became of cached pages since the last call."""
        return self._pool.cache.drain_events()

    def check_integrity(self) -> None:
        """Assert that every page is free, cached, or owned by exactly the sequences that use it."""
        self._pool.check_integrity(sequence.page_table for sequence in self._running)

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
            s.request is sequence.request and s.sample_index == 0 and s.is_prefilling
            for s in self._running
        )

    def _seat(self, sequence: Sequence) -> bool:
        """Admit a waiting sequence with the pages of its prefill, cached ones first."""
        if len(self._running) >= self._config.max_sequences:
            return False
        salt, hits = sequence.request.cache_salt, []
        if self._config.prefix_cache:
            # Of a new prompt's last token the logits are needed, so its page cannot be a hit.
            known = sequence.prefill_end - (sequence.num_output_tokens == 0)
            limit = known // self._pool.page_size
            root = root_hash(self._revision, salt)
            hits = self._pool.match(root, salt, sequence.token_ids, limit)
        shared = [page for page, _ in hits]
        slots = sequence.prefill_end + sequence.max_block_size
        missing = self._pool.pages_for(slots) - len(hits)
        idle_hits = len(shared) - self._pool.num_in_use(shared)
        if missing > self._pool.num_free - idle_hits:
            return False
        self._pool.share(shared)
        pages = self._pool.allocate(missing)
        assert pages is not None, "counted above"
        self._waiting.remove(sequence)
        self._running.append(sequence)
        sequence.page_table = shared + pages
        sequence.page_hashes = [name for _, name in hits]
        sequence.num_committed = len(hits) * self._pool.page_size
        if sequence.num_output_tokens == 0:
            sequence.num_cached = sequence.num_committed
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages; it will prefill again what it had committed."""
        if not sequence.is_prefilling:
            sequence.prefill_end = sequence.num_committed
        self._leave(sequence)
        sequence.num_committed = 0
        self._num_preemptions += 1
        insort(self._waiting, sequence, key=_rank)

    def _decode_queries(self) -> dict[Sequence, Query]:
        """What each decoding sequence wants, with its pages; who lost its own is left out."""
        if self._governor is not None:
            set_block_sizes(self._governor, self._running)
        queries: dict[Sequence, Query] = {}
        for sequence in list(self._running):
            if sequence.is_prefilling or not sequence.page_table:
                continue
            query = sequence.strategy.next_query(
                Position(
                    sequence.token_ids[sequence.num_committed],
                    sequence.num_committed,
                    sequence.block_size,
                )
            )
            queries[sequence] = query
            needed = self._pool.pages_for(query.start + len(query.token_ids))
            while sequence.page_table and len(sequence.page_table) < needed:
                pages = self._pool.allocate(needed - len(sequence.page_table))
                if pages is not None:
                    sequence.page_table += pages
                    break
                victim = max(self._running, key=_rank)
                self._preempt(victim)
                queries.pop(victim, None)
        return queries

    def _decode(self, queries: dict[Sequence, Query], budget: int) -> tuple[list[Scheduled], int]:
        """Those whose query fits the budget; the others are first in the next pass."""
        scheduled: list[Scheduled] = []
        skipped: list[Sequence] = []
        for sequence, query in queries.items():
            if len(query.token_ids) > budget:
                skipped.append(sequence)
                continue
            budget -= len(query.token_ids)
            scheduled.append(Scheduled(sequence, query))
        if skipped:
            late = set(skipped)
            self._running = skipped + [s for s in self._running if s not in late]
        return scheduled, budget

    def _learn(self, sequence: Sequence, accepted: int) -> None:
        if self._governor is not None and sequence.acceptance is not None:
            assert sequence.block_size is not None, "a round without a size"
            self._governor.observe(sequence.acceptance, sequence.block_size, accepted)

    def _publish(self, sequence: Sequence) -> None:
        """Make the pages that are full of final KV known to the prefix cache."""
        if not self._config.prefix_cache:
            return
        size, salt = self._pool.page_size, sequence.request.cache_salt
        final = min(sequence.num_committed, len(sequence.token_ids))
        for index in range(len(sequence.page_hashes), final // size):
            hashes = sequence.page_hashes
            parent = hashes[-1] if hashes else root_hash(self._revision, salt)
            ids = sequence.token_ids[index * size : (index + 1) * size]
            page, name = self._pool.publish(sequence.page_table[index], parent, salt, ids)
            sequence.page_table[index] = page
            hashes.append(name)

    def _leave(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._pool.free(sequence.page_table)
        sequence.page_table = []
        sequence.page_hashes = []


def _rank(sequence: Sequence) -> tuple[int, int]:
    """Lower is served first and preempted last."""
    return sequence.request.priority, sequence.order


def _prefill_query(sequence: Sequence, budget: int) -> Query:
    """The next chunk of the prefill; a prompt's last token answers the first output token."""
    start = sequence.num_committed
    end = min(sequence.prefill_end, start + budget)
    first = sequence.num_output_tokens == 0  # else it only restores what a preemption took
    answers = (end - start - 1,) if first and end == sequence.prefill_end else ()
    token_ids = sequence.token_ids[start:end]
    return Query(Stage.PREFILL, PassKind.CAUSAL, token_ids, start, answers)


def _take(sequence: Sequence, query: Query, answer: Answers) -> Outcome:
    """Hand the answers to whoever asked, and count the pass."""
    if query.stage is Stage.PREFILL:
        if query.answers:  # all chunks of a prefill count as one forward
            sequence.num_forwards += 1
        return Outcome(
            answer.token_ids, num_committed=len(query.token_ids), logprobs=answer.logprobs
        )
    sequence.num_forwards += 1
    return sequence.strategy.accept(answer.token_ids, answer.confidences, answer.logprobs)
