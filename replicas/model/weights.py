"""Weights between files and a model: loading in the published layout, and saving.

No remote code and no pickle: only safetensors are opened.
"""

import json
from collections.abc import Callable
from pathlib import Path

import structlog
import torch
from safetensors.torch import save_file

from trimode.replicas.model.checkpoint_files import (
    ADAPTER_FILE,
    ADAPTER_FOLDER,
    REQUIRED_ADAPTER_VALUES,
    AdapterConfig,
    weight_files,
)
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.model.parallel import Group
from trimode.replicas.model.quantization import Quantiser, check_quantization
from trimode.replicas.model.safetensors_header import StoredTensor, locate
from trimode.replicas.model.safetensors_reader import LoadReport, Progress, read_tensors
from trimode.replicas.model.target import Target
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel

logger = structlog.get_logger(__name__)


def log_report(report: LoadReport) -> None:
    """What load_model does with its report unless told otherwise."""
    logger.info(
        "weights loaded",
        gb=round(report.read_bytes / 1e9, 2),
        seconds=round(report.seconds, 2),
        gb_per_s=round(report.gb_per_s, 2),
    )


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    adapter: bool = True,
    quantization: str | None = None,
    progress: Progress | None = None,
    on_loaded: Callable[[LoadReport], None] = log_report,
    group: Group | None = None,
) -> NemotronLabsDiffusionModel:
    """Build the model of `folder` with its weights, and with its draft adapter where it has one.

    group: the ranks that share it; only this one's part is kept. None: this one alone.
    Raises CheckpointError that names the file and the missing, surplus or misshapen tensor; memory
    for weights is taken only after everything was found. Raises ConfigError for a quantization that
    the device does not run, and where the model cannot be split over the group.
    """
    device = torch.device(device)
    check_quantization(quantization, device)
    config = ModelConfig.load(folder)
    adapter_config = AdapterConfig.load(folder) if adapter else None
    model = empty_model(config, adapter_config, group)
    stored = locate_weights(folder, model)
    model = model.to(dtype)
    on_filled = None
    if quantization is None:
        model.to_empty(device=device)
    else:
        quantiser = Quantiser(model, device)
        quantiser.place(model)
        on_filled = quantiser.filled
    rotary = type(model.encoder.rotary)(config, model.shard)  # not in any file
    model.encoder.rotary = rotary.to(device)
    on_loaded(read_tensors(stored, _targets(model), progress=progress, on_filled=on_filled))
    return model.eval().requires_grad_(False)


def empty_model(
    config: ModelConfig, adapter: AdapterConfig | None, group: Group | None = None
) -> NemotronLabsDiffusionModel:
    """The model, or one rank's part of it, on the meta device: shapes and no memory."""
    with torch.device("meta"):
        model = NemotronLabsDiffusionModel(config, group)
        if adapter is not None:
            model.add_draft_adapter(adapter.rank, adapter.alpha)
    return model


def locate_weights(folder: Path, model: NemotronLabsDiffusionModel) -> dict[str, StoredTensor]:
    """Where each tensor of a model, its adapter's included, lies in the folder's files.

    Raises CheckpointError as load_model does; no weight is read.
    """
    stored = locate(weight_files(folder), _shapes(model.targets()))
    if model.has_draft_adapter:
        stored |= locate([folder / ADAPTER_FILE], _shapes(model.adapter_targets()))
    return stored


def _targets(model: NemotronLabsDiffusionModel) -> dict[str, Target]:
    adapter = model.adapter_targets() if model.has_draft_adapter else {}
    return model.targets() | adapter


def _shapes(targets: dict[str, Target]) -> dict[str, tuple[int, ...]]:
    return {name: target.stored_shape for name, target in targets.items()}


def save_model(model: NemotronLabsDiffusionModel, folder: Path, dtype: torch.dtype) -> None:
    """Write model.safetensors in the published layout."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: view.to(dtype).contiguous() for name, view in model.published_tensors().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_adapter(model: NemotronLabsDiffusionModel, folder: Path, alpha: float) -> None:
    """Write linear_spec_lora/ in PEFT's layout, in float32 as the published adapters are."""
    tensors = {n: t.float().contiguous() for n, t in model.published_adapter_tensors().items()}
    rank = next(iter(tensors.values())).shape[0]
    target = folder / ADAPTER_FOLDER
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    config = REQUIRED_ADAPTER_VALUES | {"r": rank, "lora_alpha": alpha, "lora_dropout": 0.0}
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
