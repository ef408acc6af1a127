"""Products of rows with a weight whose every element is summed in an order that does not depend on
how many rows there are, nor on which of them it belongs to.

cuBLAS picks tiles, instructions and splits of the sum by the number of rows, and so the last digits
of a row depend on its company. Here they depend on the weight's shape and dtype alone. The sum is
cut into parts, for a few rows alone would keep too few programs busy to read the weight at speed;
parts are added up in their order, by whoever computed them: one program after another for many
rows, one program each and a sum behind them for few. Both give the same bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from trimode.kernels.dispatch import by_device
from trimode.kernels.fp8 import FP8

MANY_PROGRAMS = 128  # keep a GPU's memory, or with more rows its tensor cores, busy
MIN_STEPS = 8  # of a part: shorter ones cost more than they bring
GROUP = 16  # row tiles that share what they read of the weight
SUM_BLOCK = 1024

Scales = tuple[Tensor, Tensor]  # [num_rows] of x and [out_features] of the weight, float32


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut up."""

    rows: int
    columns: int
    step: int  # of the sum, at once
    num_steps: int  # of each part of the sum
    num_parts: int
    num_warps: int
    num_stages: int
    # Products of float8 that a tensor core adds with fewer digits before they join the sum.
    imprecise: int

    @classmethod
    def of(cls, out_features: int, in_features: int, dtype: torch.dtype) -> "Tile":
        """Whatever it is computed from is all that the bits of a product depend on."""
        if dtype.itemsize == 4:  # no tensor cores: exact products of float32
            rows, columns, step, num_stages = 32, 32, 32, 2
        else:
            rows, columns, step, num_stages = 64, 128, 128 // dtype.itemsize, 4
        num_steps = triton.cdiv(in_features, step)
        num_parts = 1
        while (
            triton.cdiv(out_features, columns) * num_parts < MANY_PROGRAMS
            and num_steps >= 2 * num_parts * MIN_STEPS
        ):
            num_parts *= 2
        num_steps = triton.cdiv(num_steps, num_parts)
        num_parts = triton.cdiv(in_features, num_steps * step)
        # Those sums are kept apart for float8, which takes the registers of more warps.
        num_warps, imprecise = (8, step) if dtype == FP8 else (4, 0)
        return cls(rows, columns, step, num_steps, num_parts, num_warps, num_stages, imprecise)


