"""Paged attention over rows of any kind: prefill chunk, decode, denoise, draft and verify in one
launch. What each row sees is told by replicas' AttentionInputs.

What it costs, with context C, G query heads a KV head and b bytes a value: a tile of R rows reads
2 C head_dim b bytes a KV head and computes 4 R G C head_dim floating-point operations, 2 R G / b a
byte. With G = 4 and bfloat16 that is 4 a byte for a decode row and 128 for a block of 32, where an
H100 could do about 300: decode and blocks are bound by memory. A prompt's tiles of 32 rows read the
same KV at the same time, from the L2 cache, and are bound by the tensor cores.

Slots behind a context's end are not read. What a decode step moves beyond its KV, queries and
results are the sums of splits: 8 G head_dim bytes against 2 b head_dim a slot of the split, an
eighth at the shortest (64 slots). Of its products (G of 16 rows) three quarters are zeros, in time
that waiting for memory leaves over.
"""

from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimode.kernels.attention_inputs import AttentionInputs
from trimode.kernels.attention_layout import Layout, device_facts, padded
from trimode.kernels.dispatch import by_device
from trimode.kernels.kv_cache import KVCache

# What changes from pass to pass must not compile a kernel anew.
SIZES = ("num_tokens", "table_stride", "num_splits")
LISTS = ("visible_ptr", "page_table_ptr", "tiles_ptr")

COMBINED_LANES = 16  # of a program: few, as a long context of few sequences has few tiles

# Lower than any score and finite, so that the difference of two of them is not NaN.
LOWEST = tl.constexpr(-1e38)


def paged_attention_reference(
    query: Tensor,  # [num_tokens, num_heads, head_dim]
    cache: KVCache,
    layer: int,
    inputs: AttentionInputs,
) -> Tensor:
    """Softmax(q k^T / sqrt(head_dim)) v over the entries each row sees; like query. Padding rows
    give exactly 0.
    """
    num_tokens = len(query)
    entries = cache.layers[layer]  # [num_slots, 2, num_kv_heads, head_dim]
    groups = inputs.reference_tiles()
    if len(groups) == 1 and groups[0].are_all_rows:
        return groups[0].attend(query, entries)
    out = query.new_zeros(num_tokens + 1, *query.shape[1:])  # the last row takes the empty lanes
    for tiles in groups:
        rows = tiles.rows.flatten()
        # What an empty lane asks does not matter, as nobody reads its answer.
        packed = query.index_select(0, rows.clamp(max=num_tokens - 1))
        out.index_copy_(0, rows, tiles.attend(packed, entries))
    return out[:num_tokens]


@triton.jit
def _lanes(
    tiles_ptr, visible_ptr, first_lane,
    GROUP: tl.constexpr, HEADS: tl.constexpr, NUM_LANES: tl.constexpr,
):  # fmt: skip
    """This program's tile: its sequence, and of each lane [NUM_LANES] the row, the query head,
    whether there is such a one, and what it sees. Heads of a row are neighbours, as in memory.
    """
    # Later rows see more: the longest programs start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    first = tl.load(tiles_ptr + tile * 3 + 1).to(tl.int32)
    end = tl.load(tiles_ptr + tile * 3 + 2).to(tl.int32)
    parts: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    lane = first_lane + tl.arange(0, NUM_LANES)
    row = first + lane // HEADS
    member = tl.program_id(1) % parts * HEADS + lane % HEADS
    inside = (row < end) & (member < GROUP)
    visible = tl.load(visible_ptr + row, mask=inside, other=0).to(tl.int32)
    head = tl.program_id(1) // parts * GROUP + member
    return sequence, row.to(tl.int64), head, inside, visible


@triton.jit
def _split_len(reach, num_splits, MIN_SPLIT_LEN: tl.constexpr):
    """Slots of each split but the last; from the tile's own reach, whatever the batch's."""
    share = tl.cdiv(reach, num_splits)
    return tl.maximum(tl.cdiv(share, MIN_SPLIT_LEN), 1) * MIN_SPLIT_LEN


