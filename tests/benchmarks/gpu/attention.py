"""Paged attention on a GPU: achieved bandwidth of decode, TFLOP/s of prompts, both of blocks, over
the card's copy bandwidth and matrix rate, and beside other implementations.

    python tests/benchmarks/gpu/attention.py [--sweep]

Every case is checked against float32 before it is timed. A figure is the median of replays of a
CUDA graph that runs the case on several caches in turn, so that KV comes from memory. The others
are torch's own on keys and values that were gathered before (they pay for no page table), and,
where they can be imported, flash_attn on the same and flashinfer on our pages. --sweep tries other
layouts than the one that is chosen. Writes docs/measurements/gpu_attention.json. Without a GPU,
TRITON_INTERPRET=1 and --tiny show that all of it runs.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from elementwise import copy_gb_per_s, error_of, microseconds
from kernel_command import kernel_command
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import OutOfResources

from trimode.kernels.attention_inputs import AttentionInputs
from trimode.kernels.attention_layout import Layout, device_facts
from trimode.kernels.kv_cache import KVCache
from trimode.kernels.paged_attention import launch_attention, paged_attention_triton

Call = Callable[[int], Tensor]  # of the index of a cache -> [num_tokens, num_heads, head_dim]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sequences of one kind of query."""

    num_sequences: int
    num_rows: int
    context_len: int  # with the rows

    @property
    def is_prompt(self) -> bool:
        return self.num_rows == self.context_len

    @property
    def kind(self) -> str:
        return "prompt" if self.is_prompt else "decode" if self.num_rows == 1 else "block"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a model matters here; as it stands all published models'."""

    shapes: tuple[Shape, ...]
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    cache_bytes: int = 256 << 20  # that the caches of a case have at least, several times an L2
    matrix_size: int = 8192


FULL = Sizes(
    (
        *(Shape(n, 1, c) for c in (512, 4096, 32768) for n in (1, 4, 16, 64, 128)),
        *(Shape(n, r, 4096) for r in (8, 16, 32) for n in (1, 8, 32)),
        *(Shape(1, n, n) for n in (512, 2048, 8192)),
        Shape(4, 2048, 2048),
    )
)
TINY = Sizes((Shape(2, 1, 40), Shape(1, 8, 30), Shape(1, 20, 20)), 4, 2, 16, 4, 1, 16)


