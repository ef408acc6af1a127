"""The answer of every row of logits in one read of them: its id, how sure the model was of it, its
log-probability.

A chunk of the vocabulary at a time, whatever the batch and whoever holds it; what the chunks found
is joined in the order of the vocabulary. So a row's answer hangs on nothing but the row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimode.kernels.logit_edits import EditedRows
from trimode.kernels.noise import gumbel_tile
from trimode.kernels.truncation import Truncation

CHUNK = 4096
# Ids pass as float32.
MAX_VOCAB_SIZE = 1 << 24


@dataclass(frozen=True, slots=True)
class Draws:
    """The rows with a temperature above 0, and what their noise is a function of."""

    rows: Tensor  # [num_drawn] int64
    temperatures: Tensor  # [num_drawn] float32
    seeds: Tensor  # [num_drawn] int64
    positions: Tensor  # [num_drawn] int64: of the token that the row produces
    samples: Tensor | None = None  # [num_drawn] int64: index among a request's samples
    truncation: Truncation | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """What rows ask beside their best id. Places are [num_answers] int32, the row's index in a list
    of those that ask, -1 where it does not; None where nobody does.
    """

    draws: Draws | None
    draw_places: Tensor | None
    floors: Tensor | None  # [num_drawn] float32: the lowest logit that may be drawn
    confident_places: Tensor | None
    confidence_temperatures: Tensor | None  # [num_confident] float32
    logprob_places: Tensor | None
    num_logprobs: int
    candidate_places: Tensor | None
    num_candidate_rows: int

    @property
    def num_fields(self) -> int:
        """How many numbers a chunk tells of a row: (best score, its id); for confidences also
        (that id's logit, the largest logit, sum of exp((logit - largest) / T)); for
        log-probabilities also the same three of the model's own logits at T = 1.
        """
        return (
            8 if self.logprob_places is not None else 5 if self.confident_places is not None else 2
        )


@dataclass(frozen=True, slots=True)
class Chosen:
    """The answers of a pass."""

    token_ids: Tensor  # [num_answers] int64
    confidences: Tensor  # [num_confident] float32
    logprobs: Tensor  # [num_logprobs] float32
    normalisers: Tensor  # [num_logprobs] float32: log of the sum of exp(own logit)


@triton.jit
def _peak_and_mass(x, scale):
    """(the largest, the sum of exp((x - the largest) * scale)); the mass of nothing is 0."""
    peak = tl.max(x, axis=0)
    return peak, tl.sum(tl.exp((x - tl.where(peak == float("-inf"), 0.0, peak)) * scale), axis=0)


@triton.jit
def _chunk_kernel(
    logits_ptr,  # [num_answers, part_size]
    row_stride,
    edited_ptr,  # [num_edited, part_size] float32
    edited_stride,
    size,  # columns that are ids
    start,  # id of the first column
    banned_column,
    edited_places_ptr,  # [num_answers] int32, as all places
    draw_places_ptr,
    temperatures_ptr,  # [num_drawn] float32
    seeds_ptr,  # [num_drawn] int64
    positions_ptr,  # [num_drawn] int64
    samples_ptr,  # [num_drawn] int64
    floors_ptr,  # [num_drawn] float32
    confident_places_ptr,
    confidence_temperatures_ptr,  # [num_confident] float32
    logprob_places_ptr,
    candidate_places_ptr,
    scores_ptr,  # [num_candidate_rows, scores_stride] float32: scores of all ids
    scores_stride,
    found_ptr,  # [num_fields, num_answers, num_chunks] float32
    HAS_EDITED: tl.constexpr,
    HAS_DRAWS: tl.constexpr,
    HAS_SAMPLES: tl.constexpr,
    HAS_FLOORS: tl.constexpr,
    HAS_CONFIDENT: tl.constexpr,
    HAS_LOGPROBS: tl.constexpr,
    HAS_CANDIDATES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program a chunk of a row, which it reads once (of an edited row, both forms)."""
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * CHUNK
    columns = first + tl.arange(0, CHUNK)
    inside = columns < size
    # Banned after the load, which is a wide one only where its mask is.
    banned = columns == banned_column
    own = tl.load(logits_ptr + row * row_stride + columns, mask=inside, other=float("-inf"))
    own = tl.where(banned, float("-inf"), own.to(tl.float32))
    x = own
    if HAS_EDITED:
        edited = tl.load(edited_places_ptr + row).to(tl.int64)
        if edited >= 0:
            ours = edited_ptr + edited * edited_stride + columns
            x = tl.load(ours, mask=inside, other=float("-inf"))
    score = x
    if HAS_DRAWS:
        draw = tl.load(draw_places_ptr + row)
        if draw >= 0:
            if HAS_FLOORS:
                score = tl.where(x >= tl.load(floors_ptr + draw), x, float("-inf"))
            # Of a truncated row, most chunks have nothing to draw.
            if tl.max(score, axis=0) > float("-inf"):
                seed, position = tl.load(seeds_ptr + draw), tl.load(positions_ptr + draw)
                sample = tl.load(samples_ptr + draw) if HAS_SAMPLES else position * 0
                noise = gumbel_tile(seed, position, sample, start + first, CHUNK)
                score += tl.load(temperatures_ptr + draw) * noise
    best, lane = tl.max(score, axis=0, return_indices=True)
    field = tl.num_programs(1).to(tl.int64) * tl.num_programs(0)
    found_ptr += row * tl.num_programs(0) + tl.program_id(0)
    tl.store(found_ptr, best)
    tl.store(found_ptr + field, (start + first + lane).to(tl.float32))
    is_best = columns == first + lane
    if HAS_CONFIDENT:
        confident = tl.load(confident_places_ptr + row)
        if confident >= 0:
            scale = 1.0 / tl.load(confidence_temperatures_ptr + confident)
            peak, mass = _peak_and_mass(x, scale)
            tl.store(found_ptr + 2 * field, tl.sum(tl.where(is_best, x, 0.0), axis=0))
            tl.store(found_ptr + 3 * field, peak)
            tl.store(found_ptr + 4 * field, mass)
    if HAS_LOGPROBS:
        wants_logprob = tl.load(logprob_places_ptr + row) >= 0
        if wants_logprob:
            own_peak, own_mass = _peak_and_mass(own, 1.0)
            tl.store(found_ptr + 5 * field, tl.sum(tl.where(is_best, own, 0.0), axis=0))
            tl.store(found_ptr + 6 * field, own_peak)
            tl.store(found_ptr + 7 * field, own_mass)
    if HAS_CANDIDATES:
        candidate = tl.load(candidate_places_ptr + row).to(tl.int64)
        if candidate >= 0:
            ours = scores_ptr + candidate * scores_stride + columns
            tl.store(ours, score, mask=columns < scores_stride)


@triton.jit
def _joined(fields_ptr, field, inside, chosen, scale):
    """Of three fields (logit of the best, peak, mass) of all chunks: (logit of the chosen id below
    the row's peak, the peak, the mass).
    """
    logit = tl.sum(tl.where(chosen, tl.load(fields_ptr, mask=inside, other=0.0), 0.0), axis=0)
    peaks = tl.load(fields_ptr + field, mask=inside, other=float("-inf"))
    masses = tl.load(fields_ptr + 2 * field, mask=inside, other=0.0)
    peak = tl.max(peaks, axis=0)
    return logit - peak, peak, tl.sum(masses * tl.exp((peaks - peak) * scale), axis=0)


@triton.jit
def _join_kernel(
    found_ptr,  # [num_ranks, num_fields, num_answers, num_chunks] float32
    num_chunks,
    num_lanes,  # num_ranks * num_chunks
    last_id,
    token_ids_ptr,  # [num_answers] int64
    confident_places_ptr,  # [num_answers] int32
    confidence_temperatures_ptr,  # [num_confident] float32
    confidences_ptr,  # [num_confident] float32
    logprob_places_ptr,  # [num_answers] int32
    logprobs_ptr,  # [num_logprobs] float32
    normalisers_ptr,  # [num_logprobs] float32
    NUM_FIELDS: tl.constexpr,
    HAS_CONFIDENT: tl.constexpr,
    HAS_LOGPROBS: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    inside = lanes < num_lanes
    field = tl.num_programs(0).to(tl.int64) * num_chunks
    rank = lanes // num_chunks
    ours = found_ptr + rank * NUM_FIELDS * field + row * num_chunks + (lanes - rank * num_chunks)
    scores = tl.load(ours, mask=inside, other=float("-inf"))
    _, best = tl.max(scores, axis=0, return_indices=True)
    chosen = lanes == best
    ids = tl.load(ours + field, mask=inside, other=0.0)
    token_id = tl.sum(tl.where(chosen, ids, 0.0), axis=0).to(tl.int64)
    # A row of NaN may point past the vocabulary.
    tl.store(token_ids_ptr + row, tl.minimum(token_id, last_id))
    if HAS_CONFIDENT:
        confident = tl.load(confident_places_ptr + row)
        if confident >= 0:
            scale = 1.0 / tl.load(confidence_temperatures_ptr + confident)
            logit, _, mass = _joined(ours + 2 * field, field, inside, chosen, scale)
            tl.store(confidences_ptr + confident, tl.exp(logit * scale) / mass)
    if HAS_LOGPROBS:
        place = tl.load(logprob_places_ptr + row)
        if place >= 0:
            own_logit, own_peak, own_mass = _joined(ours + 5 * field, field, inside, chosen, 1.0)
            tl.store(logprobs_ptr + place, own_logit - tl.log(own_mass))
            tl.store(normalisers_ptr + place, own_peak + tl.log(own_mass))


def choose_in_part(
    logits: Tensor,  # [num_answers, part_size]
    edited: EditedRows | None,
    asked: Asked,
    mask_id: int,
    start: int,
    size: int,
) -> tuple[Tensor, Tensor]:
    """What the first `size` columns of the logits, ids from `start` on, hold: ([num_fields,
    num_answers, num_chunks], scores [num_candidate_rows, part_size] of all ids). All float32.
    """
    assert logits.stride(1) == 1
    assert start + size <= MAX_VOCAB_SIZE
    num_answers, part_size = logits.shape
    num_chunks = triton.cdiv(part_size, CHUNK)
    nothing = logits
    found = logits.new_empty(asked.num_fields, num_answers, num_chunks, dtype=torch.float32)
    scores = logits.new_empty(asked.num_candidate_rows, part_size, dtype=torch.float32)
    draws = asked.draws
    samples = None if draws is None else draws.samples
    _chunk_kernel[(num_chunks, num_answers)](
        logits, logits.stride(0),
        nothing if edited is None else edited.logits, part_size, size, start, mask_id - start,
        nothing if edited is None else edited.places,
        nothing if asked.draw_places is None else asked.draw_places,
        nothing if draws is None else draws.temperatures,
        nothing if draws is None else draws.seeds,
        nothing if draws is None else draws.positions,
        nothing if samples is None else samples,
        nothing if asked.floors is None else asked.floors,
        nothing if asked.confident_places is None else asked.confident_places,
        nothing if asked.confidence_temperatures is None else asked.confidence_temperatures,
        nothing if asked.logprob_places is None else asked.logprob_places,
        nothing if asked.candidate_places is None else asked.candidate_places,
        scores, part_size, found,
        HAS_EDITED=edited is not None, HAS_DRAWS=draws is not None,
        HAS_SAMPLES=samples is not None, HAS_FLOORS=asked.floors is not None,
        HAS_CONFIDENT=asked.confident_places is not None,
        HAS_LOGPROBS=asked.logprob_places is not None,
        HAS_CANDIDATES=asked.candidate_places is not None,
        CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
    return found, scores


def join_parts(
    found: Tensor,  # [num_ranks, num_fields, num_answers, num_chunks] float32
    asked: Asked,
    vocab_size: int,
) -> Chosen:
    """The answers, from what all parts of the vocabulary hold; ties go to the lowest id."""
    num_ranks, num_fields, num_answers, num_chunks = found.shape
    temperatures = asked.confidence_temperatures
    num_confident = 0 if temperatures is None else len(temperatures)
    token_ids = found.new_empty(num_answers, dtype=torch.int64)
    confidences = found.new_empty(num_confident)
    logprobs, normalisers = found.new_empty(2, asked.num_logprobs)
    nothing = found
    _join_kernel[(num_answers,)](
        found, num_chunks, num_ranks * num_chunks, vocab_size - 1, token_ids,
        nothing if asked.confident_places is None else asked.confident_places,
        nothing if temperatures is None else temperatures, confidences,
        nothing if asked.logprob_places is None else asked.logprob_places, logprobs, normalisers,
        NUM_FIELDS=num_fields, HAS_CONFIDENT=asked.confident_places is not None,
        HAS_LOGPROBS=asked.logprob_places is not None,
        LANES=triton.next_power_of_2(num_ranks * num_chunks), num_warps=1,
    )  # fmt: skip
    return Chosen(token_ids, confidences, logprobs, normalisers)
