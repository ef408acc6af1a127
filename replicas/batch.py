"""Batch: the tensors of one pass, built from the queries of the sequences that take part.

Dimension names, used everywhere: num_tokens (rows of the pass), num_sequences, num_pages (longest
page table of the pass), num_answers (rows whose prediction is wanted), num_draft_rows.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trimode.kernels.paged_attention import AttentionInputs
from trimode.kernels.sampling import Sampled, SamplingInputs
from trimode.replicas.decoding.strategy import PassKind
from trimode.replicas.sampling import build_sampling
from trimode.replicas.scheduler import Answers, Scheduled
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
    num_answers: np.ndarray  # [num_sequences]
    num_confidences: np.ndarray  # [num_sequences]
    num_logprobs: list[int | None]  # [num_sequences]: alternatives wanted, None for no logprobs

    @classmethod
    def build(
        cls,
        scheduled: SequenceOf[Scheduled],
        page_size: int,
        mask_id: int,
        vocab_size: int,
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
            sampling=build_sampling(
                scheduled, counts, positions[answer_rows], mask_id, vocab_size, tensor
            ),
            draft_rows=tensor(draft_rows) if len(draft_rows) else None,
            num_answers=counts,
            num_confidences=np.where([q.wants_confidence for q in queries], counts, 0),
            num_logprobs=[item.sequence.request.num_logprobs for item in scheduled],
        )

    def split(self, sampled: Sampled) -> list[Answers]:
        """Give every sequence its part."""
        ids, values = sampled.token_ids.tolist(), sampled.confidences.tolist()
        id_ends, value_ends = self.num_answers.cumsum(), self.num_confidences.cumsum()
        answers = [
            Answers(ids[id_end - num_ids : id_end], values[value_end - num_values : value_end])
            for id_end, num_ids, value_end, num_values in zip(
                id_ends, self.num_answers, value_ends, self.num_confidences, strict=True
            )
        ]
        if sampled.logprobs is None or sampled.top_ids is None or sampled.top_logprobs is None:
            return answers
        chosen = sampled.logprobs.tolist()
        top = sampled.top_ids.tolist(), sampled.top_logprobs.tolist()
        first = 0
        for index, (answer, num_top) in enumerate(zip(answers, self.num_logprobs, strict=True)):
            if num_top is None:
                continue
            rows = range(first, first + len(answer.token_ids))
            first += len(answer.token_ids)
            logprobs = [
                TokenLogprobs(
                    chosen[row],
                    tuple(zip(top[0][row][:num_top], top[1][row][:num_top], strict=True)),
                )
                for row in rows
            ]
            answers[index] = Answers(answer.token_ids, answer.confidences, logprobs)
        return answers


def _page_tables(
    scheduled: SequenceOf[Scheduled], context_lens: np.ndarray, page_size: int
) -> np.ndarray:
    """[num_sequences, num_pages] int64: the pages that the pass touches, 0 beyond a table's end."""
    num_pages = -(-context_lens // page_size)
    tables = np.zeros((len(scheduled), num_pages.max()), dtype=np.int64)
    for row, item, used in zip(tables, scheduled, num_pages, strict=True):
        row[:used] = item.sequence.page_table[:used]
    return tables
