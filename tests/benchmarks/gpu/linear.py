"""What the matrix products of the 8B and the 14B take: cuBLAS in bfloat16, float8 with its
quantisation of the rows, batch-invariant in both.

    python tests/benchmarks/gpu/linear.py

Each form must first give the right products, and the batch-invariant ones the same bits for any
number of rows. A figure is the median of replays of a CUDA graph of products with one weight after
another, which together are several times larger than the L2 cache. GB/s count weight, rows and
result once. Writes docs/measurements/gpu_linear.json. Without a GPU, TRITON_INTERPRET=1 and --tiny
show that all of it runs.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from typing import Any

import torch
from kernel_command import kernel_command
from torch import Tensor
from torch.nn import functional

from trimode.kernels.batch_invariant import product_reference, product_triton
from trimode.kernels.fp8 import Fp8Rows, quantise_rows
from trimode.kernels.linear_fp8 import fp8_linear

MAX_ERROR = 4e-3  # root mean square over that of the product: rounding to bfloat16
REPEATS = 12


@dataclass(frozen=True, slots=True)
class Shape:
    """One product of a model."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is measured."""

    shapes: tuple[Shape, ...] = (
        Shape("8B qkv", 6144, 4096),
        Shape("8B o", 4096, 4096),
        Shape("8B gate_up", 28672, 4096),
        Shape("8B down", 4096, 14336),
        Shape("8B head", 131072, 4096),
        Shape("14B qkv", 6144, 5120),
        Shape("14B o", 5120, 4096),
        Shape("14B gate_up", 32768, 5120),
        Shape("14B down", 5120, 16384),
    )
    num_rows: tuple[int, ...] = (1, 8, 32, 128, 512, 4096)
    weight_bytes: float = 400e6  # of all weights that take turns, in float8


TINY = Sizes((Shape("tiny", 48, 64),), (1, 3), 6144)


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight, wide and in float8."""

    wide: Tensor
    fp8: Fp8Rows


def cublas(x: Tensor, weight: Weight) -> Tensor:
    return functional.linear(x, weight.wide)


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
IN_FP8 = (fp8, batch_invariant_fp8)
INVARIANT = (batch_invariant, batch_invariant_fp8)


def forms_of(device: str) -> tuple[Form, ...]:
    """Triton's interpreter gets products of float8 wrong by itself."""
    return FORMS if device == "cuda" else FORMS[:-1]


def make_weights(shape: Shape, weight_bytes: float, device: str) -> list[Weight]:
    """Enough of them, and two at least."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    size = (shape.out_features, shape.in_features)
    count = max(2, round(weight_bytes / (size[0] * size[1])))
    wides = (torch.randn(size, dtype=dtype, device=device) for _ in range(count))
    return [Weight(wide, quantise_rows(wide)) for wide in wides]


def check(form: Form, x: Tensor, weight: Weight) -> float:
    """The error's share of the product. Fails where it is too large, and where the form should
    know nothing of the batch and does.
    """
    got = form(x, weight)
    if form in IN_FP8:
        rows = quantise_rows(x)
        scales = rows.scales, weight.fp8.scales
        wanted = product_reference(rows.values, weight.fp8.values, torch.float32, scales)
    else:
        wanted = product_reference(x, weight.wide, torch.float32)
    error = ((got.float() - wanted).norm() / wanted.norm()).item()
    assert error <= MAX_ERROR, f"{form.__name__} is off by {error:.2g} at {list(x.shape)}"
    if form in INVARIANT:
        same = torch.equal(got[-1:], form(x[-1:], weight))
        assert same, f"{form.__name__} depends on the batch at {list(x.shape)}"
    return error


def microseconds(form: Form, x: Tensor, weights: list[Weight]) -> float:
    """Of one product; the weights take turns."""

    def launch() -> None:
        for weight in weights:
            form(x, weight)

    if not x.is_cuda:
        begin = time.perf_counter()
        launch()
        return (time.perf_counter() - begin) / len(weights) * 1e6
    form(x, weights[0])  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    times = []
    for _ in range(2 + REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(weights) * 1e3)
    return statistics.median(times[2:])


def rows_of(shape: Shape, sizes: Sizes, device: str) -> Iterator[dict[str, Any]]:
    """Every form at every number of rows."""
    weights = make_weights(shape, sizes.weight_bytes, device)
    weight = weights[0]
    for num_rows in sizes.num_rows:
        x = torch.randn(num_rows, shape.in_features, dtype=weight.wide.dtype, device=device)
        num_products = num_rows * shape.out_features * shape.in_features
        for form in forms_of(device):
            error = check(form, x, weight)
            taken = microseconds(form, x, weights)
            read = weight.fp8.values if form in IN_FP8 else weight.wide
            moved = read.nbytes + x.nbytes + num_rows * shape.out_features * x.itemsize
            yield {
                "product": shape.name,
                "num_rows": num_rows,
                "form": form.__name__,
                "us": taken,
                "gb_per_s": moved / taken / 1e3,
                "tflops": 2 * num_products / taken / 1e6,
                "error": error,
            }


def run(device: str, sizes: Sizes | None = None) -> dict[str, Any]:
    """Check and time everything; device 'cuda', or 'cpu' for the interpreter."""
    sizes = sizes or Sizes()
    torch.manual_seed(0)
    with torch.inference_mode():
        rows = [row for shape in sizes.shapes for row in rows_of(shape, sizes, device)]
    return {"sizes": asdict(sizes), "rows": rows}


def table(rows: SequenceOf[dict[str, Any]]) -> str:
    lines = [f"{'product':12}{'rows':>6}  {'form':20}{'us':>10}{'GB/s':>8}{'TFLOP/s':>9}"]
    lines += [
        f"{row['product']:12}{row['num_rows']:6}  {row['form']:20}{row['us']:10.2f}"
        f"{row['gb_per_s']:8.0f}{row['tflops']:9.1f}"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(kernel_command("linear", run, TINY)["rows"]))
