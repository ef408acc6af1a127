"""The seam of the decoding modes: what a mode asks of a pass (Query) and what it keeps of it
(Outcome).

A strategy is the state machine of one sequence after its prefill, on plain ints. Between two passes
it holds at most one block. To add a mode, write one file with a Strategy and name it in the
registry of `modes.py`.

A pass may be launched before the one before it was read. Its queries then hold PENDING where only
the device knows an id, and `pending` says what to put there.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from trimode.replicas.types import Request, TokenLogprobs


class PassKind(Enum):
    """What a row of a pass sees, and whether the draft adapter is on."""

    CAUSAL = "causal"  # itself and what is before it; the only kind whose KV is kept
    DENOISE = "denoise"  # all that is cached and its whole block
    DRAFT = "draft"  # as DENOISE, with the draft adapter on


class Stage(Enum):
    """What a query is for; the step log and the metrics speak in these words."""

    PREFILL = "prefill"
    DECODE = "decode"
    DENOISE = "denoise"
    COMMIT = "commit"
    DRAFT = "draft"
    VERIFY = "verify"


PENDING = -1  # a token id that the pass before leaves on the device


class Pending(Enum):
    """What of a query the device fills in, from the answers of the same sequence's pass before."""

    # Token 0 is the last answer that the pass keeps; start moves on by one for every draft kept.
    KNOWN = "known"
    DRAFTS = "drafts"  # all tokens but the first are the pass's answers


@dataclass(frozen=True, slots=True)
class Query:
    """One sequence's part of one pass: consecutive tokens at positions start, start + 1, ..."""

    stage: Stage
    kind: PassKind
    token_ids: SequenceOf[int]
    start: int  # position of token_ids[0]; its KV slot, too
    answers: SequenceOf[int]  # indices into token_ids whose prediction is wanted, ascending
    wants_confidence: bool = False
    # Temperature of the softmax that confidences are read from; drafts take the request's where
    # that is not 0.
    confidence_temperature: float = 1.0
    num_candidates: int = 0  # best ids that should come with each answer
    pending: Pending | None = None

    @property
    def end(self) -> int:
        """The position after the last token's."""
        return self.start + len(self.token_ids)

    @property
    def known_after(self) -> int:
        """Where the known token is after this causal pass, unless drafts are kept, too."""
        return self.end if self.stage is Stage.PREFILL else self.start + 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a pass brought a sequence."""

    emitted: SequenceOf[int] = ()  # new output tokens, in order
    num_committed: int = 0  # slots whose causal KV is now final
    accepted: int | None = None  # tokens of a verify round
    logprobs: SequenceOf[TokenLogprobs] = ()  # one an emitted token, where they are wanted


@dataclass(frozen=True, slots=True)
class Position:
    """Where a sequence stands when its strategy is asked: one known token without KV after
    num_committed slots.
    """

    known_id: int
    start: int  # = num_committed: the known token's position
    block_size: int | None = None  # of a round that begins here, by the governor; None: its own


@dataclass(frozen=True, slots=True)
class DecodingContext:
    """What a strategy knows of its sequence from the start."""

    request: Request
    mask_id: int
    stop_ids: frozenset[int]  # eos and the request's
    block_size: int  # pinned by the request, or the engine's


class Strategy(Protocol):
    """One sequence's decoding after its prefill."""

    @property
    def needs_host(self) -> bool:
        """Whether what it asks next depends on answers in a way that only accept() can tell."""
        ...

    def starts_round(self, before: Query | None = None) -> bool:
        """Whether the next query, or the one after `before`, begins a round whose block size may be
        chosen.
        """
        ...

    def next_query(self, position: Position) -> Query:
        """The pass this sequence needs next. Asking twice before accept() gives the same."""
        ...

    def query_ahead(self, before: Query, block_size: int | None) -> Query:
        """The pass after `before`, whose answers nobody has read. Changes nothing: once they are
        accepted, next_query() gives this query with all ids known. Not asked where needs_host.
        """
        ...

    def accept(
        self,
        token_ids: SequenceOf[int],
        confidences: SequenceOf[float],
        logprobs: SequenceOf[TokenLogprobs] = (),
    ) -> Outcome:
        """Take the answers of the last query; confidences is empty unless it wanted them, logprobs
        unless the request does.
        """
        ...


def confident_indices(confidences: SequenceOf[float], threshold: float) -> list[int]:
    """Which answers of a denoise or draft pass to commit: all at or over the threshold, and always
    the best one.

    Ties for the best go to the first, as in the published decoders (model.md 5.2, 5.3). This one
    function is where a better sampler would take its place.
    """
    best = max(range(len(confidences)), key=confidences.__getitem__)
    return [i for i, value in enumerate(confidences) if i == best or value >= threshold]
