"""What requests change in their rows of logits before an answer is chosen: penalties, biases, bans,
grammars, forced ids.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimode.kernels.places import places_of

CHUNK = 4096


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """Changes of single logits, as coordinate lists; a (row, id) pair occurs once a list."""

    rows: Tensor  # [num_edited] int64: every row that is named below, once
    penalised_rows: Tensor  # [num_penalised] int64
    penalised_ids: Tensor  # [num_penalised] int64
    penalties: Tensor  # [num_penalised] float64: divides a positive logit, multiplies others
    added_rows: Tensor  # [num_added] int64
    added_ids: Tensor  # [num_added] int64
    additions: Tensor  # [num_added] float64; -inf is a ban
    forced_rows: Tensor  # [num_forced] int64: rows with one possible answer
    forced_ids: Tensor  # [num_forced] int64
    masked_rows: Tensor  # [num_masked] int64: rows that follow a grammar
    allowed: Tensor | None  # [num_masked, vocab_size] bool


def apply_edits(logits: Tensor, edits: LogitEdits) -> None:
    """Change logits [num_answers, vocab_size] in place."""
    if len(edits.penalised_rows):
        where = (edits.penalised_rows, edits.penalised_ids)
        values, penalties = logits[where], edits.penalties.to(logits.dtype)
        logits[where] = torch.where(values > 0, values / penalties, values * penalties)
    if len(edits.added_rows):
        where = (edits.added_rows, edits.added_ids)
        logits[where] = logits[where] + edits.additions.to(logits.dtype)
    if edits.allowed is not None:
        kept = logits[edits.masked_rows].masked_fill(~edits.allowed, -torch.inf)
        logits[edits.masked_rows] = kept
    if len(edits.forced_rows):
        logits[edits.forced_rows] = -torch.inf
        logits[edits.forced_rows, edits.forced_ids] = 0.0


@dataclass(frozen=True, slots=True)
class EditedRows:
    """The rows that differ from the model's own, in float32 whatever the logits are: a small bias
    would be lost in a narrow type.
    """

    logits: Tensor  # [num_edited, part_size] float32
    places: Tensor  # [num_answers] int32: of each row in it, -1 where the row is as it was


@triton.jit
def _copy_kernel(
    logits_ptr,  # [num_answers, size]
    row_stride,
    size,
    start,
    vocab_size,
    mask_id,
    rows_ptr,  # [num_edited] int64
    out_ptr,  # [num_edited, size] float32
    allowed_ptr,  # [num_masked, vocab_size] bool
    allowed_places_ptr,  # [num_answers] int32
    forced_ids_ptr,  # [num_forced] int64
    forced_places_ptr,  # [num_answers] int32
    HAS_ALLOWED: tl.constexpr,
    HAS_FORCED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Rows as they are before single logits change: grammars and forced ids are whole rows."""
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    ids = start + columns
    inside = (columns < size) & (ids < vocab_size)
    row = tl.load(rows_ptr + place)
    x = tl.load(logits_ptr + row * row_stride + columns, mask=inside, other=float("-inf"))
    x = tl.where(ids == mask_id, float("-inf"), x.to(tl.float32))
    if HAS_ALLOWED:
        masked = tl.load(allowed_places_ptr + row)
        if masked >= 0:
            ours = allowed_ptr + masked.to(tl.int64) * vocab_size + ids
            allowed = tl.load(ours, mask=inside, other=0)
            x = tl.where(allowed != 0, x, float("-inf"))
    if HAS_FORCED:
        forced = tl.load(forced_places_ptr + row)
        if forced >= 0:
            x = tl.where(ids == tl.load(forced_ids_ptr + forced), 0.0, float("-inf"))
    tl.store(out_ptr + place * size + columns, x, mask=columns < size)


@triton.jit(do_not_specialize=["num_changes"])
def _change_kernel(
    edited_ptr,  # [num_edited, size] float32
    size,
    start,
    places_ptr,  # [num_answers] int32
    rows_ptr,  # [num_changes] int64
    ids_ptr,  # [num_changes] int64
    values_ptr,  # [num_changes] float64
    num_changes,
    forced_places_ptr,  # [num_answers] int32
    IS_PENALTY: tl.constexpr,
    HAS_FORCED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Penalise or add, except on forced rows, which nothing changes."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_changes
    row = tl.load(rows_ptr + index, mask=inside, other=0)
    column = tl.load(ids_ptr + index, mask=inside, other=0) - start
    inside &= (column >= 0) & (column < size)
    if HAS_FORCED:
        inside &= tl.load(forced_places_ptr + row, mask=inside, other=0) < 0
    place = tl.load(places_ptr + row, mask=inside, other=0).to(tl.int64)
    where = edited_ptr + place * size + column
    x = tl.load(where, mask=inside, other=0.0)
    value = tl.load(values_ptr + index, mask=inside, other=1.0).to(tl.float32)
    if IS_PENALTY:
        x = tl.where(x > 0, tl.div_rn(x, value), x * value)
    else:
        x += value
    tl.store(where, x, mask=inside)


def edited_rows(
    logits: Tensor, edits: LogitEdits, mask_id: int, start: int, vocab_size: int
) -> EditedRows:
    """What apply_edits makes of the rows that it changes, with the mask id banned; logits
    [num_answers, part_size], whose first column is id `start`, stay as they are.
    """
    num_answers, size = logits.shape
    places = places_of(edits.rows, num_answers)
    out = logits.new_empty(len(edits.rows), size, dtype=torch.float32)
    has_forced = len(edits.forced_rows) > 0
    forced_places = places_of(edits.forced_rows, num_answers) if has_forced else places
    has_allowed = edits.allowed is not None
    _copy_kernel[(len(edits.rows), triton.cdiv(size, CHUNK))](
        logits, logits.stride(0), size, start, vocab_size, mask_id, edits.rows, out,
        edits.allowed if has_allowed else out,
        places_of(edits.masked_rows, num_answers) if has_allowed else places,
        edits.forced_ids, forced_places,
        HAS_ALLOWED=has_allowed, HAS_FORCED=has_forced, CHUNK=CHUNK, num_warps=8,
    )  # fmt: skip
    lists = (
        (edits.penalised_rows, edits.penalised_ids, edits.penalties, True),
        (edits.added_rows, edits.added_ids, edits.additions, False),
    )
    for rows, ids, values, is_penalty in lists:
        if len(rows):
            _change_kernel[(triton.cdiv(len(rows), 1024),)](
                out, size, start, places, rows, ids, values, len(rows), forced_places,
                IS_PENALTY=is_penalty, HAS_FORCED=has_forced, BLOCK=1024,
            )  # fmt: skip
    return EditedRows(out, places)
