"""What a pass takes from the one before it without the host having seen it: the ids that it left on
the device, and how far it got.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimode.kernels.accept import num_accepted
from trimode.replicas.decoding.strategy import Pending
from trimode.replicas.scheduled import Scheduled
from trimode.replicas.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Unread:
    """A launched pass: its rows and, on the device, their answers."""

    token_ids: Tensor  # [num_tokens] int64
    answers: Tensor  # [num_answers] int64
    query_start: np.ndarray  # [num_sequences + 1]: rows of sequence i
    answer_start: np.ndarray  # [num_sequences + 1]: answers of sequence i
    places: dict[Sequence, int]  # which i each sequence is


@dataclass(frozen=True, slots=True)
class Shifts:
    """How much later than the host knew each sequence's query starts."""

    exact: Tensor  # [num_sequences] int64, on the device
    at_most: np.ndarray  # [num_sequences] int64


def fill_pending(
    scheduled: SequenceOf[Scheduled], query_start: np.ndarray, token_ids: Tensor, unread: Unread
) -> Shifts:
    """Replace what is PENDING in token_ids [num_tokens], in place. query_start: of the new pass."""
    device = token_ids.device
    members: dict[Pending, list[tuple[int, int]]] = {kind: [] for kind in Pending}
    for index, item in enumerate(scheduled):
        if item.query.pending is not None:
            members[item.query.pending].append((index, unread.places[item.sequence]))
    counts = np.diff(unread.answer_start)
    if members[Pending.DRAFTS]:
        index, before = np.array(members[Pending.DRAFTS]).T
        targets = _runs(query_start[index] + 1, counts[before])
        sources = _runs(unread.answer_start[before], counts[before])
        token_ids[_on(device, targets)] = unread.answers[_on(device, sources)]
    exact = torch.zeros(len(scheduled), dtype=torch.int64, device=device)
    at_most = np.zeros(len(scheduled), dtype=np.int64)
    if members[Pending.KNOWN]:
        index, before = np.array(members[Pending.KNOWN]).T
        first_answers = _on(device, unread.answer_start[before])
        kept = num_accepted(
            unread.token_ids,
            unread.answers,
            _on(device, unread.query_start[before]),
            first_answers,
            _on(device, counts[before]),
            int(counts[before].max()),
        )
        token_ids[_on(device, query_start[index])] = unread.answers[first_answers + kept - 1]
        exact[_on(device, index)] = kept - 1
        at_most[index] = counts[before] - 1
    return Shifts(exact, at_most)


def _runs(starts: np.ndarray, lens: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each run, one after the other."""
    return np.asarray(np.arange(lens.sum()) + np.repeat(starts - (lens.cumsum() - lens), lens))


def _on(device: torch.device, array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
