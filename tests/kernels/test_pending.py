from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from trimode.kernels.pending import (
    KNOWN,
    PendingInputs,
    Rows,
    fill_in_reference,
    fill_in_triton,
)

PAGE_SIZE = 4


def random_pass(num_sequences: int, device: str, num_padding: int = 3) -> dict[str, Any]:
    """Arguments of both forms: sequences of 1 to 9 rows, every other one after a moved start."""
    generator = torch.Generator().manual_seed(num_sequences)

    def ints(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=generator)

    lens = ints(1, 10, num_sequences)
    num_rows = int(lens.sum())
    owner = torch.arange(num_sequences).repeat_interleave(lens)
    before = torch.where(torch.arange(num_sequences) % 2 == 0, ints(0, 7, num_sequences), -1)
    sources = ints(-1, 20, num_rows)
    firsts = lens.cumsum(0) - lens
    sources[firsts] = torch.where(before >= 0, KNOWN, -1)
    positions = torch.cat([torch.arange(int(n)) for n in lens]) + 5
    padding = (0, num_padding)

    def padded(rows: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(rows, padding, value=value).to(device)

    rows = Rows(
        token_ids=padded(ints(0, 99, num_rows), 0),
        positions=padded(positions, 0),
        slots=padded(positions, -1),
        visible=padded(positions + 1, 0).int(),
        draw_positions=positions[: num_rows // 2].to(device),
    )
    pending = PendingInputs(
        sources=padded(sources, -1),
        owner=padded(owner, num_sequences),
        before=torch.cat((before, torch.tensor([-1]))).to(device),
        draw_owner=owner[: num_rows // 2].to(device),
    )
    table = ints(0, 1000, (num_sequences + 1) * 8).view(num_sequences + 1, 8).int()
    return {
        "answers": ints(0, 99, 20).to(device),
        "accepted": ints(1, 9, 7).to(device),
        "last_ids": ints(0, 99, 7).to(device),
        "rows": rows,
        "pending": pending,
        "page_table": table.to(device),
        "page_size": PAGE_SIZE,
    }


@pytest.mark.parametrize("num_sequences", [1, 2, 60])
@pytest.mark.parametrize("has_draws", [False, True])
def test_the_kernel_equals_the_reference(num_sequences: int, has_draws: bool, device: str) -> None:
    given = random_pass(num_sequences, device)
    if not has_draws:
        given["rows"] = replace(given["rows"], draw_positions=None)
        given["pending"] = replace(given["pending"], draw_owner=None)
    wanted = fill_in_reference(**given)
    assert not torch.equal(wanted.token_ids, given["rows"].token_ids)
    got = fill_in_triton(**given)
    for one, other in zip(astuple(got), astuple(wanted), strict=True):
        assert one is other is None or (one.dtype == other.dtype and torch.equal(one, other))


def test_rows_of_nobody_and_of_padding_stay_as_they_are(device: str) -> None:
    given = random_pass(4, device)
    nobody = replace(
        given["pending"],
        sources=torch.full_like(given["pending"].sources, -1),
        before=torch.full_like(given["pending"].before, -1),
    )
    rows = given["rows"]
    copies = Rows(*(tensor.clone() for tensor in astuple(rows)))
    got = fill_in_triton(**given | {"pending": nobody, "rows": copies})
    for name in ("token_ids", "positions", "visible", "draw_positions"):
        assert torch.equal(getattr(got, name), getattr(rows, name))
    assert (got.slots[-3:] == -1).all()


def test_it_compiles_for_every_target_without_a_spill(
    compile_launches: Callable[..., list[dict[str, Any]]],
) -> None:
    given = random_pass(3, "cpu")

    def launch() -> None:
        fill_in_triton(**given)

    for found in compile_launches("trimode.kernels.pending", launch):
        assert found["cubin_bytes"] > 0
        assert found["spilled_bytes"] == 0, found
