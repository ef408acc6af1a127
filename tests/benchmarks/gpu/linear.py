"""What the matrix products of the 8B and the 14B take: cuBLAS in bfloat16, float8 with its
quantisation of the rows, batch-invariant in both.

    python tests/benchmarks/gpu/linear.py --out linear.json

Each form must first give the right products, and the batch-invariant ones the same bits for any
number of rows. Then it is timed: a CUDA graph of products with one weight after another, all of
them together several times larger than the L2 cache; medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimode.kernels.batch_invariant import product_reference, product_triton
from trimode.kernels.fp8 import Fp8Rows, quantise_rows
from trimode.kernels.linear_fp8 import fp8_linear

ROWS = (1, 8, 32, 128, 512, 4096)
ROTATED_BYTES = 400e6  # of weights; an H100's L2 cache has 50 MB, a B200's 126
REPEATS = 15
RATIO = 4e-3  # of rounding the result to bfloat16


@dataclass(frozen=True, slots=True)
class Shape:
    """One product of a model."""

    name: str
    out_features: int
    in_features: int


GPU_SHAPES = (
    Shape("8B qkv", 6144, 4096),
    Shape("8B o", 4096, 4096),
    Shape("8B gate_up", 28672, 4096),
    Shape("8B down", 4096, 14336),
    Shape("14B qkv", 6144, 5120),
    Shape("14B o", 5120, 4096),
    Shape("14B gate_up", 32768, 5120),
    Shape("14B down", 5120, 16384),
    Shape("8B head", 131072, 4096),
)
SMOKE_SHAPES = (Shape("tiny", 48, 64),)  # for an interpreter
SMOKE_ROWS = (1, 3)


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight, wide and in float8."""

    wide: Tensor
    fp8: Fp8Rows


def cublas(x: Tensor, weight: Weight) -> Tensor:
    return torch.nn.functional.linear(x, weight.wide)


def fp8(x: Tensor, weight: Weight) -> Tensor:
    return fp8_linear(x, weight.fp8)


def batch_invariant(x: Tensor, weight: Weight) -> Tensor:
    return product_triton(x, weight.wide, x.dtype)


def batch_invariant_fp8(x: Tensor, weight: Weight) -> Tensor:
    rows = quantise_rows(x)
    scales = rows.scales, weight.fp8.scales
    return product_triton(rows.values, weight.fp8.values, x.dtype, scales)


Form = Callable[[Tensor, Weight], Tensor]
FORMS: tuple[Form, ...] = (cublas, fp8, batch_invariant, batch_invariant_fp8)


def make_weights(shape: Shape, count: int, dtype: torch.dtype, device: str) -> list[Weight]:
    generator = torch.Generator(device).manual_seed(0)
    weights = []
    for _ in range(count):
        wide = torch.randn(
            shape.out_features, shape.in_features, generator=generator, dtype=dtype, device=device
        )
        weights.append(Weight(wide, quantise_rows(wide)))
    return weights


def check(form: Form, x: Tensor, weight: Weight) -> float:
    """The error's share of the product. Raises RuntimeError where it is not right."""
    got = form(x, weight)
    if form in (fp8, batch_invariant_fp8):
        rows = quantise_rows(x)
        scales = rows.scales, weight.fp8.scales
        wanted = product_reference(rows.values, weight.fp8.values, torch.float32, scales)
    else:
        wanted = product_reference(x, weight.wide, torch.float32)
    ratio = ((got.float() - wanted).norm() / wanted.norm()).item()
    if not ratio <= RATIO:
        raise RuntimeError(f"{form.__name__} is off by {ratio:.2g} at {list(x.shape)}")
    if form in (batch_invariant, batch_invariant_fp8):
        alone = form(x[-1:], weight)
        if not torch.equal(got[-1:], alone):
            raise RuntimeError(f"{form.__name__} depends on the batch at {list(x.shape)}")
    return ratio


def seconds_of(form: Form, x: Tensor, weights: list[Weight], repeats: int) -> float:
    """Of one product; the weights take turns."""
    if not x.is_cuda:
        begun = time.perf_counter()
        for weight in weights:
            form(x, weight)
        return (time.perf_counter() - begun) / len(weights)
    for weight in weights[:2]:
        form(x, weight)  # compiles, and lets libraries choose
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            form(x, weight)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(weights))
    return statistics.median(times)


def measure(form: Form, x: Tensor, weights: list[Weight], repeats: int) -> dict[str, Any]:
    """One form at one number of rows."""
    ratio = check(form, x, weights[0])
    seconds = seconds_of(form, x, weights, repeats)
    weight = weights[0]
    read = weight.wide if form in (cublas, batch_invariant) else weight.fp8.values
    num_rows, (out_features, in_features) = len(x), weight.wide.shape
    moved = read.nbytes + x.nbytes + num_rows * out_features * x.itemsize
    return {
        "us": round(seconds * 1e6, 2),
        "gb_per_s": round(moved / seconds / 1e9, 1),
        "tflops": round(2 * num_rows * out_features * in_features / seconds / 1e12, 2),
        "error": float(f"{ratio:.2g}"),
    }


@torch.inference_mode()
def run(device: str, repeats: int = REPEATS) -> dict[str, Any]:
    """Microseconds, GB/s (weight, rows and result, once each) and TFLOP/s, by shape, rows and form.

    On a CPU, a smoke test of a tiny shape. Raises RuntimeError where a product is wrong.
    """
    on_gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    shapes, sizes = (GPU_SHAPES, ROWS) if on_gpu else (SMOKE_SHAPES, SMOKE_ROWS)
    result: dict[str, Any] = {}
    for shape in shapes:
        num_bytes = shape.out_features * shape.in_features  # of the smallest form
        count = max(2, round(ROTATED_BYTES / num_bytes)) if on_gpu else 2
        weights = make_weights(shape, count, dtype, device)
        rows: dict[str, Any] = {}
        for num_rows in sizes:
            x = torch.randn(num_rows, shape.in_features, dtype=dtype, device=device)
            rows[str(num_rows)] = {
                form.__name__: measure(form, x, weights, repeats) for form in FORMS
            }
        result[shape.name] = {
            "out_features": shape.out_features,
            "in_features": shape.in_features,
            "weights": count,
            "rows": rows,
        }
        del weights
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text = json.dumps(run(device), indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
