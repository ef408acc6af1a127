from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trimode.kernels.activation import silu_mul, silu_mul_reference, silu_mul_triton

# Of the root mean square, against the reference in float32: what one rounding makes.
RATIOS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 3e-3}


@pytest.mark.parametrize("dtype", RATIOS, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "size"), [(1, 1), (1, 8), (3, 48), (5, 100), (2, 1024), (2, 1500)]
)
def test_the_kernel_is_near_the_reference(
    num_tokens: int,
    size: int,
    dtype: torch.dtype,
    device: str,
    fenced: Callable[[Tensor], Tensor],
    assert_near: Callable[..., None],
) -> None:
    generator = torch.Generator().manual_seed(size)
    gate_up = torch.randn(num_tokens, 2 * size, generator=generator) * 3
    gate_up = fenced(gate_up.to(device, dtype))
    got = silu_mul_triton(gate_up)
    assert got.dtype == dtype
    assert_near("product", got, silu_mul_reference(gate_up.float()), RATIOS[dtype])


def test_a_gate_far_from_zero_is_closed_or_open(device: str) -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 3.0, 3.0]], device=device)
    with np.errstate(over="ignore"):  # of the interpreter
        assert silu_mul_triton(gate_up).tolist() == [[0.0, 600.0]]


def test_the_gate_comes_first(device: str) -> None:
    gate_up = torch.tensor([[0.0, 5.0]], device=device)
    assert silu_mul(gate_up).tolist() == [[0.0]]


def test_it_compiles_for_every_target_without_a_spill(
    compile_launches: Callable[..., list[dict[str, Any]]],
) -> None:
    gate_up = torch.empty(32, 2 * 14336, dtype=torch.bfloat16, device="meta")
    for found in compile_launches("trimode.kernels.activation", lambda: silu_mul_triton(gate_up)):
        assert found["cubin_bytes"] > 0
        assert found["spilled_bytes"] == 0, found
