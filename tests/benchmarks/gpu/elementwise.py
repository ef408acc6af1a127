"""Microseconds and bandwidth of the kernels around the matrix products and the attention: residual
and norm, rotation and KV write, activation, draft adapter. Beside them torch's operations, one by
one.

    python tests/benchmarks/gpu/elementwise.py

Every kernel is checked against its reference before it is timed. A figure is the median of replays
of a CUDA graph that launches the kernel once for every layer, each with the layer's own weights and
cache, so that weights come from memory and activations are as warm as a pass leaves them. Bandwidth
is the bytes that must be moved over that time, wherever they are; it is beside that of a copy of
1 GiB. Writes docs/measurements/gpu_elementwise.json. Without a GPU, TRITON_INTERPRET=1 and --tiny
show that all of it runs.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from kernel_command import kernel_command
from torch import Tensor
from torch.nn import functional

from trimode.kernels.activation import silu_mul_reference, silu_mul_triton
from trimode.kernels.draft_adapter import (
    DraftRows,
    add_draft_adapter_reference,
    add_draft_adapter_triton,
)
from trimode.kernels.kv_cache import KVCache
from trimode.kernels.norm import add_rms_norm_reference, add_rms_norm_triton
from trimode.kernels.rope import (
    Rotary,
    rotate,
    rotate_and_write_reference,
    rotate_and_write_triton,
)

EPS, SCALE = 1e-5, 4.0
COPY_BYTES = 2**30
MAX_ERROR = 0.01  # root mean square, over that of the reference in float32


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a model matters here; as it stands the 8B's."""

    hidden: int = 4096
    intermediate: int = 14336
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    rank: int = 128
    num_layers: int = 34
    num_tokens: tuple[int, ...] = (1, 32, 512, 4096)


TINY = Sizes(32, 48, 4, 2, 12, 4, 2, (1, 5))


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel at one size. Both calls take a layer's index."""

    name: str
    kernel: Callable[[int], object]
    one_by_one: Callable[[int], object]
    num_bytes: int  # that a launch must read and write
    error: float  # of what the kernel gave when it was checked


@dataclass(frozen=True, slots=True)
class Bench:
    """Where and at what size."""

    sizes: Sizes
    num_tokens: int
    device: str

    @property
    def dtype(self) -> torch.dtype:
        # Triton's interpreter gets bfloat16 wrong by itself.
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)


def error_of(got: Tensor, wanted: Tensor) -> float:
    """Fails where it is too large, and for NaN."""
    got, wanted = got.double(), wanted.double()
    error = ((got - wanted).square().mean() / wanted.square().mean()).sqrt().item()
    assert error <= MAX_ERROR, f"off by {error}"
    return error


def norm_case(bench: Bench) -> Case:
    size = bench.sizes.hidden
    x, update = bench.normal(bench.num_tokens, size), bench.normal(bench.num_tokens, size)
    weights = bench.normal(bench.sizes.num_layers, size)
    got, _ = add_rms_norm_triton(x.clone(), update, weights[0], EPS)
    wanted, _ = add_rms_norm_reference(x.float(), update.float(), weights[0].float(), EPS)
    return Case(
        "residual and norm",
        lambda layer: add_rms_norm_triton(x, update, weights[layer], EPS),
        lambda layer: add_rms_norm_reference(x, update, weights[layer], EPS),
        (4 * x.numel() + size) * x.itemsize,
        error_of(got, wanted),
    )


