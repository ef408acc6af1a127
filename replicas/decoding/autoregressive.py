"""Autoregressive decoding: one causal token a pass."""

from collections.abc import Sequence as SequenceOf

from trimode.replicas.decoding.strategy import (
    DecodingContext,
    Outcome,
    PassKind,
    Position,
    Query,
    Stage,
)
from trimode.replicas.types import TokenLogprobs


class Autoregressive:
    """Feeds the known token, keeps its KV, emits the next."""

    def __init__(self, context: DecodingContext) -> None:
        pass

    @property
    def starts_round(self) -> bool:
        return False

    def next_query(self, position: Position) -> Query:
        return Query(
            Stage.DECODE, PassKind.CAUSAL, (position.known_id,), position.start, answers=(0,)
        )

    def accept(
        self,
        token_ids: SequenceOf[int],
        confidences: SequenceOf[float],
        logprobs: SequenceOf[TokenLogprobs] = (),
    ) -> Outcome:
        return Outcome(emitted=token_ids, num_committed=1, logprobs=logprobs)
