"""What a pass takes from the one before it, on the device: ids, and how far its sequences came."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimode.kernels.dispatch import by_device

KNOWN = -2  # the source of a row whose id is the last answer that its sequence kept
BLOCK = 128

KNOWN_CONSTANT = tl.constexpr(KNOWN)
# What changes from pass to pass must not compile the kernel anew.
SIZES = ("num_tokens", "num_draws", "table_stride")


@dataclass(frozen=True, slots=True)
class PendingInputs:
    """What of a pass the one before it decides, which the host has not read."""

    # [num_tokens] int64: which answer of the pass before is the row's id, KNOWN, -1 for neither
    sources: Tensor
    owner: Tensor  # [num_tokens] int64: sequence of each row; num_sequences for padding
    # [num_sequences + 1] int64: which of the pass before a sequence was whose known token is
    # pending and whose start moves on; -1 for all others, and for padding
    before: Tensor
    draw_owner: Tensor | None  # [num_drawn] int64: sequence of each drawn answer


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a pass and its draws."""

    token_ids: Tensor  # [num_tokens] int64
    positions: Tensor  # [num_tokens] int64
    slots: Tensor  # [num_tokens] int64, -1 for padding
    visible: Tensor  # [num_tokens] int32 or int64
    draw_positions: Tensor | None  # [num_drawn] int64


def fill_in_reference(
    answers: Tensor,  # [num_answers of the pass before] int64
    accepted: Tensor,  # [num_sequences of the pass before] int64: answers kept
    last_ids: Tensor,  # likewise: the last of them
    rows: Rows,  # as far as the host knows; may be overwritten
    pending: PendingInputs,
    page_table: Tensor,  # [num_sequences or more, num_pages] int32 or int64
    page_size: int,
) -> Rows:
    """The rows with nothing pending."""
    sources, owner, before = pending.sources, pending.owner, pending.before
    shifts = (accepted[before.clamp(min=0)] - 1).masked_fill(before < 0, 0)
    moved = shifts[owner]
    ids = torch.where(sources < 0, rows.token_ids, answers[sources.clamp(min=0)])
    ids = torch.where(sources == KNOWN, last_ids[before[owner].clamp(min=0)], ids)
    positions = rows.positions + moved
    pages = page_table[owner.clamp(max=len(page_table) - 1), positions // page_size].long()
    slots = pages * page_size + positions % page_size
    draws = rows.draw_positions
    if draws is not None and pending.draw_owner is not None:
        draws = draws + shifts[pending.draw_owner]
    return Rows(
        token_ids=ids,
        positions=positions,
        slots=torch.where(rows.slots < 0, rows.slots, slots),
        visible=(rows.visible + moved).to(rows.visible.dtype),
        draw_positions=draws,
    )


@triton.jit
def _shift(before_ptr, accepted_ptr, owner, inside):
    """How far the owner's sequence moves on, and which of the pass before it was, or -1."""
    which = tl.load(before_ptr + owner, mask=inside, other=-1)
    return tl.load(accepted_ptr + which, mask=which >= 0, other=1) - 1, which


@triton.jit(do_not_specialize=SIZES)
def _fill_in_kernel(
    answers_ptr, accepted_ptr, last_ids_ptr,
    token_ids_ptr, positions_ptr, slots_ptr, visible_ptr, draw_positions_ptr,
    sources_ptr, owner_ptr, before_ptr, draw_owner_ptr, page_table_ptr,
    num_tokens, num_draws, table_stride,
    page_size: tl.constexpr, HAS_DRAWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a block of rows and as many draws."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < num_tokens
    owner = tl.load(owner_ptr + index, mask=inside, other=0)
    moved, which = _shift(before_ptr, accepted_ptr, owner, inside)
    source = tl.load(sources_ptr + index, mask=inside, other=-1)
    is_answer, is_known = source >= 0, source == KNOWN_CONSTANT
    answer = tl.load(answers_ptr + source, mask=is_answer, other=0)
    known = tl.load(last_ids_ptr + which, mask=is_known, other=0)
    token_id = tl.where(is_answer, answer, known)
    tl.store(token_ids_ptr + index, token_id, mask=is_answer | is_known)
    position = tl.load(positions_ptr + index, mask=inside, other=0) + moved
    tl.store(positions_ptr + index, position, mask=inside)
    visible = tl.load(visible_ptr + index, mask=inside, other=0) + moved
    tl.store(visible_ptr + index, visible.to(visible_ptr.dtype.element_ty), mask=inside)
    is_kept = inside & (tl.load(slots_ptr + index, mask=inside, other=-1) >= 0)
    at = owner * table_stride + position // page_size
    page = tl.load(page_table_ptr + at, mask=is_kept, other=0).to(tl.int64)
    tl.store(slots_ptr + index, page * page_size + position % page_size, mask=is_kept)
    if HAS_DRAWS:
        is_draw = index < num_draws
        draw_owner = tl.load(draw_owner_ptr + index, mask=is_draw, other=0)
        ahead, _ = _shift(before_ptr, accepted_ptr, draw_owner, is_draw)
        drawn = tl.load(draw_positions_ptr + index, mask=is_draw, other=0)
        tl.store(draw_positions_ptr + index, drawn + ahead, mask=is_draw)


def fill_in_triton(
    answers: Tensor,
    accepted: Tensor,
    last_ids: Tensor,
    rows: Rows,
    pending: PendingInputs,
    page_table: Tensor,
    page_size: int,
) -> Rows:
    """As the reference, in place of the rows."""
    draws, draw_owner = rows.draw_positions, pending.draw_owner
    has_draws = draws is not None and draw_owner is not None
    num_tokens = len(rows.token_ids)
    num_draws = 0 if draws is None else len(draws)
    _fill_in_kernel[(triton.cdiv(max(num_tokens, num_draws), BLOCK),)](
        answers, accepted, last_ids,
        rows.token_ids, rows.positions, rows.slots, rows.visible, draws if has_draws else answers,
        pending.sources, pending.owner, pending.before, draw_owner if has_draws else answers,
        page_table, num_tokens, num_draws, page_table.stride(0),
        page_size=page_size, HAS_DRAWS=has_draws, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return rows


fill_in = by_device(fill_in_reference, fill_in_triton)
