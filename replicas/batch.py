"""Batch: the tensors of one pass, built from the queries of the sequences that take part.

Dimension names, used everywhere: num_tokens (rows of the pass), num_sequences, num_pages (longest
page table of the pass), num_answers (rows whose prediction is wanted), num_draft_rows.

A pass that is launched before the one before it was read gets on the device what its queries leave
pending: see replicas/look_ahead.py.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

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
    draft_rows: Tensor | None  # [num_draft_rows] int64, None where nobody drafts with the adapter
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
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        lens = np.array([len(query.token_ids) for query in queries])  # [num_sequences]
        starts = np.array([query.start for query in queries])
        query_start = np.concatenate(([0], lens.cumsum()))
        owner = np.repeat(np.arange(len(queries)), lens)  # [num_tokens]
        token_ids = tensor(
            np.concatenate([np.asarray(query.token_ids, dtype=np.int64) for query in queries])
        )
        shifts = None
        if unread is not None and any(query.pending for query in queries):
            shifts = fill_pending(scheduled, query_start, token_ids, unread)

        counts = np.array([len(query.answers) for query in queries])
        answers = [np.asarray(query.answers, dtype=np.int64) for query in queries]
        answer_rows = np.concatenate(answers) + np.repeat(query_start[:-1], counts)
        kinds = np.array([query.kind for query in queries])
        draft_rows = np.flatnonzero((kinds == PassKind.DRAFT)[owner])
        places = _place(scheduled, query_start, owner, starts, kinds != PassKind.CAUSAL,
                        page_size, shifts, tensor)  # fmt: skip
        return cls(
            token_ids=token_ids,
            positions=places.positions,
            slots=places.slots,
            attention=places.attention,
            answer_rows=tensor(answer_rows),
            sampling=build_sampling(
                scheduled, counts, places.positions, answer_rows, mask_id, vocab_size, tensor
            ),
            draft_rows=tensor(draft_rows) if len(draft_rows) else None,
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
    is_block: np.ndarray,  # [num_sequences] bool
    page_size: int,
    shifts: Shifts | None,
    tensor: Callable[[np.ndarray], Tensor],
) -> _Places:
    ends = starts + np.diff(query_start)
    host_positions = np.arange(len(owner)) - query_start[owner] + starts[owner]
    # A row of a causal pass sees up to itself, a row of a block pass up to the end of its block.
    host_visible = np.where(is_block[owner], ends[owner], host_positions + 1)
    positions, visible = tensor(host_positions), tensor(host_visible)
    if shifts is None:
        tables = _page_tables(scheduled, ends, page_size)
        slots = tensor(_slots(tables, owner, host_positions, page_size))
        pages = tensor(tables)
        attention = AttentionInputs.build(query_start, ends, visible, pages, page_size)
        return _Places(positions, slots, attention)
    owners = tensor(owner)
    positions, visible = positions + shifts.exact[owners], visible + shifts.exact[owners]
    at_most = ends + shifts.at_most
    pages = tensor(_page_tables(scheduled, at_most, page_size))
    slots = _slots(pages, owners, positions, page_size)
    exact_ends = tensor(ends) + shifts.exact
    attention = AttentionInputs.build(query_start, at_most, visible, pages, page_size, exact_ends)
    return _Places(positions, slots, attention)


Indices = TypeVar("Indices", np.ndarray, Tensor)


def _slots(pages: Indices, owner: Indices, positions: Indices, page_size: int) -> Indices:
    """[num_tokens]: where each row's KV is written."""
    pages = pages[owner, positions // page_size]
    slots: Indices = pages * page_size + positions % page_size
    return slots


def _page_tables(
    scheduled: SequenceOf[Scheduled], context_lens: np.ndarray, page_size: int
) -> np.ndarray:
    """[num_sequences, num_pages] int64: the pages that the pass touches, 0 beyond a table's end."""
    num_pages = -(-context_lens // page_size)
    tables = np.zeros((len(scheduled), num_pages.max()), dtype=np.int64)
    for row, item, used in zip(tables, scheduled, num_pages, strict=True):
        row[:used] = item.sequence.page_table[:used]
    return tables
