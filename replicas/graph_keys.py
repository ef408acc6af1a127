"""Which passes are captured as CUDA graphs: the few sizes that all but large prefills take."""

from bisect import bisect_left
from dataclasses import dataclass

MAX_GRAPH_TOKENS = 512  # a larger pass takes the device longer than it takes to launch


@dataclass(frozen=True, slots=True)
class GraphKey:
    """One size of pass."""

    num_tokens: int
    num_sequences: int
    drafts: bool  # some rows may run with the draft adapter; others know no adapter


@dataclass(frozen=True, slots=True)
class GraphKeys:
    """The sizes of one engine, ascending."""

    token_buckets: tuple[int, ...]
    sequence_buckets: tuple[int, ...]
    has_drafts: bool

    @classmethod
    def of(
        cls, max_sequences: int, max_block_size: int, max_step_tokens: int, has_adapter: bool
    ) -> "GraphKeys":
        """Powers of two for tokens and, from 32 on, the middle between two, as wide passes pay for
        padding rows. Powers of four for sequences: one too many costs a few empty tiles.
        """
        most = min(max_step_tokens, MAX_GRAPH_TOKENS)
        powers = [1 << exponent for exponent in range(most.bit_length() + 1)]
        tokens = sorted({*powers, *(3 * size // 2 for size in powers if size >= 32)})
        return cls(
            token_buckets=_up_to(tokens, most),
            sequence_buckets=_up_to(powers[::2], min(max_sequences, most)),
            has_drafts=has_adapter and max_block_size > 1,
        )

    def find(self, num_tokens: int, num_sequences: int, drafts: bool) -> GraphKey | None:
        """The smallest that a pass fits into; None for a pass that is too large."""
        if num_tokens > self.token_buckets[-1] or num_sequences > self.sequence_buckets[-1]:
            return None
        tokens = _round_up(self.token_buckets, num_tokens)
        sequences = _round_up(self.sequence_buckets, num_sequences)
        return GraphKey(tokens, sequences, drafts and self.has_drafts)

    def all(self) -> list[GraphKey]:
        """Every key that `find` gives: the largest number of tokens first, as all others fit into
        the memory of those graphs, then from the smallest on, which would miss a graph most.
        """
        most = self.sequence_buckets[-1]
        *others, last = self.token_buckets
        return [
            GraphKey(tokens, sequences, drafts)
            for tokens in (last, *others)
            for sequences in reversed(self.sequence_buckets)
            if sequences <= _round_up(self.sequence_buckets, min(tokens, most))
            # A draft has two rows, at least.
            for drafts in ((True, False) if self.has_drafts and tokens > 1 else (False,))
        ]


def _round_up(buckets: tuple[int, ...], size: int) -> int:
    return buckets[bisect_left(buckets, size)]


def _up_to(sizes: list[int], most: int) -> tuple[int, ...]:
    return (*(size for size in sizes if size < most), most)
