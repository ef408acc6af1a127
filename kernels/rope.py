"""Rotary embedding of queries and keys, the scaling of the queries, and the write of keys and
values into the cache.
"""

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimode.kernels.dispatch import by_device
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
    slots: Tensor,  # [num_tokens] int64: where each row's key and value are kept, -1 for padding
) -> Tensor:
    """Keep every row's rotated key and its value; returns the rotated and scaled queries
    [num_tokens, num_heads, head_dim].
    """
    query, key, value = rotate(qkv, rotary)
    write_kv_reference(cache, layer, key, value, slots)
    return query


@triton.jit
def _rotate_and_write_kernel(
    qkv_ptr,  # [num_tokens, (num_heads + 2 * num_kv_heads) * 2 * half]
    cos_ptr,  # [num_tokens, half]
    sin_ptr,  # [num_tokens, half]
    query_scale_ptr,  # [num_tokens]
    slots_ptr,  # [num_tokens] int32 or int64
    query_ptr,  # [num_tokens, num_heads, 2 * half]
    entries_ptr,  # [num_slots, 2, num_kv_heads, 2 * half], of one layer
    slot_stride: tl.constexpr,
    pair_stride: tl.constexpr,
    head_stride: tl.constexpr,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    half: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """One program a row and BLOCK_HEADS of its heads: queries, then keys, then values. Reads and
    writes every value of qkv once.

    Computed in float32 and rounded once, where the reference rounds cos, sin and products, too.
    """
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    columns = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (heads < num_heads + 2 * num_kv_heads) & (columns < half)
    source = qkv_ptr + (row * (num_heads + 2 * num_kv_heads) + heads) * (2 * half) + columns
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + row * half + columns, mask=columns < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + row * half + columns, mask=columns < half, other=0.0).to(tl.float32)
    query_scale = tl.load(query_scale_ptr + row).to(tl.float32)
    slot = tl.load(slots_ptr + row).to(tl.int64)

    is_query = heads < num_heads
    is_value = heads >= num_heads + num_kv_heads
    scale = tl.where(is_query, query_scale, 1.0)
    turned_first = tl.where(is_value, first, (first * cos - second * sin) * scale)
    turned_second = tl.where(is_value, second, (second * cos + first * sin) * scale)
    turned_first = turned_first.to(query_ptr.dtype.element_ty)
    turned_second = turned_second.to(query_ptr.dtype.element_ty)

    query_ptrs = query_ptr + (row * num_heads + heads) * (2 * half) + columns
    tl.store(query_ptrs, turned_first, mask=inside & is_query)
    tl.store(query_ptrs + half, turned_second, mask=inside & is_query)
    kv_heads = tl.where(is_value, heads - num_heads - num_kv_heads, heads - num_heads)
    entry_ptrs = entries_ptr + slot * slot_stride + is_value.to(tl.int64) * pair_stride
    entry_ptrs += kv_heads * head_stride + columns
    is_kept = inside & (heads >= num_heads) & (slot >= 0)
    tl.store(entry_ptrs, turned_first, mask=is_kept)
    tl.store(entry_ptrs + half, turned_second, mask=is_kept)


def rotate_and_write_triton(
    qkv: Tensor, rotary: Rotary, cache: KVCache, layer: int, slots: Tensor
) -> Tensor:
    """As the reference; slots may be int32, too."""
    num_tokens, half = rotary.cos.shape
    num_heads, num_kv_heads = rotary.num_heads, rotary.num_kv_heads
    entries = cache.layers[layer]
    assert qkv.is_contiguous() and entries.stride(3) == 1
    query = qkv.new_empty(num_tokens, num_heads, 2 * half)
    # Four warps of 16-byte accesses for heads of 128 in bfloat16.
    block = min(16, triton.next_power_of_2(num_heads + 2 * num_kv_heads))
    grid = (num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, block))
    _rotate_and_write_kernel[grid](
        qkv, rotary.cos, rotary.sin, rotary.query_scale, slots, query, entries,
        slot_stride=entries.stride(0), pair_stride=entries.stride(1),
        head_stride=entries.stride(2), num_heads=num_heads, num_kv_heads=num_kv_heads, half=half,
        BLOCK_HEADS=block, BLOCK_HALF=triton.next_power_of_2(half), num_warps=4,
    )  # fmt: skip
    return query


rotate_and_write = by_device(rotate_and_write_reference, rotate_and_write_triton)
