"""The part of the vocabulary that one rank of a tensor-parallel group holds."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class VocabularyShard:
    """One rank's columns of the logits: those of the ids from `start` on. Columns of ids past the
    vocabulary are padding, whatever they hold.
    """

    start: int  # a multiple of 4; ranks hold equal parts, in rank order
    vocab_size: int  # of all ranks together, without padding
    gather: Callable[[Tensor], Tensor]  # [...] of each rank -> [num_ranks, ...], on every rank

    def __post_init__(self) -> None:
        if self.start % 4:
            # Four neighbouring ids share a draw of the noise.
            raise ValueError(f"start must be a multiple of 4, not {self.start}")

    def whole(self, part: Tensor) -> Tensor:
        """[num_rows, part_size] of each rank -> [num_rows, vocab_size], the same on every rank."""
        return self.gather(part).transpose(0, 1).flatten(1)[:, : self.vocab_size]
