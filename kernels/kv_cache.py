"""The paged KV cache and the write into it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of all layers, by slot. Slot = page * page_size + offset in the page.

    A slot's key and value lie side by side, so that one gather reads both.
    """

    entries: Tensor  # [num_layers, num_slots, 2, num_kv_heads, head_dim]
    layers: tuple[Tensor, ...] = field(init=False)  # views of it, which are not made each time

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", self.entries.unbind(0))

    @property
    def keys(self) -> Tensor:  # [num_layers, num_slots, num_kv_heads, head_dim], a view
        return self.entries[:, :, 0]

    @property
    def values(self) -> Tensor:  # likewise
        return self.entries[:, :, 1]

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
        shape = (num_layers, num_slots, 2, num_kv_heads, head_dim)
        # Not initialised: nobody reads a slot before it was written, and NaN-poisoned tests prove
        # it.
        return cls(torch.empty(shape, dtype=dtype, device=device))


def write_kv_reference(
    cache: KVCache, layer: int, key: Tensor, value: Tensor, slots: Tensor
) -> None:
    """Put key and value [num_tokens, num_kv_heads, head_dim] into slots [num_tokens].

    A block pass writes here, too; the causal pass over the same positions overwrites it.
    """
    cache.layers[layer].index_copy_(0, slots, torch.stack((key, value), dim=1))


write_kv = write_kv_reference


def copy_page(cache: KVCache, source: int, target: int, page_size: int) -> None:
    """Copy one page's keys and values in all layers. Slots that nobody wrote are copied, too."""
    pages = cache.entries.unflatten(1, (-1, page_size))
    pages[:, target] = pages[:, source]
