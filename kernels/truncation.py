"""Top-k, top-p and min-p as one number a row: the lowest logit that stays. Ties stay together."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimode.kernels.logit_edits import EditedRows, load_logits

CHUNK = 4096
# How many low bits of a value that is widened to float32 are always 0.
LOW_BITS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}


@dataclass(frozen=True, slots=True)
class Truncation:
    """What of the distribution is left to the draw, for each drawn row."""

    top_k: Tensor  # [num_drawn] int64, vocab_size for all
    top_p: Tensor  # [num_drawn] float32
    min_p: Tensor  # [num_drawn] float32


def truncation_floors_reference(
    logits: Tensor,  # [num_drawn, vocab_size]
    temperatures: Tensor,  # [num_drawn] float32, which the probabilities are read at
    kept: Truncation,
) -> Tensor:
    """[num_drawn]: the lowest logit of each row that top-k, then top-p of what top-k left, and
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
    """logits [num_drawn, vocab_size] with -inf where truncation excludes an id."""
    floors = truncation_floors_reference(logits, temperatures, kept)
    return logits.masked_fill(logits < floors[:, None], -torch.inf)


@triton.jit
def _key_of(x, shift):
    """A float32 as an integer of the same order. shift: low bits that a narrower type leaves 0."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> shift).to(tl.int64)


@triton.jit
def _value_of(key, shift):
    """What _key_of was given."""
    bits = (key.to(tl.int32) << shift) | tl.where(key < 0, (1 << shift) - 1, 0)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _lowest_above(
    logits_ptr, edited_ptr, is_edited, size, banned_column, bound, peak, scale, least_weight,
    HAS_EDITED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The lowest logit above the bound whose weight is not less than the least, and the weight of
    all these. A weight is the probability over the best one's.
    """
    lowest = tl.full([CHUNK], float("inf"), tl.float32)
    mass = tl.zeros([CHUNK], tl.float32)
    for first in range(0, size, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        x = load_logits(logits_ptr, edited_ptr, is_edited, columns, size, banned_column, HAS_EDITED)
        weight = tl.exp((x - peak) * scale)
        stays = (x > bound) & (weight >= least_weight)
        lowest = tl.where(stays & (x < lowest), x, lowest)
        mass += tl.where(stays, weight, 0.0)
    return tl.min(lowest, axis=0), tl.sum(mass, axis=0)


@triton.jit
def _search(
    logits_ptr, edited_ptr, is_edited, size, banned_column, low, high, shift, target,
    peak, scale, OF_MASS: tl.constexpr, HAS_EDITED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A logit that those to keep, and no others, are above: what is above it holds `target` or
    more, but less without its lowest value.

    low, high: keys above which there is `target` or more, and less. Each pass over the row
    quarters what is between them.
    """
    num_low, num_high = size, 0
    while (high - low > 1) & (num_low - num_high > 1):
        step = tl.maximum((high - low) // 4, 1)
        key1 = low + step
        key2, key3 = tl.minimum(key1 + step, high), tl.minimum(key1 + 2 * step, high)
        bound1, bound2 = _value_of(key1, shift), _value_of(key2, shift)
        bound3 = _value_of(key3, shift)
        count1 = tl.zeros([CHUNK], tl.int32)
        count2, count3 = count1, count1
        mass1 = tl.zeros([CHUNK], tl.float32)
        mass2, mass3 = mass1, mass1
        for first in range(0, size, CHUNK):
            columns = first + tl.arange(0, CHUNK)
            x = load_logits(
                logits_ptr, edited_ptr, is_edited, columns, size, banned_column, HAS_EDITED
            )
            count1 += (x > bound1).to(tl.int32)
            count2 += (x > bound2).to(tl.int32)
            count3 += (x > bound3).to(tl.int32)
            if OF_MASS:
                weight = tl.exp((x - peak) * scale)
                mass1 += tl.where(x > bound1, weight, 0.0)
                mass2 += tl.where(x > bound2, weight, 0.0)
                mass3 += tl.where(x > bound3, weight, 0.0)
        num1, num2, num3 = tl.sum(count1, 0), tl.sum(count2, 0), tl.sum(count3, 0)
        if OF_MASS:
            reached1, reached2 = tl.sum(mass1, 0) >= target, tl.sum(mass2, 0) >= target
            reached3 = tl.sum(mass3, 0) >= target
        else:
            reached1, reached2, reached3 = num1 >= target, num2 >= target, num3 >= target
        high = tl.where(reached3, high, tl.where(reached2, key3, tl.where(reached1, key2, key1)))
        num_high = tl.where(
            reached3, num_high, tl.where(reached2, num3, tl.where(reached1, num2, num1))
        )
        low = tl.where(reached3, key3, tl.where(reached2, key2, tl.where(reached1, key1, low)))
        num_low = tl.where(
            reached3, num3, tl.where(reached2, num2, tl.where(reached1, num1, num_low))
        )
    return _value_of(low, shift)


@triton.jit
def _floors_kernel(
    logits_ptr,  # [num_answers, size]
    row_stride,
    edited_ptr,  # [num_edited, size] float32
    places_ptr,  # [num_answers] int32: of each row in it, or -1
    rows_ptr,  # [num_drawn] int64
    temperatures_ptr,  # [num_drawn] float32
    top_k_ptr,  # [num_drawn] int64
    top_p_ptr,  # [num_drawn] float32
    min_p_ptr,  # [num_drawn] float32
    out_ptr,  # [num_drawn] float32
    size,
    mask_id,
    HAS_EDITED: tl.constexpr,
    SHIFT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a row. It reads the row once for its maximum, up to 8 times (16 where the logits
    are float32) for each of top-k and top-p, and once for what stays.
    """
    index = tl.program_id(0)
    temperature = tl.load(temperatures_ptr + index)
    top_k, top_p = tl.load(top_k_ptr + index), tl.load(top_p_ptr + index)
    min_p = tl.load(min_p_ptr + index)
    if (top_k >= size) & (top_p >= 1.0) & (min_p <= 0.0):
        tl.store(out_ptr + index, float("-inf"))
        return
    row = tl.load(rows_ptr + index)
    logits_ptr += row * row_stride
    is_edited, shift, banned = False, SHIFT, mask_id
    if HAS_EDITED:
        place = tl.load(places_ptr + row)
        is_edited = place >= 0
        edited_ptr += tl.maximum(place, 0).to(tl.int64) * size
        shift = tl.where(is_edited, 0, SHIFT)
    peaks = tl.full([CHUNK], float("-inf"), tl.float32)
    for first in range(0, size, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        peaks = tl.maximum(
            peaks,
            load_logits(logits_ptr, edited_ptr, is_edited, columns, size, banned, HAS_EDITED),
        )
    peak = tl.max(peaks, axis=0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)  # of a row whose ids are all banned
    scale = 1.0 / temperature
    # Banned ids weigh nothing and have no say in what stays.
    bound = tl.full([], float("-inf"), tl.float32)
    low, high = _key_of(bound, shift), _key_of(peak, shift)
    if top_k < size:
        bound = _search(
            logits_ptr, edited_ptr, is_edited, size, banned, low, high, shift, top_k,
            peak, scale, False, HAS_EDITED, CHUNK,
        )  # fmt: skip
    if top_p < 1.0:
        lowest, mass = _lowest_above(
            logits_ptr, edited_ptr, is_edited, size, banned, bound, peak, scale, 0.0,
            HAS_EDITED, CHUNK,
        )  # fmt: skip
        # All ids below this together hold less than half of what top-p may leave out.
        least = peak - temperature * tl.log(2.0 * size / (1.0 - top_p))
        low = tl.maximum(_key_of(lowest, shift), _key_of(least, shift)) - 1
        bound = _search(
            logits_ptr, edited_ptr, is_edited, size, banned, low, high, shift, top_p * mass,
            peak, scale, True, HAS_EDITED, CHUNK,
        )  # fmt: skip
    floor, _ = _lowest_above(
        logits_ptr, edited_ptr, is_edited, size, banned, bound, peak, scale, min_p,
        HAS_EDITED, CHUNK,
    )  # fmt: skip
    tl.store(out_ptr + index, floor)


def truncation_floors_triton(
    logits: Tensor,  # [num_answers, vocab_size]
    edited: EditedRows | None,
    rows: Tensor,  # [num_drawn] int64
    temperatures: Tensor,  # [num_drawn] float32
    kept: Truncation,
    mask_id: int,
) -> Tensor:
    """As the reference of those rows, after edits; the mask id is banned."""
    size = logits.shape[1]
    floors = torch.empty(len(rows), device=logits.device)
    _floors_kernel[(len(rows),)](
        logits, logits.stride(0),
        logits if edited is None else edited.logits, rows if edited is None else edited.places,
        rows, temperatures, kept.top_k, kept.top_p, kept.min_p, floors, size, mask_id,
        HAS_EDITED=edited is not None, SHIFT=LOW_BITS[logits.dtype],
        CHUNK=min(CHUNK, triton.next_power_of_2(size)), num_warps=16,
    )  # fmt: skip
    return floors
