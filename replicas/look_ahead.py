"""What a pass takes from the one before it without the host having seen it: the ids that it left on
the device, and how far it got.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from trimode.kernels.pending import KNOWN, PendingInputs, Rows, fill_in
from trimode.replicas.decoding.strategy import Pending, Stage
from trimode.replicas.pass_inputs import AcceptInputs, PassInputs
from trimode.replicas.scheduled import Scheduled
from trimode.replicas.sequence import Sequence

# numpy's on the host, torch's on the device.
Array = Any


@dataclass(frozen=True, slots=True)
class Unread:
    """Where the answers of a launched pass are; on the host."""

    answer_start: np.ndarray  # [num_sequences + 1]: answers of sequence i
    places: dict[Sequence, int]  # which i each sequence is


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a launched pass leaves on the device for the next one."""

    answers: Tensor  # [num_answers] int64
    # None where nobody looks ahead.
    accepted: Tensor | None = None  # [num_sequences] int64: answers kept
    last_ids: Tensor | None = None  # [num_sequences] int64: the last of them


def accept_inputs(
    scheduled: SequenceOf[Scheduled], query_start: np.ndarray, answer_start: np.ndarray
) -> AcceptInputs:
    """What the device needs to tell how many drafts of a pass are kept."""
    verifies = np.array([item.query.stage is Stage.VERIFY for item in scheduled])
    counts = np.where(verifies, np.diff(answer_start), 1)
    # Who has no answer reads another's, which nobody then asks for.
    first_answers = np.minimum(answer_start[:-1], max(0, answer_start[-1] - 1))
    return AcceptInputs(query_start[:-1], first_answers, counts, int(counts.max()))


def pending_inputs(
    scheduled: SequenceOf[Scheduled],
    query_start: np.ndarray,  # [num_sequences + 1], of the new pass
    owner: Array,  # [num_tokens]
    draw_owner: Array | None,  # [num_drawn]
    unread: Unread,
) -> tuple[PendingInputs, np.ndarray]:
    """And how much later than the host knows each sequence may start, [num_sequences]."""
    members: dict[Pending, list[tuple[int, int]]] = {kind: [] for kind in Pending}
    for index, item in enumerate(scheduled):
        if item.query.pending is not None:
            members[item.query.pending].append((index, unread.places[item.sequence]))
    counts = np.diff(unread.answer_start)
    drafts, before = _columns(members[Pending.DRAFTS])
    sources: Array = np.full(len(owner), -1)
    sources[_runs(query_start[drafts] + 1, counts[before])] = _runs(
        unread.answer_start[before], counts[before]
    )
    known, before = _columns(members[Pending.KNOWN])
    sources[query_start[known]] = KNOWN
    at_most = np.zeros(len(scheduled), dtype=np.int64)
    at_most[known] = counts[before] - 1
    befores: Array = np.full(len(scheduled) + 1, -1)
    befores[known] = before
    return PendingInputs(sources, owner, befores, draw_owner), at_most


def resolve(inputs: PassInputs, before: Outputs, page_size: int) -> PassInputs:
    """Fill in what is pending; inputs hold tensors, which may be overwritten."""
    pending, draws = inputs.pending, inputs.sampling.draws
    if pending is None:
        return inputs
    assert before.accepted is not None and before.last_ids is not None, "nobody looked ahead"
    attention = inputs.attention
    given = Rows(
        inputs.token_ids, inputs.positions, inputs.slots, attention.visible,
        None if draws is None else draws.positions,
    )  # fmt: skip
    rows = fill_in(
        before.answers, before.accepted, before.last_ids, given, pending, attention.page_table,
        page_size,
    )  # fmt: skip
    sampling = inputs.sampling
    if draws is not None and rows.draw_positions is not None:
        sampling = replace(sampling, draws=replace(draws, positions=rows.draw_positions))
    return replace(
        inputs,
        token_ids=rows.token_ids,
        positions=rows.positions,
        slots=rows.slots,
        attention=attention.seeing(rows.visible),
        sampling=sampling,
    )


def _columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0].copy(), table[:, 1].copy()


def _runs(starts: np.ndarray, lens: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each run, one after the other."""
    return np.asarray(np.arange(lens.sum()) + np.repeat(starts - (lens.cumsum() - lens), lens))
