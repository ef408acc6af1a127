"""Linear self-speculation: draft a block with the diffusion path, verify it with one causal pass
(model.md 5.3).

Every emitted token is the causal path's own answer to the prefix it follows, so the output is that
of AR at any temperature; drafts only decide how many answers of a pass can be kept. Drafts use the
same position-keyed noise as the verify pass, which makes them agree more often.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

from trimode.replicas.decoding.block import Block
from trimode.replicas.decoding.strategy import (
    PENDING,
    DecodingContext,
    Outcome,
    PassKind,
    Pending,
    Position,
    Query,
    Stage,
    confident_indices,
)
from trimode.replicas.types import TokenLogprobs

ONE_PASS = 0.0  # the default threshold: a single draft pass fills the whole block
GRAMMAR_CANDIDATES = 16  # ids of a draft position that are tried against a grammar


class SelfSpeculation:
    """A round is one or more draft passes and one verify pass. A block of 1 has nothing to draft:
    it is AR.
    """

    def __init__(self, context: DecodingContext) -> None:
        request = context.request
        self._context = context
        self._threshold = ONE_PASS if request.threshold is None else request.threshold
        self._draft_kind = PassKind.DRAFT if request.use_adapter else PassKind.DENOISE
        self._block: Block | None = None

    @property
    def needs_host(self) -> bool:
        return self._threshold > ONE_PASS  # which drafts a pass fills in is seen in the confidences

    def starts_round(self, before: Query | None = None) -> bool:
        return self._block is None if before is None else before.kind is PassKind.CAUSAL

    def next_query(self, position: Position) -> Query:
        if self._block is None:
            self._block = self._new_block(position.known_id, position.start, position.block_size)
        return self._query(self._block)

    def query_ahead(self, before: Query, block_size: int | None) -> Query:
        if before.kind is PassKind.CAUSAL:
            block = self._new_block(PENDING, before.known_after, block_size)
            return replace(self._query(block), pending=Pending.KNOWN)
        drafted = [before.token_ids[0], *[PENDING] * (len(before.token_ids) - 1)]
        return replace(_verify(drafted, before.start), pending=Pending.DRAFTS)

    def _new_block(self, known_id: int, start: int, block_size: int | None) -> Block:
        size = block_size or self._context.block_size
        return Block(known_id, start, size, self._context.mask_id)

    def _query(self, block: Block) -> Query:
        if not block.masked:
            return _verify(block.token_ids, block.start)
        return Query(
            Stage.DRAFT, self._draft_kind, block.token_ids, block.start, answers=block.masked,
            wants_confidence=self._threshold > ONE_PASS,
            confidence_temperature=self._context.request.temperature or 1.0,
            num_candidates=GRAMMAR_CANDIDATES if self._context.request.grammar else 0,
        )  # fmt: skip

    def accept(
        self,
        token_ids: SequenceOf[int],
        confidences: SequenceOf[float],
        logprobs: SequenceOf[TokenLogprobs] = (),
    ) -> Outcome:
        block = self._block
        assert block is not None, "accept() without a query"
        if block.masked:
            one_pass = self._threshold == ONE_PASS
            chosen = (
                range(len(token_ids)) if one_pass
                else confident_indices(confidences, self._threshold)
            )  # fmt: skip
            block.fill(chosen, token_ids)
            return Outcome()
        self._block = None
        accepted = 1 + num_agreeing(block.token_ids[1:], token_ids)
        return Outcome(
            emitted=token_ids[:accepted], num_committed=accepted, accepted=accepted,
            logprobs=logprobs[:accepted],
        )  # fmt: skip


def _verify(token_ids: SequenceOf[int], start: int) -> Query:
    stage = Stage.VERIFY if len(token_ids) > 1 else Stage.DECODE
    return Query(stage, PassKind.CAUSAL, token_ids, start, answers=range(len(token_ids)))


def num_agreeing(drafts: SequenceOf[int], answers: SequenceOf[int]) -> int:
    """Length of the longest prefix on which the drafts are what the causal pass answered."""
    for index, (draft, answer) in enumerate(zip(drafts, answers, strict=False)):
        if draft != answer:
            return index
    return len(drafts)
