from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from trimode.kernels.sampling import Sampled
from trimode.replicas.batch import Batch, BatchLimits
from trimode.replicas.decoding.autoregressive import Autoregressive
from trimode.replicas.decoding.strategy import DecodingContext, PassKind, Query, Stage
from trimode.replicas.graph_keys import GraphKey, GraphKeys
from trimode.replicas.scheduled import Answers, Scheduled
from trimode.replicas.sequence import Sequence
from trimode.replicas.types import Mode, Request

MASK = 3
LIMITS = BatchLimits(page_size=4, mask_id=MASK, vocab_size=64)


@pytest.fixture
def item(make_request: Callable[..., Request]) -> Callable[..., Scheduled]:
    """item(page_table, query, **request fields): a sequence with these pages and this query."""

    def make(page_table: list[int], query: Query, **own: Any) -> Scheduled:
        request = make_request(Mode.AUTOREGRESSIVE, **own)
        strategy = Autoregressive(DecodingContext(request, MASK, frozenset(), 1))
        return Scheduled(
            Sequence(request, strategy, frozenset(), 0.0, page_table=page_table), query
        )

    return make


@pytest.fixture
def scheduled(item: Any) -> list[Scheduled]:
    """A prefill chunk that ends a prompt, a decode row, a draft, a denoise and a verify pass."""
    causal = PassKind.CAUSAL
    block = [9, MASK, MASK]
    soft = {"wants_confidence": True}
    return [
        item([5, 0], Query(Stage.PREFILL, causal, [20, 21, 22], 2, (2,)), temperature=0.5, seed=8),
        item([1, 7, 2], Query(Stage.DECODE, causal, (30,), 9, (0,))),
        item(
            [3, 6],
            Query(
                Stage.DRAFT, PassKind.DRAFT, block, 4, [1, 2], **soft, confidence_temperature=0.7
            ),
            temperature=0.7,
            seed=2**62,
        ),
        item([4], Query(Stage.DENOISE, PassKind.DENOISE, block, 1, [1, 2], **soft)),
        item([9, 8], Query(Stage.VERIFY, causal, [40, 41], 3, range(2)), temperature=1.5, seed=1),
    ]


@pytest.fixture
def batch(scheduled: list[Scheduled]) -> Batch:
    return Batch.build(scheduled, LIMITS)


def test_rows_stand_in_the_order_of_their_sequences(batch: Batch) -> None:
    wanted = [20, 21, 22, 30, 9, MASK, MASK, 9, MASK, MASK, 40, 41]
    assert batch.inputs.token_ids.tolist() == wanted
    assert batch.inputs.positions.tolist() == [2, 3, 4, 9, 4, 5, 6, 1, 2, 3, 3, 4]


def test_slots_follow_the_page_table(batch: Batch) -> None:
    assert batch.inputs.slots.tolist() == [22, 23, 0, 9, 24, 25, 26, 17, 18, 19, 39, 32]


def test_causal_rows_see_themselves_and_block_rows_their_whole_block(batch: Batch) -> None:
    assert batch.inputs.attention.visible.tolist() == [3, 4, 5, 10, 7, 7, 7, 4, 4, 4, 4, 5]


def test_answer_rows_are_those_that_were_asked_for(batch: Batch) -> None:
    assert batch.inputs.answer_rows.tolist() == [2, 3, 5, 6, 8, 9, 10, 11]


def test_only_draft_rows_run_with_the_adapter(batch: Batch, scheduled: list[Scheduled]) -> None:
    assert np.flatnonzero(batch.inputs.draft_mask).tolist() == [4, 5, 6]
    others = [item for item in scheduled if item.query.kind is not PassKind.DRAFT]
    assert Batch.build(others, LIMITS).inputs.draft_mask is None


