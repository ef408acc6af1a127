"""The gated activation of SwiGLU (arXiv 2002.05202)."""

from torch import Tensor
from torch.nn import functional


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """gate_up [num_tokens, 2 * size], the gate first -> silu(gate) * up [num_tokens, size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


silu_mul = silu_mul_reference
