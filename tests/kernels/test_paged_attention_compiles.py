"""What the attention kernels become on GPUs, in the layouts that are chosen for them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from trimode.kernels.attention_inputs import AttentionInputs
from trimode.kernels.attention_layout import DeviceFacts, Layout
from trimode.kernels.paged_attention import launch_attention

NUM_HEADS, NUM_KV_HEADS = 32, 8  # of the published models
# The smallest cards: Ada and consumer Blackwell, which run what sm_80 does; Hopper.
SHARED_LIMITS = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def launch(
    num_rows: int, num_splits: int, head_dim: int, dtype: torch.dtype, device: DeviceFacts
) -> None:
    """Two sequences of so many rows, on the meta device."""
    num_tokens = 2 * num_rows
    inputs = AttentionInputs.build(
        np.array([0, num_rows, num_tokens]),
        np.ones(num_tokens),
        np.zeros((2, 1)),
        16,
        partial(torch.asarray, device="meta"),
    )
    query = torch.empty(num_tokens, NUM_HEADS, head_dim, dtype=dtype, device="meta")
    entries = torch.empty(64, 2, NUM_KV_HEADS, head_dim, dtype=dtype, device="meta")
    layout = Layout.choose(query, NUM_KV_HEADS, inputs, device)
    launch_attention(query, entries, inputs, replace(layout, num_splits=num_splits))


ALL = [
    (1, 4, 128, torch.bfloat16),
    (32, 1, 128, torch.bfloat16),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            (8, 1, 128, torch.bfloat16),
            (16, 1, 128, torch.bfloat16),
            (32, 4, 128, torch.bfloat16),
            (32, 1, 64, torch.bfloat16),
            (32, 1, 128, torch.float16),
            (1, 1, 128, torch.float32),
            (32, 1, 128, torch.float32),
        )
    ),
]


@pytest.mark.parametrize(("num_rows", "num_splits", "head_dim", "dtype"), ALL)
@pytest.mark.parametrize(("targets", "is_wide"), [([80], False), ([90, 100], True)], ids=str)
def test_a_launch_compiles_without_a_spill(
    num_rows: int,
    num_splits: int,
    head_dim: int,
    dtype: torch.dtype,
    targets: list[int],
    is_wide: bool,
    compile_launches: Callable[..., list[dict[str, Any]]],
) -> None:
    run = partial(launch, num_rows, num_splits, head_dim, dtype, DeviceFacts(132, is_wide))
    all_found = compile_launches("trimode.kernels.paged_attention", run, targets=targets)
    assert len(all_found) == len(targets) * (1 if num_splits == 1 else 2)
    for found in all_found:
        assert found["cubin_bytes"] > 0
        assert found["spilled_bytes"] == 0, found
        assert found["shared_bytes"] <= SHARED_LIMITS[found["capability"]], found
        has_products = found["kernel"].endswith("_attention_kernel")
        assert bool(found["tensor_cores"]) == (has_products and dtype != torch.float32), found
