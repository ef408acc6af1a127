"""Where to cut a row of logits: device functions that count and weigh what lies above a threshold,
without sorting, in one program a row.

A row is (logits_ptr, wide_ptr, is_wide, size, banned_column): its values are at wide_ptr in float32
if is_wide, else at logits_ptr in the logits' own type. A weight is a probability over that of the
row's best, exp((x - peak) * scale).
"""

import triton
import triton.language as tl


@triton.jit
def load_logits(logits_ptr, wide_ptr, is_wide, columns, size, banned_column):
    """In float32; -inf past the row's end."""
    inside = columns < size
    if is_wide:
        x = tl.load(wide_ptr + columns, mask=inside, other=float("-inf"))
    else:
        x = tl.load(logits_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    # Banned after the load, which is a wide one only where its mask is.
    return tl.where(columns == banned_column, float("-inf"), x)


@triton.jit
def key_of(x, shift):
    """A float32 as an integer of the same order. shift: low bits that a narrower type leaves 0."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> shift).to(tl.int64)


@triton.jit
def value_of(key, shift):
    """What key_of was given."""
    bits = (key.to(tl.int32) << shift) | tl.where(key < 0, (1 << shift) - 1, 0)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def find_peak(
    logits_ptr, wide_ptr, is_wide, size, banned_column, CHUNK: tl.constexpr
):  # fmt: skip
    """The largest logit."""
    peaks = tl.full([CHUNK], float("-inf"), tl.float32)
    for first in range(0, size, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        x = load_logits(logits_ptr, wide_ptr, is_wide, columns, size, banned_column)
        peaks = tl.maximum(peaks, x)
    return tl.max(peaks, axis=0)


@triton.jit
def lowest_above(
    logits_ptr, wide_ptr, is_wide, size, banned_column, bound, peak, scale, least_weight,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The lowest logit above the bound whose weight is not less than the least, and the weight of
    all these.
    """
    lowest = tl.full([CHUNK], float("inf"), tl.float32)
    mass = tl.zeros([CHUNK], tl.float32)
    for first in range(0, size, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        x = load_logits(logits_ptr, wide_ptr, is_wide, columns, size, banned_column)
        weight = tl.exp((x - peak) * scale)
        stays = (x > bound) & (weight >= least_weight)
        lowest = tl.where(stays & (x < lowest), x, lowest)
        mass += tl.where(stays, weight, 0.0)
    return tl.min(lowest, axis=0), tl.sum(mass, axis=0)


@triton.jit
def find_cut(
    logits_ptr, wide_ptr, is_wide, size, banned_column, peak, scale, temperature, top_k, top_p,
    MAX_LISTED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A logit that what top-k (top-p where top_k is `size` or more) keeps is above, with at most
    MAX_LISTED others, -inf if it is not at once found; and the weight of the whole row.
    """
    cut1, cut2 = peak - 5 * temperature, peak - 10 * temperature
    count1 = tl.zeros([CHUNK], tl.int32)
    count2 = count1
    mass = tl.zeros([CHUNK], tl.float32)
    mass1, mass2 = mass, mass
    for first in range(0, size, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        x = load_logits(logits_ptr, wide_ptr, is_wide, columns, size, banned_column)
        weight = tl.exp((x - peak) * scale)
        mass += weight
        mass1 += tl.where(x > cut1, weight, 0.0)
        mass2 += tl.where(x > cut2, weight, 0.0)
        count1 += (x > cut1).to(tl.int32)
        count2 += (x > cut2).to(tl.int32)
    total = tl.sum(mass, axis=0)
    num1, num2 = tl.sum(count1, axis=0), tl.sum(count2, axis=0)
    least = top_p * total
    by_count = top_k < size
    decides1 = tl.where(by_count, num1 >= top_k, tl.sum(mass1, axis=0) >= least)
    decides2 = tl.where(by_count, num2 >= top_k, tl.sum(mass2, axis=0) >= least)
    cut = tl.where(decides2 & (num2 <= MAX_LISTED), cut2, float("-inf"))
    return tl.where(decides1 & (num1 <= MAX_LISTED), cut1, cut), total


@triton.jit
def list_above(
    logits_ptr, wide_ptr, is_wide, size, banned_column, cut, list_ptr, CHUNK: tl.constexpr
):  # fmt: skip
    """Copy what is above the cut to list_ptr [any] float32, which is filled up with -inf to a
    multiple of 16, for wide loads; that number.
    """
    num_listed = 0
    for first in range(0, size, CHUNK):
        columns = first + tl.arange(0, CHUNK)
        x = load_logits(logits_ptr, wide_ptr, is_wide, columns, size, banned_column)
        stays = (x > cut).to(tl.int32)
        place = num_listed + tl.cumsum(stays, axis=0) - 1
        tl.store(list_ptr + place, x, mask=stays > 0)
        num_listed += tl.sum(stays, axis=0)
    num_filled = tl.cdiv(num_listed, 16) * 16
    end = num_listed + tl.arange(0, 16)
    tl.store(list_ptr + end, float("-inf"), mask=end < num_filled)
    tl.debug_barrier()  # the program's other threads read it
    return num_filled


@triton.jit
def search_threshold(
    logits_ptr, wide_ptr, is_wide, size, banned_column, low, high, shift, target,
    peak, scale, OF_MASS: tl.constexpr, CHUNK: tl.constexpr,
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
        bound1, bound2 = value_of(key1, shift), value_of(key2, shift)
        bound3 = value_of(key3, shift)
        count1 = tl.zeros([CHUNK], tl.int32)
        count2, count3 = count1, count1
        mass1 = tl.zeros([CHUNK], tl.float32)
        mass2, mass3 = mass1, mass1
        for first in range(0, size, CHUNK):
            columns = first + tl.arange(0, CHUNK)
            x = load_logits(logits_ptr, wide_ptr, is_wide, columns, size, banned_column)
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
    return value_of(low, shift)
