"""Batch: one pass as the host sees it: what goes to the device, and whose the answers are.

A pass that is launched before the one before it was read gets on the device what its queries leave
pending: see replicas/look_ahead.py.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from itertools import chain
from typing import TypeVar

import numpy as np

from trimode.kernels.sampling import Sampled
from trimode.replicas.decoding.strategy import PassKind, Query
from trimode.replicas.graph_keys import GraphKeys
from trimode.replicas.look_ahead import Unread, accept_inputs, pending_inputs
from trimode.replicas.page_tables import PageCopy
from trimode.replicas.pass_inputs import PassInputs
from trimode.replicas.pass_size import Size, filled
from trimode.replicas.sampling import build_sampling
from trimode.replicas.scheduled import Answers, Scheduled
from trimode.replicas.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What is the same for every pass of an engine."""

    page_size: int
    mask_id: int
    vocab_size: int
    launch_ahead: bool = False  # the next pass may be launched before this one was read
    batch_invariant: bool = False
    graph_keys: GraphKeys | None = None  # sizes that passes are padded to


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows are grouped by sequence, in the order they were scheduled."""

    inputs: PassInputs  # of numpy arrays
    scheduled: SequenceOf[Scheduled]
    answer_start: np.ndarray  # [num_sequences + 1]: answers of sequence i
    num_confidences: np.ndarray  # [num_sequences]
    num_candidates: np.ndarray  # [num_sequences]: answers that come with candidates
    num_logprobs: list[int | None]  # [num_sequences]: alternatives wanted, None for no logprobs

    @classmethod
    def build(
        cls,
        scheduled: SequenceOf[Scheduled],
        limits: BatchLimits,
        before: "Batch | None" = None,
        copies: SequenceOf[PageCopy] = (),
    ) -> "Batch":
        """Lists to arrays. The only loop is over sequences, and it only concatenates.

        before: the pass that pending queries hang on.
        """
        queries = [item.query for item in scheduled]
        rows = _Rows.of(queries)
        inputs = _inputs(scheduled, rows, limits, None if before is None else before.unread())
        if copies:
            inputs = replace(inputs, copies=np.array([(c.source, c.target) for c in copies]))
        counts = rows.num_answers
        return cls(
            inputs=inputs,
            scheduled=scheduled,
            answer_start=rows.answer_start,
            num_confidences=np.where([q.wants_confidence for q in queries], counts, 0),
            num_candidates=np.where([q.num_candidates for q in queries], counts, 0),
            num_logprobs=[item.sequence.request.num_logprobs for item in scheduled],
        )

    @property
    def num_answers(self) -> np.ndarray:  # [num_sequences]
        return np.diff(self.answer_start)

    def unread(self) -> Unread:
        """Where the next pass finds this one's answers before they are read."""
        places = {item.sequence: index for index, item in enumerate(self.scheduled)}
        return Unread(self.answer_start, places)

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
class _Rows:
    """How queries lie in the rows of a pass, before padding."""

    query_start: np.ndarray  # [num_sequences + 1]: rows of sequence i
    owner: np.ndarray  # [num_tokens]: sequence of each row
    positions: np.ndarray  # [num_tokens], as far as the host knows
    ends: np.ndarray  # [num_sequences]: the position after each query, likewise
    answer_start: np.ndarray  # [num_sequences + 1]: answers of sequence i
    answer_rows: np.ndarray  # [num_answers]

    @classmethod
    def of(cls, queries: SequenceOf[Query]) -> "_Rows":
        lens = np.array([len(query.token_ids) for query in queries])
        starts = np.array([query.start for query in queries])
        counts = np.array([len(query.answers) for query in queries])
        query_start = np.concatenate(([0], lens.cumsum()))
        owner = np.repeat(np.arange(len(queries)), lens)
        answer_rows = _chained([query.answers for query in queries])
        return cls(
            query_start=query_start,
            owner=owner,
            positions=np.arange(len(owner)) + (starts - query_start[:-1])[owner],
            ends=starts + lens,
            answer_start=np.concatenate(([0], counts.cumsum())),
            answer_rows=answer_rows + np.repeat(query_start[:-1], counts),
        )

    @property
    def num_answers(self) -> np.ndarray:  # [num_sequences]
        return np.diff(self.answer_start)


