"""Rotary embedding of queries and keys, the scaling of the queries, and the write of keys and
values into the cache.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from trimode.kernels.kv_cache import KVCache, write_kv_reference


@dataclass(frozen=True, slots=True)
class Rotary:
    """The rotation at the rows' positions; computed once a pass, used by every layer."""

    cos: Tensor  # [num_tokens, head_dim / 2] float32 (float64 in float64 runs)
    sin: Tensor  # [num_tokens, head_dim / 2], likewise
    query_scale: Tensor  # [num_tokens], likewise
    num_heads: int
    num_kv_heads: int
    _factors: dict[torch.dtype, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [num_tokens, num_heads + num_kv_heads, 2, head_dim / 2] for the reference: of
        the query heads, scaled, then of the key heads; sin is negative for the first half. The
        first layer of a pass makes them.
        """
        found = self._factors.get(dtype)
        if found is None:
            scale = self.query_scale[:, None]
            heads = torch.cat(
                (
                    scale.expand(-1, self.num_heads),
                    torch.ones_like(scale).expand(-1, self.num_kv_heads),
                ),
                dim=-1,
            )[..., None, None]  # [num_tokens, num_heads + num_kv_heads, 1, 1]
            cos = torch.stack((self.cos, self.cos), dim=1)[:, None]
            sin = torch.stack((-self.sin, self.sin), dim=1)[:, None]
            found = (heads * cos).to(dtype), (heads * sin).to(dtype)
            self._factors[dtype] = found
        return found


def rotate(
    qkv: Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], as projected
    rotary: Rotary,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [num_tokens, num_heads, head_dim], key and value [num_tokens, num_kv_heads, head_dim].

    Each head turns as two halves (rotate_half of the published code).
    """
    half = rotary.cos.shape[1]
    num_heads, num_kv_heads = rotary.num_heads, rotary.num_kv_heads
    turned_width = (num_heads + num_kv_heads) * 2 * half
    turned, value = qkv.split((turned_width, num_kv_heads * 2 * half), dim=-1)
    halves = turned.unflatten(-1, (-1, 2, half))
    cos, sin = rotary.factors(qkv.dtype)
    turned = torch.addcmul(halves * cos, halves.flip(2), sin).flatten(-2)
    return turned[:, :num_heads], turned[:, num_heads:], value.unflatten(-1, (-1, 2 * half))


def rotate_and_write_reference(
    qkv: Tensor,  # [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim], as projected
    rotary: Rotary,
    cache: KVCache,
    layer: int,
    slots: Tensor,  # [num_tokens] int64, where each row's key and value are kept
) -> Tensor:
    """Keep every row's rotated key and its value; returns the rotated and scaled queries
    [num_tokens, num_heads, head_dim].
    """
    query, key, value = rotate(qkv, rotary)
    write_kv_reference(cache, layer, key, value, slots)
    return query


rotate_and_write = rotate_and_write_reference
