"""Training can be stopped anywhere, and the report leaves loops out."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trimode.replicas.checkpoint import train
from trimode.replicas.checkpoint.corpus import DOMAINS, HELD_OUT_SHARE, has_loop, is_held_out
from trimode.replicas.checkpoint.objective import ar_loss
from trimode.replicas.checkpoint.train import Stage, Trainer


def batches(size: int, random: np.random.Generator) -> Tensor:
    return torch.from_numpy(random.integers(4, 64, (size, 16)))


def run(model: Any, work: Path, num_steps: int) -> None:
    def objective(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        loss = ar_loss(model, tokens)
        return loss, {"ar": loss.item()}

    stage = Stage("ar", num_steps, batch_size=2, learning_rate=1e-3, warmup_steps=2)
    work.mkdir(exist_ok=True)
    Trainer(model, list(model.named_parameters()), work).run(stage, objective, batches)


def fresh(tiny_model: Any) -> Any:
    model = deepcopy(tiny_model(torch.float32))  # the fixture is everybody's
    for layer in model.encoder.layers:
        layer.self_attn.draft_adapter = None
    return model.requires_grad_(True)


def test_a_resumed_run_ends_where_an_unbroken_one_does(tiny_model: Any, tmp_path: Path) -> None:
    unbroken, resumed = fresh(tiny_model), fresh(tiny_model)
    run(unbroken, tmp_path / "a", 6)
    run(resumed, tmp_path / "b", 3)
    run(fresh(tiny_model), tmp_path / "c", 1)  # another run beside it changes nothing
    again = fresh(tiny_model)
    run(again, tmp_path / "b", 6)
    for one, other in zip(unbroken.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_rates_warm_up_stay_and_fall_to_zero() -> None:
    stage = Stage("s", 100, 1, learning_rate=1.0, warmup_steps=10, decay_share=0.5)
    assert [round(stage.rate(step), 2) for step in (0, 9, 50, 75, 99)] == [0.1, 1.0, 1.0, 0.5, 0.02]


@pytest.mark.parametrize("domain", DOMAINS)
def test_about_the_stated_share_of_documents_is_held_out(domain: str) -> None:
    held = sum(is_held_out(domain, f"document {i}") for i in range(24_000))
    assert held == pytest.approx(24_000 / HELD_OUT_SHARE[domain], rel=0.15)


def test_a_completion_that_repeats_sixteen_tokens_is_a_loop() -> None:
    phrase = list(range(16))
    assert has_loop([*phrase, 99, *phrase])
    assert not has_loop([*phrase, 99, *phrase[:15], 98])


def test_the_bundled_files_fit_into_sixteen_mebibytes() -> None:
    kinds = ("*.safetensors", "*.json", "linear_spec_lora/*")
    size = sum(path.stat().st_size for kind in kinds for path in train.CHECKPOINT.glob(kind))
    assert size <= 16 * 1024 * 1024
