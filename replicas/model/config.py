"""ModelConfig: the dimensions and constants of one checkpoint, read from its config.json and
nowhere else.
"""

import json
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from trimode.replicas.errors import CheckpointError, ConfigError

# The small tri-mode checkpoint that ships with trimode.
BUNDLED_CHECKPOINT = Path(__file__).parent.parent / "checkpoint"

ARCHITECTURE = "NemotronLabsDiffusionModel"

# What the implementation takes for granted. A checkpoint that says otherwise would decode to
# nonsense.
REQUIRED_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "sliding_window": None,
}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """YaRN rotary embedding (arXiv 2309.00071) and the Llama-4 query scaling that goes with it."""

    theta: float
    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float
    query_scaling_beta: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One checkpoint's config.json; class defaults of the published code are never relied on."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeConfig
    bos_id: int
    eos_id: int
    mask_id: int
    block_size: int

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    def check_ranks(self, size: int) -> None:
        """Raises ConfigError where the model cannot be split over so many ranks."""
        for name, number in (
            ("num_attention_heads", self.num_heads),
            ("intermediate_size", self.intermediate_size),
        ):
            if number % size:
                raise ConfigError(f"tensor_parallel is {size}; it must divide {name} {number}")
        if self.num_kv_heads % size and size % self.num_kv_heads:
            raise ConfigError(
                f"tensor_parallel is {size}; it must divide, or be a multiple of, "
                f"num_key_value_heads {self.num_kv_heads}"
            )

    @classmethod
    def load(cls, folder: Path) -> "ModelConfig":
        """Read folder/config.json.

        Raises CheckpointError that names the file and the key.
        """
        path = folder / "config.json"
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing: {folder} is not a model folder") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path} must hold a JSON object")
        return cls.from_dict(raw, where=str(path))

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> "ModelConfig":
        """Check and convert a parsed config.json; `where` names it in errors."""
        architectures = raw.get("architectures")
        if architectures != [ARCHITECTURE]:
            raise CheckpointError(
                f"{where}: architectures is {architectures}; supported: [{ARCHITECTURE!r}]"
            )
        for key, wanted in REQUIRED_VALUES.items():
            if raw.get(key, wanted) != wanted:
                raise CheckpointError(f"{where}: {key} is {raw[key]!r}; supported: {wanted!r}")
        number = _Reader(raw, where)
        config = cls(
            vocab_size=number.positive_int("vocab_size"),
            hidden_size=number.positive_int("hidden_size"),
            intermediate_size=number.positive_int("intermediate_size"),
            num_layers=number.positive_int("num_hidden_layers"),
            num_heads=number.positive_int("num_attention_heads"),
            num_kv_heads=number.positive_int("num_key_value_heads"),
            head_dim=number.positive_int("head_dim"),
            max_positions=number.positive_int("max_position_embeddings"),
            rms_norm_eps=number.real("rms_norm_eps"),
            rope=_rope(raw.get("rope_parameters"), where),
            bos_id=number.token_id("bos_token_id"),
            eos_id=number.token_id("eos_token_id"),
            mask_id=number.token_id("mask_token_id"),
            block_size=number.positive_int("block_size"),
        )
        if config.num_heads % config.num_kv_heads:
            raise CheckpointError(
                f"{where}: num_attention_heads {config.num_heads} is not a multiple of "
                f"num_key_value_heads {config.num_kv_heads}"
            )
        if config.head_dim % 2:
            raise CheckpointError(f"{where}: head_dim {config.head_dim} must be even for rotary")
        return config


def _rope(raw: Any, where: str) -> RopeConfig:
    where = f"{where}: rope_parameters"
    if not isinstance(raw, dict):
        raise CheckpointError(f"{where} is missing")
    if raw.get("rope_type") != "yarn":
        raise CheckpointError(f"{where}.rope_type is {raw.get('rope_type')!r}; supported: 'yarn'")
    number = _Reader(raw, where)
    theta = number.real("rope_theta")
    if theta <= 1:
        raise CheckpointError(f"{where}: rope_theta must be above 1, is {theta}")
    return RopeConfig(
        theta=theta,
        factor=number.real("factor"),
        original_max_positions=number.positive_int("original_max_position_embeddings"),
        beta_fast=number.real("beta_fast"),
        beta_slow=number.real("beta_slow"),
        mscale=number.real("mscale"),
        mscale_all_dim=number.real("mscale_all_dim"),
        query_scaling_beta=number.real("llama_4_scaling_beta"),
    )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Typed look-ups in a parsed JSON object; every error names the key."""

    raw: dict[str, Any]
    where: str

    def real(self, key: str) -> float:
        value = self.raw.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
            raise CheckpointError(f"{self.where}: {key} must be a number above 0, is {value!r}")
        return float(value)

    def positive_int(self, key: str) -> int:
        value = self.raw.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{self.where}: {key} must be an integer above 0, is {value!r}")
        return value

    def token_id(self, key: str) -> int:
        value, vocab_size = self.raw.get(key), self.positive_int("vocab_size")
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
            raise CheckpointError(
                f"{self.where}: {key} must be a token id in [0, {vocab_size}), is {value!r}"
            )
        return value
