"""From logits to token ids, confidences and log-probabilities, one row an answer, whatever pass the
row comes from.

The order is fixed: the mask id is banned, log-probabilities are read, then repetition penalty,
additions (the other penalties, logit bias, bans), allowed ids, forced ids, temperature, top-k,
top-p, min-p, noise, arg max.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimode.kernels.noise import gumbel


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """Changes of single logits, as coordinate lists; a (row, id) pair occurs once a list."""

    penalised_rows: Tensor  # [num_penalised] int64
    penalised_ids: Tensor  # [num_penalised] int64
    penalties: Tensor  # [num_penalised] float64: divides a positive logit, multiplies others
    added_rows: Tensor  # [num_added] int64
    added_ids: Tensor  # [num_added] int64
    additions: Tensor  # [num_added] float64; -inf is a ban
    forced_rows: Tensor  # [num_forced] int64: rows with one possible answer
    forced_ids: Tensor  # [num_forced] int64
    masked_rows: Tensor  # [num_masked] int64: rows that follow a grammar
    allowed: Tensor | None  # [num_masked, vocab_size] bool


@dataclass(frozen=True, slots=True)
class Truncation:
    """What of the distribution is left to the draw, for each drawn row."""

    top_k: Tensor  # [num_drawn] int64, vocab_size for all
    top_p: Tensor  # [num_drawn] float32
    min_p: Tensor  # [num_drawn] float32


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


def sample_reference(logits: Tensor, inputs: SamplingInputs) -> Sampled:
    """logits [num_answers, vocab_size], changed in place -> Sampled.

    id = argmax(logits + T * gumbel(seed, position, sample, id)) draws from softmax(logits / T); at
    T = 0 it is plain argmax. Confidence is softmax(edited logits / confidence temperature) at the
    id. Log-probabilities are the model's own. The mask id is never an answer.
    """
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
        count = min(inputs.num_candidates, logits.shape[1])
        candidates = scores[inputs.candidate_rows].topk(count, dim=-1).indices
    if own is None or inputs.logprob_rows is None:
        return Sampled(token_ids, confidences, candidates)
    top = own.topk(inputs.num_top, dim=-1)
    chosen = own.gather(1, token_ids[inputs.logprob_rows, None])[:, 0]
    return Sampled(token_ids, confidences, candidates, chosen, top.indices, top.values)


def _with_noise(logits: Tensor, draws: Draws) -> Tensor:
    """logits [num_drawn, vocab_size] -> scores whose arg max is the draw."""
    noise = gumbel(draws.seeds, draws.positions, logits.shape[1], draws.samples)
    if draws.truncation is not None:
        logits = truncate(logits, draws.temperatures, draws.truncation)
    return logits + draws.temperatures[:, None] * noise


def apply_edits(logits: Tensor, edits: LogitEdits) -> None:
    """Change logits [num_answers, vocab_size] in place."""
    if len(edits.penalised_rows):
        where = (edits.penalised_rows, edits.penalised_ids)
        values, penalties = logits[where], edits.penalties.to(logits.dtype)
        logits[where] = torch.where(values > 0, values / penalties, values * penalties)
    if len(edits.added_rows):
        where = (edits.added_rows, edits.added_ids)
        logits[where] = logits[where] + edits.additions.to(logits.dtype)
    if edits.allowed is not None:
        kept = logits[edits.masked_rows].masked_fill(~edits.allowed, -torch.inf)
        logits[edits.masked_rows] = kept
    if len(edits.forced_rows):
        logits[edits.forced_rows] = -torch.inf
        logits[edits.forced_rows, edits.forced_ids] = 0.0


def truncate(logits: Tensor, temperatures: Tensor, kept: Truncation) -> Tensor:
    """-inf where top-k, then top-p of what top-k left, or min-p excludes an id; ties stay together.

    logits [num_drawn, vocab_size] before the temperature, which the probabilities are read at.
    """
    probabilities = (logits / temperatures[:, None]).softmax(-1)
    ordered = probabilities.sort(dim=-1, descending=True).values
    kth = ordered.gather(1, (kept.top_k - 1).clamp(max=logits.shape[1] - 1)[:, None])
    of_top_k = torch.where(ordered >= kth, ordered, 0)
    mass = of_top_k.cumsum(-1)
    # An id stays while those before it hold less than top_p of what top-k left.
    stays = (mass - of_top_k) < kept.top_p.to(mass.dtype)[:, None] * mass[:, -1:]
    lowest = torch.where(stays & (of_top_k > 0), ordered, torch.inf).amin(-1, keepdim=True)
    floor = torch.maximum(lowest, kept.min_p.to(mass.dtype)[:, None] * ordered[:, :1])
    return logits.masked_fill(probabilities < floor, -torch.inf)


sample = sample_reference
