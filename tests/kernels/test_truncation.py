from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trimode.kernels import logit_edits, truncation
from trimode.kernels.truncation import (
    Truncation,
    truncate,
    truncation_floors_reference,
    truncation_floors_triton,
)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(6, 20, generator=torch.Generator().manual_seed(5)) * 2


def truncated(row: Tensor, temperature: float = 1.0, **own: float) -> set[int]:
    """The ids that are left of one row."""
    kept = Truncation(
        torch.tensor([0]),
        torch.tensor([int(own.get("top_k", len(row)))]),
        torch.tensor([own.get("top_p", 1.0)]),
        torch.tensor([own.get("min_p", 0.0)]),
    )
    left = truncate(row[None], torch.tensor([temperature]), kept)[0]
    return {index for index, value in enumerate(left.tolist()) if value > -torch.inf}


@pytest.mark.parametrize("top_k", [1, 3, 20])
def test_top_k_leaves_the_k_best(logits: Tensor, top_k: int) -> None:
    assert truncated(logits[0], top_k=top_k) == set(logits[0].topk(top_k).indices.tolist())


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 1.0])
def test_top_p_leaves_the_smallest_set_that_holds_so_much(logits: Tensor, top_p: float) -> None:
    row = logits[0].double()
    order = row.argsort(descending=True).tolist()
    wanted, mass = set(), 0.0
    for index in order:
        if mass >= top_p:
            break
        wanted.add(index)
        mass += float(row.softmax(-1)[index])
    assert truncated(row, top_p=top_p) == wanted


def test_top_p_counts_what_top_k_left(logits: Tensor) -> None:
    row = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert truncated(row, top_p=0.55) == {0, 1}
    assert truncated(row, top_p=0.55, top_k=2) == {0}


def test_min_p_is_a_share_of_the_best_after_the_temperature() -> None:
    row = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert truncated(row, min_p=0.6) == {0, 1}
    assert truncated(row, temperature=5.0, min_p=0.6) == {0, 1, 2, 3}


def test_a_row_that_asks_for_nothing_keeps_what_weighs_nothing() -> None:
    """Sums of float32 would leave it out."""
    assert truncated(torch.tensor([0.0, -40.0, -500.0])) == {0, 1, 2}


MASK = 2
VOCAB_SIZE = 131072  # of the real models
# (top_k, top_p, min_p, temperature) of each row; a top_k of 0 is the whole vocabulary.
ASKED = [
    (0, 1.0, 0.0, 1.0),
    (1, 1.0, 0.0, 0.7),
    (7, 1.0, 0.0, 1.0),
    (0, 0.9, 0.0, 1.3),
    (0, 0.05, 0.0, 1.0),
    (9, 0.6, 0.0, 2.0),
    (0, 1.0, 0.1, 0.9),
    (20, 0.999, 0.02, 0.3),
]


def asked(vocab_size: int, device: str) -> tuple[Tensor, Truncation]:
    top_k, top_p, min_p, temperatures = zip(*ASKED, strict=True)
    kept = Truncation(
        torch.arange(len(ASKED), device=device),
        torch.tensor([k or vocab_size for k in top_k], device=device),
        torch.tensor(top_p, device=device),
        torch.tensor(min_p, device=device),
    )
    return torch.tensor(temperatures, device=device), kept


