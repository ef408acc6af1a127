"""The backbone against transformers' Ministral3, an independent implementation of it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trimode.kernels.draft_adapter import DraftRows
from trimode.kernels.rope import Rotary
from trimode.replicas.errors import CheckpointError
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.model.layers import RMSNorm, yarn_frequencies
from trimode.replicas.model.transformer import (
    NemotronLabsDiffusionModel,
    dense_attention,
)

LENGTH = 90  # almost three times the original context of 32


def causal_mask(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def block_mask(length: int, block_size: int) -> Tensor:
    """Causal, except that the last block_size rows see each other."""
    mask = causal_mask(length)
    mask[-block_size:] = True
    return mask


def run(
    model: NemotronLabsDiffusionModel,
    ids: Tensor,
    mask: Tensor,
    start: int = 0,
    draft_rows: Tensor | None = None,  # [num_tokens] bool
) -> Tensor:
    """Logits of a dense pass at positions start, start + 1, ..."""

    def attend(layer: int, qkv: Tensor, rotary: Rotary) -> Tensor:
        return dense_attention(qkv, rotary, mask)

    positions = torch.arange(start, start + len(ids))
    rows = None if draft_rows is None else DraftRows(draft_rows)
    return model.logits(model(ids, positions, attend, rows))


@pytest.fixture(scope="module")
def model(tiny_model: Callable[..., NemotronLabsDiffusionModel]) -> NemotronLabsDiffusionModel:
    return tiny_model(torch.float64)


@pytest.fixture(scope="module")
def oracle(model: NemotronLabsDiffusionModel, tiny_config_dict: dict[str, Any]) -> Any:
    """A Ministral3ForCausalLM with the tiny model's weights."""
    from trimode.cluster.bench.transformers_baseline import as_ministral  # here: it takes seconds

    causal_lm = as_ministral(model, tiny_config_dict, attn_implementation="eager")
    # Theirs is float32 to begin with; ours must be judged by the formula, not by that rounding.
    causal_lm.model.rotary_emb.inv_freq = causal_lm.model.rotary_emb.inv_freq.double()
    return causal_lm


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(4, 64, (LENGTH,), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def run_oracle(oracle: Any, ids: Tensor, mask: Tensor, start: int = 0) -> Tensor:
    bias = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
    positions = torch.arange(start, start + len(ids))[None]
    out = oracle(
        input_ids=ids[None],
        attention_mask=bias[None, None],
        position_ids=positions,
        use_cache=False,
    )
    logits: Tensor = out.logits[0]
    return logits


@pytest.mark.parametrize("start", [0, 31, 300])
@pytest.mark.parametrize(
    "mask",
    [causal_mask(LENGTH), block_mask(LENGTH, 32), block_mask(LENGTH, 7)],
    ids=["causal", "block of 32", "block of 7"],
)
def test_logits_equal_those_of_transformers(
    model: NemotronLabsDiffusionModel, oracle: Any, ids: Tensor, mask: Tensor, start: int
) -> None:
    got, wanted = run(model, ids, mask, start), run_oracle(oracle, ids, mask, start)
    # They compute cos and sin in float32 whatever the dtype of the weights.
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert wanted.std() > 1


def test_float32_stays_near_float64(
    model: NemotronLabsDiffusionModel, tiny_model: Any, ids: Tensor
) -> None:
    got = run(tiny_model(torch.float32), ids, causal_mask(LENGTH))
    assert got.dtype == torch.float32
    wanted = run(model, ids, causal_mask(LENGTH))
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3)


def test_yarn_slows_the_slow_dimensions_only(tiny_config: ModelConfig) -> None:
    frequencies, magnitude = yarn_frequencies(tiny_config.rope, tiny_config.head_dim)
    plain = 10000.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    ratio = (frequencies / plain).tolist()
    assert ratio[0] == 1
    assert ratio[2:] == pytest.approx([0.25] * 4)
    assert 0.25 < ratio[1] < 1
    assert magnitude == pytest.approx(1.1386294 / 1.1109035)