def product_reference(
    x: Tensor,  # [num_rows, in_features]
    weight: Tensor,  # [out_features, in_features], like x
    dtype: torch.dtype,
    scales: Scales | None = None,
) -> Tensor:
    """x weight^T, times the scales, in float32 and then rounded to dtype: [num_rows,
    out_features].
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = functional.linear(x.to(wide), weight.to(wide))
    if scales is not None:
        out = out * scales[0][:, None] * scales[1]
    return out.to(dtype)


@triton.jit
def _tile_sum(
    x_ptr,  # [rows_left, in_features]: of the tile and below
    weight_ptr,  # [columns_left, in_features], likewise
    rows_left,
    columns_left,
    in_features,
    part,
    num_steps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    IMPRECISE: tl.constexpr,
):
    """One part of the sum of a tile, [BLOCK_M, BLOCK_N] float32."""
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    x_mask, weight_mask = (rows < rows_left)[:, None], (columns < columns_left)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(num_steps):
        at = (part * num_steps + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        x_at = x_ptr + rows[:, None] * in_features + at[None, :]
        weight_at = weight_ptr + columns[None, :] * in_features + at[:, None]
        if IS_RAGGED:
            x = tl.load(x_at, mask=x_mask & (at < in_features)[None, :], other=0.0)
            inside = weight_mask & (at < in_features)[:, None]
            weight = tl.load(weight_at, mask=inside, other=0.0)
        else:
            x = tl.load(x_at, mask=x_mask, other=0.0)
            weight = tl.load(weight_at, mask=weight_mask, other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee", max_num_imprecise_acc=IMPRECISE)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    x_ptr,  # [num_rows, in_features]
    weight_ptr,  # [out_features, in_features]
    x_scales_ptr,  # [num_rows] float32
    weight_scales_ptr,  # [out_features] float32
    out_ptr,  # [num_rows, out_features], or IS_PART [NUM_PARTS, num_rows, out_features] float32
    num_rows,
    out_features,
    in_features,
    num_steps,
    NUM_PARTS: tl.constexpr,
    IS_PART: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    IMPRECISE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program a tile, and a part where IS_PART. GROUP row tiles of one column tile run side by
    side.
    """
    num_row_tiles = tl.cdiv(num_rows, BLOCK_M)
    in_group = GROUP * tl.cdiv(out_features, BLOCK_N)
    first = tl.program_id(0) // in_group * GROUP
    group = tl.minimum(num_row_tiles - first, GROUP)
    index = tl.program_id(0) % in_group
    row = (first + index % group).to(tl.int64) * BLOCK_M
    column = (index // group).to(tl.int64) * BLOCK_N
    rows_left, columns_left = (num_rows - row).to(tl.int32), (out_features - column).to(tl.int32)
    x_ptr += row * in_features
    weight_ptr += column * in_features
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    if IS_PART:
        total = _tile_sum(
            x_ptr, weight_ptr, rows_left, columns_left, in_features, part, num_steps,
            BLOCK_M, BLOCK_N, BLOCK_K, IS_RAGGED, IMPRECISE,
        )  # fmt: skip
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for each in range(NUM_PARTS):
            total += _tile_sum(
                x_ptr, weight_ptr, rows_left, columns_left, in_features, each, num_steps,
                BLOCK_M, BLOCK_N, BLOCK_K, IS_RAGGED, IMPRECISE,
            )  # fmt: skip
        if HAS_SCALES:
            x_scales = tl.load(x_scales_ptr + row + rows, mask=rows < rows_left, other=0.0)
            scales_at = weight_scales_ptr + column + columns
            scales = tl.load(scales_at, mask=columns < columns_left, other=0.0)
            total = total * x_scales[:, None] * scales[None, :]
    inside = (rows < rows_left)[:, None] & (columns < columns_left)[None, :]
    out_ptr += (part.to(tl.int64) * num_rows + row) * out_features + column
    offsets = rows[:, None] * out_features + columns[None, :]
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_parts_kernel(
    parts_ptr,  # [NUM_PARTS, num_rows, out_features] float32
    x_scales_ptr,  # [num_rows] float32
    weight_scales_ptr,  # [out_features] float32
    out_ptr,  # [num_rows, out_features]
    num_rows,
    out_features,
    NUM_PARTS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The parts in their order."""
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < out_features
    offsets = row * out_features + columns
    size = num_rows.to(tl.int64) * out_features  # of a part
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(NUM_PARTS):
        total += tl.load(parts_ptr + part * size + offsets, mask=inside, other=0.0)
    if HAS_SCALES:
        scales = tl.load(weight_scales_ptr + columns, mask=inside, other=0.0)
        total = total * tl.load(x_scales_ptr + row) * scales
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=inside)


def product_triton(
    x: Tensor, weight: Tensor, dtype: torch.dtype, scales: Scales | None = None
) -> Tensor:
    num_rows, (out_features, in_features) = len(x), weight.shape
    x, tile = x.contiguous(), Tile.of(out_features, in_features, weight.dtype)
    out = x.new_empty(num_rows, out_features, dtype=dtype)
    if num_rows == 0:
        return out
    num_tiles = triton.cdiv(num_rows, tile.rows) * triton.cdiv(out_features, tile.columns)
    in_parts = tile.num_parts > 1 and num_tiles < MANY_PROGRAMS
    num_parts = tile.num_parts if in_parts else 1
    into = x.new_empty(num_parts, *out.shape, dtype=torch.float32) if in_parts else out
    x_scales, weight_scales = (out, out) if scales is None else scales  # out: never read
    _product_kernel[(num_tiles, num_parts)](
        x, weight, x_scales, weight_scales, into, num_rows,
        out_features, in_features, tile.num_steps,
        NUM_PARTS=tile.num_parts, IS_PART=in_parts, HAS_SCALES=scales is not None,
        BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.step,
        IS_RAGGED=tile.num_parts * tile.num_steps * tile.step > in_features,
        IMPRECISE=tile.imprecise, GROUP=GROUP, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if in_parts:
        _sum_parts_kernel[(triton.cdiv(out_features, SUM_BLOCK), num_rows)](
            into, x_scales, weight_scales, out, num_rows, out_features,
            NUM_PARTS=tile.num_parts, HAS_SCALES=scales is not None, BLOCK=SUM_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


batch_invariant_product = by_device(product_reference, product_triton)
