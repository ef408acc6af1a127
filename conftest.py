"""Comes before every other conftest and so before any kernel is imported."""

import os

import pytest
import torch

# What cuBLAS wants before it is deterministic, as tests with poisoned memory ask of it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Without a GPU, the same kernels run in Triton's interpreter. It is chosen when they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("no GPU here")
