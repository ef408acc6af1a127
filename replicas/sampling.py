"""What the requests of a pass ask of its answers, as arrays: the host side of kernels/sampling.py.

Rows of requests that ask for nothing special cost nothing here. What depends on the text before a
token (penalties, min_tokens, the thinking budget, grammars) is computed for the prefix that each
row really has: a verify row's prefix holds the drafts before it. Rows of a block pass predict many
positions at once and know only what is committed; the thinking budget also counts what its block
already holds.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trimode.kernels.choice import Draws
from trimode.kernels.logit_edits import LogitEdits
from trimode.kernels.sampling import SamplingInputs
from trimode.kernels.truncation import Truncation
from trimode.replicas.decoding.strategy import PassKind, Query, Stage
from trimode.replicas.scheduled import Scheduled
from trimode.replicas.sequence import Sequence
from trimode.replicas.types import ThinkingBudget

# numpy's here; `kernels.sampling` speaks of the tensors that they become on the device.
Array = Any


def build_sampling(
    scheduled: SequenceOf[Scheduled],
    counts: np.ndarray,  # [num_sequences]: answers of each
    positions: np.ndarray,  # [num_answers] int64: of the rows that answer
    mask_id: int,
    vocab_size: int,
) -> SamplingInputs:
    """Per-sequence parameters repeated over answers; nothing for what nobody asks."""
    requests = [item.sequence.request for item in scheduled]
    queries = [item.query for item in scheduled]

    def rows_where(wanted: list[bool]) -> Array | None:
        """Answer rows of the sequences that want something; None where nobody does."""
        return np.flatnonzero(np.repeat(wanted, counts)) if any(wanted) else None

    def of_rows(values: list[float] | list[int], rows: Array, dtype: type) -> Array:
        return np.array(values, dtype=dtype).repeat(counts)[rows]

    confident = rows_where([query.wants_confidence for query in queries])
    candidates = rows_where([query.num_candidates > 0 for query in queries])
    logprobs = rows_where([request.num_logprobs is not None for request in requests])
    return SamplingInputs(
        mask_id=mask_id,
        draws=_draws(scheduled, rows_where([request.temperature > 0 for request in requests]),
                     counts, positions, vocab_size, of_rows),
        edits=_edits(scheduled, counts, vocab_size),
        confident_rows=confident,
        confidence_temperatures=(
            None if confident is None
            else of_rows([query.confidence_temperature for query in queries], confident, np.float32)
        ),
        candidate_rows=candidates,
        num_candidates=max((query.num_candidates for query in queries), default=0),
        logprob_rows=logprobs,
        num_top=max((request.num_logprobs or 0 for request in requests), default=0),
    )  # fmt: skip


def _draws(
    scheduled: SequenceOf[Scheduled],
    rows: Array | None,
    counts: np.ndarray,
    positions: np.ndarray,
    vocab_size: int,
    of_rows: Callable[[list[float] | list[int], Array, type], Array],
) -> Draws | None:
    if rows is None:
        return None
    requests = [item.sequence.request for item in scheduled]
    # Block passes predict their own position, causal passes the next.
    ahead = [int(item.query.kind is PassKind.CAUSAL) for item in scheduled]
    truncation = None
    is_truncated = [
        r.temperature > 0 and (r.top_k, r.top_p, r.min_p) != (0, 1, 0) for r in requests
    ]
    if any(is_truncated):
        draws: Array = np.flatnonzero(np.repeat(is_truncated, counts)[rows])
        truncation = Truncation(
            draws,
            of_rows([r.top_k or vocab_size for r in requests], rows[draws], np.int64),
            of_rows([r.top_p for r in requests], rows[draws], np.float32),
            of_rows([r.min_p for r in requests], rows[draws], np.float32),
        )
    return Draws(
        rows=rows,
        temperatures=of_rows([r.temperature for r in requests], rows, np.float32),
        seeds=of_rows([r.seed for r in requests], rows, np.int64),
        positions=positions[rows] + of_rows(ahead, rows, np.int64),
        samples=of_rows([item.sequence.sample_index for item in scheduled], rows, np.int64),
        truncation=truncation,
    )


@dataclass(slots=True)
class _Edits:
    """Coordinate lists in the making."""

    penalised: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    added: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    forced: list[tuple[int, int]] = field(default_factory=list)
    masked: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


def _edits(
    scheduled: SequenceOf[Scheduled], counts: np.ndarray, vocab_size: int
) -> LogitEdits | None:
    edits = _Edits()
    ends = counts.cumsum()
    for item, end, count in zip(scheduled, ends, counts, strict=True):
        if count and item.sequence.wants_edits:
            _edit(edits, item.sequence, item.query, int(end - count), vocab_size)
    if not (edits.penalised or edits.added or edits.forced or edits.masked):
        return None
    penalised, added = _joined(edits.penalised), _joined(edits.added)
    forced: Array = np.array(edits.forced, dtype=np.int64).reshape(-1, 2)
    masked: tuple[Array, ...] = tuple(
        np.concatenate(part) for part in zip(*edits.masked, strict=True)
    )
    masked_rows: Array = masked[0] if masked else np.empty(0, dtype=np.int64)
    rows: Array = np.unique(np.concatenate((penalised[0], added[0], forced[:, 0], masked_rows)))
    return LogitEdits(
        rows,
        *penalised,
        *added,
        forced_rows=forced[:, 0],
        forced_ids=forced[:, 1],
        masked_rows=masked_rows,
        allowed=masked[1] if masked else None,
    )


def _joined(
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[Array, Array, Array]:
    if not parts:
        nothing = np.empty(0, dtype=np.int64)
        return nothing, nothing, np.empty(0)
    rows, ids, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    return rows, ids, values


def _edit(edits: _Edits, sequence: Sequence, query: Query, first: int, vocab_size: int) -> None:
    """Add one query's edits; its answers are the rows first, first + 1, ..."""
    request = sequence.request
    answers = np.asarray(query.answers, dtype=np.int64)
    causal = query.kind is PassKind.CAUSAL
    # Row i of a causal pass follows the query's tokens up to i; of a block pass, what is committed.
    depths = answers if causal else np.zeros_like(answers)
    added: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # (rows, ids, values)
    if request.has_penalties:
        rows, ids, counts = _occurrences(sequence, query, depths, vocab_size)
        if request.repetition_penalty != 1:
            penalty = np.full(len(rows), float(request.repetition_penalty))
            edits.penalised.append((first + rows, ids, penalty))
        cost = request.frequency_penalty * counts + request.presence_penalty * (counts > 0)
        added.append((rows, ids, -cost))
    if request.logit_bias:
        biased = np.array([token_id for token_id, _ in request.logit_bias], dtype=np.int64)
        values = np.array([bias for _, bias in request.logit_bias])
        added.append(_on_rows(np.arange(len(answers)), biased, values))
    if request.min_tokens:
        produced = query.start + answers + causal - sequence.num_prompt_tokens
        early = np.flatnonzero(produced < request.min_tokens)
        stops = np.array(sorted(sequence.stop_ids), dtype=np.int64)
        added.append(_on_rows(early, stops, np.full(len(stops), -np.inf)))
    if added:
        edits.added.append(_summed(added, first, vocab_size))
    if sequence.grammar is not None:
        # The grammar stands after the committed text. A prefill has no drafts behind its answer; of
        # a draft pass only the first token follows a text that is known.
        verifies = query.stage is Stage.VERIFY
        allowed = sequence.grammar.masks(list(query.token_ids[1:]) if verifies else [])
        rows = first + np.arange(len(answers) if verifies else 1)
        edits.masked.append((rows, allowed[answers] if verifies else allowed))
    if request.thinking is not None:
        ending = _ending_thinking(sequence, query, request.thinking)
        edits.forced += [(first + row, request.thinking.end_id) for row in ending]


