"""Rows in float8 (e4m3, arXiv 2209.05433) with one float32 scale each: activations as they come,
and weights, whose rows are output channels.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimode.kernels.dispatch import by_device

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # finite number of that type
# Below it the scale of a row of next to nothing would lose digits, and at last divide by zero.
SMALLEST_SCALE = 2.0**-100
MAX_SIZE = 65536  # elements of a row, which one program holds

LARGEST_CONSTANT = tl.constexpr(LARGEST)
SMALLEST_SCALE_CONSTANT = tl.constexpr(SMALLEST_SCALE)


@dataclass(frozen=True, slots=True)
class Fp8Rows:
    """values[i] * scales[i] stands for row i."""

    values: Tensor  # [num_rows, size] float8_e4m3fn
    scales: Tensor  # [num_rows] float32

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """[num_rows, size], computed in dtype."""
        return self.values.to(dtype) * self.scales.to(dtype)[:, None]


def quantise_rows_reference(x: Tensor) -> Fp8Rows:
    """x [num_rows, size], the largest magnitude of each row becoming that of the type.

    A row of zeros stays zero. The scale of a row that holds NaN or an infinity is that, and its
    products are NaN.
    """
    wide = x.float()
    scales = (wide.abs().amax(dim=-1) / LARGEST).clamp_min(SMALLEST_SCALE)
    return Fp8Rows((wide / scales[:, None]).to(FP8), scales)


@triton.jit
def _quantise_rows_kernel(
    x_ptr,  # [num_rows, size]
    values_ptr,  # [num_rows, size] float8
    scales_ptr,  # [num_rows] float32
    size: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row, which it reads once."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(x_ptr + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=0)
    scale = tl.maximum(tl.div_rn(largest, LARGEST_CONSTANT), SMALLEST_SCALE_CONSTANT)
    has_nan = tl.max((x != x).to(tl.int32), axis=0) > 0  # which a maximum overlooks
    scale = tl.where(has_nan, float("nan"), scale)
    values = tl.div_rn(x, scale).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + row * size + columns, values, mask=inside)
    tl.store(scales_ptr + row, scale)


def quantise_rows_triton(x: Tensor) -> Fp8Rows:
    num_rows, size = x.shape
    if size > MAX_SIZE:
        raise ValueError(f"a row may have {MAX_SIZE} elements, has {size}")
    x = x.contiguous()
    values = torch.empty_like(x, dtype=FP8)
    scales = x.new_empty(num_rows, dtype=torch.float32)
    block = triton.next_power_of_2(size)
    if num_rows:
        _quantise_rows_kernel[(num_rows,)](
            x, values, scales, size=size, BLOCK=block, num_warps=min(16, max(1, block // 512))
        )
    return Fp8Rows(values, scales)


quantise_rows = by_device(quantise_rows_reference, quantise_rows_triton)
