"""Tensor parallelism as the model sees it: a group of ranks that add and gather, and the part of
every layer that each of them holds.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trimode.replicas.model.config import ModelConfig


class Group(Protocol):
    """The ranks that run one model copy together. All of them make the same calls in the same
    order.
    """

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, the same bits on each. x is used up."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """x of every rank, by rank: [size, *x.shape]."""
        ...


class Alone:
    """The group of one rank: everything is here already."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x[None]


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds: runs of heads, of KV heads, of the feed-forward's channels and of token
    ids.
    """

    heads: range
    kv_heads: range
    channels: range
    token_ids: range  # may be shorter than num_rows, or empty, where the vocabulary does not divide
    num_rows: int  # of embedding and head, padding included; the same on every rank

    @classmethod
    def of(cls, config: ModelConfig, rank: int, size: int) -> "Shard":
        """Raises ConfigError where the model cannot be split over so many ranks."""
        config.check_ranks(size)
        # Where there are more ranks than KV heads, neighbours hold the same one.
        num_kv_heads = max(1, config.num_kv_heads // size)
        first_kv_head = rank * config.num_kv_heads // size
        num_rows = config.vocab_size
        if size > 1:  # in fours: as many neighbouring ids share a draw of the sampling noise
            num_rows = -(-config.vocab_size // (4 * size)) * 4
        first_id = min(rank * num_rows, config.vocab_size)
        return cls(
            heads=_run(rank, config.num_heads // size),
            kv_heads=range(first_kv_head, first_kv_head + num_kv_heads),
            channels=_run(rank, config.intermediate_size // size),
            token_ids=range(first_id, min(first_id + num_rows, config.vocab_size)),
            num_rows=num_rows,
        )


def _run(rank: int, length: int) -> range:
    return range(rank * length, (rank + 1) * length)


def smallest(number: int, group: Group, device: torch.device) -> int:
    """The smallest of every rank's number."""
    if group.size == 1:
        return number
    return int(group.all_gather(torch.tensor([number], device=device)).min())
