"""Checkpoints on disk: the published safetensors layout, memory-mapped and copied straight into
place.

    folder/config.json
    folder/model.safetensors                     or model.safetensors.index.json and its shards
    folder/linear_spec_lora/adapter_config.json  the draft adapter; absent in base checkpoints
    folder/linear_spec_lora/adapter_model.safetensors

No remote code and no pickle: only safetensors are opened.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimode.replicas.errors import CheckpointError
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel

ADAPTER_FOLDER = "linear_spec_lora"
LOADABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Told once with (0, total) and then after every tensor with (bytes so far, total).
Progress = Callable[[int, int], None]

# What the draft adapter's arithmetic takes for granted.
REQUIRED_ADAPTER_VALUES: dict[str, Any] = {
    "peft_type": "LORA",
    "bias": "none",
    "target_modules": ["o_proj"],
    "layers_to_transform": None,
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
}


def load_model(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    adapter: bool = True,
    progress: Progress | None = None,
) -> NemotronLabsDiffusionModel:
    """Build the model of `folder` with its weights, and with its draft adapter where it has one.

    Raises CheckpointError that names the file and the missing, surplus or misshapen tensor.
    """
    config = ModelConfig.load(folder)
    with torch.device("meta"):
        model = NemotronLabsDiffusionModel(config)
    model = model.to(dtype).to_empty(device=device)
    model.encoder.rotary = type(model.encoder.rotary)(config).to(device)  # not in any file

    jobs = [(model.published_tensors(), _shards(folder))]
    adapter_file = folder / ADAPTER_FOLDER / "adapter_model.safetensors"
    if adapter and (folder / ADAPTER_FOLDER).exists():
        rank, alpha = _adapter_shape(folder / ADAPTER_FOLDER / "adapter_config.json")
        model.add_draft_adapter(rank, alpha)
        jobs.append((model.published_adapter_tensors(), [adapter_file]))

    total = sum(view.numel() * view.element_size() for views, _ in jobs for view in views.values())
    done = 0
    if progress is not None:
        progress(done, total)
    for views, files in jobs:
        for size in _copy_into(views, files):
            done += size
            if progress is not None:
                progress(done, total)
    return model.eval().requires_grad_(False)


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


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error!r}") from None
    if not names:
        raise CheckpointError(f"{index}: weight_map names no shard")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: shard {name!r} must be a file name in the same folder")
    return [folder / name for name in names]


def _adapter_shape(path: Path) -> tuple[int, float]:
    """Rank and alpha of an adapter_config.json that asks for nothing we do not do."""
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    for key, wanted in REQUIRED_ADAPTER_VALUES.items():
        if raw.get(key, wanted) != wanted:
            raise CheckpointError(f"{path}: {key} is {raw[key]!r}; supported: {wanted!r}")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise CheckpointError(f"{path}: r must be an integer above 0, is {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"{path}: lora_alpha must be a finite number, is {alpha!r}")
    return rank, float(alpha)


def _copy_into(views: dict[str, Tensor], files: list[Path]) -> Iterator[int]:
    """Copy every tensor of `files` into its view, one at a time; yields the bytes each filled."""
    missing = dict(views)
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict, only keys() iterates
                    view = missing.pop(name, None)
                    if view is None:
                        raise CheckpointError(f"{path}: surplus tensor {name}")
                    source = tensors.get_tensor(name)
                    _check(source, view, f"{path}: tensor {name}")
                    view.copy_(source)
                    yield view.numel() * view.element_size()
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
    if missing:
        shown = ", ".join(sorted(missing)[:3])
        raise CheckpointError(f"{files[0].parent}: {len(missing)} tensors are missing: {shown} ...")


def _check(source: Tensor, view: Tensor, where: str) -> None:
    if source.shape != view.shape:
        raise CheckpointError(
            f"{where} has shape {list(source.shape)}, config.json says {list(view.shape)}"
        )
    if source.dtype not in LOADABLE_DTYPES:
        raise CheckpointError(f"{where} is {source.dtype}; supported: {LOADABLE_DTYPES}")
