"""How a launch of paged attention lies on a GPU: sizes of its products, splits of long contexts."""

from dataclasses import dataclass
from functools import cache
from math import ceil

import torch
import triton
from torch import Tensor

from trimode.kernels.attention_inputs import AttentionInputs

MAX_BLOCK_M, MAX_BLOCK_N = 128, 64
BLOCK_BYTES = 16 * 1024  # of keys that a block of slots has, and as many of values
MAX_QUERY_BYTES = 32 * 1024  # of a tile; its accumulators are 2 to 4 times as large
# One stage for page ids, two each for the KV that they lead to: fewer leave KV one buffer only,
# without which a block's copy does not overlap the products of the one before.
NUM_STAGES = 5
MAX_SPLITS = 64


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What of a GPU a layout hangs on."""

    num_multiprocessors: int
    has_wide_products: bool  # tensor cores that read both operands from shared memory


@cache
def device_facts(device: torch.device) -> DeviceFacts:
    """Those of this device."""
    if device.type != "cuda":  # Triton's interpreter runs one program at a time
        return DeviceFacts(1, True)
    properties = torch.cuda.get_device_properties(device)
    return DeviceFacts(properties.multi_processor_count, properties.major in (9, 10))


@dataclass(frozen=True, slots=True)
class Layout:
    """How a launch lies on the device. Chosen from shapes alone, as a CUDA graph keeps it."""

    heads: int  # query heads of a KV head in one program, a power of two
    block_m: int  # rows of its products: those of a tile times these heads, at least 16
    block_n: int  # KV slots it takes at once
    min_split_len: int  # fewer slots are not worth a split
    num_splits: int
    num_warps: int
    num_stages: int

    @classmethod
    def choose(
        cls, query: Tensor, num_kv_heads: int, inputs: AttentionInputs, device: DeviceFacts
    ) -> "Layout":
        """query: [num_tokens, num_heads, head_dim]."""
        _, num_heads, head_dim = query.shape
        group = num_heads // num_kv_heads
        slot_bytes = padded(head_dim) * query.itemsize
        has_tensor_cores = query.itemsize == 2
        # Without them, products take more registers.
        max_block_m = min(MAX_BLOCK_M, MAX_QUERY_BYTES // slot_bytes) if has_tensor_cores else 32
        block_bytes = BLOCK_BYTES if has_tensor_cores else BLOCK_BYTES // 2
        heads = max(1, min(1 << (group - 1).bit_length(), max_block_m // inputs.tile_len))
        block_m = max(16, inputs.tile_len * heads)
        block_n = min(MAX_BLOCK_N, max(16, block_bytes // slot_bytes))
        if block_m >= 64 and not device.has_wide_products:
            block_n = min(block_n, 32)
        # A split's sums are written and read once more in float32: no more bytes than its KV has.
        min_split_len = max(block_n, 2 * block_m)
        num_splits = 1
        if not inputs.batch_invariant:
            # Of sequences of about the same length; there is room for more tiles than that.
            num_tiles = max(len(inputs.page_table), triton.cdiv(len(query), inputs.tile_len))
            num_parts = num_kv_heads * triton.cdiv(group, heads)
            num_splits = choose_num_splits(
                num_tiles * num_parts,
                device.num_multiprocessors * (2 if block_m < 128 else 1),
                triton.cdiv(inputs.page_table.shape[1] * inputs.page_size, min_split_len),
            )
        # At 64 rows, wide products keep one more buffer of KV by themselves: with fewer stages two
        # programs fit a multiprocessor, and one computes while the other waits.
        has_own_buffer = block_m == 64 and device.has_wide_products
        return cls(
            heads, block_m, block_n, min_split_len, num_splits,
            num_warps=8 if block_m >= (128 if has_tensor_cores else 32) else 4,
            num_stages=NUM_STAGES if has_tensor_cores and not has_own_buffer else 3,
        )  # fmt: skip


def choose_num_splits(num_programs: int, num_places: int, most: int) -> int:
    """The fewest splits that nearly fill the device: num_programs in each split, num_places run at
    once. A launch that fills it anyway is not split.
    """
    if num_programs >= num_places:
        return 1
    filled = []  # share of the time in which places are taken
    for num_splits in range(1, min(most, MAX_SPLITS) + 1):
        waves = num_programs * num_splits / num_places
        filled.append(waves / ceil(waves))
    return next(n for n, share in enumerate(filled, 1) if share >= 0.85 * max(filled))


def padded(head_dim: int) -> int:
    """What a kernel computes with: a power of two that tensor cores take."""
    return max(16, 1 << (head_dim - 1).bit_length())