@dataclass(frozen=True, slots=True)
class Case:
    """One shape with its tensors."""

    sizes: Sizes
    shape: Shape
    query: Tensor  # [num_tokens, num_heads, head_dim]
    cache: KVCache  # a layer stands for a cache
    table: Tensor  # [num_sequences, num_pages] int64
    inputs: AttentionInputs

    @classmethod
    def build(cls, sizes: Sizes, shape: Shape, device: str) -> "Case":
        # Triton's interpreter gets bfloat16 wrong by itself.
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        num_pages = -(-shape.context_len // sizes.page_size)
        num_slots = shape.num_sequences * num_pages * sizes.page_size
        layer_bytes = num_slots * 2 * sizes.num_kv_heads * sizes.head_dim * dtype.itemsize
        num_layers = min(64, -(-sizes.cache_bytes // layer_bytes))
        cache = KVCache.allocate(
            num_layers, num_slots, sizes.num_kv_heads, sizes.head_dim, dtype, device
        )
        cache.entries.normal_()
        num_tokens = shape.num_sequences * shape.num_rows
        query = torch.randn(num_tokens, sizes.num_heads, sizes.head_dim, device=device).to(dtype)
        table = torch.randperm(num_slots // sizes.page_size).view(shape.num_sequences, num_pages)
        visible = np.full(num_tokens, shape.context_len)
        if shape.is_prompt:
            visible = np.tile(np.arange(shape.num_rows) + 1, shape.num_sequences)
        start = np.arange(shape.num_sequences + 1) * shape.num_rows
        move = partial(torch.asarray, device=device)
        inputs = AttentionInputs.build(start, visible, table.numpy(), sizes.page_size, move)
        return cls(sizes, shape, query, cache, table.to(device), inputs)

    @property
    def num_bytes(self) -> int:
        """What must be moved: KV once, queries, results."""
        slots = self.shape.num_sequences * self.shape.context_len
        per_slot = 2 * self.sizes.num_kv_heads * self.sizes.head_dim
        return (slots * per_slot + 2 * self.query.numel()) * self.query.itemsize

    @property
    def num_flops(self) -> int:
        seen = int(self.inputs.visible.sum())
        return 4 * seen * self.sizes.num_heads * self.sizes.head_dim

    def gathered(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [num_sequences, context_len, num_kv_heads, head_dim]."""
        pages = self.cache.layers[layer].unflatten(0, (-1, self.sizes.page_size))
        kv = pages[self.table].flatten(1, 2)[:, : self.shape.context_len]
        return kv[:, :, 0].contiguous(), kv[:, :, 1].contiguous()

    def batched_query(self) -> Tensor:  # [num_sequences, num_rows, num_heads, head_dim]
        return self.query.unflatten(0, (self.shape.num_sequences, self.shape.num_rows))

    def ours(self, layer: int) -> Tensor:
        return paged_attention_triton(self.query, self.cache, layer, self.inputs)

    def layout(self) -> Layout:
        device = device_facts(self.query.device)
        return Layout.choose(self.query, self.sizes.num_kv_heads, self.inputs, device)


def check(case: Case, call: Call) -> float:
    """The error of the last rows of the first and the last sequence."""
    shape, got = case.shape, call(0).unflatten(0, (-1, case.shape.num_rows))
    rows = slice(max(0, shape.num_rows - 64), shape.num_rows)
    visible = case.inputs.visible[: shape.num_rows][rows]
    seen = torch.arange(shape.context_len, device=visible.device) < visible[:, None]
    errors = []
    for owner in {0, shape.num_sequences - 1}:
        one = replace(
            case, table=case.table[owner : owner + 1], shape=replace(shape, num_sequences=1)
        )
        key, value = (part.transpose(1, 2).float() for part in one.gathered(0))
        query = case.batched_query()[owner, rows].transpose(0, 1)[None].float()
        group = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(group, 1) for part in (key, value))
        wanted = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        errors.append(error_of(got[owner, rows], wanted[0].transpose(0, 1)))
    return max(errors)


def torch_calls(case: Case) -> Iterator[tuple[str, Call]]:
    """torch's own attention, by each implementation that there is."""
    kept = [
        tuple(part.transpose(1, 2) for part in case.gathered(layer))
        for layer in range(len(case.cache.layers))
    ]
    query = case.batched_query().transpose(1, 2)

    def call(layer: int, backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            out = functional.scaled_dot_product_attention(
                query, *kept[layer], is_causal=case.shape.is_prompt, enable_gqa=True
            )
        return out.transpose(1, 2).flatten(0, 1)

    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    for backend in backends if case.query.is_cuda else [SDPBackend.MATH]:
        yield f"torch {backend.name.lower()}", partial(call, backend=backend)


def flash_attn_calls(case: Case) -> Iterator[tuple[str, Call]]:
    library = importlib.import_module("flash_attn")
    kept = [case.gathered(layer) for layer in range(len(case.cache.layers))]

    def call(layer: int) -> Tensor:
        query, (key, value) = case.batched_query(), kept[layer]
        out = library.flash_attn_func(query, key, value, causal=case.shape.is_prompt)
        return out.flatten(0, 1)

    yield "flash_attn", call


def flashinfer_calls(case: Case) -> Iterator[tuple[str, Call]]:
    library = importlib.import_module("flashinfer")
    shape, sizes = case.shape, case.sizes
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device=case.query.device)
    wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    steps = torch.arange(shape.num_sequences + 1, dtype=torch.int32)
    last = (shape.context_len - 1) % sizes.page_size + 1
    wrapper.plan(
        steps * shape.num_rows, steps * case.table.shape[1],
        case.table.flatten().int(), torch.full_like(steps[1:], last),
        sizes.num_heads, sizes.num_kv_heads, sizes.head_dim, sizes.page_size,
        causal=shape.is_prompt, q_data_type=case.query.dtype,
    )  # fmt: skip

    def call(layer: int) -> Tensor:
        pages = case.cache.layers[layer].unflatten(0, (-1, sizes.page_size))
        out: Tensor = wrapper.run(case.query, (pages[:, :, 0], pages[:, :, 1]))
        return out

    yield "flashinfer", call


def others(case: Case, time_us: Callable[[Call], float]) -> dict[str, float | str]:
    """Microseconds of each, or why there are none."""
    found: dict[str, float | str] = {}
    for source in (torch_calls, flash_attn_calls, flashinfer_calls):
        name = source.__name__.removesuffix("_calls")
        try:
            for name, call in source(case):
                check(case, call)
                found[name] = time_us(call)
        except ModuleNotFoundError:
            continue
        except Exception as error:  # whatever a library that cannot do this case raises
            found[name] = f"{type(error).__name__}: {error}"[:200]
    return found


def layouts(chosen: Layout) -> Iterator[Layout]:
    """Others that give the same."""
    for block_n, num_warps, num_stages in product((32, 64, 128), (4, 8), (3, 5, 7)):
        least = max(chosen.min_split_len, block_n)
        yield replace(
            chosen, block_n=block_n, num_warps=num_warps, num_stages=num_stages, min_split_len=least
        )
    for num_splits, min_split_len in product((1, 2, 4, 8, 16, 32), (64, 256, 1024)):
        yield replace(chosen, num_splits=num_splits, min_split_len=min_split_len)


def sweep(case: Case, time_us: Callable[[Call], float]) -> list[dict[str, Any]]:
    """Other layouts, the fastest first."""
    found = []
    for layout in layouts(case.layout()):

        def call(layer: int, layout: Layout = layout) -> Tensor:
            return launch_attention(case.query, case.cache.layers[layer], case.inputs, layout)

        try:
            check(case, call)
        except OutOfResources:  # of the card's shared memory or registers
            continue
        found.append(asdict(layout) | {"us": time_us(call)})
    return sorted(found, key=lambda row: float(row["us"]))[:5]


def tflop_per_s(device: str, size: int) -> float:
    """Of a plain matrix product."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in "lr")
    return 2 * size**3 / microseconds(lambda _: left @ right, 4, device) / 1e6


def run(device: str, sizes: Sizes = FULL, *, is_sweep: bool = False) -> dict[str, Any]:
    """Check and time everything; device 'cuda', or 'cpu' for the interpreter."""
    torch.manual_seed(0)
    is_gpu = device == "cuda"
    copied = copy_gb_per_s(device, 2**30 if is_gpu else 2**20)
    multiplied = tflop_per_s(device, sizes.matrix_size)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for shape in sizes.shapes:
            case = Case.build(sizes, shape, device)
            time_us = partial(microseconds, num_layers=len(case.cache.layers), device=device)
            row: dict[str, Any] = {"kind": shape.kind, **asdict(shape)}
            row["error"] = check(case, case.ours)
            row["us"] = time_us(case.ours)
            row["gb_per_s"] = case.num_bytes / row["us"] / 1e3
            row["tflop_per_s"] = case.num_flops / row["us"] / 1e6
            row["share_of_copy"] = row["gb_per_s"] / copied
            row["share_of_matmul"] = row["tflop_per_s"] / multiplied
            row["layout"] = asdict(case.layout())
            row["others_us"] = others(case, time_us)
            if is_sweep:
                row["sweep"] = sweep(case, time_us)
            print(line(row), flush=True)
            rows.append(row)
    return {"copy_gb_per_s": copied, "matmul_tflop_per_s": multiplied, "rows": rows}


def line(row: dict[str, Any]) -> str:
    rest = {
        name: value if isinstance(value, str) else f"{value:.1f}"
        for name, value in row["others_us"].items()
    }
    size = f"{row['num_sequences']} x {row['num_rows']} of {row['context_len']}"
    return (
        f"{row['kind']:7}{size:22}{row['us']:10.1f} us {row['share_of_copy']:7.1%} of copy"
        f" {row['share_of_matmul']:7.1%} of matmul  {rest}"
        + "".join(f"\n    {found}" for found in row.get("sweep", []))
    )


if __name__ == "__main__":
    kernel_command("attention", run, TINY, {"sweep": "try other layouts, too"})
