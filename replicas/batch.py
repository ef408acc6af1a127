"""Batch: the tensors of one pass, built from the queries of the sequences that take part.

Dimension names, used everywhere: num_tokens (rows of the pass), num_sequences, num_pages (longest
page table of the pass), num_answers (rows whose prediction is wanted), num_draft_rows.

A pass that is launched before the one before it was read gets on the device what its queries leave
pending: see replicas/look_ahead.py.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from trimode.kernels.draft_adapter import DraftRows
from trimode.kernels.paged_attention import AttentionInputs
from trimode.kernels.sampling import Sampled, SamplingInputs
from trimode.replicas.decoding.strategy import PassKind
from trimode.replicas.look_ahead import Shifts, Unread, fill_pending
from trimode.replicas.sampling import build_sampling
from trimode.replicas.scheduled import Answers, Scheduled
from trimode.replicas.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Batch:
    """One pass. Rows are grouped by sequence, in the order they were scheduled."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    slots: Tensor  # [num_tokens] int64: where each row's KV is written
    attention: AttentionInputs
    answer_rows: Tensor  # [num_answers] int64
    sampling: SamplingInputs  # of the answer rows
    draft_rows: DraftRows | None  # None where nobody drafts with the adapter
    scheduled: SequenceOf[Scheduled]
    query_start: np.ndarray  # [num_sequences + 1]: rows of sequence i
    num_answers: np.ndarray  # [num_sequences]
    num_confidences: np.ndarray  # [num_sequences]
    num_candidates: np.ndarray  # [num_sequences]: answers that come with candidates
    num_logprobs: list[int | None]  # [num_sequences]: alternatives wanted, None for no logprobs

    @classmethod
    def build(
        cls,
        scheduled: SequenceOf[Scheduled],
        page_size: int,
        mask_id: int,
        vocab_size: int,
        device: torch.device | str = "cpu",
        unread: Unread | None = None,
    ) -> "Batch":
        """Lists to tensors. The only loop is over sequences, and it only concatenates.

        unread: the pass before, which pending queries hang on.
        """
        queries = [item.query for item in scheduled]

        def tensor(array: np.ndarray) -> Tensor:
            return torch.as_tensor(array, device=device)

        lens = np.array([len(query.token_ids) for query in queries])  # [num_sequences]
        starts = np.array([query.start for query in queries])
        query_start = np.concatenate(([0], lens.cumsum()))
        owner = np.repeat(np.arange(len(queries)), lens)  # [num_tokens]
        token_ids = tensor(_chained([query.token_ids for query in queries]))
        shifts = None
        if unread is not None and any(query.pending for query in queries):
            shifts = fill_pending(scheduled, query_start, token_ids, unread)

        counts = np.array([len(query.answers) for query in queries])
        answer_rows = _chained([query.answers for query in queries])
        answer_rows += np.repeat(query_start[:-1], counts)
        places = _place(scheduled, query_start, owner, starts, page_size, shifts, device)
        drafts = [query.kind is PassKind.DRAFT for query in queries]
        draft_rows = DraftRows(tensor(np.repeat(drafts, lens))) if any(drafts) else None
        return cls(
            token_ids=token_ids,
            positions=places.positions,
            slots=places.slots,
            attention=places.attention,
            answer_rows=tensor(answer_rows),
            sampling=build_sampling(
                scheduled, counts, places.positions, answer_rows, mask_id, vocab_size, tensor
            ),
            draft_rows=draft_rows,
            scheduled=scheduled,
            query_start=query_start,
            num_answers=counts,
            num_confidences=np.where([q.wants_confidence for q in queries], counts, 0),
            num_candidates=np.where([q.num_candidates for q in queries], counts, 0),
            num_logprobs=[item.sequence.request.num_logprobs for item in scheduled],
        )

    def unread(self, sampled: Sampled) -> Unread:
        """What the next pass may take from this one before it is read."""
        return Unread(
            self.token_ids,
            sampled.token_ids,
            self.query_start,
            np.concatenate(([0], self.num_answers.cumsum())),
            {item.sequence: index for index, item in enumerate(self.scheduled)},
        )

    def split(self, sampled: Sampled) -> list[Answers]:
        """Give every sequence its part."""
        ids = _parts(sampled.token_ids.tolist(), self.num_answers)
        confidences = _parts(sampled.confidences.tolist(), self.num_confidences)
        if sampled.candidates is None and sampled.logprobs is None:
            return [Answers(*own) for own in zip(ids, confidences, strict=True)]
        listed = [] if sampled.candidates is None else sampled.candidates.tolist()
        candidates = _parts(listed, self.num_candidates)
        return [
            Answers(*own)
            for own in zip(ids, confidences, candidates, self._logprobs(sampled), strict=True)
        ]

    def _logprobs(self, sampled: Sampled) -> list[list[TokenLogprobs]]:
        if sampled.logprobs is None or sampled.top_ids is None or sampled.top_logprobs is None:
            return [[]] * len(self.num_answers)
        wanted = np.array([num_top is not None for num_top in self.num_logprobs])
        rows = zip(
            sampled.logprobs.tolist(), sampled.top_ids.tolist(), sampled.top_logprobs.tolist(),
            strict=True,
        )  # fmt: skip
        return [
            [
                TokenLogprobs(chosen, tuple(zip(ids[:num_top], values[:num_top], strict=True)))
                for chosen, ids, values in own
            ]
            for own, num_top in zip(
                _parts(list(rows), self.num_answers * wanted), self.num_logprobs, strict=True
            )
        ]


