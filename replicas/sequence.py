"""Sequence: the progress of one sample of a request. Only the scheduler changes it."""

from array import array
from collections.abc import MutableSequence
from dataclasses import dataclass, field

from trimode.replicas.acceptance import Acceptance
from trimode.replicas.decoding.strategy import Query, Stage, Strategy
from trimode.replicas.grammar import GrammarState
from trimode.replicas.stop_strings import StopScanner
from trimode.replicas.types import Finish, FinishReason, Request, Timings


@dataclass(slots=True, eq=False)  # identity, not value: two sequences are never the same one
class Sequence:
    """Invariant once prefilled: every token but those a block still holds has its KV, except the
    last one.
    """

    request: Request
    strategy: Strategy
    stop_ids: frozenset[int]
    arrived_at: float  # time.monotonic()
    token_ids: "array[int]" = field(init=False)  # prompt and output; four bytes each
    order: int = -1  # of arrival, once it is queued
    sample_index: int = 0  # below the request's n
    grammar: GrammarState | None = None
    stop_scanner: StopScanner | None = None
    acceptance: Acceptance | None = None  # where the governor picks its block sizes
    block_size: int | None = None  # of its present or last round, by the governor
    max_block_size: int = 1  # slots that one of its queries may need after the prefill
    page_table: MutableSequence[int] = field(default_factory=list)
    page_hashes: list[int] = field(default_factory=list)  # of its published pages, root first
    num_committed: int = 0  # slots that hold final, causal KV
    # Of a pass that was launched and will be read only after the next one is scheduled.
    unread: Query | None = None
    num_seatings: int = 0  # how often it was admitted; answers of an earlier seating are void
    num_cached: int = 0  # prompt tokens that the prefix cache had
    # The prefill ends here: at the prompt's end, after a preemption where decoding had come to.
    prefill_end: int = 0
    wants_edits: bool = False  # its logits are changed before the draw
    is_governed: bool = False  # a governor may pick its block sizes
    needs_host: bool = False  # what it asks next, or its edits, depend on the last answers
    num_forwards: int = 0
    accepted: list[int] = field(default_factory=list)
    scheduled_at: float | None = None
    first_token_at: float | None = None
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.token_ids = array("I", self.request.prompt_ids)
        self.prefill_end = self.num_prompt_tokens
        request = self.request
        self.is_governed = (
            request.governed and request.block_size is None and self.strategy.starts_round()
        )
        # What its edits are depends on the text; a bias alone is the same at every position.
        follows_text = bool(
            request.has_penalties or request.min_tokens
            or request.thinking is not None or self.grammar is not None
        )  # fmt: skip
        self.wants_edits = follows_text or bool(request.logit_bias)
        self.needs_host = follows_text or self.strategy.needs_host

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_launched(self) -> int:
        """Slots that hold final KV once every launched pass is done, at least."""
        prefills = self.unread is not None and self.unread.stage is Stage.PREFILL
        return self.unread.end if self.unread and prefills else self.num_committed

    @property
    def is_prefilling(self) -> bool:
        """Whether chunks of its prefill are still to be launched."""
        return self.num_launched < self.prefill_end

    @property
    def awaits_answers(self) -> bool:
        """Whether what it asks next hangs on answers that nobody has read."""
        return self.unread is not None and len(self.unread.answers) > 0

    @property
    def starts_round(self) -> bool:
        """Whether the block size of what it asks next may be chosen."""
        return self.strategy.starts_round(self.unread if self.awaits_answers else None)

    @property
    def rows(self) -> int:
        """Query tokens that it brings to a pass, about."""
        return self.block_size or self.max_block_size

    @property
    def deadline(self) -> float:
        """When its time is up, on the clock of arrived_at."""
        timeout = self.request.timeout_s
        return float("inf") if timeout is None else self.arrived_at + timeout

    def append(self, emitted: list[int]) -> list[int]:
        """Take emitted tokens up to the first stop token, the end of a stop string, or max_tokens;
        returns those taken.
        """
        if self.grammar is not None and self.grammar.is_broken:
            self.finish_reason = FinishReason.GRAMMAR
            return []
        room = self.request.max_tokens - self.num_output_tokens
        taken = emitted[:room]
        for index, token_id in enumerate(taken):
            stops = token_id in self.stop_ids
            if self.stop_scanner is not None:
                stops = self.stop_scanner.push(token_id) or stops
            if stops:
                taken = taken[: index + 1]
                self.finish_reason = FinishReason.STOP
                break
        else:
            if len(taken) == room:
                self.finish_reason = FinishReason.LENGTH
        self.token_ids.extend(taken)
        if self.grammar is not None:
            self.grammar.advance(taken)
            if self.grammar.is_broken:
                self.finish_reason = FinishReason.GRAMMAR
        return taken

    def put_in_grammar(
        self, query: Query, drafts: list[int], candidates: list[list[int]]
    ) -> list[int]:
        """The query's drafts, each exchanged for the best candidate that the grammar allows there,
        up to where it allows none.
        """
        assert self.grammar is not None
        wanted: list[list[int]] = [[token_id] for token_id in query.token_ids]
        for index, own in zip(query.answers, candidates, strict=True):
            wanted[index] = own
        inside = [query.token_ids[0], *self.grammar.draft(wanted[1:])]
        return [
            inside[index] if index < len(inside) else draft
            for index, draft in zip(query.answers, drafts, strict=True)
        ]

    def account(self, now: float) -> Finish:
        """The closing account; the sequence must have a finish reason."""
        assert self.finish_reason is not None
        start = self.arrived_at

        def since(moment: float | None) -> float:
            return (now if moment is None else moment) - start

        return Finish(
            reason=self.finish_reason,
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_output_tokens,
            forwards=self.num_forwards,
            accepted=tuple(self.accepted),
            timings=Timings(
                queue_s=since(self.scheduled_at),
                first_token_s=since(self.first_token_at),
                total_s=since(now),
            ),
            cached_tokens=self.num_cached,
        )
