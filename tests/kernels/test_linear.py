import pytest
import torch

from trimode.kernels.linear import linear, pack_weight


@pytest.mark.parametrize("num_rows", [1, 2, 3, 8, 33])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_packed_weight_gives_the_same_products(
    num_rows: int, dtype: torch.dtype, close: float
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, 48, generator=generator).to(dtype)
    weight = (torch.randn(80, 48, generator=generator) / 7).to(dtype)
    with torch.inference_mode():
        got = linear(x, weight, pack_weight(weight))
    torch.testing.assert_close(got, x @ weight.t(), rtol=close, atol=close)


def test_float64_is_not_packed() -> None:
    assert pack_weight(torch.ones(4, 4, dtype=torch.float64)) is None


def test_a_gradient_flows_through_the_weight_itself() -> None:
    weight = torch.ones(6, 5, requires_grad=True)
    linear(torch.ones(8, 5), weight, pack_weight(weight)).sum().backward()
    assert weight.grad is not None
