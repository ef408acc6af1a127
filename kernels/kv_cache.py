"""The paged KV cache and the write into it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of all layers, by slot. Slot = page * page_size + offset in the page."""

    keys: Tensor  # [num_layers, num_slots, num_kv_heads, head_dim]
    values: Tensor  # likewise

    @classmethod
    def allocate(
        cls,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> "KVCache":
        shape = (num_layers, num_slots, num_kv_heads, head_dim)
        # Not initialised: nobody reads a slot before it was written, and NaN-poisoned tests prove
        # it.
        return cls(
            torch.empty(shape, dtype=dtype, device=device),
            torch.empty(shape, dtype=dtype, device=device),
        )


def write_kv_reference(
    cache: KVCache, layer: int, key: Tensor, value: Tensor, slots: Tensor
) -> None:
    """Put key and value [num_tokens, num_kv_heads, head_dim] into slots [num_tokens].

    A block pass writes here, too; the causal pass over the same positions overwrites it.
    """
    cache.keys[layer].index_copy_(0, slots, key)
    cache.values[layer].index_copy_(0, slots, value)


write_kv = write_kv_reference