def _ending_thinking(sequence: Sequence, query: Query, thinking: ThinkingBudget) -> list[int]:
    """The answers that must end the thinking: those after a start, with no end since, that lies the
    whole budget back or more. Of a block pass the first one only: once it is filled, it is the end.
    """
    causal = query.kind is PassKind.CAUSAL
    text = np.array([*sequence.token_ids[: query.start + 1], *query.token_ids[1:]], dtype=np.int64)
    marks = np.flatnonzero((text == thinking.start_id) | (text == thinking.end_id))
    lens = query.start + np.asarray(query.answers, dtype=np.int64) + causal  # of each prefix
    last = np.searchsorted(marks, lens) - 1
    rows = []
    for row, (length, index) in enumerate(zip(lens.tolist(), last.tolist(), strict=True)):
        is_open = index >= 0 and text[marks[index]] == thinking.start_id
        if is_open and length - 1 - marks[index] >= thinking.max_tokens:
            rows.append(row)
    return rows if causal else rows[:1]


def _occurrences(
    sequence: Sequence, query: Query, depths: np.ndarray, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, ids, counts in the output) of every id that a row's prefix holds, prompt included."""
    before = np.asarray(sequence.token_ids[: query.start + 1], dtype=np.int64)
    in_output = np.arange(len(before)) >= sequence.num_prompt_tokens
    extra = np.asarray(query.token_ids[1:], dtype=np.int64)
    ids, inverse = np.unique(before, return_inverse=True)
    counts = np.bincount(inverse, weights=in_output, minlength=len(ids))
    extra_rows, which = np.nonzero(np.arange(len(extra))[None, :] < depths[:, None])
    extra_out = query.start + 1 + which >= sequence.num_prompt_tokens
    keys = np.concatenate(
        (
            (np.arange(len(depths))[:, None] * vocab_size + ids).ravel(),
            extra_rows * vocab_size + extra[which],
        )
    )
    weights = np.concatenate((np.tile(counts, len(depths)), extra_out.astype(np.float64)))
    unique, inverse = np.unique(keys, return_inverse=True)
    return unique // vocab_size, unique % vocab_size, np.bincount(inverse, weights=weights)


def _on_rows(
    rows: np.ndarray, ids: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same ids and values on every row."""
    return rows.repeat(len(ids)), np.tile(ids, len(rows)), np.tile(values, len(rows))


def _summed(
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], first: int, vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One entry a (row, id), so that the order of additions is not the device's choice."""
    rows, ids, values = (np.concatenate(part) for part in zip(*parts, strict=True))
    keys, inverse = np.unique(rows * vocab_size + ids, return_inverse=True)
    total = np.zeros(len(keys))
    np.add.at(total, inverse, values)
    return first + keys // vocab_size, keys % vocab_size, total
