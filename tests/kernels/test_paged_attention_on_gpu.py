"""Paged attention at the sizes of the published models, in launches of every kind."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from trimode.kernels.attention_inputs import AttentionInputs
from trimode.kernels.kv_cache import KVCache
from trimode.kernels.paged_attention import paged_attention_reference, paged_attention_triton

pytestmark = pytest.mark.gpu

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
RATIO = 5e-3  # bfloat16
Sequences = list[tuple[int, int, bool]]  # rows, context, do rows see all of it

PASSES: dict[str, Sequences] = {
    "one decode row": [(1, 5000, False)],
    "decode": [(1, 1 + 37 * i, False) for i in range(64)],
    "a block": [(32, 4096, True)],
    "blocks": [(8, 100 + 300 * i, True) for i in range(8)],
    "a prompt": [(1500, 1500, False)],
    "a chunk after a prefix": [(512, 3000, False)],
    "mixed": [(1, 900, False)] * 8 + [(32, 700, True), (16, 2000, False), (300, 700, False)],
}


@dataclass(frozen=True, slots=True)
class Pass:
    """On the GPU; slots that nobody wrote are NaN."""

    query: Tensor
    cache: KVCache
    query_start: np.ndarray
    visible: np.ndarray
    page_table: np.ndarray

    @classmethod
    def build(cls, sequences: Sequences) -> "Pass":
        torch.manual_seed(len(sequences))
        contexts = np.array([context for _, context, _ in sequences])
        pages_of = -(-contexts // PAGE_SIZE)
        pages = torch.randperm(int(pages_of.sum()) + 5).numpy()
        shape = (1, len(pages) * PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
        cache = KVCache.allocate(*shape, torch.bfloat16, "cuda")
        cache.entries.fill_(torch.nan)
        table = np.zeros((len(sequences), pages_of.max()), dtype=np.int64)
        position = np.arange(contexts.max())
        for row, (context, count) in enumerate(zip(contexts, pages_of, strict=True)):
            table[row, :count], pages = pages[:count], pages[count:]
            own = table[row, position[:context] // PAGE_SIZE] * PAGE_SIZE
            cache.layers[0][torch.from_numpy(own + position[:context] % PAGE_SIZE).cuda()] = (
                torch.randn(context, 2, NUM_KV_HEADS, HEAD_DIM, device="cuda").bfloat16()
            )
        visible = [
            np.full(rows, context) if is_block else np.arange(context - rows, context) + 1
            for rows, context, is_block in sequences
        ]
        start = np.concatenate(([0], np.cumsum([rows for rows, _, _ in sequences])))
        query = torch.randn(start[-1], NUM_HEADS, HEAD_DIM, device="cuda").bfloat16()
        return cls(query, cache, start, np.concatenate(visible), table)

    def inputs(self, device: str = "cuda", **own: int | bool) -> AttentionInputs:
        move = partial(torch.asarray, device=device)
        args = (self.query_start, self.visible, self.page_table, PAGE_SIZE, move)
        return AttentionInputs.build(*args, **own)

    def reference(self) -> Tensor:
        """In float32, on the CPU."""
        cache = KVCache(self.cache.entries.float().cpu())
        return paged_attention_reference(self.query.float().cpu(), cache, 0, self.inputs("cpu"))

    def padded_query(self, num_tokens: int) -> Tensor:
        query = self.query.new_full((num_tokens, NUM_HEADS, HEAD_DIM), torch.nan)
        query[: len(self.query)] = self.query
        return query


@pytest.mark.parametrize("sequences", PASSES.values(), ids=PASSES.keys())
def test_a_pass_is_near_the_reference(
    sequences: Sequences, assert_near: Callable[..., None]
) -> None:
    case = Pass.build(sequences)
    got = paged_attention_triton(case.query, case.cache, 0, case.inputs())
    assert_near("attention", got.cpu(), case.reference(), RATIO)


def test_batch_invariant_bits_do_not_depend_on_the_batch() -> None:
    sequences = PASSES["mixed"]
    case = Pass.build(sequences)
    whole = paged_attention_triton(case.query, case.cache, 0, case.inputs(batch_invariant=True))
    for owner in range(len(sequences)):
        first, end = case.query_start[owner : owner + 2]
        for start in {first, end - 1}:  # all rows, and the last as a decode row
            single = Pass(
                case.query[start:end], case.cache, np.array([0, end - start]),
                case.visible[start:end], case.page_table[owner : owner + 1],
            )  # fmt: skip
            inputs = single.inputs(batch_invariant=True)
            got = paged_attention_triton(single.query, single.cache, 0, inputs)
            assert torch.equal(whole[start:end], got), (owner, start)


def test_a_captured_launch_serves_other_passes_of_its_size(
    assert_near: Callable[..., None],
) -> None:
    sizes = {"num_tokens": 128, "num_sequences": 8, "num_pages": 512}
    blank = AttentionInputs.build(
        np.zeros(1, dtype=np.int64), np.zeros(128), np.zeros((8, 512)), PAGE_SIZE,
        partial(torch.asarray, device="cuda"), **sizes,
    )  # fmt: skip
    passes = [Pass.build([(16, 4000, True)] * 8), Pass.build([(32, 300, True), (1, 7000, False)])]
    slots = max(case.cache.entries.shape[1] for case in passes)
    cache = KVCache.allocate(1, slots, NUM_KV_HEADS, HEAD_DIM, torch.bfloat16, "cuda")
    query = torch.zeros(128, NUM_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    paged_attention_triton(query, cache, 0, blank)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = paged_attention_triton(query, cache, 0, blank)
    for case in passes:
        inputs = case.inputs(**sizes)
        cache.entries[:, : case.cache.entries.shape[1]] = case.cache.entries
        query.copy_(case.padded_query(128))
        for name in ("visible", "page_table", "tiles"):
            getattr(blank, name).copy_(getattr(inputs, name))
        graph.replay()
        num_rows = len(case.query)
        assert_near("attention", got[:num_rows].cpu(), case.reference(), RATIO)
        assert (got[num_rows:] == 0).all()
