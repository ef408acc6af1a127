"""Which rows of a pass are in a list of rows, and where: so that a kernel that visits every row
finds what is asked of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimode.kernels.dispatch import by_device

BLOCK = 128


def places_of_reference(rows: Tensor, num_rows: int) -> Tensor:
    """[num_rows] int32: where each row stands in `rows` [any] int64, which names none twice; -1
    where it does not.
    """
    places = torch.full((num_rows,), -1, dtype=torch.int32, device=rows.device)
    return places.scatter_(0, rows, torch.arange(len(rows), dtype=torch.int32, device=rows.device))


# What changes from pass to pass must not compile the kernel anew.
@triton.jit(do_not_specialize=["num_listed", "num_rows"])
def _places_kernel(
    rows_ptr,  # [num_listed] int64
    places_ptr,  # [num_rows] int32
    num_listed,
    num_rows,
    BLOCK: tl.constexpr,
):
    """One program a block of rows, which it compares with the whole list."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    places = tl.full([BLOCK], -1, tl.int32)
    for first in range(0, num_listed, BLOCK):
        index = first + tl.arange(0, BLOCK)
        listed = tl.load(rows_ptr + index, mask=index < num_listed, other=-1)
        is_here = listed[None, :] == row[:, None]
        places = tl.maximum(places, tl.max(tl.where(is_here, index[None, :], -1), axis=1))
    tl.store(places_ptr + row, places, mask=row < num_rows)


def places_of_triton(rows: Tensor, num_rows: int) -> Tensor:
    """As the reference."""
    places = torch.empty(num_rows, dtype=torch.int32, device=rows.device)
    _places_kernel[(triton.cdiv(num_rows, BLOCK),)](
        rows, places, len(rows), num_rows, BLOCK=BLOCK, num_warps=4
    )
    return places


places_of = by_device(places_of_reference, places_of_triton)