def rope_case(bench: Bench) -> Case:
    sizes, num_tokens = bench.sizes, bench.num_tokens
    num_all = sizes.num_heads + 2 * sizes.num_kv_heads
    qkv = bench.normal(num_tokens, num_all * sizes.head_dim)
    angles = torch.rand(num_tokens, sizes.head_dim // 2, device=bench.device) * 100
    scale = 1 + torch.rand(num_tokens, device=bench.device)
    rotary = Rotary(angles.cos(), angles.sin(), scale, sizes.num_heads, sizes.num_kv_heads)
    slots = torch.randperm(2 * num_tokens, device=bench.device)[:num_tokens]

    def cache(num_layers: int, dtype: torch.dtype) -> KVCache:
        return KVCache.allocate(
            num_layers, 2 * num_tokens, sizes.num_kv_heads, sizes.head_dim, dtype, bench.device
        )

    kept, wide = cache(sizes.num_layers, bench.dtype), cache(1, torch.float32)
    got = rotate_and_write_triton(qkv, rotary, kept, 0, slots)
    wanted = rotate_and_write_reference(qkv.float(), rotary, wide, 0, slots)
    error_of(kept.keys[0, slots], wide.keys[0, slots])
    error_of(kept.values[0, slots], wide.values[0, slots])

    def one_by_one(layer: int) -> Tensor:
        query, key, value = rotate(qkv, rotary)
        kept.layers[layer].index_copy_(0, slots, torch.stack((key, value), dim=1))
        return query

    return Case(
        "rotation and KV write",
        lambda layer: rotate_and_write_triton(qkv, rotary, kept, layer, slots),
        one_by_one,
        2 * qkv.numel() * qkv.itemsize + 2 * angles.numel() * 4 + num_tokens * (4 + 8),
        error_of(got, wanted),
    )


def activation_case(bench: Bench) -> Case:
    gate_up = bench.normal(bench.num_tokens, 2 * bench.sizes.intermediate)
    return Case(
        "activation",
        lambda layer: silu_mul_triton(gate_up),
        lambda layer: silu_mul_reference(gate_up),
        gate_up.numel() * gate_up.itemsize * 3 // 2,
        error_of(silu_mul_triton(gate_up), silu_mul_reference(gate_up.float())),
    )


def adapter_case(bench: Bench, drafts: bool) -> Case:
    sizes, num_tokens = bench.sizes, bench.num_tokens
    in_features = sizes.num_heads * sizes.head_dim
    x, out = bench.normal(num_tokens, in_features), bench.normal(num_tokens, sizes.hidden)
    lora_a = bench.normal(sizes.num_layers, sizes.rank, in_features) / in_features**0.5
    lora_b = bench.normal(sizes.num_layers, sizes.hidden, sizes.rank) / sizes.rank**0.5
    mask = torch.full((num_tokens,), drafts, device=bench.device)
    rows = DraftRows(mask)
    got = add_draft_adapter_triton(out.clone(), x, rows, lora_a[0], lora_b[0], SCALE)
    wanted = add_draft_adapter_reference(
        out.float(), x.float(), rows, lora_a[0].float(), lora_b[0].float(), SCALE
    )

    def one_by_one(layer: int) -> Tensor:
        low = functional.linear(x, lora_a[layer])
        return out.add_(functional.linear(low, lora_b[layer]) * SCALE * mask[:, None])

    moved = x.numel() + lora_a[0].numel() + lora_b[0].numel() + 2 * out.numel()
    return Case(
        "draft adapter" if drafts else "draft adapter, nobody drafts",
        lambda layer: add_draft_adapter_triton(out, x, rows, lora_a[layer], lora_b[layer], SCALE),
        one_by_one,
        moved * x.itemsize * drafts + num_tokens,
        error_of(got, wanted),
    )


def microseconds(call: Callable[[int], object], num_layers: int, device: str) -> float:
    """Of one call, the median of replays."""

    def launch() -> None:
        for layer in range(num_layers):
            call(layer)

    if device != "cuda":
        begin = time.perf_counter()
        launch()
        return (time.perf_counter() - begin) / num_layers * 1e6
    launch()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    times = []
    for _ in range(30):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / num_layers * 1e3)
    return statistics.median(times[5:])


def copy_gb_per_s(device: str, num_bytes: int = COPY_BYTES) -> float:
    """Bytes read and written a second by a plain copy."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    taken = microseconds(lambda layer: target.copy_(source), 4, device)
    return 2 * num_bytes / taken / 1e3


def cases(bench: Bench) -> Iterator[Case]:
    yield norm_case(bench)
    yield rope_case(bench)
    yield activation_case(bench)
    yield adapter_case(bench, drafts=True)
    yield adapter_case(bench, drafts=False)


def run(device: str, sizes: Sizes | None = None) -> dict[str, Any]:
    """Check and time everything; device 'cuda', or 'cpu' for the interpreter."""
    sizes = sizes or Sizes()
    torch.manual_seed(0)
    copied = copy_gb_per_s(device, COPY_BYTES if device == "cuda" else 2**20)
    timed = partial(microseconds, num_layers=sizes.num_layers, device=device)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for num_tokens in sizes.num_tokens:
            for case in cases(Bench(sizes, num_tokens, device)):
                taken = timed(case.kernel)
                bandwidth = case.num_bytes / taken / 1e3
                rows.append(
                    {
                        "kernel": case.name,
                        "num_tokens": num_tokens,
                        "us": taken,
                        "torch_us": timed(case.one_by_one),
                        "gb_per_s": bandwidth,
                        "share_of_copy": bandwidth / copied,
                        "error": case.error,
                    }
                )
    return {"sizes": asdict(sizes), "copy_gb_per_s": copied, "rows": rows}


def table(rows: SequenceOf[dict[str, Any]]) -> str:
    lines = [f"{'kernel':30}{'rows':>6}{'us':>9}{'torch us':>10}{'GB/s':>8}{'of copy':>9}"]
    lines += [
        f"{row['kernel']:30}{row['num_tokens']:6}{row['us']:9.2f}{row['torch_us']:10.2f}"
        f"{row['gb_per_s']:8.0f}{row['share_of_copy']:9.1%}"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(kernel_command("elementwise", run, TINY)["rows"]))
