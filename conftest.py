"""Comes before every other conftest and so before any kernel is imported."""

import os

import pytest
import torch

# Without a GPU, the same kernels run in Triton's interpreter. It is chosen when they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("no GPU here")
