"""The card's own rates, which every floor is made of: copies, reads, matrix products."""

import torch
from documents import Document, Facts
from floors import Card
from gpu_time import event_seconds
from torch import Tensor
from workbench import Workbench

COPY_BYTES = 4 << 30  # many times an L2
MATRIX_SIZE = 8192


def measure_card(bench: Workbench, document: Document) -> None:
    """Bytes a second of a copy, read and written, and of a sum, read; operations a second of a
    product of random bfloat16 matrices, and of float8 ones where torch has that.
    """
    size = 128 if bench.is_tiny else MATRIX_SIZE
    device, num_bytes = bench.device, 2**20 if bench.is_tiny else COPY_BYTES
    source = torch.empty(num_bytes // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copied = event_seconds(lambda: target.copy_(source), device)
    read = event_seconds(source.sum, device)
    document.write(
        copy_gb_per_s=2 * num_bytes / copied / 1e9,
        read_gb_per_s=num_bytes / read / 1e9,
        copy_bytes=num_bytes,
    )
    left, right = (torch.randn(size, size, device=device).to(bench.dtype) for _ in "lr")
    taken = event_seconds(lambda: left @ right, device)
    document.write(matmul_tflop_per_s=2 * size**3 / taken / 1e12, matrix_size=size)
    document.write(fp8_matmul_tflop_per_s=_float8_rate(left, right, device))


def card_of(documents: dict[str, Facts], machine: Facts) -> Card:
    """Of the floor section's figures. Raises ValueError where they are of another card."""
    found = documents["floor"]
    names = [of.get("gpu", {}).get("name") for of in (found["machine"], machine)]
    if names[0] != names[1]:
        raise ValueError(f"the folder's floor is of {names[0]}, this is {names[1]}")
    return Card(found["copy_gb_per_s"] * 1e9, found["matmul_tflop_per_s"] * 1e12)


def _float8_rate(left: Tensor, right: Tensor, device: torch.device) -> float | str:
    """TFLOP/s, or why there is none."""
    try:
        a, b = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device=device)
        taken = event_seconds(
            lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16), device
        )
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"[:200]
    return 2 * len(left) ** 3 / taken / 1e12
