"""Which passes are captured as CUDA graphs: the few sizes that passes of decode size take."""

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
    max_block_size: int
    has_adapter: bool

    @classmethod
    def of(
        cls, max_sequences: int, max_block_size: int, max_step_tokens: int, has_adapter: bool
    ) -> "GraphKeys":
        """Powers of two for sequences; for tokens also the middle between two from 32 on, as wide
        passes pay for padding.
        """
        most = min(max_sequences * max_block_size, max_step_tokens, MAX_GRAPH_TOKENS)
        powers = [1 << exponent for exponent in range(most.bit_length() + 1)]
        sizes = sorted({*powers, *(3 * size // 2 for size in powers if size >= 32)})
        return cls(
            token_buckets=_up_to(sizes, most),
            sequence_buckets=_up_to(powers, min(max_sequences, most)),
            max_block_size=max_block_size,
            has_adapter=has_adapter and max_block_size > 1,
        )

    def find(self, num_tokens: int, num_sequences: int, drafts: bool) -> GraphKey | None:
        """The smallest that a pass fits into; None for a pass of more than decode size."""
        if num_tokens > self.token_buckets[-1] or num_sequences > self.sequence_buckets[-1]:
            return None
        sequences = _round_up(self.sequence_buckets, num_sequences)
        tokens = _round_up(self.token_buckets, max(num_tokens, sequences))
        if tokens > self._most_tokens(sequences):
            return None
        return GraphKey(tokens, sequences, drafts and self.has_adapter)

    def all(self) -> list[GraphKey]:
        """Every key that `find` gives, largest first: smaller graphs then fit into the memory of
        larger ones.
        """
        return [
            GraphKey(tokens, sequences, drafts)
            for tokens in reversed(self.token_buckets)
            for sequences in reversed(self.sequence_buckets)
            if sequences <= tokens <= self._most_tokens(sequences)
            for drafts in ((True, False) if self.has_adapter else (False,))
        ]

    def _most_tokens(self, num_sequences: int) -> int:
        most = min(num_sequences * self.max_block_size, self.token_buckets[-1])
        return _round_up(self.token_buckets, most)


def _round_up(buckets: tuple[int, ...], size: int) -> int:
    return buckets[bisect_left(buckets, size)]


def _up_to(sizes: list[int], most: int) -> tuple[int, ...]:
    return (*(size for size in sizes if size < most), most)
