"""What the requests of a pass ask of its answers, as tensors: the host side of kernels/sampling.py.

Rows of requests that ask for nothing special cost nothing here. What depends on the text before a
token (penalties, min_tokens, the thinking budget, grammars) is computed for the prefix that each
row really has: a verify row's prefix holds the drafts before it. Rows of a block pass predict many
positions at once and know only what is committed; the thinking budget also counts what its block
already holds.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from trimode.kernels.sampling import LogitEdits, SamplingInputs, Truncation
from trimode.replicas.decoding.strategy import PassKind, Query, Stage
from trimode.replicas.scheduler import Scheduled
from trimode.replicas.sequence import Sequence

ToTensor = Callable[[np.ndarray], Tensor]


def build_sampling(
    scheduled: SequenceOf[Scheduled],
    counts: np.ndarray,  # [num_sequences]: answers of each
    answer_positions: np.ndarray,  # [num_answers]: positions of the answering rows
    mask_id: int,
    vocab_size: int,
    tensor: ToTensor,
) -> SamplingInputs:
    """Per-sequence parameters repeated over answers; edits only for those who want some."""
    requests = [item.sequence.request for item in scheduled]
    queries = [item.query for item in scheduled]

    def each(values: list[float] | list[int] | list[bool], dtype: type) -> np.ndarray:
        return np.array(values, dtype=dtype).repeat(counts)

    temperatures = each([r.temperature for r in requests], np.float32)
    # Block passes predict their own position, causal passes the next.
    shift = each([q.kind is PassKind.CAUSAL for q in queries], np.int64)
    rows = np.flatnonzero(temperatures > 0)
    confident = np.flatnonzero(each([q.wants_confidence for q in queries], bool))
    logprobs = np.flatnonzero(each([r.num_logprobs is not None for r in requests], bool))
    softness = each([q.confidence_temperature for q in queries], np.float32)
    truncation = None
    if len(rows) and any((r.top_k, r.top_p, r.min_p) != (0, 1, 0) for r in requests):
        truncation = Truncation(
            tensor(each([r.top_k or vocab_size for r in requests], np.int64)[rows]),
            tensor(each([r.top_p for r in requests], np.float32)[rows]),
            tensor(each([r.min_p for r in requests], np.float32)[rows]),
        )
    return SamplingInputs(
        mask_id=mask_id,
        sampled_rows=tensor(rows) if len(rows) else None,
        temperatures=tensor(temperatures[rows]),
        seeds=tensor(each([r.seed for r in requests], np.int64)[rows]),
        positions=tensor((answer_positions + shift)[rows]),
        samples=tensor(each([i.sequence.sample_index for i in scheduled], np.int64)[rows]),
        confident_rows=tensor(confident) if len(confident) else None,
        confidence_temperatures=tensor(softness[confident]),
        truncation=truncation,
        edits=_edits(scheduled, counts, vocab_size, tensor),
        logprob_rows=tensor(logprobs) if len(logprobs) else None,
        num_top=max((r.num_logprobs or 0 for r in requests), default=0),
    )


@dataclass(slots=True)
class _Edits:
    """Coordinate lists in the making."""

    penalised: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    added: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    forced: list[tuple[int, int]] = field(default_factory=list)
    masked: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)


def _edits(
    scheduled: SequenceOf[Scheduled], counts: np.ndarray, vocab_size: int, tensor: ToTensor
) -> LogitEdits | None:
    edits = _Edits()
    ends = counts.cumsum()
    for item, end, count in zip(scheduled, ends, counts, strict=True):
        if count and item.sequence.wants_edits:
            _edit(edits, item.sequence, item.query, int(end - count), vocab_size)
    if not (edits.penalised or edits.added or edits.forced or edits.masked):
        return None
    penalised, added = _joined(edits.penalised), _joined(edits.added)
    forced = np.array(edits.forced, dtype=np.int64).reshape(-1, 2)
    masked = [np.concatenate(part) for part in zip(*edits.masked, strict=True)]
    return LogitEdits(
        penalised_rows=tensor(penalised[0]),
        penalised_ids=tensor(penalised[1]),
        penalties=tensor(penalised[2]),
        added_rows=tensor(added[0]),
        added_ids=tensor(added[1]),
        additions=tensor(added[2]),
        forced_rows=tensor(forced[:, 0]),
        forced_ids=tensor(forced[:, 1]),
        masked_rows=tensor(masked[0] if masked else np.empty(0, dtype=np.int64)),
        allowed=tensor(masked[1]) if masked else None,
    )


def _joined(
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
        before = sequence.token_ids[: query.start + 1]
        for row, index in enumerate(query.answers):
            prefix = [*before, *query.token_ids[1 : index + causal]]
            if ends_thinking(prefix, request.thinking.max_tokens, request.thinking.start_id,
                             request.thinking.end_id):  # fmt: skip
                edits.forced.append((first + row, request.thinking.end_id))


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


def ends_thinking(prefix: SequenceOf[int], budget: int, start_id: int, end_id: int) -> bool:
    """Whether the token after prefix must end the thinking: its start lies exactly budget tokens
    back and neither a start nor an end has come since.
    """
    opened = len(prefix) - 1 - budget
    if opened < 0 or prefix[opened] != start_id:
        return False
    since = prefix[opened + 1 :]
    return start_id not in since and end_id not in since