def test_a_model_without_an_adapter_is_asked_for_none(scheduled: list[Scheduled]) -> None:
    keys = GraphKeys.of(8, 8, 64, has_adapter=False)
    limits = replace(LIMITS, graph_keys=keys)
    inputs = Batch.build(scheduled, limits).inputs
    assert inputs.graph == GraphKey(16, 8, False)
    assert inputs.draft_mask is None


def test_sampled_answers_carry_the_position_of_the_token_they_produce(batch: Batch) -> None:
    draws = batch.inputs.sampling.draws
    assert draws is not None
    assert draws.rows.tolist() == [0, 2, 3, 6, 7]
    assert draws.positions.tolist() == [5, 5, 6, 4, 5]  # causal rows the next, block rows theirs
    assert draws.seeds.tolist() == [8, 2**62, 2**62, 1, 1]
    assert draws.temperatures.tolist() == pytest.approx([0.5, 0.7, 0.7, 1.5, 1.5])


def test_confidences_are_read_at_their_own_temperature(batch: Batch) -> None:
    sampling = batch.inputs.sampling
    assert sampling.confident_rows is not None
    assert sampling.confident_rows.tolist() == [2, 3, 4, 5]
    assert sampling.confidence_temperatures.tolist() == pytest.approx([0.7, 0.7, 1.0, 1.0])


def test_only_rows_that_are_drawn_and_ask_for_it_are_truncated(item: Any) -> None:
    decode = Query(Stage.DECODE, PassKind.CAUSAL, (30,), 9, (0,))
    asked = [
        {"temperature": 0.5},
        {"top_k": 3},
        {"temperature": 0.5, "top_p": 0.5},
        {"temperature": 1.0, "top_k": 4, "min_p": 0.25},
    ]
    built = Batch.build([item([page], decode, **own) for page, own in enumerate(asked)], LIMITS)
    draws = built.inputs.sampling.draws
    assert draws is not None and draws.truncation is not None
    assert draws.rows.tolist() == [0, 2, 3]
    assert draws.truncation.draws.tolist() == [1, 2]
    assert draws.truncation.top_k.tolist() == [64, 4]
    assert draws.truncation.top_p.tolist() == [0.5, 1.0]
    assert draws.truncation.min_p.tolist() == [0.0, 0.25]
    greedy = Batch.build([item([0], decode, top_k=3), item([1], decode, temperature=1)], LIMITS)
    assert greedy.inputs.sampling.draws is not None
    assert greedy.inputs.sampling.draws.truncation is None


def test_a_greedy_batch_without_confidences_says_so(scheduled: list[Scheduled]) -> None:
    sampling = Batch.build(scheduled[1:2], LIMITS).inputs.sampling
    assert sampling.draws is None
    assert sampling.confident_rows is None


def test_split_gives_each_sequence_its_own_answers(batch: Batch) -> None:
    got = batch.split(
        Sampled(torch.arange(10, 18), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    )
    assert got == [
        Answers([10], []),
        Answers([11], []),
        Answers([12, 13], [0.1, 0.2]),
        Answers([14, 15], [0.3, 0.4]),
        Answers([16, 17], []),
    ]


def test_a_chunk_without_answers_gets_none(item: Any) -> None:
    chunk = item([0], Query(Stage.PREFILL, PassKind.CAUSAL, [7, 8], 0, ()))
    decode = item([1], Query(Stage.DECODE, PassKind.CAUSAL, [7], 2, (0,)))
    batch = Batch.build([chunk, decode], LIMITS)
    assert batch.inputs.answer_rows.tolist() == [2]
    assert batch.split(Sampled(torch.tensor([5]), torch.empty(0))) == [
        Answers([], []),
        Answers([5], []),
    ]


def test_pages_past_the_pass_are_not_read(item: Any) -> None:
    short = item([3, 99, 99], Query(Stage.DECODE, PassKind.CAUSAL, [7], 2, (0,)))
    batch = Batch.build([short], LIMITS)
    assert batch.inputs.slots.tolist() == [14]
    assert batch.inputs.attention.page_table.tolist() == [[3]]
