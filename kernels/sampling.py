"""From logits to token ids, confidences and log-probabilities, one row an answer, whatever pass the
row comes from.

The order is fixed: the mask id is banned, log-probabilities are read, then repetition penalty,
additions (the other penalties, logit bias, bans), allowed ids, forced ids, temperature, top-k,
top-p, min-p, noise, arg max.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimode.kernels.choice import Asked, Draws, choose_in_part, join_parts
from trimode.kernels.dispatch import by_device
from trimode.kernels.logit_edits import EditedRows, LogitEdits, apply_edits, edited_rows
from trimode.kernels.noise import gumbel
from trimode.kernels.places import places_of
from trimode.kernels.truncation import truncate, truncation_floors_triton
from trimode.kernels.vocabulary import VocabularyShard


@dataclass(frozen=True, slots=True)
class SamplingInputs:
    """Parameters of the answers of one pass. Rows index the answers; None where no row is
    concerned.
    """

    mask_id: int
    draws: Draws | None = None
    edits: LogitEdits | None = None
    confident_rows: Tensor | None = None  # [num_confident] int64: rows whose confidence is wanted
    confidence_temperatures: Tensor | None = None  # [num_confident] float32
    candidate_rows: Tensor | None = None  # [num_with_candidates] int64
    num_candidates: int = 0  # best ids reported of each such row, the chosen one first
    logprob_rows: Tensor | None = None  # [num_logprobs] int64
    num_top: int = 0  # alternatives beside the chosen id


@dataclass(frozen=True, slots=True)
class Sampled:
    """What the rows of one pass answered."""

    token_ids: Tensor  # [num_answers] int64
    confidences: Tensor  # [num_confident]
    candidates: Tensor | None = None  # [num_with_candidates, num_candidates] int64
    logprobs: Tensor | None = None  # [num_logprobs]: of the chosen ids
    top_ids: Tensor | None = None  # [num_logprobs, num_top] int64, best first
    top_logprobs: Tensor | None = None  # [num_logprobs, num_top]


def sample_reference(
    logits: Tensor, inputs: SamplingInputs, shard: VocabularyShard | None = None
) -> Sampled:
    """logits [num_answers, vocab_size], or this rank's part of them, which may be changed in place
    -> Sampled, the same on every rank.

    id = argmax(logits + T * gumbel(seed, position, sample, id)) draws from softmax(logits / T); at
    T = 0 it is plain argmax, of equals the lowest id. Confidence is softmax(edited logits /
    confidence temperature) at the id. Log-probabilities are the model's own. The mask id is never
    an answer.
    """
    if shard is not None:
        logits = shard.whole(logits)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    wide[:, inputs.mask_id] = -torch.inf
    own = None if inputs.logprob_rows is None else wide[inputs.logprob_rows].log_softmax(-1)
    if inputs.edits is not None:
        apply_edits(wide, inputs.edits)
    token_ids = wide.argmax(-1)
    scores = wide
    if inputs.draws is not None:
        drawn = _with_noise(wide[inputs.draws.rows], inputs.draws)
        token_ids[inputs.draws.rows] = drawn.argmax(-1)
        if inputs.candidate_rows is not None:
            scores = wide.index_copy(0, inputs.draws.rows, drawn)
    confidences, candidates = wide.new_empty(0), None
    if inputs.confident_rows is not None and inputs.confidence_temperatures is not None:
        scaled = wide[inputs.confident_rows] / inputs.confidence_temperatures[:, None]
        chosen = scaled.gather(1, token_ids[inputs.confident_rows, None])[:, 0]
        confidences = torch.exp(chosen - scaled.logsumexp(-1))
    if inputs.candidate_rows is not None:
        candidates = _candidates(scores[inputs.candidate_rows], token_ids, inputs, None)
    if own is None or inputs.logprob_rows is None:
        return Sampled(token_ids, confidences, candidates)
    top = own.topk(inputs.num_top, dim=-1)
    chosen = own.gather(1, token_ids[inputs.logprob_rows, None])[:, 0]
    return Sampled(token_ids, confidences, candidates, chosen, top.indices, top.values)


def _with_noise(logits: Tensor, draws: Draws) -> Tensor:
    """logits [num_drawn, vocab_size] -> scores whose arg max is the draw."""
    noise = gumbel(draws.seeds, draws.positions, logits.shape[1], draws.samples)
    kept = draws.truncation
    if kept is not None:
        left = truncate(logits[kept.draws], draws.temperatures[kept.draws], kept)
        logits = logits.index_copy(0, kept.draws, left)
    return logits + draws.temperatures[:, None] * noise


def sample_triton(
    logits: Tensor, inputs: SamplingInputs, shard: VocabularyShard | None = None
) -> Sampled:
    """As the reference. Nothing waits for the device.

    Most rows are read once, and of shards only what each chunk found is gathered. Rows with edits
    are copied to float32; truncated rows are mostly read three times more, and gathered whole from
    shards.
    """
    num_answers, part_size = logits.shape
    start, vocab_size = (0, part_size) if shard is None else (shard.start, shard.vocab_size)
    size = max(0, min(part_size, vocab_size - start))
    edits = inputs.edits
    edited = (
        None if edits is None else edited_rows(logits, edits, inputs.mask_id, start, vocab_size)
    )
    asked = _asked(inputs, num_answers, _floors(logits, edited, inputs, shard))
    found, scores = choose_in_part(logits, edited, asked, inputs.mask_id, start, size)
    chosen = join_parts(found[None] if shard is None else shard.gather(found), asked, vocab_size)
    candidates = None
    if inputs.candidate_rows is not None:
        candidates = _candidates(scores, chosen.token_ids, inputs, shard)
    if inputs.logprob_rows is None:
        return Sampled(chosen.token_ids, chosen.confidences, candidates)
    own = logits[inputs.logprob_rows]
    own[:, size:] = -torch.inf
    if 0 <= inputs.mask_id - start < size:
        own[:, inputs.mask_id - start] = -torch.inf
    values, top_ids = _best(own, inputs.num_top, shard)
    top_logprobs = values.float() - chosen.normalisers[:, None]
    return Sampled(
        chosen.token_ids, chosen.confidences, candidates, chosen.logprobs, top_ids, top_logprobs
    )


def _asked(inputs: SamplingInputs, num_answers: int, floors: Tensor | None) -> Asked:
    def places(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else places_of(rows, num_answers)

    candidate_rows, logprob_rows = inputs.candidate_rows, inputs.logprob_rows
    return Asked(
        draws=inputs.draws,
        draw_places=None if inputs.draws is None else places(inputs.draws.rows),
        floors=floors,
        confident_places=places(inputs.confident_rows),
        confidence_temperatures=inputs.confidence_temperatures,
        logprob_places=places(logprob_rows),
        num_logprobs=0 if logprob_rows is None else len(logprob_rows),
        candidate_places=places(candidate_rows),
        num_candidate_rows=0 if candidate_rows is None else len(candidate_rows),
    )


def _floors(
    logits: Tensor,
    edited: EditedRows | None,
    inputs: SamplingInputs,
    shard: VocabularyShard | None,
) -> Tensor | None:
    """[num_drawn]: the lowest logit that may be drawn; None where all may."""
    draws = inputs.draws
    if draws is None or draws.truncation is None:
        return None
    kept = draws.truncation
    rows, temperatures = draws.rows[kept.draws], draws.temperatures[kept.draws]
    floors = torch.full_like(draws.temperatures, -torch.inf)
    if shard is not None:
        own = logits[rows]
        if edited is not None:
            places = edited.places[rows, None].long()
            own = torch.where(places < 0, own.float(), edited.logits[places[:, 0].clamp(min=0)])
        logits, edited = shard.whole(own), None
        rows = torch.arange(len(rows), device=rows.device)
    found = truncation_floors_triton(logits, edited, rows, temperatures, kept, inputs.mask_id)
    return floors.index_copy_(0, kept.draws, found)


def _candidates(
    scores: Tensor, token_ids: Tensor, inputs: SamplingInputs, shard: VocabularyShard | None
) -> Tensor:
    """The best ids of scores [num_with_candidates, part_size]; of equals, the chosen one first."""
    assert inputs.candidate_rows is not None
    start = 0 if shard is None else shard.start
    ids = torch.arange(start, start + scores.shape[1], device=scores.device)
    scores = scores.masked_fill(ids == token_ids[inputs.candidate_rows, None], torch.inf)
    return _best(scores, inputs.num_candidates, shard)[1]


def _best(values: Tensor, count: int, shard: VocabularyShard | None) -> tuple[Tensor, Tensor]:
    """(values, ids) of the `count` best of each row [num_rows, part_size] of all ranks together."""
    found, ids = values.topk(min(count, values.shape[1]), dim=-1)
    if shard is None:
        return found, ids
    found, ids = (shard.gather(t).transpose(0, 1).flatten(1) for t in (found, ids + shard.start))
    found, order = found.topk(min(count, found.shape[1]), dim=-1)
    return found, ids.gather(1, order).clamp(max=shard.vocab_size - 1)


sample = by_device(sample_reference, sample_triton)
