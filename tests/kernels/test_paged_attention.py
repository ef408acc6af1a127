from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimode.kernels.attention_inputs import AttentionInputs
from trimode.kernels.attention_layout import Layout, device_facts
from trimode.kernels.kv_cache import KVCache, write_kv
from trimode.kernels.paged_attention import (
    launch_attention,
    paged_attention_reference,
    paged_attention_triton,
)

CAUSAL, BLOCK = "causal", "block"
LAYER, NUM_LAYERS = 1, 2
Sequences = list[tuple[int, int, str]]  # rows, KV entries after the write, what rows see

# What rounding alone makes: sums in another order, weights in the dtype of the values, and the last
# digit of a narrow result.
RATIOS = {torch.float32: 1e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences over a shuffled cache that is NaN wherever nobody wrote; on the CPU."""

    query: Tensor
    cache: KVCache
    page_table: Tensor
    query_start: np.ndarray
    visible: Tensor
    page_size: int

    def inputs(self, device: str = "cpu", **own: Any) -> AttentionInputs:
        move = partial(torch.as_tensor, device=device)
        visible, table = self.visible.numpy(), self.page_table.numpy()
        return AttentionInputs.build(self.query_start, visible, table, self.page_size, move, **own)


def build(
    sequences: Sequences,
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
    shape = (len(seen), num_kv_heads * group, head_dim)
    query = torch.randn(shape, generator=generator).to(dtype)
    return Case(query, cache, page_table, query_start, seen, page_size)


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


Attend = Callable[..., Tensor]


def reference(case: Case, **own: Any) -> Tensor:
    return paged_attention_reference(case.query, case.cache, LAYER, case.inputs(**own))


def kernel(device: str, case: Case, num_splits: int | None = None, **own: Any) -> Tensor:
    """num_splits: as many, whatever the launcher would choose."""
    cache, inputs = KVCache(case.cache.entries.to(device)), case.inputs(device, **own)
    query = case.query.new_full((len(inputs.visible), *case.query.shape[1:]), torch.nan)
    query[: len(case.query)] = case.query
    query = query.to(device)
    if num_splits is None:
        return paged_attention_triton(query, cache, LAYER, inputs).cpu()
    entries = cache.layers[LAYER]
    layout = Layout.choose(query, entries.shape[2], inputs, device_facts(query.device))
    layout = replace(layout, num_splits=num_splits)
    return launch_attention(query, entries, inputs, layout).cpu()


@pytest.fixture(params=["reference", "kernel"])
def attend(request: pytest.FixtureRequest, device: str) -> Attend:
    """attend(case): either form, on the CPU in the end."""
    return reference if request.param == "reference" else partial(kernel, device)


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
    sequences: Sequences, page_size: int, attend: Attend, assert_near: Callable[..., None]
) -> None:
    case = build(sequences, page_size, dtype=torch.float32)
    assert_near("attention", attend(case), naive(case), RATIOS[torch.float32])


def test_the_reference_is_exact_in_float64(assert_near: Callable[..., None]) -> None:
    case = build(SHAPES["all together"])
    assert_near("attention", reference(case), naive(case), 1e-14)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 40])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_heads_of_a_group_share_their_kv_head(
    group: int, num_kv_heads: int, attend: Attend, assert_near: Callable[..., None]
) -> None:
    sequences = [(1, 7, CAUSAL), (5, 12, BLOCK), (6, 6, CAUSAL)]
    case = build(sequences, num_kv_heads=num_kv_heads, group=group, dtype=torch.float32)
    assert_near("attention", attend(case), naive(case), RATIOS[torch.float32])


@pytest.mark.parametrize("head_dim", [2, 12, 16, 64, 128, 160])
@pytest.mark.parametrize("dtype", RATIOS, ids=str)
def test_every_dtype_and_head_dim_stays_near_the_naive_loop(
    dtype: torch.dtype, head_dim: int, attend: Attend, assert_near: Callable[..., None]
) -> None:
    case = build([(1, 30, CAUSAL), (20, 33, CAUSAL), (8, 71, BLOCK)], 4, 1, 3, head_dim, dtype)
    got = attend(case)
    assert got.dtype == dtype
    assert_near("attention", got, naive(case), RATIOS[dtype])


def test_large_scores_do_not_overflow(attend: Attend, assert_near: Callable[..., None]) -> None:
    case = build([(1, 90, CAUSAL), (3, 80, BLOCK)], dtype=torch.float32)
    case.query.mul_(1e4)
    assert_near("attention", attend(case), naive(case), 1e-4)


@pytest.mark.parametrize("num_splits", [2, 3, 7])
@pytest.mark.parametrize("dtype", RATIOS, ids=str)
def test_splits_of_the_context_add_up(
    num_splits: int, dtype: torch.dtype, device: str, assert_near: Callable[..., None]
) -> None:
    # Whole splits, a part of one, and sequences that do not reach the later ones.
    sequences = [(1, 200, CAUSAL), (1, 64, CAUSAL), (1, 65, CAUSAL), (30, 130, BLOCK)]
    sequences.append((1, 1, CAUSAL))
    case = build(sequences, num_kv_heads=1, group=4, dtype=dtype, num_padding=2)
    got = kernel(device, case, num_splits)
    assert_near("attention", got, naive(case), RATIOS[dtype])
    assert (got[-2:] == 0).all()


def test_splits_of_very_different_scores_add_up(
    device: str, assert_near: Callable[..., None]
) -> None:
    case = build([(1, 200, CAUSAL), (3, 190, BLOCK)], dtype=torch.float32)
    case.query.mul_(1e4)
    assert_near("attention", kernel(device, case, 3), naive(case), 1e-4)


def test_slots_that_nobody_wrote_never_leak(attend: Attend) -> None:
    sequences = [(1, 2, CAUSAL), (3, 50, CAUSAL), (7, 9, BLOCK)]
    case = build(sequences, page_size=16, dtype=torch.float32)
    assert case.cache.keys[LAYER].isnan().any()
    assert attend(case).isfinite().all()


def test_padding_rows_give_exactly_zero(attend: Attend) -> None:
    sequences = [(1, 5, CAUSAL), (4, 9, BLOCK), (2, 3, CAUSAL)]
    got = attend(build(sequences, dtype=torch.float32, num_padding=3))
    assert (got[-3:] == 0).all()
    assert got[:-3].abs().min() > 0


def test_a_pass_of_nothing_but_padding_gives_zero(attend: Attend) -> None:
    case = build([(1, 3, CAUSAL), (4, 4, CAUSAL)], dtype=torch.float32)
    got = attend(replace(case, visible=torch.zeros_like(case.visible)))
    assert (got == 0).all()


def test_a_row_that_sees_nothing_leaves_its_tile_alone(device: str) -> None:
    case = build([(4, 9, CAUSAL)], dtype=torch.float32)
    wanted = kernel(device, case)
    wanted[1] = 0
    case.visible[1] = 0
    got = kernel(device, case)
    assert (got[1] == 0).all()
    torch.testing.assert_close(got, wanted)


def test_a_row_does_not_depend_on_the_other_sequences(
    attend: Attend, assert_near: Callable[..., None]
) -> None:
    case = build([(4, 9, BLOCK), (1, 5, CAUSAL), (40, 45, CAUSAL)], dtype=torch.float32)
    whole = attend(case)
    for owner in range(len(case.page_table)):
        single, rows = alone(case, owner)
        assert_near("rows", whole[rows], attend(single), RATIOS[torch.float32])


def alone(case: Case, owner: int, last: int | None = None) -> tuple[Case, slice]:
    """A pass of one sequence's rows, or of its last ones; and which they were."""
    first, end = case.query_start[owner : owner + 2]
    rows = slice(first if last is None else end - last, end)
    single = replace(
        case,
        query=case.query[rows],
        visible=case.visible[rows],
        page_table=case.page_table[owner : owner + 1],
        query_start=np.array([0, rows.stop - rows.start]),
    )
    return single, rows


@pytest.mark.parametrize("dtype", RATIOS, ids=str)
def test_batch_invariant_bits_do_not_depend_on_the_batch(dtype: torch.dtype, device: str) -> None:
    sequences = [(1, 90, CAUSAL), (32, 150, CAUSAL), (1, 3, CAUSAL), (8, 70, BLOCK)]
    case = build(sequences, page_size=16, group=4, dtype=dtype)
    attend = partial(kernel, device, batch_invariant=True)
    whole = attend(case)
    for owner in range(len(sequences)):
        # As a pass of its own, and its last row as a decode row.
        for last in (None, 1):
            single, rows = alone(case, owner, last)
            assert torch.equal(whole[rows], attend(single)), (owner, last)
    padded = attend(case, num_tokens=64, num_sequences=8, num_pages=20)
    assert torch.equal(whole, padded[: len(whole)])


def test_a_causal_row_ignores_what_comes_after_it(attend: Attend) -> None:
    case = build([(6, 10, CAUSAL)], page_size=16, dtype=torch.float32)
    before = attend(case)
    last = int(case.page_table[0, 0]) * 16 + 9
    case.cache.keys[LAYER, last] = 100.0
    case.cache.values[LAYER, last] = 100.0
    after = attend(case)
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5], after[5])


