from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trimode.kernels.norm import add_rms_norm_reference, add_rms_norm_triton

EPS = 1e-5
# What rounding alone makes: a sum in another order, and the last digit of a narrow result.
RATIOS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 3e-3}


def rows(num_tokens: int, size: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(size)
    x, update = (torch.randn(num_tokens, size, generator=generator) * 3 for _ in range(2))
    weight = 1 + torch.randn(size, generator=generator) / 4
    return tuple(tensor.to(device, dtype) for tensor in (x, update, weight))


@pytest.mark.parametrize("dtype", RATIOS, ids=str)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 8), (3, 48), (5, 100), (2, 3072)])
@pytest.mark.parametrize("has_update", [False, True])
def test_the_kernel_is_near_the_reference(
    num_tokens: int,
    size: int,
    dtype: torch.dtype,
    has_update: bool,
    device: str,
    fenced: Callable[[Tensor], Tensor],
    assert_near: Callable[..., None],
) -> None:
    x, update, weight = rows(num_tokens, size, dtype, device)
    added, weight = fenced(update) if has_update else None, fenced(weight)
    wanted, wanted_sum = add_rms_norm_reference(x.clone(), added, weight, EPS)
    got, got_sum = add_rms_norm_triton(fenced(x), added, weight, EPS)
    assert got.dtype == dtype
    assert_near("norm", got, wanted, RATIOS[dtype])
    assert_near("sum", got_sum, wanted_sum, RATIOS[dtype])


def test_a_row_of_zeros_stays_zero(device: str) -> None:
    x = torch.zeros(1, 16, device=device)
    got, _ = add_rms_norm_triton(x, None, torch.ones(16, device=device), EPS)
    assert (got == 0).all()


def test_the_sum_is_rounded_before_it_is_normed(device: str) -> None:
    x, update, weight = rows(4, 64, torch.bfloat16, device)
    _, total = add_rms_norm_triton(x.clone(), update, weight, EPS)
    assert torch.equal(total, x + update)


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_a_row_does_not_depend_on_the_others(num_tokens: int, device: str) -> None:
    x, update, weight = rows(num_tokens, 300, torch.bfloat16, device)
    whole, _ = add_rms_norm_triton(x.clone(), update, weight, EPS)
    for row in range(num_tokens):
        one = slice(row, row + 1)
        single, _ = add_rms_norm_triton(x[one].clone(), update[one], weight, EPS)
        assert torch.equal(single, whole[one])


def test_it_compiles_for_every_target_without_a_spill(
    compile_launches: Callable[..., list[dict[str, Any]]],
) -> None:
    def launch() -> None:
        for size in (3072, 4096, 5120):
            x = torch.empty(32, size, dtype=torch.bfloat16, device="meta")
            add_rms_norm_triton(x, x, x[0], EPS)

    for found in compile_launches("trimode.kernels.norm", launch):
        assert found["cubin_bytes"] > 0
        assert found["spilled_bytes"] == 0, found
