from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from trimode.kernels.kv_cache import KVCache, write_kv
from trimode.kernels.paged_attention import AttentionInputs, paged_attention_reference

CAUSAL, BLOCK = "causal", "block"
LAYER, NUM_LAYERS = 1, 2


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences over a shuffled cache that is NaN wherever nobody wrote."""

    query: Tensor
    cache: KVCache
    inputs: AttentionInputs
    page_table: Tensor
    query_start: np.ndarray
    visible: Tensor
    page_size: int


def build(
    sequences: list[tuple[int, int, str]],  # rows, KV entries after the write, what rows see
    page_size: int = 4,
    num_kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 6,
    dtype: torch.dtype = torch.float64,
    num_padding: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(len(sequences) + page_size)
    contexts = np.array([context for _, context, _ in sequences])
    pages_of = -(-contexts // page_size)
    free = torch.randperm(int(pages_of.sum()) + 3, generator=generator)
    cache = KVCache.allocate(NUM_LAYERS, len(free) * page_size, num_kv_heads, head_dim, dtype)
    page_table = torch.zeros(len(sequences), int(pages_of.max()), dtype=torch.int64)
    visible: list[int] = []
    for row, (num_rows, context, kind) in enumerate(sequences):
        pages, free = free[: pages_of[row]], free[pages_of[row] :]
        page_table[row, : len(pages)] = pages
        position = torch.arange(context)
        slots = pages[position // page_size] * page_size + position % page_size
        shape = (context, num_kv_heads, head_dim)
        key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in "kv")
        write_kv(cache, LAYER, key, value, slots)
        first = context - num_rows
        visible += [context if kind == BLOCK else first + i + 1 for i in range(num_rows)]
    query_start = np.concatenate(([0], np.cumsum([rows for rows, _, _ in sequences])))
    seen = torch.tensor(visible + [0] * num_padding)
    inputs = AttentionInputs.build(query_start, seen.numpy(), page_table.numpy(), page_size)
    shape = (len(seen), num_kv_heads * group, head_dim)
    query = torch.randn(shape, generator=generator).to(dtype)
    return Case(query, cache, inputs, page_table, query_start, seen, page_size)


def naive(case: Case) -> Tensor:
    """Row by row, head by head, entry by entry, in float64."""
    num_heads, head_dim = case.query.shape[1:]
    group = num_heads // case.cache.keys.shape[2]
    out = torch.zeros(case.query.shape, dtype=torch.float64)
    for owner, table in enumerate(case.page_table):
        for row in range(case.query_start[owner], case.query_start[owner + 1]):
            slots = [
                int(table[position // case.page_size]) * case.page_size + position % case.page_size
                for position in range(int(case.visible[row]))
            ]
            for head in range(num_heads):
                keys = case.cache.keys[LAYER, slots, head // group].double()
                values = case.cache.values[LAYER, slots, head // group].double()
                scores = keys @ case.query[row, head].double() / head_dim**0.5
                out[row, head] = scores.softmax(0) @ values
    return out


def attend(case: Case) -> Tensor:
    return paged_attention_reference(case.query, case.cache, LAYER, case.inputs)


SHAPES = {
    "one token of one sequence": [(1, 1, CAUSAL)],
    "one decode row": [(1, 9, CAUSAL)],
    "decode rows of odd lengths": [(1, 3, CAUSAL), (1, 17, CAUSAL), (1, 8, CAUSAL)],
    "a whole prompt": [(13, 13, CAUSAL)],
    "a prompt of more than one tile": [(71, 71, CAUSAL)],
    "a chunk after a prefix": [(40, 93, CAUSAL)],
    "a block": [(8, 21, BLOCK)],
    "a block at the very start": [(5, 5, BLOCK)],
    "a block as large as a tile": [(32, 40, BLOCK)],
    "a block larger than a tile": [(33, 50, BLOCK)],
    "all together": [
        (1, 30, CAUSAL), (33, 33, CAUSAL), (1, 2, CAUSAL), (8, 19, BLOCK), (4, 64, CAUSAL),
        (1, 1, CAUSAL), (32, 35, BLOCK), (65, 70, CAUSAL),
    ],
}  # fmt: skip


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("sequences", SHAPES.values(), ids=SHAPES.keys())
def test_attention_equals_the_naive_loop(
    sequences: list[tuple[int, int, str]], page_size: int
) -> None:
    case = build(sequences, page_size)
    torch.testing.assert_close(attend(case), naive(case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", [1, 2, 3, 4])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_heads_of_a_group_share_their_kv_head(group: int, num_kv_heads: int) -> None:
    sequences = [(1, 7, CAUSAL), (5, 12, BLOCK), (6, 6, CAUSAL)]
    case = build(sequences, num_kv_heads=num_kv_heads, group=group)
    torch.testing.assert_close(attend(case), naive(case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrow_types_stay_near_the_naive_loop(dtype: torch.dtype, bound: float) -> None:
    case = build([(1, 30, CAUSAL), (20, 33, CAUSAL), (8, 19, BLOCK)], dtype=dtype, head_dim=16)
    got = attend(case)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), naive(case), rtol=bound, atol=bound)


def test_slots_that_nobody_wrote_never_leak() -> None:
    case = build([(1, 2, CAUSAL), (3, 50, CAUSAL), (7, 9, BLOCK)], page_size=16)
    assert case.cache.keys[LAYER].isnan().any()
    assert attend(case).isfinite().all()


def test_padding_rows_give_exactly_zero() -> None:
    case = build([(1, 5, CAUSAL), (4, 9, BLOCK), (2, 3, CAUSAL)], num_padding=3)
    got = attend(case)
    assert (got[-3:] == 0).all()
    assert got[:-3].abs().min() > 0


def test_a_row_does_not_depend_on_the_other_sequences() -> None:
    sequences = [(4, 9, BLOCK), (1, 5, CAUSAL), (40, 45, CAUSAL)]
    case = build(sequences)
    whole = attend(case)
    for owner in range(len(sequences)):
        rows = slice(case.query_start[owner], case.query_start[owner + 1])
        inputs = AttentionInputs.build(
            np.array([0, rows.stop - rows.start]),
            case.visible[rows].numpy(),
            case.page_table[owner : owner + 1].numpy(),
            case.page_size,
        )
        single = paged_attention_reference(case.query[rows], case.cache, LAYER, inputs)
        torch.testing.assert_close(whole[rows], single, rtol=1e-12, atol=1e-12)


def test_a_causal_row_ignores_what_comes_after_it() -> None:
    case = build([(6, 10, CAUSAL)], page_size=16)
    before = attend(case)
    last = int(case.page_table[0, 0]) * 16 + 9
    case.cache.keys[LAYER, last] = 100.0
    case.cache.values[LAYER, last] = 100.0
    after = attend(case)
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5], after[5])


def test_every_row_of_a_block_sees_the_last_of_it() -> None:
    case = build([(6, 10, BLOCK)], page_size=16)
    before = attend(case)
    case.cache.values[LAYER, int(case.page_table[0, 0]) * 16 + 9] = 100.0
    assert (attend(case) != before).any(-1).all()
