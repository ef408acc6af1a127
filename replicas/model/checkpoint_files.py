"""Which files a model folder holds, and what its adapter_config.json says.

folder/config.json
folder/model.safetensors                     or model.safetensors.index.json and its shards
folder/linear_spec_lora/adapter_config.json  the draft adapter; absent in base checkpoints
folder/linear_spec_lora/adapter_model.safetensors
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimode.replicas.errors import CheckpointError

ADAPTER_FOLDER = "linear_spec_lora"
ADAPTER_FILE = f"{ADAPTER_FOLDER}/adapter_model.safetensors"

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


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The shape of a draft adapter."""

    rank: int
    alpha: float

    @classmethod
    def load(cls, folder: Path) -> "AdapterConfig | None":
        """That of a model folder; None where it has no adapter.

        Raises CheckpointError where adapter_config.json asks for something we do not do.
        """
        if not (folder / ADAPTER_FOLDER).exists():
            return None
        path = folder / ADAPTER_FOLDER / "adapter_config.json"
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
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise CheckpointError(f"{path}: lora_alpha must be a number, is {alpha!r}")
        if not math.isfinite(alpha):
            raise CheckpointError(f"{path}: lora_alpha must be finite, is {alpha!r}")
        return cls(rank, float(alpha))


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names. Raises CheckpointError."""
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
