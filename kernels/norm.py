"""Root-mean-square norm (arXiv 1910.07467) of the residual stream and what a layer adds to it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimode.kernels.dispatch import by_device


def add_rms_norm_reference(
    x: Tensor,  # [num_tokens, size]
    update: Tensor | None,  # [num_tokens, size], None for nothing
    weight: Tensor,  # [size]
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(norm of x + update, x + update), both like x. Computed in float32 (float64 stays so)."""
    if update is not None:
        x = x + update
    if x.dtype == weight.dtype and x.dtype.itemsize >= 4 and not torch.is_grad_enabled():
        # Fewer operations than functional.rms_norm; a gradient through the norm of 0 is NaN.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.mul_(norm).mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        return (x * scale).mul_(weight), x
    # Narrow x is rounded before the weight is applied, as the published code has it.
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(x.dtype), x


@triton.jit
def _add_rms_norm_kernel(
    x_ptr,  # [num_tokens, size], replaced by the sum
    update_ptr,  # [num_tokens, size]
    weight_ptr,  # [size]
    out_ptr,  # [num_tokens, size]
    eps,
    size: tl.constexpr,
    HAS_UPDATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row. Moves 4 * size values a row (2 * size without an update), the least there
    is, and the weight.
    """
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    offsets = tl.program_id(0).to(tl.int64) * size + columns
    # Asked for before the sum over the row, which nothing behind it overtakes.
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    if HAS_UPDATE:
        # The stream is rounded to its own dtype before it is normed, as in the reference.
        update = tl.load(update_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) + update).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + offsets, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    normed = (wide * scale).to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + offsets, (weight * normed).to(out_ptr.dtype.element_ty), mask=inside)


def add_rms_norm_triton(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As the reference, but the sum takes the place of x."""
    out = torch.empty_like(x)
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    _add_rms_norm_kernel[(len(x),)](
        x, x if update is None else update, weight, out, eps,
        size=size, HAS_UPDATE=update is not None, BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return out, x


add_rms_norm = by_device(add_rms_norm_reference, add_rms_norm_triton)