def poisoned_rows(vocab_size: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random rows with ties and bans; what lies behind each row is NaN."""
    generator = torch.Generator().manual_seed(vocab_size)
    rows = torch.randn(len(ASKED), vocab_size, generator=generator) * 3
    rows[:, ::5] = rows[:, ::5].round()
    rows[:, 3::11] = -torch.inf
    storage = torch.full((len(ASKED), vocab_size + 24), torch.nan)
    storage[:, :vocab_size] = rows
    return storage.to(device, dtype)[:, :vocab_size]


def assert_stays(kept: Tensor, row: Tensor, which: int) -> None:
    """kept [vocab_size] bool is what row `which` asks for, but for the rounding of a sum of
    float32: an id whose rank of mass is as near to top_p, or to min_p, as that may stay or not.
    """
    top_k, top_p, min_p, temperature = ASKED[which]
    wide = row.double() / temperature
    wide[MASK] = -torch.inf
    weights = (wide - wide.max()).exp()
    ranks = (weights[None, :] > weights[:, None]).sum(1)
    in_top_k = ranks < (top_k or len(row))
    of_top_k = torch.where(in_top_k, weights, 0)
    before = torch.where(of_top_k[None, :] > weights[:, None], of_top_k[None, :], 0).sum(1)
    share = before / of_top_k.sum()

    def stays(slack: float) -> Tensor:
        in_top_p = (share < top_p * (1 + slack)) | (top_p == 1)
        return in_top_k & in_top_p & (weights >= min_p * (1 - slack)) & (weights > 0)

    possible = weights > 0
    assert (kept & possible)[stays(-1e-5)].all()
    assert stays(1e-5)[kept & possible].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("vocab_size", "chunk", "max_listed"), [(40, 4096, 4096), (131, 32, 16), (131, 32, 64)]
)
def test_the_kernel_keeps_what_is_asked(
    vocab_size: int,
    chunk: int,
    max_listed: int,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(truncation, "CHUNK", chunk)
    monkeypatch.setattr(truncation, "MAX_LISTED", max_listed)
    logits = poisoned_rows(vocab_size, dtype, device)
    temperatures, kept = asked(vocab_size, device)
    # Another order of the drawn rows than of the answers.
    rows = torch.arange(len(ASKED), device=device).flip(0)
    floors = truncation_floors_triton(logits.flip(0), None, rows, temperatures, kept, MASK)
    for index, row in enumerate(logits.cpu().float()):
        assert_stays(row >= floors[index].item(), row, index)
        reference = truncation_floors_reference(
            row[None].index_fill(1, torch.tensor([MASK]), -torch.inf).double(),
            temperatures[index : index + 1].cpu(),
            Truncation(*(part[index : index + 1].cpu() for part in _parts(kept))),
        )
        assert_stays(row >= reference.item(), row, index)


def _parts(kept: Truncation) -> tuple[Tensor, ...]:
    return kept.draws, kept.top_k, kept.top_p, kept.min_p


def test_edited_rows_are_read_in_their_edited_form(device: str) -> None:
    logits = torch.tensor([[5.0, 4.0, 0.0, 1.0], [5.0, 4.0, 0.0, 1.0]], dtype=torch.bfloat16)
    edited = logit_edits.EditedRows(
        torch.tensor([[1.001, 3.003, 0.0, 3.001]], device=device),
        torch.tensor([-1, 0], dtype=torch.int32, device=device),
    )
    kept = Truncation(
        *(
            torch.tensor(values, device=device)
            for values in ([0, 1], [2, 2], [1.0, 1.0], [0.0, 0.0])
        )
    )
    floors = truncation_floors_triton(
        logits.to(device),
        edited,
        torch.arange(2, device=device),
        torch.ones(2, device=device),
        kept,
        MASK,
    )
    assert floors.tolist() == [4.0, torch.tensor(3.001).item()]


def test_it_compiles_for_every_target_without_a_spill(
    compile_launches: Callable[..., list[dict[str, Any]]],
) -> None:
    def launch() -> None:
        places = torch.empty(8, dtype=torch.int32, device="meta")
        edited = logit_edits.EditedRows(torch.empty(2, VOCAB_SIZE, device="meta"), places)
        temperatures, kept = asked(VOCAB_SIZE, "meta")
        rows = torch.empty(8, dtype=torch.int64, device="meta")
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.empty(8, VOCAB_SIZE, dtype=dtype, device="meta")
            truncation_floors_triton(logits, edited, rows, temperatures, kept, MASK)

    for found in compile_launches("trimode.kernels.truncation", launch):
        assert found["cubin_bytes"] > 0
        assert found["spilled_bytes"] == 0, found
