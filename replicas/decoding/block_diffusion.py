"""Block diffusion: denoise a block until no mask is left, then commit it with one causal pass
(model.md 5.2).

At temperature 0 every denoise pass takes the arg max, above it the position-keyed noise decides;
either way the confidence is the model's at temperature 1, after penalties, bias and forced ids.
Penalties count the tokens before the block. Unlike self-speculation nothing is verified: the text
is not what AR would write.
"""

from collections.abc import Sequence as SequenceOf

from trimode.replicas.decoding.block import Block
from trimode.replicas.decoding.strategy import (
    DecodingContext,
    Outcome,
    PassKind,
    Position,
    Query,
    Stage,
    confident_indices,
)
from trimode.replicas.types import TokenLogprobs

DEFAULT_THRESHOLD = 0.9


class BlockDiffusion:
    """A block's tokens are emitted when its last mask falls; the commit pass then gives the next
    known token.
    """

    needs_host = True  # which masks fall is seen in the confidences

    def __init__(self, context: DecodingContext) -> None:
        self._context = context
        threshold = context.request.threshold
        self._threshold = DEFAULT_THRESHOLD if threshold is None else threshold
        self._block: Block | None = None

    def starts_round(self, before: Query | None = None) -> bool:
        return False

    def next_query(self, position: Position) -> Query:
        if self._block is None:
            self._block = Block(
                position.known_id, position.start, self._context.block_size, self._context.mask_id
            )
        block = self._block
        if block.masked:
            return Query(
                Stage.DENOISE, PassKind.DENOISE, block.token_ids, block.start,
                answers=block.masked, wants_confidence=True,
            )  # fmt: skip
        last = len(block.token_ids) - 1
        return Query(Stage.COMMIT, PassKind.CAUSAL, block.token_ids, block.start, answers=(last,))

    def query_ahead(self, before: Query, block_size: int | None) -> Query:
        raise NotImplementedError("confidences come first")

    def accept(
        self,
        token_ids: SequenceOf[int],
        confidences: SequenceOf[float],
        logprobs: SequenceOf[TokenLogprobs] = (),
    ) -> Outcome:
        block = self._block
        assert block is not None, "accept() without a query"
        if not block.masked:
            self._block = None
            return Outcome(token_ids, num_committed=len(block.token_ids), logprobs=logprobs)
        block.fill(confident_indices(confidences, self._threshold), token_ids, logprobs)
        stop = block.first_stop(self._context.stop_ids)
        if block.masked and stop is None:
            return Outcome()
        end = len(block.token_ids) if stop is None else stop + 1
        wanted = [block.logprobs[index] for index in range(1, end)] if logprobs else ()
        return Outcome(emitted=block.token_ids[1:end], logprobs=wanted)
