"""How many answers of a verify pass are kept, told on the device, so that the next pass can be
launched before the host has read them.
"""

import torch
from torch import Tensor


def num_accepted_reference(
    token_ids: Tensor,  # [num_tokens] int64: rows of the pass
    answers: Tensor,  # [num_answers] int64
    first_rows: Tensor,  # [num_sequences] int64: row of each sequence's known token
    first_answers: Tensor,  # [num_sequences] int64: its first answer
    counts: Tensor,  # [num_sequences] int64: its answers, at least 1
    max_count: int,
) -> Tensor:
    """[num_sequences] int64: 1 and one more for every draft before the first that its answer
    contradicts. Where a sequence has one answer it is 1, whatever its rows.
    """
    if max_count == 1:
        return torch.ones_like(counts)
    index = torch.arange(max_count - 1, device=token_ids.device)
    # Lanes past a sequence's end read whatever is there and do not count.
    drafts = token_ids[(first_rows[:, None] + 1 + index).clamp(max=len(token_ids) - 1)]
    own = answers[(first_answers[:, None] + index).clamp(max=len(answers) - 1)]
    agrees = (drafts == own) & (index < counts[:, None] - 1)
    return 1 + agrees.cumprod(dim=1).sum(dim=1)


num_accepted = num_accepted_reference
