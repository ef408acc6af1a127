from types import SimpleNamespace

import pytest
import torch

from trimode.kernels.dispatch import by_device


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "chosen"),
    [
        (False, torch.float32, "reference"),
        (True, torch.float32, "kernel"),
        (True, torch.bfloat16, "kernel"),
        (True, torch.float64, "reference"),
    ],
)
def test_gpus_get_the_kernel_except_for_float64(
    is_cuda: bool, dtype: torch.dtype, chosen: str
) -> None:
    operation = by_device(lambda x, y: ("reference", y), lambda x, y: ("kernel", y))
    assert operation(SimpleNamespace(is_cuda=is_cuda, dtype=dtype), y=3) == (chosen, 3)