@triton.jit
def _attend_to_block(
    query,  # [BLOCK_M, HEAD_DIM]
    mixed,  # [BLOCK_M, HEAD_DIM]: sum of the values so far, by weight
    total,  # [BLOCK_M]: sum of the weights so far
    peak,  # [BLOCK_M]: largest score so far, in powers of 2
    visible,  # [BLOCK_M]
    keys_ptr,  # of slot 0 and the KV head
    table_ptr,  # of the sequence
    start, reach, scale,
    num_kv_heads: tl.constexpr, head_dim: tl.constexpr, page_size: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of KV; not MASKED where every lane sees all of it."""
    position = start + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_DIM)
    written = position < reach
    if MASKED:
        page = tl.load(table_ptr + position // page_size, mask=written, other=0)
    else:
        page = tl.load(table_ptr + position // page_size)
    slot = page.to(tl.int64) * page_size + position % page_size
    keys = keys_ptr + slot[:, None] * (2 * num_kv_heads * head_dim) + dims[None, :]
    values = keys + num_kv_heads * head_dim
    # Slots that nobody wrote may hold NaN, which times 0 is NaN: they are not loaded.
    if MASKED or head_dim != HEAD_DIM:
        mask = written[:, None] & (dims < head_dim)[None, :]
        key = tl.load(keys, mask=mask, other=0.0)  # [BLOCK_N, HEAD_DIM]
        value = tl.load(values, mask=mask, other=0.0)
    else:
        key = tl.load(keys)
        value = tl.load(values)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")  # [BLOCK_M, BLOCK_N] float32
    if MASKED:
        scores = tl.where(position[None, :] < visible[:, None], scores, float("-inf"))
    # Where a row sees nothing of the block, its peak, total and sum keep their very bits.
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.exp2(tl.fma(scores, scale, -new_peak[:, None]))
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(value.dtype), value, mixed * shrink[:, None], input_precision="ieee")
    return mixed, total, new_peak


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=LISTS)
def _attention_kernel(
    query_ptr,  # [num_tokens, num_heads, head_dim], rows query_stride apart
    entries_ptr,  # [num_slots, 2, num_kv_heads, head_dim]
    out_ptr,  # [num_tokens, num_heads, head_dim]
    mixed_ptr,  # [num_splits, num_tokens, num_heads, head_dim] float32, where IS_SPLIT
    weights_ptr,  # [num_splits, num_tokens, num_heads, 2] float32: peak and total, where IS_SPLIT
    visible_ptr, page_table_ptr, tiles_ptr,
    num_tokens, table_stride, query_stride, scale,
    num_heads: tl.constexpr, num_kv_heads: tl.constexpr, head_dim: tl.constexpr,
    page_size: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MIN_SPLIT_LEN: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (tile, KV head and part of its query heads, split)."""
    GROUP: tl.constexpr = num_heads // num_kv_heads
    sequence, row, head, inside, visible = _lanes(tiles_ptr, visible_ptr, 0, GROUP, HEADS, BLOCK_M)
    if tl.max(inside.to(tl.int32), 0) == 0:
        return
    reach = tl.max(visible, 0)
    least = tl.min(tl.where(inside, visible, reach), 0)
    begin = 0
    stop = reach
    if IS_SPLIT:
        split_len = _split_len(reach, tl.num_programs(2), MIN_SPLIT_LEN)
        begin = tl.program_id(2) * split_len
        stop = tl.minimum(begin + split_len, reach)
        if begin > 0 and begin >= reach:
            return
    dims = tl.arange(0, HEAD_DIM)
    mask = inside[:, None] & (dims < head_dim)[None, :]
    columns = head[:, None] * head_dim + dims[None, :]
    query = tl.load(query_ptr + row[:, None] * query_stride + columns, mask=mask, other=0.0)
    kv_head = tl.program_id(1) // ((GROUP + HEADS - 1) // HEADS)
    keys_ptr = entries_ptr + kv_head * head_dim
    table_ptr = page_table_ptr + sequence * table_stride
    mixed = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    whole = tl.maximum(begin, tl.minimum(least, stop) // BLOCK_N * BLOCK_N)
    for start in range(begin, whole, BLOCK_N):
        mixed, total, peak = _attend_to_block(
            query, mixed, total, peak, visible, keys_ptr, table_ptr, start, reach, scale,
            num_kv_heads, head_dim, page_size, HEAD_DIM, BLOCK_N, False,
        )  # fmt: skip
    for start in range(whole, stop, BLOCK_N):
        mixed, total, peak = _attend_to_block(
            query, mixed, total, peak, visible, keys_ptr, table_ptr, start, reach, scale,
            num_kv_heads, head_dim, page_size, HEAD_DIM, BLOCK_N, True,
        )  # fmt: skip
    place = row * num_heads + head
    if IS_SPLIT:
        place += tl.program_id(2).to(tl.int64) * num_tokens * num_heads
        tl.store(mixed_ptr + place[:, None] * head_dim + dims[None, :], mixed, mask=mask)
        tl.store(weights_ptr + place * 2, peak, mask=inside)
        tl.store(weights_ptr + place * 2 + 1, total, mask=inside)
    else:
        out = mixed / tl.where(total > 0, total, 1.0)[:, None]
        out_ptrs = out_ptr + place[:, None] * head_dim + dims[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=LISTS)
def _combine_kernel(
    mixed_ptr,  # [num_splits, num_tokens, num_heads, head_dim] float32
    weights_ptr,  # [num_splits, num_tokens, num_heads, 2] float32: peak and total
    out_ptr,  # [num_tokens, num_heads, head_dim]
    visible_ptr, tiles_ptr,
    num_tokens, num_splits,
    num_heads: tl.constexpr, num_kv_heads: tl.constexpr, head_dim: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    MIN_SPLIT_LEN: tl.constexpr, NUM_LANES: tl.constexpr,
):  # fmt: skip
    """Program (tile, KV head and part of its query heads, some of these lanes): their splits, in
    order.
    """
    GROUP: tl.constexpr = num_heads // num_kv_heads
    _, _, _, _, seen = _lanes(tiles_ptr, visible_ptr, 0, GROUP, HEADS, BLOCK_M)
    reach = tl.max(seen, 0)
    _, row, head, inside, _ = _lanes(
        tiles_ptr, visible_ptr, tl.program_id(2) * NUM_LANES, GROUP, HEADS, NUM_LANES
    )
    if tl.max(inside.to(tl.int32), 0) == 0:
        return
    num_live = tl.maximum(tl.cdiv(reach, _split_len(reach, num_splits, MIN_SPLIT_LEN)), 1)
    dims = tl.arange(0, HEAD_DIM)
    mask = inside[:, None] & (dims < head_dim)[None, :]
    place = row * num_heads + head
    stride = tl.cast(num_tokens, tl.int64) * num_heads
    mixed = tl.zeros([NUM_LANES, HEAD_DIM], dtype=tl.float32)
    total = tl.zeros([NUM_LANES], dtype=tl.float32)
    peak = tl.full([NUM_LANES], LOWEST, dtype=tl.float32)
    for split in range(num_live):
        at = place + split * stride
        its_peak = tl.load(weights_ptr + at * 2, mask=inside, other=LOWEST)
        its_total = tl.load(weights_ptr + at * 2 + 1, mask=inside, other=0.0)
        its_mixed = tl.load(
            mixed_ptr + at[:, None] * head_dim + dims[None, :], mask=mask, other=0.0
        )
        new_peak = tl.maximum(peak, its_peak)
        shrink, its_share = tl.exp2(peak - new_peak), tl.exp2(its_peak - new_peak)
        total = total * shrink + its_total * its_share
        mixed = mixed * shrink[:, None] + its_mixed * its_share[:, None]
        peak = new_peak
    out = mixed / tl.where(total > 0, total, 1.0)[:, None]
    out_ptrs = out_ptr + place[:, None] * head_dim + dims[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def paged_attention_triton(
    query: Tensor, cache: KVCache, layer: int, inputs: AttentionInputs
) -> Tensor:
    entries = cache.layers[layer]
    layout = Layout.choose(query, entries.shape[2], inputs, device_facts(query.device))
    return launch_attention(query, entries, inputs, layout)


def launch_attention(
    query: Tensor,  # [num_tokens, num_heads, head_dim]
    entries: Tensor,  # [num_slots, 2, num_kv_heads, head_dim]
    inputs: AttentionInputs,
    layout: Layout,
) -> Tensor:
    """As the reference, in a given layout."""
    num_tokens, num_heads, head_dim = query.shape
    num_kv_heads = entries.shape[2]
    if not query[0].is_contiguous():
        query = query.contiguous()
    # Every row is in a tile, which writes it.
    out = query.new_empty(query.shape)
    mixed = weights = out
    if layout.num_splits > 1:
        shape = (layout.num_splits, num_tokens, num_heads)
        mixed = query.new_empty((*shape, head_dim), dtype=torch.float32)
        weights = query.new_empty((*shape, 2), dtype=torch.float32)
    shapes = {
        "num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
        "HEADS": layout.heads, "HEAD_DIM": padded(head_dim), "BLOCK_M": layout.block_m,
        "MIN_SPLIT_LEN": layout.min_split_len,
    }  # fmt: skip
    num_parts = num_kv_heads * triton.cdiv(num_heads // num_kv_heads, layout.heads)
    num_tiles = len(inputs.tiles)
    _attention_kernel[(num_tiles, num_parts, layout.num_splits)](
        query, entries, out, mixed, weights, inputs.visible, inputs.page_table, inputs.tiles,
        num_tokens, inputs.page_table.stride(0), query.stride(0), log2(e) / head_dim**0.5,
        page_size=inputs.page_size, BLOCK_N=layout.block_n, IS_SPLIT=layout.num_splits > 1,
        num_warps=layout.num_warps, num_stages=layout.num_stages, **shapes,
    )  # fmt: skip
    if layout.num_splits > 1:
        _combine_kernel[(num_tiles, num_parts, layout.block_m // COMBINED_LANES)](
            mixed, weights, out, inputs.visible, inputs.tiles, num_tokens, layout.num_splits,
            NUM_LANES=COMBINED_LANES, **shapes,
        )  # fmt: skip
    return out


paged_attention = by_device(paged_attention_reference, paged_attention_triton)
