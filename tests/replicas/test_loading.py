"""What a dtype's name stands for."""

import pytest
import torch

from trimode.replicas.errors import CheckpointError
from trimode.replicas.loading import torch_dtype


def test_dtypes_go_by_name() -> None:
    assert torch_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(CheckpointError, match=r"'int8'.*'bfloat16', 'float16', 'float32'"):
        torch_dtype("int8")
