"""Sampling noise as a pure function of (seed, position, token id): Philox4x32-10 and the Gumbel
transform.

Counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so that any
row of any batch on any replica draws the same noise for the same token at the same place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimode.kernels.dispatch import by_device

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 10


def philox_reference(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Four words of 32 random bits for each counter; all tensors int64 holding 32-bit values,
    broadcastable.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit product may wrap into the sign; masks after the shifts keep the right bits.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((second >> 32) & _LOW) ^ c1 ^ k0,
            second & _LOW,
            ((first >> 32) & _LOW) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return [c0, c1, c2, c3]


def gumbel_reference(
    seeds: Tensor,
    positions: Tensor,
    vocab_size: int,
    samples: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """Gumbel noise [num_rows, vocab_size] float32 of the ids from `start` (a multiple of 4) on, for
    seeds, positions and samples (indices among a request's parallel samples; None: all 0), each
    [num_rows] int64.

    Four neighbouring token ids share a counter and take one word each. 23 bits a draw: the largest
    that float32 holds without rounding to 1.
    """
    first = start // 4
    quads = torch.arange(first, first + -(-vocab_size // 4), device=seeds.device)[None, :]
    sample = torch.zeros_like(quads) if samples is None else samples[:, None]
    position = positions[:, None]
    words = philox_reference(
        (quads, position & _LOW, position >> 32, sample),
        (seeds[:, None] & _LOW, (seeds[:, None] >> 32) & _LOW),
    )
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :vocab_size]
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


@triton.jit
def _log(x):
    """Natural logarithm of normal positive numbers, to 2^-23 of it: near 1, too, where the
    hardware's own is far off. Half the work of the library's, which allows for all other numbers.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000  # such that the rest lies in [2/3, 4/3)
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    # A least-maximum fit of (log(1 + f) - f) / f^2 in relative error of the logarithm.
    q = 0.14026351 * f - 0.15388541
    q = q * f + 0.13995808
    q = q * f - 0.16415961
    q = q * f + 0.20011169
    q = q * f - 0.2500782
    q = q * f + 0.33333197
    q = q * f - 0.49999937
    return exponent.to(tl.float32) * 8.262958e-08 + (f * f * q + f)  # log(2) / 2^23


@triton.jit
def gumbel_tile(seed, position, sample, first_id, SIZE: tl.constexpr):
    """[SIZE] float32: the noise of SIZE ids from first_id on. SIZE and first_id: multiples of 4."""
    quads = (first_id // 4 + tl.arange(0, SIZE // 4)).to(tl.uint32)
    c1, c2 = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, quads, c1, c2, sample.to(tl.uint32))
    bits = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [SIZE])
    uniform = ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -_log(-_log(uniform))


@triton.jit
def _gumbel_kernel(
    out_ptr,  # [num_rows, vocab_size] float32
    seeds_ptr,  # [num_rows] int64
    positions_ptr,  # [num_rows] int64
    samples_ptr,  # [num_rows] int64
    vocab_size,
    start,
    HAS_SAMPLES: tl.constexpr,
    SIZE: tl.constexpr,
):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE
    sample = tl.load(samples_ptr + row) if HAS_SAMPLES else row * 0
    noise = gumbel_tile(
        tl.load(seeds_ptr + row), tl.load(positions_ptr + row), sample, start + column, SIZE
    )
    columns = column + tl.arange(0, SIZE)
    tl.store(out_ptr + row * vocab_size + columns, noise, mask=columns < vocab_size)


def gumbel_triton(
    seeds: Tensor,
    positions: Tensor,
    vocab_size: int,
    samples: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """As the reference, but for the last digits of the logarithms."""
    out = torch.empty(len(seeds), vocab_size, device=seeds.device)
    _gumbel_kernel[(len(seeds), triton.cdiv(vocab_size, 1024))](
        out, seeds, positions, seeds if samples is None else samples, vocab_size, start,
        HAS_SAMPLES=samples is not None, SIZE=1024,
    )  # fmt: skip
    return out


gumbel = by_device(gumbel_reference, gumbel_triton)
