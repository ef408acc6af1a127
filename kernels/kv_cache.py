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
    cache: KVCache,
    layer: int,
    key: Tensor,  # [num_tokens, num_kv_heads, head_dim]
    value: Tensor,  # likewise
    slots: Tensor,  # [num_tokens] int64, -1 for padding
) -> None:
    """Put every row's key and value into its slot; padding is kept nowhere.

    A block pass writes here, too; the causal pass over the same positions overwrites it.
    """
    entries, pairs = cache.layers[layer], torch.stack((key, value), dim=1)
    try:
        if not slots.is_cuda:  # there it could not be caught
            entries.index_copy_(0, slots, pairs)
            return
    except IndexError:
        pass  # Padding. Passes on a CPU have none, and none of their layers pays for a look.
    kept = slots >= 0
    entries.index_copy_(0, slots[kept], pairs[kept])


write_kv = write_kv_reference


def copy_page(cache: KVCache, source: int, target: int, page_size: int) -> None:
    """Copy one page's keys and values in all layers. Slots that nobody wrote are copied, too.

    The host does not wait for it: what is launched later sees the copy.
    """
    pages = cache.entries.unflatten(1, (-1, page_size))
    pages[:, target] = pages[:, source]
