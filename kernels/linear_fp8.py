"""Products with a weight in float8, one scale for each output channel. The rows are quantised as
they come, so a product is one of float8 operands, of half the bytes and twice the rate of
bfloat16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimode.kernels.batch_invariant import batch_invariant_product, product_reference
from trimode.kernels.dispatch import by_device
from trimode.kernels.fp8 import Fp8Rows, quantise_rows

ALIGNMENT = 16  # what both features of a weight must be multiples of for cuBLAS and CUTLASS


def fp8_linear_reference(x: Tensor, weight: Fp8Rows) -> Tensor:
    """x [num_rows, in_features] times weight [out_features, in_features]: [num_rows, out_features]
    like x. The very operands that a GPU multiplies, in float32.
    """
    rows = quantise_rows(x)
    return product_reference(rows.values, weight.values, x.dtype, (rows.scales, weight.scales))


def fp8_linear_scaled_mm(x: Tensor, weight: Fp8Rows) -> Tensor:
    """As the reference, in a library's kernel; the sum is bfloat16 before it is like x."""
    rows = quantise_rows(x)
    out: Tensor = torch._scaled_mm(
        rows.values,
        weight.values.t(),
        scale_a=rows.scales[:, None],
        scale_b=weight.scales[None, :],
        out_dtype=torch.bfloat16,
    )
    return out.to(x.dtype)


fp8_linear = by_device(fp8_linear_reference, fp8_linear_scaled_mm)


@dataclass(frozen=True, slots=True)
class Fp8Linear:
    """The fastest product that there is."""

    weight: Fp8Rows

    def __call__(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight)


@dataclass(frozen=True, slots=True)
class BatchInvariantFp8Linear:
    """Each row has the same bits in any batch; also for features of any number."""

    weight: Fp8Rows

    def __call__(self, x: Tensor) -> Tensor:
        rows = quantise_rows(x)
        scales = rows.scales, self.weight.scales
        return batch_invariant_product(rows.values, self.weight.values, x.dtype, scales)


def is_aligned(weight: Fp8Rows) -> bool:
    """Whether Fp8Linear has a kernel for it."""
    return all(size % ALIGNMENT == 0 for size in weight.values.shape)
