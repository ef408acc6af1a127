from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trimode.kernels.kv_cache import KVCache
from trimode.kernels.rope import (
    Rotary,
    rotate,
    rotate_and_write_reference,
    rotate_and_write_triton,
)

LAYER, NUM_LAYERS = 1, 2
# Of the root mean square, against the reference in float32: what one rounding makes.
RATIOS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 3e-3}
# num_heads, num_kv_heads, head_dim
TINY, ODD, PUBLISHED = (4, 2, 12), (3, 1, 10), (32, 8, 128)
Heads = tuple[int, int, int]


def rotary(num_tokens: int, heads: Heads, device: str = "cpu") -> Rotary:
    """Any angles and query scales."""
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(num_tokens)
    angles = torch.rand(num_tokens, head_dim // 2, generator=generator) * 100
    scale = 1 + torch.rand(num_tokens, generator=generator)
    return Rotary(
        (angles.cos() * 1.1).to(device), (angles.sin() * 1.1).to(device), scale.to(device),
        num_heads, num_kv_heads,
    )  # fmt: skip


def projected(
    num_tokens: int, heads: Heads, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(head_dim)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    return torch.randn(num_tokens, width, generator=generator).to(device, dtype)


def small_cache(
    heads: Heads, num_slots: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> KVCache:
    return KVCache.allocate(NUM_LAYERS, num_slots, heads[1], heads[2], dtype, device)


@pytest.mark.parametrize("dtype", RATIOS, ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "heads"),
    [(1, TINY), (5, TINY), (3, ODD), (2, (1, 1, 2)), (4, (12, 4, 16)), (2, PUBLISHED)],
)
def test_the_kernel_is_near_the_reference(
    num_tokens: int,
    heads: Heads,
    dtype: torch.dtype,
    device: str,
    fenced: Callable[[Tensor], Tensor],
    assert_near: Callable[..., None],
) -> None:
    qkv, turn = fenced(projected(num_tokens, heads, dtype, device)), rotary(num_tokens, heads)
    slots = torch.randperm(num_tokens + 4)[:num_tokens]
    wide = small_cache(heads, num_tokens + 4)
    wanted = rotate_and_write_reference(qkv.float().cpu(), turn, wide, LAYER, slots)
    cache = small_cache(heads, num_tokens + 4, dtype, device)
    got = rotate_and_write_triton(
        qkv, rotary(num_tokens, heads, device), cache, LAYER, slots.to(device)
    )
    assert got.dtype == dtype
    assert_near("query", got, wanted, RATIOS[dtype])
    assert_near("key", cache.keys[LAYER].cpu()[slots], wide.keys[LAYER, slots], RATIOS[dtype])
    assert torch.equal(cache.values[LAYER].cpu()[slots].float(), wide.values[LAYER, slots])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_the_kernel_writes_its_slots_only_and_padding_nowhere(
    index_dtype: torch.dtype, device: str
) -> None:
    qkv = projected(6, TINY, device=device)
    qkv[2] = torch.nan
    cache = small_cache(TINY, 9, device=device)
    slots = torch.tensor([7, 0, -1, 4, 8, -1], dtype=index_dtype, device=device)
    query = rotate_and_write_triton(qkv, rotary(6, TINY, device), cache, LAYER, slots)
    written = torch.zeros(NUM_LAYERS, 9, dtype=torch.bool)
    written[LAYER, [7, 0, 4, 8]] = True
    for part in (cache.keys, cache.values):
        assert torch.equal(part.isfinite().all(-1).all(-1).cpu(), written)
        assert torch.equal(part.isfinite().any(-1).any(-1).cpu(), written)
    assert query[[0, 1, 3, 4]].isfinite().all()


def test_the_reference_writes_padding_nowhere(device: str) -> None:
    qkv = projected(4, TINY, device=device)
    padded, plain = (small_cache(TINY, 5, device=device) for _ in range(2))
    slots, turn = torch.tensor([3, -1, 0, -1], device=device), rotary(4, TINY, device)
    query = rotate_and_write_reference(qkv, turn, padded, LAYER, slots)
    assert query.shape == (4, 4, 12)
    qkv, turn = (
        qkv[[0, 2]],
        Rotary(turn.cos[[0, 2]], turn.sin[[0, 2]], turn.query_scale[[0, 2]], 4, 2),
    )
    rotate_and_write_reference(qkv, turn, plain, LAYER, slots[[0, 2]])
    torch.testing.assert_close(padded.entries, plain.entries, rtol=0, atol=0, equal_nan=True)


def test_the_kernel_follows_the_strides_of_the_cache(
    device: str, assert_near: Callable[..., None]
) -> None:
    wide = torch.empty(NUM_LAYERS, 5, 3, 4, 20, device=device)
    cache = KVCache(wide[:, :, :2, 1:3, 4:16])
    qkv, turn, slots = projected(2, TINY, device=device), rotary(2, TINY, device), [4, 2]
    index = torch.tensor(slots, device=device)
    rotate_and_write_triton(qkv, turn, cache, LAYER, index)
    _, key, value = rotate(qkv, turn)
    assert_near("key", cache.keys[LAYER, slots], key, 1e-6)
    assert torch.equal(cache.values[LAYER, slots], value)
    assert wide.isfinite().sum() == 2 * key.numel()


def test_a_head_turns_as_pairs_of_its_halves() -> None:
    """Every pair is a complex number, turned by its angle; keys are not scaled, values neither."""
    num_heads, num_kv_heads, head_dim = ODD
    qkv = projected(4, ODD, torch.float64)
    angles = torch.rand(4, head_dim // 2, dtype=torch.float64) * 50
    scale = torch.tensor([1.0, 1.5, 2.0, 3.0], dtype=torch.float64)
    query, key, value = rotate(
        qkv, Rotary(angles.cos(), angles.sin(), scale, num_heads, num_kv_heads)
    )
    heads = qkv.view(4, -1, 2, head_dim // 2)
    pairs = torch.complex(heads[:, :, 0], heads[:, :, 1])
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    turned = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(query, turned[:, :num_heads] * scale[:, None, None])
    torch.testing.assert_close(key, turned[:, num_heads : num_heads + num_kv_heads])
    assert torch.equal(value, heads[:, num_heads + num_kv_heads :].flatten(-2))


def test_it_compiles_for_every_target_without_a_spill(
    compile_launches: Callable[..., list[dict[str, Any]]],
) -> None:
    qkv = projected(2, PUBLISHED, torch.bfloat16, "meta")
    cache = small_cache(PUBLISHED, 32, torch.bfloat16, "meta")
    turn = rotary(2, PUBLISHED, "meta")

    def launch() -> None:
        for dtype in (torch.int32, torch.int64):
            slots = torch.empty(2, dtype=dtype, device="meta")
            rotate_and_write_triton(qkv, turn, cache, LAYER, slots)

    for found in compile_launches("trimode.kernels.rope", launch):
        assert found["cubin_bytes"] > 0
        assert found["spilled_bytes"] == 0, found
