from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from trimode.kernels.draft_adapter import (
    BLOCK_ROWS,
    SPLIT_LEN,
    DraftRows,
    add_draft_adapter_reference,
    add_draft_adapter_triton,
)

SCALE = 4.0
# Of the root mean square of what is added, against the reference in float32: the low-rank rows are
# rounded once, the sum once.
RATIOS = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


@dataclass(frozen=True, slots=True)
class Case:
    """Rows that draft and rows that do not, whose x is NaN."""

    out: Tensor
    x: Tensor
    mask: Tensor
    lora_a: Tensor
    lora_b: Tensor

    def run(self, index: Tensor | slice = slice(None)) -> Tensor:
        """The kernels on these rows of the case, in this order."""
        rows = DraftRows(self.mask[index].contiguous())
        out, x = self.out[index].clone(), self.x[index].contiguous()
        got = add_draft_adapter_triton(out, x, rows, self.lora_a, self.lora_b, SCALE)
        assert got is out
        return got


def build(
    num_tokens: int, in_features: int, out_features: int, rank: int,
    dtype: torch.dtype = torch.float32, device: str = "cpu", share: float = 0.6,
    fenced: Callable[[Tensor], Tensor] = torch.clone,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(num_tokens + rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    mask = torch.rand(num_tokens, generator=generator) < share
    x = normal(num_tokens, in_features)
    x[~mask] = torch.nan
    lora_a, lora_b = normal(rank, in_features) / in_features**0.5, normal(out_features, rank)
    out, x, lora_a, lora_b = (
        fenced(tensor.to(device, dtype))
        for tensor in (normal(num_tokens, out_features), x, lora_a, lora_b)
    )
    return Case(out, x, mask.to(device), lora_a, lora_b)


SHAPES = [
    (1, 8, 8, 4),
    (5, 48, 32, 4),
    (33, 100, 70, 3),
    (70, 130, 65, 20),
    (3, SPLIT_LEN + 76, 17, 16),
    (2, 2 * SPLIT_LEN, 16, 130),
    (2, 40, 96, 256),
]


@pytest.mark.parametrize("dtype", RATIOS, ids=str)
@pytest.mark.parametrize(("num_tokens", "in_features", "out_features", "rank"), SHAPES)
def test_the_kernel_is_near_the_reference(
    num_tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: torch.dtype,
    device: str,
    fenced: Callable[[Tensor], Tensor],
    assert_near: Callable[..., None],
) -> None:
    case = build(
        num_tokens, in_features, out_features, rank, dtype, device, share=0.9, fenced=fenced
    )
    assert case.mask.any()
    out, x, lora_a, lora_b = (
        tensor.float().cpu() for tensor in (case.out, case.x, case.lora_a, case.lora_b)
    )
    mask = case.mask.cpu()
    wanted = add_draft_adapter_reference(out, x, DraftRows(mask), lora_a, lora_b, SCALE)
    got = case.run()
    assert got.dtype == dtype
    added = got.float().cpu() - out
    assert_near("what is added", added[mask], (wanted - out)[mask], RATIOS[dtype])
    assert torch.equal(got[~case.mask], case.out[~case.mask])


def test_nothing_changes_where_nobody_drafts(device: str) -> None:
    case = build(40, 64, 48, 4, device=device, share=0.0)
    assert torch.equal(case.run(), case.out)


def test_blocks_of_rows_that_do_not_draft_are_left_at_once(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cpu":
        pytest.skip("products are counted by the interpreter")
    multiply, num_products = InterpreterBuilder.create_dot, 0

    def counted(*args: Any) -> Any:
        nonlocal num_products
        num_products += 1
        return multiply(*args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    case = build(2 * BLOCK_ROWS + 5, 64, 48, 4, share=1.0)
    case.run(slice(0, 1))
    num_of_one_block = num_products
    case.mask[:] = False
    case.run()
    assert num_products == num_of_one_block
    case.mask[BLOCK_ROWS + 3] = True
    case.run()
    assert num_products == 2 * num_of_one_block > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_the_others_nor_on_its_place(
    dtype: torch.dtype, device: str
) -> None:
    case = build(70, SPLIT_LEN + 200, 80, 20, dtype, device)
    whole = case.run()
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(case.run(order), whole[order])
    for row in case.mask.nonzero()[:3, 0].tolist():
        assert torch.equal(case.run(slice(row, row + 1)), whole[row : row + 1])


def test_rows_past_the_end_are_not_touched(device: str) -> None:
    case = build(33, 48, 32, 4, device=device, share=1.0)
    around = torch.full((66, 32), 7.0, device=device)
    rows = DraftRows(case.mask[:20])
    add_draft_adapter_triton(around[:20], case.x[:20], rows, case.lora_a, case.lora_b, SCALE)
    assert (around[20:] == 7).all()
    assert (around[:20] != 7).any(dim=1).all()


@pytest.mark.parametrize("rank", [128, 256])
def test_it_compiles_for_tensor_cores_of_every_target_without_a_spill(
    rank: int, compile_launches: Callable[..., list[dict[str, Any]]]
) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    rows = DraftRows(torch.empty(32, dtype=torch.bool, device="meta"))

    def launch() -> None:
        add_draft_adapter_triton(
            empty(32, 5120), empty(32, 4096), rows, empty(rank, 4096), empty(5120, rank), SCALE
        )

    for found in compile_launches("trimode.kernels.draft_adapter", launch):
        assert found["tensor_cores"], found
        assert found["spilled_bytes"] == 0, found