def test_a_longer_original_context_changes_late_positions(
    model: NemotronLabsDiffusionModel, tiny_config_dict: dict[str, Any], ids: Tensor
) -> None:
    """So the tests above do see YaRN and the query scaling."""
    rope = tiny_config_dict["rope_parameters"] | {"llama_4_scaling_beta": 1e-9}
    config = ModelConfig.from_dict(tiny_config_dict | {"rope_parameters": rope})
    unscaled = NemotronLabsDiffusionModel(config).to(torch.float64)
    for name, view in unscaled.published_tensors().items():
        view.copy_(model.published_tensors()[name])
    with torch.inference_mode():
        difference = run(unscaled, ids, causal_mask(LENGTH)) - run(model, ids, causal_mask(LENGTH))
    assert difference[:32].abs().max() < 1e-6
    assert difference[40:].abs().max() > 1e-2


def test_the_adapter_changes_draft_rows_only(
    model: NemotronLabsDiffusionModel, ids: Tensor
) -> None:
    mask = block_mask(LENGTH, 8)
    rows = torch.arange(LENGTH) >= LENGTH - 8
    plain, drafted = run(model, ids, mask), run(model, ids, mask, draft_rows=rows)
    assert torch.equal(plain[:-8], drafted[:-8])
    assert (plain[-8:] - drafted[-8:]).abs().amax(-1).min() > 1e-3


def test_the_adapter_adds_its_scaled_product_to_o_proj(
    model: NemotronLabsDiffusionModel, ids: Tensor, tiny_model: Any
) -> None:
    """All rows drafting is o_proj + alpha / rank * B A on all rows."""
    merged = NemotronLabsDiffusionModel(model.config).to(torch.float64)
    adapter = model.published_adapter_tensors()
    for name, view in merged.published_tensors().items():
        view.copy_(model.published_tensors()[name])
        if "o_proj" in name:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            view += 2.0 * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
    with torch.inference_mode():
        wanted = run(merged, ids, causal_mask(LENGTH))
        got = run(model, ids, causal_mask(LENGTH), draft_rows=torch.ones(LENGTH, dtype=torch.bool))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_a_model_without_adapter_ignores_draft_rows(tiny_config: ModelConfig, ids: Tensor) -> None:
    bare = NemotronLabsDiffusionModel(tiny_config).requires_grad_(False)
    assert not bare.has_draft_adapter
    mask = causal_mask(LENGTH)
    assert torch.equal(
        run(bare, ids, mask, draft_rows=torch.arange(LENGTH) < 9), run(bare, ids, mask)
    )


def test_rms_norm_computes_in_float32_for_narrow_input() -> None:
    norm = RMSNorm(512, 1e-5).to(torch.bfloat16)
    x = (torch.randn(4, 512, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    wide = x.float()
    wanted = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    normed, _ = norm(x, None)
    assert normed.dtype == torch.bfloat16
    assert torch.equal(normed, wanted.bfloat16())


def test_published_tensors_are_views_of_the_weights(tiny_config: ModelConfig) -> None:
    model = NemotronLabsDiffusionModel(tiny_config).requires_grad_(False)
    views = model.published_tensors()
    assert sum(view.numel() for view in views.values()) == sum(
        p.numel() for p in model.parameters()
    )
    assert len(views) == 9 * tiny_config.num_layers + 3
    views["encoder.layers.1.self_attn.k_proj.weight"].fill_(7)
    layer = model.encoder.layers[1].self_attn
    assert (layer.qkv_proj.weight == 7).all(-1).nonzero().flatten().tolist() == list(range(48, 72))


def test_a_model_without_adapter_publishes_none(tiny_config: ModelConfig) -> None:
    with pytest.raises(CheckpointError, match="no draft adapter"):
        NemotronLabsDiffusionModel(tiny_config).published_adapter_tensors()


def test_preparing_a_model_changes_no_logit(tiny_model: Any, ids: Tensor) -> None:
    model = copy.deepcopy(tiny_model(torch.float32))
    wanted = run(model, ids, causal_mask(LENGTH))
    model.prepare()
    assert model.diffusion_head.weight.stride() == (1, 64)
    with torch.inference_mode():
        torch.testing.assert_close(
            run(model, ids, causal_mask(LENGTH)), wanted, rtol=1e-4, atol=1e-4
        )
