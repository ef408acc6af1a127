from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trimode.kernels import choice
from trimode.kernels.choice import Asked, Chosen, Draws, choose_in_part, join_parts
from trimode.kernels.logit_edits import EditedRows
from trimode.kernels.noise import gumbel_reference
from trimode.kernels.places import places_of

MASK = 3
VOCAB_SIZE = 131072  # of the real models
RATIO = 2e-6  # of confidences and log-probabilities: exponentials and sums of float32
MARGIN = 1e-5  # of scores: nearer ones may be ordered by the rounding of the noise
NOTHING_ASKED = Asked(None, None, None, None, None, None, 0, None, 0)
SHAPES = [(1, 1, 4096), (5, 40, 4096), (3, 131, 32), (4, 1000, 256)]  # rows, vocabulary, chunk


def poisoned_rows(num_rows: int, vocab_size: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random rows; what lies behind each is NaN."""
    generator = torch.Generator().manual_seed(vocab_size)
    storage = torch.full((num_rows, vocab_size + 9), torch.nan)
    storage[:, :vocab_size] = torch.randn(num_rows, vocab_size, generator=generator) * 3
    return storage.to(device, dtype)[:, :vocab_size]


def choose(logits: Tensor, asked: Asked, edited: EditedRows | None = None) -> Chosen:
    vocab_size = logits.shape[1]
    found, _ = choose_in_part(logits, edited, asked, MASK, 0, vocab_size)
    return join_parts(found[None], asked, vocab_size)


def all_asked(num_rows: int, device: str) -> Asked:
    """Every row is drawn but the first; odd rows want confidence, all but the last logprobs."""
    drawn = torch.arange(num_rows - 1, 0, -1, device=device)  # not in the order of the answers
    draws = Draws(
        rows=drawn,
        temperatures=0.5 + drawn.float() / num_rows,
        seeds=drawn * 1_000_003 - 2_000_000,
        positions=drawn + 2**33,
        samples=drawn % 3,
    )
    confident = torch.arange(1, num_rows, 2, device=device)
    logprobs = torch.arange(num_rows - 1, device=device)
    return Asked(
        draws=draws,
        draw_places=places_of(drawn, num_rows),
        floors=None,
        confident_places=places_of(confident, num_rows),
        confidence_temperatures=0.6 + confident.float() / 4,
        logprob_places=places_of(logprobs, num_rows),
        num_logprobs=len(logprobs),
        candidate_places=None,
        num_candidate_rows=0,
    )


def scores_of(wide: Tensor, draws: Draws) -> Tensor:
    """wide [num_rows, vocab_size] with the noise of the drawn rows, in float64."""
    rows, seeds, positions, temperatures = (
        part.cpu() for part in (draws.rows, draws.seeds, draws.positions, draws.temperatures)
    )
    samples = None if draws.samples is None else draws.samples.cpu()
    noise = gumbel_reference(seeds, positions, wide.shape[1], samples).double()
    scores = wide.double().clone()
    scores[rows] += temperatures.double()[:, None] * noise
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_rows", "vocab_size", "chunk"), SHAPES)
def test_ids_confidences_and_logprobs_are_near_float64(
    num_rows: int,
    vocab_size: int,
    chunk: int,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    assert_near: Callable[..., None],
) -> None:
    monkeypatch.setattr(choice, "CHUNK", chunk)
    logits = poisoned_rows(num_rows, vocab_size, dtype, device)
    asked = all_asked(num_rows, device)
    chosen = choose(logits, asked)
    wide = logits.cpu().double()
    if vocab_size > MASK:
        wide[:, MASK] = -torch.inf
    assert asked.draws is not None and asked.confidence_temperatures is not None
    scores, ids = scores_of(wide, asked.draws), chosen.token_ids.cpu()
    best = scores.max(dim=-1).values
    assert (best - scores.gather(1, ids[:, None])[:, 0]).max() <= MARGIN
    own = wide.log_softmax(-1).gather(1, ids[:, None])[:-1, 0]
    if num_rows > 1:
        softness = asked.confidence_temperatures.cpu().double()[:, None]
        probabilities = (wide[1::2] / softness).softmax(-1)
        wanted = probabilities.gather(1, ids[1::2, None])[:, 0]
        assert_near("confidences", chosen.confidences, wanted, RATIO)
        assert_near("logprobs", chosen.logprobs, own, RATIO)
        assert_near("normalisers", chosen.normalisers, wide.logsumexp(-1)[:-1], RATIO)


def test_of_equal_logits_the_lowest_id_is_chosen(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch.argmax does, in a chunk and across chunks."""
    monkeypatch.setattr(choice, "CHUNK", 16)
    logits = torch.zeros(4, 70, dtype=torch.bfloat16, device=device)
    logits[1, [9, 12]] = 2
    logits[2, [69, 33, 50]] = 2
    logits[3, MASK] = 9
    clean = logits.float().cpu()
    clean[:, MASK] = -torch.inf
    wanted = clean.argmax(-1)
    assert wanted.tolist() == [0, 9, 33, 0]
    assert choose(logits, NOTHING_ASKED).token_ids.tolist() == wanted.tolist()


def test_an_answer_does_not_hang_on_its_batch_mates(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: neither on how many there are nor on what they ask."""
    monkeypatch.setattr(choice, "CHUNK", 64)
    logits = poisoned_rows(5, 300, torch.bfloat16, device)
    together = choose(logits, all_asked(5, device))
    nowhere = torch.full((1,), -1, dtype=torch.int32, device=device)
    own = torch.zeros(1, dtype=torch.int32, device=device)
    alone = replace(
        NOTHING_ASKED,
        confident_places=own,
        confidence_temperatures=torch.tensor([0.6 + 3 / 4], device=device),
        logprob_places=own,
        num_logprobs=1,
    )
    everyone = all_asked(5, device).draws
    assert everyone is not None
    alone = replace(
        alone,
        draws=Draws(
            everyone.rows[1:2] * 0,
            everyone.temperatures[1:2],
            everyone.seeds[1:2],
            everyone.positions[1:2],
            None if everyone.samples is None else everyone.samples[1:2],
        ),
        draw_places=own,
    )
    single = choose(logits[3:4], alone)
    assert single.token_ids[0] == together.token_ids[3]
    assert single.confidences[0] == together.confidences[1]
    assert single.logprobs[0] == together.logprobs[3]
    greedy = choose(logits[:1], replace(alone, draw_places=nowhere))
    assert greedy.logprobs[0] == together.logprobs[0]


def test_only_what_lies_on_the_floor_or_above_is_drawn(device: str) -> None:
    logits = poisoned_rows(5, 200, torch.float32, device)
    asked = all_asked(5, device)
    floors = torch.tensor([4.0, 5.0, -torch.inf, 1.0], device=device)
    chosen = choose(logits, replace(asked, floors=floors))
    wide = logits.cpu().double()
    wide[:, MASK] = -torch.inf
    assert asked.draws is not None
    scores = scores_of(wide, asked.draws)
    for row, floor in zip(asked.draws.rows.tolist(), floors.tolist(), strict=True):
        scores[row, wide[row] < floor] = -torch.inf
    assert chosen.token_ids.tolist() == scores.argmax(-1).tolist()


def test_edited_rows_are_chosen_from_but_the_logprob_is_the_models_own(device: str) -> None:
    logits = poisoned_rows(3, 50, torch.bfloat16, device)
    edited = EditedRows(
        torch.full((1, 50), -1.0, device=device), places_of(torch.tensor([1], device=device), 3)
    )
    edited.logits[0, 30], edited.logits[0, MASK] = 0.001, -torch.inf
    zero = places_of(torch.tensor([1], device=device), 3)
    asked = replace(
        NOTHING_ASKED,
        confident_places=zero,
        confidence_temperatures=torch.ones(1, device=device),
        logprob_places=zero,
        num_logprobs=1,
    )
    chosen = choose(logits, asked, edited)
    own = logits[1].cpu().double()
    own[MASK] = -torch.inf
    changed = edited.logits[0].cpu().double()
    assert chosen.token_ids[1] == 30
    assert chosen.logprobs.item() == pytest.approx(own.log_softmax(-1)[30].item(), rel=RATIO)
    assert chosen.confidences.item() == pytest.approx(changed.softmax(-1)[30].item(), rel=RATIO)


def test_a_row_of_nan_answers_with_an_id(device: str) -> None:
    logits = torch.full((1, 30), torch.nan, device=device)
    assert 0 <= choose(logits, NOTHING_ASKED).token_ids.item() < 30


def test_they_compile_for_every_target_without_a_spill(
    compile_launches: Callable[..., list[dict[str, Any]]],
) -> None:
    def launch() -> None:
        places = torch.empty(8, dtype=torch.int32, device="meta")
        edited = EditedRows(torch.empty(2, VOCAB_SIZE, device="meta"), places)
        asked = replace(all_asked(8, "meta"), candidate_places=places, num_candidate_rows=3)
        with_floors = replace(asked, floors=torch.empty(7, device="meta"))
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.empty(8, VOCAB_SIZE, dtype=dtype, device="meta")
            choose(logits, NOTHING_ASKED)
            choose(logits, all_asked(8, "meta"))
            choose(logits, with_floors, edited)

    for found in compile_launches("trimode.kernels.choice", launch):
        assert found["cubin_bytes"] > 0
        assert found["spilled_bytes"] == 0, found
