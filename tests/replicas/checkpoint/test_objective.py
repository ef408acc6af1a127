"""A training pass over a doubled sequence is what serving does, for all blocks at once."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from trimode.replicas.checkpoint.muon import orthogonal
from trimode.replicas.checkpoint.objective import (
    adapter_loss,
    doubled_mask,
    joint_loss,
    run_dense,
)

LENGTH, BLOCK = 64, 32


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(4, 64, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def test_a_noisy_row_sees_its_block_and_the_clean_text_before_it() -> None:
    mask = doubled_mask(6, 2)
    seen = mask[3].nonzero().flatten().tolist()  # position 3, in block {2, 3}
    assert seen == [2, 3, 6, 7]


def test_a_clean_row_sees_clean_text_up_to_itself_and_no_noise() -> None:
    assert doubled_mask(6, 2)[6 + 3].nonzero().flatten().tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize("adapter", [False, True])
def test_a_doubled_pass_predicts_what_a_draft_pass_of_each_block_would(
    tiny_model: Any, tokens: torch.Tensor, adapter: bool
) -> None:
    model = tiny_model(torch.float64)
    known = torch.arange(LENGTH) % BLOCK == 0
    noisy = torch.where(known, tokens, model.config.mask_id)
    doubled = run_dense(
        model, torch.cat((noisy, tokens), 1), torch.arange(LENGTH).repeat(2),
        doubled_mask(LENGTH, BLOCK), draft_columns=LENGTH if adapter else 0,
    )[:, BLOCK:LENGTH]  # fmt: skip
    # Serving: the first block is committed text, the second one drafts over it.
    served = torch.cat((tokens[:, :BLOCK], noisy[:, BLOCK:]), 1)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    causal[BLOCK:, BLOCK:] = True
    if adapter:  # the adapter is on in the drafting rows only, which come first here
        order = torch.arange(LENGTH).roll(BLOCK)
        single = run_dense(
            model, served[:, order], order, causal[order][:, order], draft_columns=BLOCK
        )[:, :BLOCK]
    else:
        single = run_dense(model, served, torch.arange(LENGTH), causal)[:, BLOCK:]
    assert torch.allclose(doubled, single, atol=1e-9)


def test_the_joint_loss_is_the_same_for_the_same_generator(
    tiny_model: Any, tokens: torch.Tensor
) -> None:
    model, mask = tiny_model(torch.float32), doubled_mask(LENGTH, BLOCK)
    losses = [
        joint_loss(model, tokens, mask, torch.Generator().manual_seed(5))[0].item()
        for _ in range(2)
    ]
    assert losses[0] == losses[1]


def test_the_adapter_loss_moves_nothing_but_the_adapter(
    tiny_model: Any, tokens: torch.Tensor
) -> None:
    model = deepcopy(tiny_model(torch.float32))  # the fixture is everybody's
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("draft_adapter" in name)
    loss, accepted = adapter_loss(model, tokens, doubled_mask(LENGTH, BLOCK), prompt_len=BLOCK)
    loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {name for name, _ in model.named_parameters() if "draft_adapter" in name}
    assert 0 <= accepted.item() <= BLOCK - 1


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (16, 16)])
def test_an_orthogonalised_matrix_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert values.min() > 0.6 and values.max() < 1.3
