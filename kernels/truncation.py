"""Top-k, top-p and min-p as one number a row: the lowest logit that stays. Ties stay together."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimode.kernels.logit_edits import EditedRows
from trimode.kernels.threshold_search import (
    find_cut,
    find_peak,
    key_of,
    list_above,
    lowest_above,
    search_threshold,
)

CHUNK = 4096
MAX_LISTED = 4096  # a multiple of 16
# How many low bits of a value that is widened to float32 are always 0.
LOW_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@dataclass(frozen=True, slots=True)
class Truncation:
    """What of the distribution is left to the draw, for the rows of which not all is."""

    draws: Tensor  # [num_truncated] int64: their index among the drawn rows, ascending
    top_k: Tensor  # [num_truncated] int64, vocab_size for all
    top_p: Tensor  # [num_truncated] float32
    min_p: Tensor  # [num_truncated] float32


def truncation_floors_reference(
    logits: Tensor,  # [num_truncated, vocab_size]
    temperatures: Tensor,  # [num_truncated] float32, which the probabilities are read at
    kept: Truncation,
) -> Tensor:
    """[num_truncated]: the lowest logit of each row that top-k, then top-p of what top-k left, and
    min-p leave.
    """
    probabilities = (logits / temperatures[:, None]).softmax(-1)
    ordered = probabilities.sort(dim=-1, descending=True).values
    kth = ordered.gather(1, (kept.top_k - 1).clamp(max=logits.shape[1] - 1)[:, None])
    in_top_k = ordered >= kth
    of_top_k = torch.where(in_top_k, ordered, 0)
    mass = of_top_k.cumsum(-1)
    top_p = kept.top_p.to(mass.dtype)[:, None]
    # An id stays while those before it hold less than top_p of what top-k left. Sums are rounded:
    # only where nothing is asked do the last ids surely stay.
    stays = in_top_k & ((mass - of_top_k < top_p * mass[:, -1:]) | (top_p >= 1))
    lowest = torch.where(stays, ordered, torch.inf).amin(-1, keepdim=True)
    floor = torch.maximum(lowest, kept.min_p.to(mass.dtype)[:, None] * ordered[:, :1])
    return torch.where(probabilities >= floor, logits, torch.inf).amin(-1)


def truncate(logits: Tensor, temperatures: Tensor, kept: Truncation) -> Tensor:
    """logits [num_truncated, vocab_size] with -inf where truncation excludes an id."""
    floors = truncation_floors_reference(logits, temperatures, kept)
    return logits.masked_fill(logits < floors[:, None], -torch.inf)


@triton.jit
def _floors_kernel(
    logits_ptr,  # [num_answers, size]
    row_stride,
    edited_ptr,  # [num_edited, size] float32
    places_ptr,  # [num_answers] int32: of each row in it, or -1
    rows_ptr,  # [num_truncated] int64
    temperatures_ptr,  # [num_truncated] float32
    top_k_ptr,  # [num_truncated] int64
    top_p_ptr,  # [num_truncated] float32
    min_p_ptr,  # [num_truncated] float32
    lists_ptr,  # [num_truncated, MAX_LISTED] float32
    out_ptr,  # [num_truncated] float32
    size,
    mask_id,
    HAS_EDITED: tl.constexpr,
    SHIFT: tl.constexpr,
    MAX_LISTED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a row, which it reads three times: for its maximum, for where to cut it, and to
    list what is above the cut. Each of top-k and top-p then reads the list, or the row where the
    list would be too long, up to 8 times (16 where logits are float32), mostly half as often. The
    last read is for what stays.
    """
    index = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures_ptr + index)
    top_k, top_p = tl.load(top_k_ptr + index), tl.load(top_p_ptr + index)
    min_p = tl.load(min_p_ptr + index)
    if (top_k >= size) & (top_p >= 1.0) & (min_p <= 0.0):
        tl.store(out_ptr + index, float("-inf"))
        return
    row = tl.load(rows_ptr + index)
    logits_ptr += row * row_stride
    is_wide, shift, banned = tl.full([], 0, tl.int1), tl.full([], SHIFT, tl.int32), mask_id
    wide_ptr = lists_ptr + index * MAX_LISTED
    if HAS_EDITED:
        place = tl.load(places_ptr + row).to(tl.int64)
        if place >= 0:
            is_wide, shift = tl.full([], 1, tl.int1), tl.full([], 0, tl.int32)
            wide_ptr = edited_ptr + place * size
    peak = find_peak(logits_ptr, wide_ptr, is_wide, size, banned, CHUNK)
    peak = tl.where(peak == float("-inf"), 0.0, peak)  # of a row whose ids are all banned
    scale = 1.0 / temperature
    has_top_k, has_top_p = top_k < size, top_p < 1.0
    num_left, mass = size, 0.0
    # Banned ids weigh nothing and have no say in what stays.
    cut = tl.full([], float("-inf"), tl.float32)
    if has_top_k | has_top_p:
        cut, mass = find_cut(
            logits_ptr, wide_ptr, is_wide, size, banned, peak, scale, temperature, top_k, top_p,
            MAX_LISTED, CHUNK,
        )  # fmt: skip
        if cut > float("-inf"):
            list_ptr = lists_ptr + index * MAX_LISTED
            num_left = list_above(logits_ptr, wide_ptr, is_wide, size, banned, cut, list_ptr, CHUNK)
            # From here on, the list is the row.
            wide_ptr, is_wide, banned = list_ptr, tl.full([], 1, tl.int1), -1
    bound = cut
    high = key_of(peak, shift)
    if has_top_k:
        bound = search_threshold(
            logits_ptr, wide_ptr, is_wide, num_left, banned, key_of(cut, shift), high, shift,
            top_k, peak, scale, False, CHUNK,
        )  # fmt: skip
    if has_top_p:
        # All ids below this together hold less than half of what top-p may leave out.
        least = peak - temperature * tl.log(2.0 * size / (1.0 - top_p))
        low = key_of(tl.maximum(least, cut), shift) - 1
        if has_top_k:
            lowest, mass = lowest_above(
                logits_ptr, wide_ptr, is_wide, num_left, banned, bound, peak, scale, 0.0, CHUNK
            )
            low = tl.maximum(low, key_of(lowest, shift) - 1)
        bound = search_threshold(
            logits_ptr, wide_ptr, is_wide, num_left, banned, low, high, shift, top_p * mass,
            peak, scale, True, CHUNK,
        )  # fmt: skip
    floor, _ = lowest_above(
        logits_ptr, wide_ptr, is_wide, num_left, banned, bound, peak, scale, min_p, CHUNK
    )
    tl.store(out_ptr + index, floor)


def truncation_floors_triton(
    logits: Tensor,  # [num_answers, vocab_size]
    edited: EditedRows | None,
    rows: Tensor,  # [num_truncated] int64
    temperatures: Tensor,  # [num_truncated] float32
    kept: Truncation,
    mask_id: int,
) -> Tensor:
    """As the reference of those rows, after edits; the mask id is banned."""
    size = logits.shape[1]
    floors = torch.empty(len(rows), device=logits.device)
    lists = torch.empty(len(rows), MAX_LISTED, device=logits.device)
    _floors_kernel[(len(rows),)](
        logits, logits.stride(0),
        floors if edited is None else edited.logits, rows if edited is None else edited.places,
        rows, temperatures, kept.top_k, kept.top_p, kept.min_p, lists, floors, size, mask_id,
        HAS_EDITED=edited is not None, SHIFT=LOW_BITS[logits.dtype], MAX_LISTED=MAX_LISTED,
        CHUNK=min(CHUNK, triton.next_power_of_2(size)), num_warps=8,
    )  # fmt: skip
    return floors
