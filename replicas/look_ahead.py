"""What a pass takes from the one before it without the host having seen it: the ids that it left on
the device, and how far it got.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trimode.replicas.decoding.strategy import Pending, Stage
from trimode.replicas.pass_inputs import AcceptInputs, PassInputs, PendingInputs
from trimode.replicas.scheduled import Scheduled
from trimode.replicas.sequence import Sequence


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
    owner: np.ndarray,  # [num_tokens]
    draw_owner: np.ndarray | None,  # [num_drawn]
    unread: Unread,
) -> tuple[PendingInputs, np.ndarray]:
    """And how much later than the host knows each sequence may start, [num_sequences]."""
    members: dict[Pending, list[tuple[int, int]]] = {kind: [] for kind in Pending}
    for index, item in enumerate(scheduled):
        if item.query.pending is not None:
            members[item.query.pending].append((index, unread.places[item.sequence]))
    counts = np.diff(unread.answer_start)
    drafts, before = _columns(members[Pending.DRAFTS])
    draft_rows = _runs(query_start[drafts] + 1, counts[before])
    draft_answers = _runs(unread.answer_start[before], counts[before])
    known, before = _columns(members[Pending.KNOWN])
    at_most = np.zeros(len(scheduled), dtype=np.int64)
    at_most[known] = counts[before] - 1
    inputs = PendingInputs(
        draft_rows=draft_rows,
        draft_answers=draft_answers,
        known_rows=query_start[known],
        known_sequences=known,
        known_before=before,
        owner=owner,
        draw_owner=draw_owner,
    )
    return inputs, at_most


def resolve(inputs: PassInputs, before: Outputs, page_size: int) -> PassInputs:
    """Fill in what is pending; inputs hold tensors, and token_ids are changed in place."""
    pending = inputs.pending
    if pending is None:
        return inputs
    assert before.accepted is not None and before.last_ids is not None, "nobody looked ahead"
    token_ids, answers = inputs.token_ids, before.answers
    token_ids[pending.draft_rows] = answers[pending.draft_answers]
    token_ids[pending.known_rows] = before.last_ids[pending.known_before]
    attention = inputs.attention
    # One more for padding rows, which stay where they are.
    shifts = token_ids.new_zeros(len(attention.page_table) + 1)
    shifts[pending.known_sequences] = before.accepted[pending.known_before] - 1
    moved = shifts[pending.owner]
    positions = inputs.positions + moved
    rows = pending.owner.clamp(max=len(attention.page_table) - 1)
    pages = attention.page_table[rows, positions // page_size].long()
    slots = pages * page_size + positions % page_size
    sampling = inputs.sampling
    if sampling.draws is not None and pending.draw_owner is not None:
        ahead = sampling.draws.positions + shifts[pending.draw_owner]
        sampling = replace(sampling, draws=replace(sampling.draws, positions=ahead))
    return replace(
        inputs,
        positions=positions,
        slots=torch.where(inputs.slots < 0, inputs.slots, slots),
        attention=attention.seeing(attention.visible + moved),
        sampling=sampling,
    )


def _columns(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return table[:, 0].copy(), table[:, 1].copy()


def _runs(starts: np.ndarray, lens: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each run, one after the other."""
    return np.asarray(np.arange(lens.sum()) + np.repeat(starts - (lens.cumsum() - lens), lens))
