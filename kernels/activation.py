"""The gated activation of SwiGLU (arXiv 2002.05202)."""

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from trimode.kernels.dispatch import by_device


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """gate_up [num_tokens, 2 * size], the gate first -> silu(gate) * up [num_tokens, size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


@triton.jit
def _silu_mul_kernel(
    gate_up_ptr,  # [num_tokens, 2 * size]
    out_ptr,  # [num_tokens, size]
    size: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row and BLOCK of its columns. Moves 3 * size values a row, the least there is.

    Computed in float32 and rounded once, where the reference rounds the silu, too.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate_ptrs = gate_up_ptr + row * (2 * size) + columns
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + size, mask=inside, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * size + columns, product.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """As the reference."""
    assert gate_up.is_contiguous()
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, size)
    # Four warps of 16-byte accesses in bfloat16.
    block = min(1024, triton.next_power_of_2(size))
    grid = (num_tokens, triton.cdiv(size, block))
    _silu_mul_kernel[grid](gate_up, out, size=size, BLOCK=block, num_warps=4)
    return out


silu_mul = by_device(silu_mul_reference, silu_mul_triton)
