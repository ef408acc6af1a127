from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trimode.kernels.fp8 import (
    FP8,
    Fp8Rows,
    quantise_rows_reference,
    quantise_rows_triton,
)

# e4m3 has three digits behind the point: 2**-4 at most, and 1/sqrt(3) of it on the average.
RATIO = 0.03


def rows(num_rows: int, size: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return (torch.randn(num_rows, size, generator=generator) * 3).to(device)


def assert_equal(got: Fp8Rows, wanted: Fp8Rows) -> None:
    assert torch.equal(got.scales, wanted.scales)
    assert torch.equal(got.values.view(torch.uint8), wanted.values.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_rows", "size"), [(1, 8), (3, 100), (2, 3072)])
def test_the_kernel_gives_what_the_reference_gives(
    num_rows: int, size: int, dtype: torch.dtype, device: str
) -> None:
    x = rows(num_rows, size, device).to(dtype)
    got = quantise_rows_triton(x)
    assert got.values.dtype == FP8
    assert_equal(got, quantise_rows_reference(x))


def test_quantised_rows_are_near_what_they_stand_for(
    device: str, assert_near: Callable[..., None]
) -> None:
    x = rows(4, 200, device)
    assert_near("rows", quantise_rows_triton(x).dequantise(torch.float32), x, RATIO)


def test_the_largest_magnitude_of_a_row_takes_the_largest_number(device: str) -> None:
    x = torch.tensor([[0.5, -2.0, 1.0], [1e-3, 2e-3, -7e30]], device=device)
    got = quantise_rows_triton(x)
    assert got.values.float().abs().amax(dim=1).tolist() == [448.0, 448.0]


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-38, 3e-32])
def test_rows_of_next_to_nothing_stay_finite(tiny: float, device: str) -> None:
    x = torch.full((1, 16), tiny, device=device)
    got = quantise_rows_triton(x)
    assert_equal(got, quantise_rows_reference(x))
    back = got.dequantise(torch.float64)
    assert back.isfinite().all()
    assert (back - x.double()).abs().max() <= 2.0**-103


def test_a_row_knows_nothing_of_the_others(device: str) -> None:
    x = rows(5, 64, device)
    x[3] *= 1e6
    alone = quantise_rows_triton(x[2:3])
    assert torch.equal(quantise_rows_triton(x).values[2:3].float(), alone.values.float())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of inf / inf
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("quantise", [quantise_rows_reference, quantise_rows_triton])
def test_what_is_not_finite_shows_in_every_product_of_its_row(
    quantise: Callable[[Tensor], Fp8Rows], bad: float, device: str
) -> None:
    x = rows(3, 16, device)
    x[1, 3] = bad
    quantised = quantise(x)
    assert quantised.scales.isfinite().tolist() == [True, False, True]
    products = quantised.dequantise(torch.float32) @ torch.ones(16, 2, device=device)
    assert products.isnan().all(dim=1).tolist() == [False, True, False]


def test_rows_of_zeros_stay_zero(device: str) -> None:
    x = torch.ones(4, 8, device=device)
    x[2] = 0
    assert torch.equal(quantise_rows_triton(x).dequantise(torch.float32), x)


def test_rows_that_no_program_can_hold_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="65536"):
        quantise_rows_triton(torch.zeros(1, 65537, device=device))


def test_no_rows_are_quantised_to_none(device: str) -> None:
    assert quantise_rows_triton(torch.empty(0, 16, device=device)).values.shape == (0, 16)


def test_it_compiles_for_every_target_with_float8_without_a_spill(
    compile_for_targets: Callable[..., list[dict[str, Any]]],
) -> None:
    cases = [
        {
            "kernel": "trimode.kernels.fp8:_quantise_rows_kernel",
            "signature": {"x_ptr": "*bf16", "values_ptr": "*fp8e4nv", "scales_ptr": "*fp32"},
            "constexprs": {"size": size, "BLOCK": block},
            "options": {"num_warps": 16},
            "targets": [90, 100],
        }
        for size, block in ((4096, 4096), (14336, 16384))
    ]
    for found in compile_for_targets(cases):
        assert found["cubin_bytes"] > 0
        assert found["spilled_bytes"] == 0, found