def _inputs(
    scheduled: SequenceOf[Scheduled], rows: _Rows, limits: BatchLimits, unread: Unread | None
) -> PassInputs:
    queries = [item.query for item in scheduled]
    num_tokens, num_sequences = len(rows.owner), len(queries)
    is_draft = np.array([query.kind is PassKind.DRAFT for query in queries])
    drafts, graph = bool(is_draft.any()), None
    if limits.graph_keys is not None:
        graph = limits.graph_keys.find(num_tokens, num_sequences, drafts)
    if graph is not None:
        drafts = graph.drafts  # none in a model without an adapter, whoever asks for it
    size = Size(num_tokens, num_sequences) if graph is None else Size.of(graph)
    sampling = build_sampling(
        scheduled,
        rows.num_answers,
        rows.positions[rows.answer_rows],
        limits.mask_id,
        limits.vocab_size,
    )
    pending, reach = None, rows.ends  # how far each sequence's pages must go
    if unread is not None and any(query.pending for query in queries):
        draws = sampling.draws
        drawn = None if draws is None else rows.owner[rows.answer_rows[draws.rows]]
        owner = filled(rows.owner, size.num_tokens, num_sequences)
        pending, at_most = pending_inputs(scheduled, rows.query_start, owner, drawn, unread)
        reach = reach + at_most
    pages = _page_tables(scheduled, reach, limits.page_size)
    slots = _slots(pages, rows, limits.page_size)
    ids = _chained([query.token_ids for query in queries])
    return PassInputs(
        token_ids=filled(ids, size.num_tokens, 0),
        positions=filled(rows.positions, size.num_tokens, 0),
        slots=filled(slots, size.num_tokens, -1),
        attention=size.attention(
            rows.query_start, _visible(queries, rows), pages, limits.page_size,
            limits.batch_invariant,
        ),
        answer_rows=rows.answer_rows,
        draft_mask=filled(is_draft[rows.owner], size.num_tokens, 0) if drafts else None,
        sampling=sampling,
        pending=pending,
        accept=(
            accept_inputs(scheduled, rows.query_start, rows.answer_start)
            if limits.launch_ahead else None
        ),
        graph=graph,
    )  # fmt: skip


def _visible(queries: SequenceOf[Query], rows: _Rows) -> np.ndarray:
    """[num_tokens]: a row of a causal pass sees up to itself, a row of a block pass up to the end
    of its block.
    """
    is_block = [query.kind is not PassKind.CAUSAL for query in queries]
    if not any(is_block):
        return rows.positions + 1
    owner = rows.owner
    return np.where(np.array(is_block)[owner], rows.ends[owner], rows.positions + 1)


def _slots(pages: np.ndarray, rows: _Rows, page_size: int) -> np.ndarray:
    """[num_tokens]: where each row's KV is written."""
    page = pages[rows.owner, rows.positions // page_size].astype(np.int64)
    return np.asarray(page * page_size + rows.positions % page_size)


def _chained(lists: list[SequenceOf[int]]) -> np.ndarray:
    """One after the other, int64."""
    return np.fromiter(chain.from_iterable(lists), np.int64, sum(map(len, lists)))


def _page_tables(
    scheduled: SequenceOf[Scheduled], context_lens: np.ndarray, page_size: int
) -> np.ndarray:
    """[num_sequences, num_pages] int32: the pages that the pass touches, 0 beyond a table's end."""
    num_pages = -(-context_lens // page_size)
    tables = np.zeros((len(scheduled), num_pages.max()), dtype=np.int32)
    for row, item, used in zip(tables, scheduled, num_pages.tolist(), strict=True):
        row[:used] = item.sequence.page_table[:used]
    return tables
