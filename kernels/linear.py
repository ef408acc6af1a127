"""The forms of a product of rows with a weight, and which of them serves where."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from trimode.kernels.batch_invariant import batch_invariant_product
from trimode.kernels.fp8 import Fp8Rows
from trimode.kernels.linear_fp8 import BatchInvariantFp8Linear, Fp8Linear, is_aligned
from trimode.kernels.linear_packed import pack

# x [num_rows, in_features] -> x times weight [out_features, in_features], like x.
Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """torch's own product: cuBLAS on a GPU."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


@dataclass(frozen=True, slots=True)
class BatchInvariantLinear:
    """Each row has the same bits in any batch."""

    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return batch_invariant_product(x, self.weight, x.dtype)


def linear_form(weight: Tensor | Fp8Rows, *, batch_invariant: bool) -> Linear:
    """The form that serves this weight on its device; the weight must not change any more.

    batch_invariant: for GPUs; on a CPU it changes nothing. Raises ValueError where there is no such
    product.
    """
    if isinstance(weight, Fp8Rows):
        is_free = not batch_invariant and is_aligned(weight)
        return Fp8Linear(weight) if is_free else BatchInvariantFp8Linear(weight)
    if weight.is_cuda and batch_invariant:
        if weight.dtype == torch.float64:
            raise ValueError("there is no batch-invariant product of float64")
        return BatchInvariantLinear(weight)
    return pack(weight) or PlainLinear(weight)
