"""Comes before every other conftest and so before any kernel is imported."""

import os

import torch

# Without a GPU, the same kernels run in Triton's interpreter. It is chosen when they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
