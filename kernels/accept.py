"""How many answers of a verify pass are kept, told on the device, so that the next pass can be
launched before the host has read them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimode.kernels.dispatch import by_device


def accept_reference(
    token_ids: Tensor,  # [num_tokens] int32 or int64: rows of the pass
    answers: Tensor,  # [num_answers] int32 or int64
    first_rows: Tensor,  # [num_sequences] int64: row of each sequence's known token
    first_answers: Tensor,  # [num_sequences] int64: its first answer
    counts: Tensor,  # [num_sequences] int64: its answers, at least 1
    max_count: int,
) -> tuple[Tensor, Tensor]:
    """How many answers are kept and the last of them, each sequence's next known token; both
    [num_sequences], like counts and like answers.

    Kept is 1 and one more for every draft before the first that its answer contradicts. Where a
    sequence has one answer it is 1, whatever its rows.
    """
    kept = torch.ones_like(counts)
    if max_count > 1:
        index = torch.arange(max_count - 1, device=token_ids.device)
        # Lanes past a sequence's end read whatever is there and do not count.
        drafts = token_ids[(first_rows[:, None] + 1 + index).clamp(max=len(token_ids) - 1)]
        own = answers[(first_answers[:, None] + index).clamp(max=len(answers) - 1)]
        agrees = (drafts == own) & (index < counts[:, None] - 1)
        kept += agrees.cumprod(dim=1).sum(dim=1)
    return kept, answers[first_answers + kept - 1]


@triton.jit
def _accept_kernel(
    token_ids_ptr,  # [num_tokens]
    answers_ptr,  # [num_answers]
    first_rows_ptr,  # [num_sequences]
    first_answers_ptr,  # [num_sequences]
    counts_ptr,  # [num_sequences]
    kept_ptr,  # [num_sequences]
    last_ids_ptr,  # [num_sequences]
    LANES: tl.constexpr,
):
    """One program a sequence, one lane a draft."""
    sequence = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    num_drafts = tl.load(counts_ptr + sequence) - 1
    row = tl.load(first_rows_ptr + sequence).to(tl.int64)
    answer = tl.load(first_answers_ptr + sequence).to(tl.int64)
    is_draft = lanes < num_drafts
    drafts = tl.load(token_ids_ptr + row + 1 + lanes, mask=is_draft, other=0)
    own = tl.load(answers_ptr + answer + lanes, mask=is_draft, other=0)
    # The first draft that is contradicted, or the end of the drafts.
    agreeing = tl.min(tl.where(is_draft & (drafts == own), LANES, lanes), axis=0)
    tl.store(kept_ptr + sequence, 1 + agreeing)
    tl.store(last_ids_ptr + sequence, tl.load(answers_ptr + answer + agreeing))


def accept_triton(
    token_ids: Tensor,
    answers: Tensor,
    first_rows: Tensor,
    first_answers: Tensor,
    counts: Tensor,
    max_count: int,
) -> tuple[Tensor, Tensor]:
    """As the reference."""
    kept = torch.empty_like(counts)
    last_ids = answers.new_empty(len(counts))
    _accept_kernel[(len(counts),)](
        token_ids, answers, first_rows, first_answers, counts, kept, last_ids,
        LANES=triton.next_power_of_2(max_count), num_warps=1,
    )  # fmt: skip
    return kept, last_ids


accept = by_device(accept_reference, accept_triton)
