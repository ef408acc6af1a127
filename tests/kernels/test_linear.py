"""Which form of product serves which weight, and that each gives the products."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimode.kernels.fp8 import quantise_rows_reference
from trimode.kernels.linear import BatchInvariantLinear, PlainLinear, linear_form
from trimode.kernels.linear_fp8 import (
    BatchInvariantFp8Linear,
    Fp8Linear,
    fp8_linear_reference,
    fp8_linear_scaled_mm,
)
from trimode.kernels.linear_packed import PackedLinear, lay_out, pack

# Rounding, and of float8 the two operands' (0.03 each).
RATIOS = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
FP8_RATIO = 0.045


def operands(num_rows: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, 48, generator=generator).to(dtype)
    return x, (torch.randn(80, 48, generator=generator) / 7).to(dtype)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("dtype", RATIOS, ids=str)
@pytest.mark.parametrize("laid_out", [lay_out, Tensor.contiguous])
def test_the_form_of_a_cpu_gives_the_products(
    num_rows: int,
    dtype: torch.dtype,
    laid_out: Callable[[Tensor], Tensor],
    assert_near: Callable[..., None],
) -> None:
    x, weight = operands(num_rows, dtype)
    form = linear_form(laid_out(weight), batch_invariant=False)
    assert isinstance(form, PackedLinear)
    with torch.inference_mode():
        assert_near("product", form(x), x.double() @ weight.double().t(), RATIOS[dtype])


def test_what_onednn_does_not_pack_is_left_to_torch() -> None:
    x, weight = operands(2, torch.float64)
    assert pack(weight) is None
    form = linear_form(weight, batch_invariant=False)
    assert isinstance(form, PlainLinear)
    assert torch.equal(form(x), x @ weight.t())


def test_a_gradient_flows_through_the_weight_itself() -> None:
    weight = torch.ones(6, 5, requires_grad=True)
    linear_form(weight, batch_invariant=False)(torch.ones(8, 5)).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("dtype", "device_type", "stride"),
    [
        (torch.float32, "cpu", (1, 80)),
        (torch.float64, "cpu", (1, 80)),
        (torch.bfloat16, "cpu", (48, 1)),
        (torch.float32, "meta", (48, 1)),
    ],
)
def test_weights_that_a_cpu_streams_lie_input_by_input(
    dtype: torch.dtype, device_type: str, stride: tuple[int, int]
) -> None:
    weight = operands(1, dtype)[1].to(device_type)
    laid_out = lay_out(weight)
    assert laid_out.stride() == stride
    assert device_type == "meta" or torch.equal(laid_out, weight)


@pytest.mark.parametrize("form", [Fp8Linear, BatchInvariantFp8Linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_float8_is_near_the_wide_product_and_nearer_to_that_of_its_operands(
    form: Callable[..., Callable[[Tensor], Tensor]],
    dtype: torch.dtype,
    assert_near: Callable[..., None],
) -> None:
    x, weight = operands(5, dtype)
    quantised = quantise_rows_reference(weight)
    got = form(quantised)(x)
    assert got.dtype == dtype
    assert_near("product", got, x.double() @ weight.double().t(), FP8_RATIO)
    rows = quantise_rows_reference(x).dequantise(torch.float64)
    wanted = rows @ quantised.dequantise(torch.float64).t()
    assert_near("product of the operands", got, wanted, RATIOS.get(dtype, 1e-6))


def test_the_librarys_product_is_near_the_reference(
    device: str, assert_near: Callable[..., None]
) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 before compute capability 8.9")
    x, weight = (operand.to(device) for operand in operands(5, torch.bfloat16))
    quantised = quantise_rows_reference(weight)
    wanted = fp8_linear_reference(x.float(), quantised)
    assert_near("product", fp8_linear_scaled_mm(x, quantised), wanted, RATIOS[torch.bfloat16])


@pytest.mark.parametrize(
    ("shape", "batch_invariant", "form"),
    [
        ((80, 48), False, Fp8Linear),
        ((80, 48), True, BatchInvariantFp8Linear),
        ((81, 48), False, BatchInvariantFp8Linear),  # no library takes such a size
        ((80, 40), False, BatchInvariantFp8Linear),
    ],
)
def test_the_form_of_a_quantised_weight(
    shape: tuple[int, int], batch_invariant: bool, form: type
) -> None:
    weight = quantise_rows_reference(torch.ones(shape))
    assert isinstance(linear_form(weight, batch_invariant=batch_invariant), form)


class OnGpu(Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(("batch_invariant", "form"), [(0, PlainLinear), (1, BatchInvariantLinear)])
def test_a_gpu_multiplies_with_cublas_unless_batches_must_not_matter(
    batch_invariant: int, form: type
) -> None:
    weight = torch.ones(8, 8, device="meta").as_subclass(OnGpu)
    assert isinstance(linear_form(weight, batch_invariant=bool(batch_invariant)), form)


def test_there_is_no_batch_invariant_product_of_float64() -> None:
    weight = torch.ones(8, 8, device="meta", dtype=torch.float64).as_subclass(OnGpu)
    with pytest.raises(ValueError, match="float64"):
        linear_form(weight, batch_invariant=True)
