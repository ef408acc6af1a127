"""PassInputs: everything a device needs for one pass, as arrays and numbers.

The host makes it once. It goes to the device in one copy (array_tree.py) and, under tensor
parallelism, to the other ranks in one message (wire.py): all of them run the same pass on it.

Dimension names, used everywhere: num_tokens (rows of the pass, padding included), num_sequences,
num_pages (longest page table of the pass), num_answers (rows whose prediction is wanted).
"""

from dataclasses import dataclass
from typing import Any

from trimode.kernels.attention_inputs import AttentionInputs
from trimode.kernels.choice import Draws
from trimode.kernels.logit_edits import LogitEdits
from trimode.kernels.pending import PendingInputs
from trimode.kernels.sampling import SamplingInputs
from trimode.kernels.truncation import Truncation
from trimode.replicas.graph_keys import GraphKey

# numpy's on the host, torch's on the device.
Array = Any


@dataclass(frozen=True, slots=True)
class AcceptInputs:
    """Where the drafts of verify queries and their answers are; so that the pass after this one can
    be launched before the host has compared them.
    """

    first_rows: Array  # [num_sequences] int64: row of the known token
    first_answers: Array  # [num_sequences] int64
    counts: Array  # [num_sequences] int64: answers of a verify query, 1 for all others
    max_count: int


@dataclass(frozen=True, slots=True)
class PassInputs:
    """One pass. Rows are grouped by sequence, in the order they were scheduled."""

    token_ids: Array  # [num_tokens] int64, PENDING where the pass before knows
    positions: Array  # [num_tokens] int64; of pending sequences at least
    slots: Array  # [num_tokens] int64: where each row's KV is written, -1 for padding; likewise
    attention: AttentionInputs  # what each row sees likewise
    answer_rows: Array  # [num_answers] int64
    draft_mask: Array | None  # [num_tokens] bool, None where nobody drafts with the adapter
    sampling: SamplingInputs  # of the answer rows
    pending: PendingInputs | None = None
    accept: AcceptInputs | None = None
    copies: Array | None = None  # [num_copies, 2] int64: source and target page, in order
    graph: GraphKey | None = None  # the size that the pass is padded to

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


# What a message of such a tree may hold.
KINDS = (
    PassInputs, PendingInputs, AcceptInputs, GraphKey, AttentionInputs,
    SamplingInputs, Draws, Truncation, LogitEdits,
)  # fmt: skip
