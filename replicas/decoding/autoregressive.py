"""Autoregressive decoding: one causal token a pass."""

from collections.abc import Sequence as SequenceOf

from trimode.replicas.decoding.strategy import (
    PENDING,
    DecodingContext,
    Outcome,
    PassKind,
    Pending,
    Position,
    Query,
    Stage,
)
from trimode.replicas.types import TokenLogprobs


class Autoregressive:
    """Feeds the known token, keeps its KV, emits the next."""

    needs_host = False

    def __init__(self, context: DecodingContext) -> None:
        pass

    def starts_round(self, before: Query | None = None) -> bool:
        return False

    def next_query(self, position: Position) -> Query:
        return Query(
            Stage.DECODE, PassKind.CAUSAL, (position.known_id,), position.start, answers=(0,)
        )

    def query_ahead(self, before: Query, block_size: int | None) -> Query:
        return Query(
            Stage.DECODE, PassKind.CAUSAL, (PENDING,), before.known_after, answers=(0,),
            pending=Pending.KNOWN,
        )  # fmt: skip

    def accept(
        self,
        token_ids: SequenceOf[int],
        confidences: SequenceOf[float],
        logprobs: SequenceOf[TokenLogprobs] = (),
    ) -> Outcome:
        return Outcome(emitted=token_ids, num_committed=1, logprobs=logprobs)
