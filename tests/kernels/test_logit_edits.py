from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trimode.kernels import logit_edits
from trimode.kernels.logit_edits import LogitEdits, apply_edits, edited_rows


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(6, 20, generator=torch.Generator().manual_seed(5)) * 2


def edits(**own: list[tuple[int, int, float]]) -> LogitEdits:
    """penalised, added: (row, id, value); forced: (row, id, 0)."""

    def columns(name: str) -> tuple[Tensor, Tensor, Tensor]:
        rows, ids, values = zip(*own.get(name, []), strict=True) if own.get(name) else ((), (), ())
        return (
            torch.tensor(rows, dtype=torch.int64),
            torch.tensor(ids, dtype=torch.int64),
            torch.tensor(values, dtype=torch.float64),
        )

    forced = columns("forced")
    nothing = torch.empty(0, dtype=torch.int64)
    rows = torch.tensor(sorted({row for changes in own.values() for row, _, _ in changes}))
    return LogitEdits(
        rows, *columns("penalised"), *columns("added"), forced[0], forced[1], nothing, None
    )


def test_a_repetition_penalty_lowers_a_logit_of_either_sign() -> None:
    row = torch.tensor([[2.0, -2.0, 1.0]])
    apply_edits(row, edits(penalised=[(0, 0, 2.0), (0, 1, 2.0)]))
    assert row.tolist() == [[1.0, -4.0, 1.0]]


def test_additions_and_bans_change_only_their_logit(logits: Tensor) -> None:
    wanted = logits.clone()
    wanted[2, 5] += 1.5
    wanted[4, 0] = -torch.inf
    apply_edits(logits, edits(added=[(2, 5, 1.5), (4, 0, -torch.inf)]))
    assert torch.equal(logits, wanted)


def test_a_forced_id_is_certain(logits: Tensor) -> None:
    apply_edits(logits, edits(forced=[(1, 7, 0.0)]))
    assert logits[1].softmax(-1)[7] == 1


MASK = 3
VOCAB_SIZE = 131072  # of the real models


def every_edit(vocab_size: int, device: str) -> LogitEdits:
    """Rows 1, 2, 4 and 5 of 6 are edited, 4 by a grammar as well, 5 is also forced."""
    generator = torch.Generator().manual_seed(vocab_size)
    allowed = torch.rand(2, vocab_size, generator=generator) < 0.5
    last = vocab_size - 1
    columns = (
        torch.tensor([4, 1, 5, 2]),
        *(torch.tensor([1, 1, 4, 5]), torch.tensor([0, last, 5, 6])),
        torch.tensor([1.3, 0.7, 2.0, 1.5], dtype=torch.float64),
        *(torch.tensor([1, 1, 4, 5, 5]), torch.tensor([0, 1, last, 6, 7])),
        torch.tensor([0.001, -torch.inf, -3.0, 1.0, -torch.inf], dtype=torch.float64),
        *(torch.tensor([5]), torch.tensor([7])),
        *(torch.tensor([2, 4]), allowed),
    )
    return LogitEdits(*(column.to(device) for column in columns))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("start", "part_size", "vocab_size"),
    [(0, 50, 50), (0, 20, 50), (20, 20, 50), (40, 20, 50)],
    ids=["whole", "first part", "middle part", "padded part"],
)
def test_the_kernel_equals_the_reference(
    start: int,
    part_size: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logit_edits, "CHUNK", 16)
    generator = torch.Generator().manual_seed(1)
    whole = (torch.randn(6, vocab_size, generator=generator) * 3).to(device, dtype)
    wanted = whole.float().clone()
    wanted[:, MASK] = -torch.inf
    edits = every_edit(vocab_size, device)
    apply_edits(wanted, edits)
    size = min(part_size, vocab_size - start)
    part = torch.full((6, part_size + 8), torch.nan, dtype=dtype, device=device)
    part[:, :size] = whole[:, start : start + size]
    before = part.clone()
    got = edited_rows(part[:, :part_size], edits, MASK, start, vocab_size)
    assert got.places.tolist() == [-1, 1, 3, -1, 0, 2]
    assert torch.equal(got.logits[:, :size], wanted[edits.rows, start : start + size])
    assert torch.equal(part.nan_to_num(), before.nan_to_num())


def test_they_compile_for_every_target_without_a_spill(
    compile_launches: Callable[..., list[dict[str, Any]]],
) -> None:
    def launch() -> None:
        logits = torch.empty(6, VOCAB_SIZE, dtype=torch.bfloat16, device="meta")
        edited_rows(logits, every_edit(VOCAB_SIZE, "meta"), MASK, 0, VOCAB_SIZE)

    for found in compile_launches("trimode.kernels.logit_edits", launch):
        assert found["cubin_bytes"] > 0
        assert found["spilled_bytes"] == 0, found
