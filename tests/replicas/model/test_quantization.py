"""The float8 decoder: how near it stays, what stays wide, and how it is loaded."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from trimode.cluster.bench.workload import DEFAULT_PROMPTS
from trimode.kernels.draft_adapter import DraftRows
from trimode.kernels.rope import Rotary
from trimode.replicas.config import EngineConfig
from trimode.replicas.errors import CheckpointError, ConfigError
from trimode.replicas.loading import build_engine
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.model.layers import Projection
from trimode.replicas.model.quantization import check_quantization
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel, dense_attention
from trimode.replicas.model.weights import load_model, save_adapter, save_model
from trimode.replicas.types import Mode, Request

CPU = torch.device("cpu")
# Of the bundled checkpoint's logits, against float32: 0.029 as measured, 0.032 of draft rows.
LOGITS_RATIO = 0.04
K_PROJ = "encoder.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def folder(tiny_model: Any, tiny_config_dict: dict[str, Any], tmp_path: Path) -> Path:
    """A model folder with a draft adapter."""
    model = tiny_model(torch.float32)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config_dict))
    save_model(model, tmp_path, torch.float32)
    save_adapter(model, tmp_path, alpha=8.0)
    return tmp_path


@pytest.fixture(scope="module")
def fp8() -> NemotronLabsDiffusionModel:
    """The bundled checkpoint in float8."""
    model = load_model(BUNDLED_CHECKPOINT, torch.float32, quantization="fp8")
    model.prepare()
    return model


@torch.inference_mode()
def logits(model: NemotronLabsDiffusionModel, ids: Tensor, draft_rows: Tensor | None) -> Tensor:
    """Of a dense causal pass."""
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()

    def attend(layer: int, qkv: Tensor, rotary: Rotary) -> Tensor:
        return dense_attention(qkv, rotary, mask)

    rows = None if draft_rows is None else DraftRows(draft_rows)
    return model.logits(model(ids, torch.arange(len(ids)), attend, rows))


@pytest.mark.parametrize("drafts", [False, True])
def test_logits_stay_near_those_of_float32(fp8: NemotronLabsDiffusionModel, drafts: bool) -> None:
    tokenizer = Tokenizer.from_file(str(BUNDLED_CHECKPOINT / "tokenizer.json"))
    ids = torch.tensor(tokenizer.encode("\n".join(DEFAULT_PROMPTS)).ids[:200])
    rows = torch.ones(len(ids), dtype=torch.bool) if drafts else None
    wanted = logits(load_model(BUNDLED_CHECKPOINT, torch.float32), ids, rows)
    error = (logits(fp8, ids, rows) - wanted).norm() / wanted.norm()
    assert LOGITS_RATIO / 2 < error <= LOGITS_RATIO


def test_every_projection_of_the_decoder_is_quantised_and_nothing_else(
    fp8: NemotronLabsDiffusionModel,
) -> None:
    assert fp8.quantization == "fp8"
    quantised = [m for m in fp8.modules() if isinstance(m, Projection) and m.is_quantised]
    assert len(quantised) == 4 * fp8.config.num_layers
    assert not fp8.diffusion_head.is_quantised
    wide = {name: weight.dtype for name, weight in fp8.named_parameters()}
    assert set(wide.values()) == {torch.float32}
    assert not any("_proj" in name for name in wide)
    assert any("lora_a" in name for name in wide)


def test_the_adapter_is_added_from_what_was_not_quantised(tiny_model: Any) -> None:
    layer = copy.deepcopy(tiny_model(torch.float64)).encoder.layers[0].self_attn
    adapter, out_proj = layer.draft_adapter, layer.o_proj
    x = torch.randn(5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide = out_proj(x)
    low = x @ adapter.lora_a.t() @ adapter.lora_b.t() * adapter.scale
    out_proj.quantise(CPU)
    out_proj.prepare(batch_invariant=False)
    plain = out_proj(x)
    got = adapter(plain, x, DraftRows(torch.tensor([True, False, True, False, False])))
    torch.testing.assert_close(got[[0, 2]] - plain[[0, 2]], low[[0, 2]])
    assert torch.equal(got[[1, 3, 4]], plain[[1, 3, 4]])
    assert not torch.equal(plain, wide)


def test_draft_and_verify_share_one_quantised_decoder(drain: Any) -> None:
    engine = build_engine(BUNDLED_CHECKPOINT, EngineConfig(num_pages=64), quantization="fp8")
    assert (engine.info.dtype, engine.info.quantization) == ("float32", "fp8")
    tokenizer = Tokenizer.from_file(str(BUNDLED_CHECKPOINT / "tokenizer.json"))
    prompt = tuple(tokenizer.encode(DEFAULT_PROMPTS[0]).ids)
    outputs = [
        drain(engine, [Request("r", prompt, mode, 24, ignore_eos=True)])["r"]
        for mode in (Mode.AUTOREGRESSIVE, Mode.SELF_SPECULATION)
    ]
    assert outputs[0].token_ids == outputs[1].token_ids
    assert sum(outputs[1].finish.accepted) / len(outputs[1].finish.accepted) > 1.2


def test_wide_weights_are_freed_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide_bytes: list[int] = []  # of filled projections, before each is quantised
    filled: list[Tensor] = []
    quantise = Projection.quantise

    def spy(self: Projection, device: torch.device) -> Any:
        filled.append(self.weight.detach())
        wide_bytes.append(sum(weight.untyped_storage().nbytes() for weight in filled))
        return quantise(self, device)

    monkeypatch.setattr(Projection, "quantise", spy)
    model = load_model(folder, torch.float32, quantization="fp8")
    assert len(wide_bytes) == 4 * model.config.num_layers
    assert wide_bytes == [weight.numel() * 4 for weight in filled]


def test_loading_quantised_is_loading_and_then_quantising(
    folder: Path, tiny_model: Callable[..., NemotronLabsDiffusionModel]
) -> None:
    ids = torch.arange(4, 40)
    loaded = load_model(folder, torch.float32, quantization="fp8")
    later = copy.deepcopy(tiny_model(torch.float32))
    for projection, _ in later.decoder_projections():
        projection.quantise(CPU)
    for model in (loaded, later):
        model.prepare()
    rows = torch.ones(len(ids), dtype=torch.bool)
    assert torch.equal(logits(loaded, ids, rows), logits(later, ids, rows))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(folder: Path, bad: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[K_PROJ][3, 4] = bad
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj.*NaN or an infinity"):
        load_model(folder, torch.float32, quantization="fp8")


def test_a_quantised_model_has_nothing_to_publish(
    fp8: NemotronLabsDiffusionModel, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="quantised"):
        save_model(fp8, tmp_path, torch.float32)


def test_an_unknown_quantization_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigError, match=r"'int3'.*fp8"):
        load_model(BUNDLED_CHECKPOINT, torch.float32, quantization="int3")


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (7, 5)])
def test_a_gpu_without_float8_is_told_what_works(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ConfigError, match=rf"8\.9.*has {capability[0]}\.{capability[1]}.*bfloat16"):
        check_quantization("fp8", torch.device("cuda"))
    check_quantization(None, torch.device("cuda"))


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_a_gpu_with_float8_is_taken(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    check_quantization("fp8", torch.device("cuda"))