def test_every_row_of_a_block_sees_the_last_of_it(attend: Attend) -> None:
    case = build([(6, 10, BLOCK)], page_size=16, dtype=torch.float32)
    before = attend(case)
    case.cache.values[LAYER, int(case.page_table[0, 0]) * 16 + 9] = 100.0
    assert (attend(case) != before).any(-1).all()


@pytest.mark.parametrize("num_splits", [1, 3])
def test_a_pass_filled_up_to_a_graphs_sizes_gives_the_same(num_splits: int, device: str) -> None:
    case = build([(1, 90, CAUSAL), (7, 150, CAUSAL), (8, 70, BLOCK)], dtype=torch.float32)
    got = kernel(device, case, num_splits, num_tokens=32, num_sequences=4, num_pages=50)
    wanted = kernel(device, case, num_splits)
    torch.testing.assert_close(got[: len(wanted)], wanted, rtol=1e-5, atol=1e-6)
    assert (got[len(wanted) :] == 0).all()


@given(
    sequences=st.lists(
        st.tuples(st.integers(1, 40), st.integers(0, 90), st.sampled_from([CAUSAL, BLOCK])),
        min_size=1,
        max_size=4,
    ),
    page_size=st.sampled_from([1, 2, 4, 16, 32]),
    group=st.integers(1, 5),
    num_padding=st.integers(0, 5),
    num_splits=st.integers(1, 3),
    dtype=st.sampled_from(list(RATIOS)),
)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_batch_stays_near_the_reference(
    sequences: Sequences,
    page_size: int,
    group: int,
    num_padding: int,
    num_splits: int,
    dtype: torch.dtype,
    device: str,
    assert_near: Callable[..., None],
) -> None:
    grown = [(rows, rows + before, kind) for rows, before, kind in sequences]
    case = build(grown, page_size, 1, group, 8, dtype, num_padding)
    wanted = reference(replace(case, query=case.query.double(), cache=wide(case.cache)))
    assert_near("attention", kernel(device, case, num_splits), wanted, RATIOS[dtype])


def wide(cache: KVCache) -> KVCache:
    return KVCache(cache.entries.double())
