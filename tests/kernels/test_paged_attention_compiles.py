"""What the attention kernels become on GPUs, in the layouts that the launcher chooses there."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from trimode.kernels.attention_inputs import AttentionInputs
from trimode.kernels.attention_layout import DeviceFacts, Layout, padded

KERNELS = "trimode.kernels.paged_attention:"
NUM_HEADS, NUM_KV_HEADS = 32, 8  # of the published models
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
LISTS = ("visible_ptr", "page_table_ptr", "tiles_ptr")


def layout_for(num_rows: int, head_dim: int, dtype: torch.dtype, is_wide: bool) -> Layout:
    """Of a pass of sequences with so many rows."""
    table = np.zeros((2, 1), dtype=np.int64)
    inputs = AttentionInputs.build(
        np.array([0, num_rows, 2 * num_rows]), table[:, 0].repeat(num_rows), table, 16,
        torch.from_numpy,
    )  # fmt: skip
    query = torch.empty(2 * num_rows, NUM_HEADS, head_dim, dtype=dtype, device="meta")
    return Layout.choose(query, NUM_KV_HEADS, inputs, DeviceFacts(132, is_wide))


def cases(num_rows: int, num_splits: int, head_dim: int, dtype: torch.dtype) -> list[Any]:
    found = []
    for targets, is_wide in (([80], False), ([90, 100], True)):
        layout = replace(layout_for(num_rows, head_dim, dtype, is_wide), num_splits=num_splits)
        shared = {
            "num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS, "head_dim": head_dim,
            "HEADS": layout.heads, "HEAD_DIM": padded(head_dim), "BLOCK_M": layout.block_m,
            "MIN_SPLIT_LEN": layout.min_split_len,
        }  # fmt: skip
        narrow = dict.fromkeys(("query_ptr", "entries_ptr", "out_ptr"), f"*{DTYPES[dtype]}")
        wide = dict.fromkeys(("mixed_ptr", "weights_ptr"), "*fp32")
        attention = {
            "kernel": KERNELS + "_attention_kernel",
            "signature": narrow | wide | dict.fromkeys(LISTS, "*i32")
            | dict.fromkeys(("num_tokens", "num_pages", "query_stride"), "i32")
            | {"scale": "fp32"},
            "constexprs": shared
            | {"page_size": 16, "BLOCK_N": layout.block_n, "IS_SPLIT": num_splits > 1},
            "options": {"num_warps": layout.num_warps, "num_stages": layout.num_stages},
            "targets": targets,
        }  # fmt: skip
        combine = {
            "kernel": KERNELS + "_combine_kernel",
            "signature": wide | {"out_ptr": narrow["out_ptr"]}
            | dict.fromkeys(("visible_ptr", "tiles_ptr"), "*i32")
            | dict.fromkeys(("num_tokens", "num_splits"), "i32"),
            "constexprs": shared,
            "options": {"num_warps": layout.num_warps},
            "targets": targets,
        }  # fmt: skip
        found += [attention, combine] if num_splits > 1 else [attention]
    return found


@pytest.mark.parametrize(
    ("num_rows", "num_splits", "head_dim"),
    [(1, 4, 128), (8, 1, 128), (16, 1, 128), (32, 1, 128), (32, 4, 128), (32, 1, 64)],
)
def test_launches_compile_for_every_target_without_a_spill(
    num_rows: int,
    num_splits: int,
    head_dim: int,
    compile_for_targets: Callable[..., list[dict[str, Any]]],
) -> None:
    for found in compile_for_targets(cases(num_rows, num_splits, head_dim, torch.bfloat16)):
        assert found["cubin_bytes"] > 0
        assert found["spilled_bytes"] == 0, found
        if found["kernel"].endswith("_attention_kernel"):
            assert found["tensor_cores"], found
            # Of an Ada or consumer Blackwell card; the smallest that there is.
            limit = 99 * 1024 if found["capability"] == 80 else 227 * 1024
            assert found["shared_bytes"] <= limit, found


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_the_largest_launch_compiles_for_other_dtypes(
    dtype: torch.dtype, compile_for_targets: Callable[..., list[dict[str, Any]]]
) -> None:
    for found in compile_for_targets(cases(32, 1, 128, dtype)):
        assert found["spilled_bytes"] == 0, found
        assert bool(found["tensor_cores"]) == (dtype is torch.float16)
