"""Sampling noise as a pure function of (seed, position, token id): Philox4x32-10 and the Gumbel
transform.

Counter-based (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so that any
row of any batch on any replica draws the same noise for the same token at the same place.
"""

import torch
from torch import Tensor

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
    seeds: Tensor, positions: Tensor, vocab_size: int, samples: Tensor | None = None
) -> Tensor:
    """Gumbel noise [num_rows, vocab_size] float32 for seeds, positions and samples (indices among a
    request's parallel samples; None: all 0), each [num_rows] int64.

    Four neighbouring token ids share a counter and take one word each. 23 bits a draw: the largest
    that float32 holds without rounding to 1.
    """
    quads = torch.arange(-(-vocab_size // 4), device=seeds.device)[None, :]
    sample = torch.zeros_like(quads) if samples is None else samples[:, None]
    position = positions[:, None]
    words = philox_reference(
        (quads, position & _LOW, position >> 32, sample),
        (seeds[:, None] & _LOW, (seeds[:, None] >> 32) & _LOW),
    )
    bits = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, :vocab_size]
    uniform = ((bits >> 9).float() + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))


gumbel = gumbel_reference
