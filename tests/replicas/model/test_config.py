import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from trimode.replicas.errors import CheckpointError
from trimode.replicas.model.config import ModelConfig


def test_every_field_comes_from_config_json(tiny_config_dict: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(tiny_config_dict)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (64, 32, 48)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 4, 2)
    assert (config.bos_id, config.eos_id, config.mask_id, config.block_size) == (1, 2, 3, 32)
    assert (config.query_width, config.kv_width, config.max_positions) == (48, 24, 512)
    assert (config.rope.factor, config.rope.original_max_positions) == (4.0, 32)


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps",
        "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
        "bos_token_id", "eos_token_id", "mask_token_id", "block_size", "rope_parameters",
        "architectures",
    ],
)  # fmt: skip
def test_a_missing_key_is_named(tiny_config_dict: dict[str, Any], key: str) -> None:
    raw = {name: value for name, value in tiny_config_dict.items() if name != key}
    with pytest.raises(CheckpointError, match=f"here.json.*{key}"):
        ModelConfig.from_dict(raw, where="here.json")


@pytest.mark.parametrize(
    "key",
    [
        "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast",
        "beta_slow", "mscale", "mscale_all_dim", "llama_4_scaling_beta",
    ],
)  # fmt: skip
def test_a_missing_rope_key_is_named(tiny_config_dict: dict[str, Any], key: str) -> None:
    raw = deepcopy(tiny_config_dict)
    del raw["rope_parameters"][key]
    with pytest.raises(CheckpointError, match=rf"rope_parameters.*{key}"):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["LlamaForCausalLM"]),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("tie_word_embeddings", True),
        ("sliding_window", 4096),
        ("vocab_size", 0),
        ("hidden_size", -3),
        ("hidden_size", 32.0),
        ("num_hidden_layers", True),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", float("nan")),
        ("num_key_value_heads", 3),
        ("head_dim", 13),
        ("mask_token_id", 64),
        ("mask_token_id", -1),
        ("eos_token_id", None),
        ("eos_token_id", [2, 3]),
        ("rope_parameters", None),
    ],
)
def test_an_unsupported_value_is_refused_by_name(
    tiny_config_dict: dict[str, Any], key: str, value: object
) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json.*{key}"):
        ModelConfig.from_dict(tiny_config_dict | {key: value})


def test_another_rope_type_is_refused_by_name(tiny_config_dict: dict[str, Any]) -> None:
    rope = tiny_config_dict["rope_parameters"] | {"rope_type": "llama3"}
    with pytest.raises(CheckpointError, match=r"rope_type is 'llama3'; supported: 'yarn'"):
        ModelConfig.from_dict(tiny_config_dict | {"rope_parameters": rope})


def test_unknown_keys_do_no_harm(tiny_config_dict: dict[str, Any]) -> None:
    raw = tiny_config_dict | {"dlm_paradigm": "bidirectional", "torch_dtype": "bfloat16"}
    assert ModelConfig.from_dict(raw) == ModelConfig.from_dict(tiny_config_dict)


def test_load_reads_the_folder(tiny_config_dict: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config_dict))
    assert ModelConfig.load(tmp_path) == ModelConfig.from_dict(tiny_config_dict)


def test_a_folder_without_config_is_no_model_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing.*not a model folder"):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"\xff\xfe", b'"text"'], ids=repr)
def test_a_broken_config_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.load(tmp_path)
