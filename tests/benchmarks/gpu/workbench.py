"""Workbench: random models of published size straight on the device, and runners over them."""

import gc
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog
import torch
from drawn_runner import DrawnRunner

from trimode.replicas.config import EngineConfig
from trimode.replicas.model.checkpoint_files import AdapterConfig
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.model.weights import empty_model
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.startup import settle, start_rank

FIXTURES = Path(__file__).parents[2] / "replicas" / "model" / "fixtures"  # config.json by size
WEIGHT_STD = 0.02  # as the checkpoints were initialised: activations stay finite in bfloat16
MAX_USERS = 128

# Nothing but a trial of this script.
TINY: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 2048,
}  # fmt: skip
TINY_ADAPTER_RANK = 4


def raw_config(size: str) -> dict[str, Any]:
    """The published config.json of '3B', '8B' or '14B'."""
    raw: dict[str, Any] = json.loads((FIXTURES / size / "config.json").read_text())
    return raw


@torch.no_grad()
def random_model(
    config: ModelConfig, adapter: AdapterConfig, dtype: torch.dtype, device: torch.device
) -> NemotronLabsDiffusionModel:
    """A model of that shape on the device, the same every time; no file is involved."""
    model = empty_model(config, adapter).to(dtype).to_empty(device=device)
    model.encoder.rotary = type(model.encoder.rotary)(config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.fill_(1.0)
        else:
            weight.normal_(std=WEIGHT_STD, generator=generator)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class Spec:
    """What runs."""

    size: str
    quantization: str | None = None
    batch_invariant: bool = False

    @property
    def weight_itemsize(self) -> int:
        return 2 if self.quantization is None else 1


@dataclass(slots=True)
class Workbench:
    """Keeps the last model and the last runner, as sections in a row use the same."""

    device: torch.device
    is_tiny: bool = False
    start_facts: dict[str, Any] = field(default_factory=dict)  # of the last runner
    _model: NemotronLabsDiffusionModel | None = None
    _runner: TorchModelRunner | None = None
    _rank: DrawnRunner | None = None
    _model_of: tuple[str, str | None] | None = None
    _runner_of: Spec | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def raw(self, size: str) -> dict[str, Any]:
        return raw_config(size) | (TINY if self.is_tiny else {})

    def adapter(self, size: str) -> AdapterConfig:
        published = AdapterConfig.load(FIXTURES / size)
        assert published is not None
        return replace(published, rank=TINY_ADAPTER_RANK) if self.is_tiny else published

    def config(self, size: str) -> ModelConfig:
        return ModelConfig.from_dict(self.raw(size))

    def engine_config(self, batch_invariant: bool = False) -> EngineConfig:
        """Room for every load; no prefix cache, which would answer a load's second run."""
        config = EngineConfig(
            max_sequences=MAX_USERS,
            max_waiting=2 * MAX_USERS,
            max_step_tokens=8192,
            prefix_cache=False,
            launch_ahead=True,
            batch_invariant=batch_invariant,
            graph_memory_mib=2048,
        )
        if self.is_tiny:
            config = replace(config, num_pages=96, max_sequences=4, max_step_tokens=256)
        return config

    def model(self, size: str, quantization: str | None = None) -> NemotronLabsDiffusionModel:
        if self._model is None or self._model_of != (size, quantization):
            self.release()
            config, adapter = self.config(size), self.adapter(size)
            self._model = random_model(config, adapter, self.dtype, self.device)
            if quantization is not None:
                for projection, _ in self._model.decoder_projections():
                    projection.quantise(self.device)
            self._model_of = (size, quantization)
        return self._model

    def runner(self, spec: Spec) -> tuple[TorchModelRunner, DrawnRunner]:
        """Started as a replica starts one: its KV pool sized, its smaller passes captured."""
        if self._runner is None or self._rank is None or self._runner_of != spec:
            self.drop_runner()
            model = self.model(spec.size, spec.quantization)
            with structlog.testing.capture_logs() as logs:
                config = settle(model, self.engine_config(spec.batch_invariant))
                rank, keys = start_rank(model, config, runner=DrawnRunner)
            assert isinstance(rank, DrawnRunner)
            rank.fill_cache()
            self._rank = rank
            self._runner = TorchModelRunner(model, config, rank, keys)
            self._runner_of = spec
            # What a replica logs: the arithmetic of the KV pool; how many passes were captured.
            self.start_facts = {"kv_pages": config.pages, "start_log": logs}
        return self._runner, self._rank

    def release(self) -> None:
        """Give back all memory."""
        self.drop_runner()
        self._model, self._model_of = None, None
        self._collect()

    def drop_runner(self) -> None:
        """Give back the KV pool and the captured graphs."""
        self._runner, self._rank, self._runner_of = None, None, None
        self._collect()

    def _collect(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
