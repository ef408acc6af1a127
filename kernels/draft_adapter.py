"""The draft adapter: a low-rank product (LoRA, arXiv 2106.09685) that only DRAFT rows receive."""

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from trimode.kernels.dispatch import by_device

BLOCK_ROWS = 32  # a draft of the largest block
BLOCK_RANK = 16  # of the first product: narrow, so that a single draft keeps many programs busy
# Inputs that one program of the first product sums over. Of any number of rows, as a row's sums
# must not depend on its batch.
SPLIT_LEN = 1024
BLOCK_IN = 128
BLOCK_OUT = 64


@dataclass(frozen=True, slots=True)
class DraftRows:
    """The rows of a pass that run with the adapter on."""

    mask: Tensor  # [num_tokens] bool
    _indices: list[Tensor] = field(default_factory=list)

    @property
    def indices(self) -> Tensor:
        """[num_draft_rows] int64, for the reference; the first layer of a pass makes them."""
        if not self._indices:
            self._indices.append(self.mask.nonzero()[:, 0])
        return self._indices[0]


def add_draft_adapter_reference(
    out: Tensor,  # [num_tokens, out_features]: the plain product
    x: Tensor,  # [num_tokens, in_features]: what it was a product of
    rows: DraftRows,
    lora_a: Tensor,  # [rank, in_features]
    lora_b: Tensor,  # [out_features, rank]
    scale: float,
) -> Tensor:
    """out + scale * (x lora_a^T) lora_b^T on the draft rows, out on all others."""
    low = functional.linear(x[rows.indices], lora_a)
    return out.index_add(0, rows.indices, (functional.linear(low, lora_b) * scale).to(out.dtype))


@triton.jit
def _draft_rows_of_program(mask_ptr, num_tokens, BLOCK_ROWS: tl.constexpr):
    """The rows of program_id(0), int64, and which of them draft, both [BLOCK_ROWS]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return rows, tl.load(mask_ptr + rows, mask=rows < num_tokens, other=0) != 0


@triton.jit(do_not_specialize=["num_tokens"])
def _shrink_kernel(
    x_ptr,  # [num_tokens, in_features]
    mask_ptr,  # [num_tokens] bool
    lora_a_ptr,  # [rank, in_features]
    sums_ptr,  # [num_splits, num_tokens, rank] float32
    num_tokens,
    in_features: tl.constexpr,
    rank: tl.constexpr,
    SPLIT_LEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    """One program a block of rows, a block of ranks and a split of the inputs: its part of
    x lora_a^T. Sums of rows that do not draft are left unwritten.
    """
    rows, is_draft = _draft_rows_of_program(mask_ptr, num_tokens, BLOCK_ROWS)
    if tl.max(is_draft.to(tl.int32), axis=0) == 0:
        return
    ranks = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    split = tl.program_id(2)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
    for start in range(0, SPLIT_LEN, BLOCK_IN):
        columns = split * SPLIT_LEN + start + tl.arange(0, BLOCK_IN)
        is_column = columns < in_features
        x = tl.load(
            x_ptr + rows[:, None] * in_features + columns[None, :],
            mask=is_draft[:, None] & is_column[None, :], other=0.0,
        )  # fmt: skip
        lora_a = tl.load(
            lora_a_ptr + ranks[None, :] * in_features + columns[:, None],
            mask=(ranks < rank)[None, :] & is_column[:, None], other=0.0,
        )  # fmt: skip
        sums = tl.dot(x, lora_a, sums, input_precision="ieee")
    tl.store(
        sums_ptr + (split.to(tl.int64) * num_tokens + rows[:, None]) * rank + ranks[None, :],
        sums, mask=is_draft[:, None] & (ranks < rank)[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _expand_kernel(
    sums_ptr,  # [num_splits, num_tokens, rank] float32
    mask_ptr,  # [num_tokens] bool
    lora_b_ptr,  # [out_features, rank]
    out_ptr,  # [num_tokens, out_features], added to
    num_tokens,
    scale,
    out_features: tl.constexpr,
    rank: tl.constexpr,
    num_splits: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """One program a block of rows and a block of outputs. Sums the splits in their order, rounds
    them to the adapter's dtype for the tensor cores, and rounds once more at the end.
    """
    rows, is_draft = _draft_rows_of_program(mask_ptr, num_tokens, BLOCK_ROWS)
    if tl.max(is_draft.to(tl.int32), axis=0) == 0:
        return
    num_rows = tl.cast(num_tokens, tl.int64)
    columns = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_column = columns < out_features
    out_ptrs = out_ptr + rows[:, None] * out_features + columns[None, :]
    is_out = is_draft[:, None] & is_column[None, :]
    out = tl.load(out_ptrs, mask=is_out, other=0.0).to(tl.float32)
    added = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        ranks = start + tl.arange(0, BLOCK_RANK)
        is_rank = ranks < rank
        low = tl.zeros((BLOCK_ROWS, BLOCK_RANK), dtype=tl.float32)
        for split in tl.static_range(num_splits):
            low += tl.load(
                sums_ptr + (rows[:, None] + split * num_rows) * rank + ranks[None, :],
                mask=is_draft[:, None] & is_rank[None, :], other=0.0,
            )  # fmt: skip
        lora_b = tl.load(
            lora_b_ptr + columns[None, :] * rank + ranks[:, None],
            mask=is_column[None, :] & is_rank[:, None], other=0.0,
        )  # fmt: skip
        added = tl.dot(low.to(lora_b.dtype), lora_b, added, input_precision="ieee")
    tl.store(out_ptrs, (out + scale * added).to(out_ptr.dtype.element_ty), mask=is_out)


def add_draft_adapter_triton(
    out: Tensor, x: Tensor, rows: DraftRows, lora_a: Tensor, lora_b: Tensor, scale: float
) -> Tensor:
    """As the reference, but in place of out. Blocks of rows without a draft row cost nothing."""
    assert out.is_contiguous() and x.is_contiguous()
    assert lora_a.is_contiguous() and lora_b.is_contiguous()
    (num_tokens, in_features), (out_features, rank) = x.shape, lora_b.shape
    num_splits = triton.cdiv(in_features, SPLIT_LEN)
    row_blocks = triton.cdiv(num_tokens, BLOCK_ROWS)
    sums = torch.empty(num_splits, num_tokens, rank, dtype=torch.float32, device=x.device)
    _shrink_kernel[(row_blocks, triton.cdiv(rank, BLOCK_RANK), num_splits)](
        x, rows.mask, lora_a, sums, num_tokens,
        in_features=in_features, rank=rank, SPLIT_LEN=SPLIT_LEN,
        BLOCK_ROWS=BLOCK_ROWS, BLOCK_RANK=BLOCK_RANK, BLOCK_IN=BLOCK_IN,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    _expand_kernel[(row_blocks, triton.cdiv(out_features, BLOCK_OUT))](
        sums, rows.mask, lora_b, out, num_tokens, scale,
        out_features=out_features, rank=rank, num_splits=num_splits,
        BLOCK_ROWS=BLOCK_ROWS, BLOCK_RANK=min(64, max(16, triton.next_power_of_2(rank))),
        BLOCK_OUT=BLOCK_OUT, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


add_draft_adapter = by_device(add_draft_adapter_reference, add_draft_adapter_triton)