Value = TypeVar("Value")


def _parts(values: list[Value], counts: np.ndarray) -> list[list[Value]]:
    """The first count values, the next count values, ..."""
    ends = counts.cumsum().tolist()
    return [values[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True)]


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the rows of a pass are in their texts and in the cache, and what they see."""

    positions: Tensor  # [num_tokens] int64
    slots: Tensor  # [num_tokens] int64
    attention: AttentionInputs


def _place(
    scheduled: SequenceOf[Scheduled],
    query_start: np.ndarray,  # [num_sequences + 1]
    owner: np.ndarray,  # [num_tokens]: sequence of each row
    starts: np.ndarray,  # [num_sequences]: as far as the host knows
    page_size: int,
    shifts: Shifts | None,
    device: torch.device | str,
) -> _Places:
    ends = starts + np.diff(query_start)
    positions = np.arange(len(owner)) + (starts - query_start[:-1])[owner]
    # A row of a causal pass sees up to itself, a row of a block pass up to the end of its block.
    visible = positions + 1
    is_block = [item.query.kind is not PassKind.CAUSAL for item in scheduled]
    if any(is_block):
        visible = np.where(np.array(is_block)[owner], ends[owner], visible)
    if shifts is None:
        pages = _page_tables(scheduled, ends, page_size)
        slots = _slots(pages, owner, positions, page_size)
        attention = AttentionInputs.build(query_start, visible, pages, page_size, device)
        return _Places(
            torch.as_tensor(positions, device=device),
            torch.as_tensor(slots, device=device),
            attention,
        )
    pages = _page_tables(scheduled, ends + shifts.at_most, page_size)
    owners = torch.as_tensor(owner, device=device)
    moved = torch.as_tensor(positions, device=device) + shifts.exact[owners]
    moved_slots = _slots(torch.as_tensor(pages, device=device), owners, moved, page_size)
    # The portable attention is laid out by the host and waits for the device here; a kernel need
    # not.
    exact = visible + shifts.exact.cpu().numpy()[owner]
    attention = AttentionInputs.build(query_start, exact, pages, page_size, device)
    return _Places(moved, moved_slots, attention)


Indices = TypeVar("Indices", np.ndarray, Tensor)


def _slots(pages: Indices, owner: Indices, positions: Indices, page_size: int) -> Indices:
    """[num_tokens]: where each row's KV is written."""
    pages = pages[owner, positions // page_size]
    slots: Indices = pages * page_size + positions % page_size
    return slots


def _chained(lists: list[SequenceOf[int]]) -> np.ndarray:
    """One after the other, int64."""
    return np.fromiter(chain.from_iterable(lists), np.int64, sum(map(len, lists)))


def _page_tables(
    scheduled: SequenceOf[Scheduled], context_lens: np.ndarray, page_size: int
) -> np.ndarray:
    """[num_sequences, num_pages] int64: the pages that the pass touches, 0 beyond a table's end."""
    num_pages = -(-context_lens // page_size)
    tables = np.zeros((len(scheduled), num_pages.max()), dtype=np.int64)
    for row, item, used in zip(tables, scheduled, num_pages, strict=True):
        row[:used] = item.sequence.page_table[:used]
    return tables
