"""Batch: the tensors of one pass, built from the queries of the sequences that take part.

Dimension names, used everywhere: num_tokens (rows of the pass), num_sequences, num_pages (longest
page table of the pass), num_answers (rows whose prediction is wanted), num_draft_rows.
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimode.kernels.paged_attention import AttentionInputs
from trimode.kernels.sampling import SamplingInputs
from trimode.replicas.decoding.strategy import PassKind
from trimode.replicas.scheduler import Answers, Scheduled


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
    num_answers: np.ndarray  # [num_sequences]
    num_confidences: np.ndarray  # [num_sequences]

    @classmethod
    def build(
        cls,
        scheduled: SequenceOf[Scheduled],
        page_size: int,
        mask_id: int,
        device: torch.device | str = "cpu",
    ) -> "Batch":
        """Lists to tensors. The only loop is over sequences, and it only concatenates."""
        queries = [item.query for item in scheduled]
        lens = np.array([len(query.token_ids) for query in queries])  # [num_sequences]
        starts = np.array([query.start for query in queries])
        query_start = np.concatenate(([0], lens.cumsum()))
        num_tokens = int(query_start[-1])
        owner = np.repeat(np.arange(len(queries)), lens)  # [num_tokens]
        positions = np.arange(num_tokens) - query_start[owner] + starts[owner]

        # A row of a causal pass sees up to itself, a row of a block pass up to the end of its
        # block.
        is_block = np.array([query.kind is not PassKind.CAUSAL for query in queries])
        visible = np.where(is_block[owner], (starts + lens)[owner], positions + 1)

        pages = _page_tables(scheduled, starts + lens, page_size)
        slots = pages[owner, positions // page_size] * page_size + positions % page_size

        counts = np.array([len(query.answers) for query in queries])
        answers = [np.asarray(query.answers, dtype=np.int64) for query in queries]
        answer_rows = np.concatenate(answers) + np.repeat(query_start[:-1], counts)
        drafts = np.array([query.kind is PassKind.DRAFT for query in queries])
        draft_rows = np.flatnonzero(drafts[owner])

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        return cls(
            token_ids=tensor(np.concatenate([np.asarray(q.token_ids) for q in queries])),
            positions=tensor(positions),
            slots=tensor(slots),
            attention=AttentionInputs.build(
                query_start, starts + lens, tensor(visible), tensor(pages), page_size
            ),
            answer_rows=tensor(answer_rows),
            sampling=_sampling(scheduled, counts, positions[answer_rows], mask_id, tensor),
            draft_rows=tensor(draft_rows) if len(draft_rows) else None,
            num_answers=counts,
            num_confidences=np.where([q.wants_confidence for q in queries], counts, 0),
        )

    def split(self, token_ids: Tensor, confidences: Tensor) -> list[Answers]:
        """Give every sequence its part of ids [num_answers] and confidences [num_confident]."""
        ids, values = token_ids.tolist(), confidences.tolist()
        id_ends, value_ends = self.num_answers.cumsum(), self.num_confidences.cumsum()
        return [
            Answers(ids[id_end - num_ids : id_end], values[value_end - num_values : value_end])
            for id_end, num_ids, value_end, num_values in zip(
                id_ends, self.num_answers, value_ends, self.num_confidences, strict=True
            )
        ]


def _page_tables(
    scheduled: SequenceOf[Scheduled], context_lens: np.ndarray, page_size: int
) -> np.ndarray:
    """[num_sequences, num_pages] int64: the pages that the pass touches, 0 beyond a table's end."""
    num_pages = -(-context_lens // page_size)
    tables = np.zeros((len(scheduled), num_pages.max()), dtype=np.int64)
    for row, item, used in zip(tables, scheduled, num_pages, strict=True):
        row[:used] = item.sequence.page_table[:used]
    return tables


def _sampling(
    scheduled: SequenceOf[Scheduled],
    counts: np.ndarray,  # [num_sequences]: answers of each
    answer_positions: np.ndarray,  # [num_answers]
    mask_id: int,
    tensor: Callable[[np.ndarray], Tensor],
) -> SamplingInputs:
    requests = [item.sequence.request for item in scheduled]
    queries = [item.query for item in scheduled]
    temperatures = np.array([r.temperature for r in requests], dtype=np.float32).repeat(counts)
    seeds = np.array([request.seed for request in requests], dtype=np.int64).repeat(counts)
    # Block passes predict their own position, causal passes the next.
    shift = np.array([q.kind is PassKind.CAUSAL for q in queries], dtype=np.int64).repeat(counts)
    confident = np.array([query.wants_confidence for query in queries]).repeat(counts)
    softness = np.array([q.confidence_temperature for q in queries], dtype=np.float32).repeat(
        counts
    )
    sampled_rows, confident_rows = np.flatnonzero(temperatures > 0), np.flatnonzero(confident)
    return SamplingInputs(
        mask_id=mask_id,
        sampled_rows=tensor(sampled_rows) if len(sampled_rows) else None,
        temperatures=tensor(temperatures[sampled_rows]),
        seeds=tensor(seeds[sampled_rows]),
        positions=tensor((answer_positions + shift)[sampled_rows]),
        confident_rows=tensor(confident_rows) if len(confident_rows) else None,
        confidence_temperatures=tensor(softness[confident_rows]),
    )
