import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimode.replicas.errors import CheckpointError
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.model.weights import load_model, save_adapter, save_model

K_PROJ = "encoder.layers.1.self_attn.k_proj.weight"
LORA_A = "base_model.model.encoder.layers.1.self_attn.o_proj.lora_A.weight"


@pytest.fixture
def model(tiny_model: Callable[..., NemotronLabsDiffusionModel]) -> NemotronLabsDiffusionModel:
    return tiny_model(torch.float32)


@pytest.fixture
def folder(
    model: NemotronLabsDiffusionModel, tiny_config_dict: dict[str, Any], tmp_path: Path
) -> Path:
    """A model folder with a draft adapter."""
    (tmp_path / "config.json").write_text(json.dumps(tiny_config_dict))
    save_model(model, tmp_path, torch.float32)
    save_adapter(model, tmp_path, alpha=8.0)
    return tmp_path


def tensors_of(model: NemotronLabsDiffusionModel) -> dict[str, Tensor]:
    return model.published_tensors() | model.published_adapter_tensors()


def change_tensors(path: Path, **changes: Tensor | None) -> None:
    """Replace, add or (None) drop tensors of a safetensors file."""
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_shards(folder: Path, *, index: dict[str, str] | None = None) -> None:
    """Split model.safetensors in two, named by an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    content = {"weight_map": weight_map if index is None else index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def fails(folder: Path, *parts: str) -> None:
    """Assert that loading fails with a CheckpointError whose text holds all parts in order."""
    pattern = "(?s)" + ".*".join(re.escape(part) for part in parts)
    with pytest.raises(CheckpointError, match=pattern):
        load_model(folder, torch.float32)


def test_a_saved_model_loads_bit_for_bit(model: NemotronLabsDiffusionModel, folder: Path) -> None:
    loaded = load_model(folder, torch.float32)
    wanted = tensors_of(model)
    got = tensors_of(loaded)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert loaded.encoder.layers[0].self_attn.draft_adapter.scale == 2.0


def test_a_loaded_model_answers_as_the_saved_one(
    model: NemotronLabsDiffusionModel, folder: Path, reference: Any
) -> None:
    ids = list(range(4, 60))
    wanted = reference.block_pass(model, ids, [9, 3, 3, 3], adapter=True)
    got = reference.block_pass(load_model(folder, torch.float32), ids, [9, 3, 3, 3], adapter=True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_folder_of_shards_loads_like_one_file(
    model: NemotronLabsDiffusionModel, folder: Path
) -> None:
    write_shards(folder)
    got, wanted = tensors_of(load_model(folder, torch.float32)), tensors_of(model)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32, torch.float64])
def test_files_of_any_float_type_load_into_any_dtype(
    model: NemotronLabsDiffusionModel, folder: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    save_model(model, folder, stored)
    got = load_model(folder, wanted).published_tensors()
    for name, tensor in model.published_tensors().items():
        assert torch.equal(got[name], tensor.to(stored).to(wanted)), name


def test_a_folder_without_adapter_gives_a_model_without(
    model: NemotronLabsDiffusionModel, tiny_config_dict: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config_dict))
    save_model(model, tmp_path, torch.float32)
    assert not load_model(tmp_path, torch.float32).has_draft_adapter


def test_the_adapter_can_be_left_out(folder: Path) -> None:
    assert load_model(folder, torch.float32).has_draft_adapter
    assert not load_model(folder, torch.float32, adapter=False).has_draft_adapter


def test_a_loaded_model_needs_no_gradient(folder: Path) -> None:
    loaded = load_model(folder, torch.float32)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_progress_starts_at_zero_and_ends_at_the_total(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    loaded = load_model(folder, torch.float64, progress=lambda done, of: told.append((done, of)))
    total = 8 * sum(tensor.numel() for tensor in tensors_of(loaded).values())
    assert told[0] == (0, total)
    assert told[-1] == (total, total)
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert len(told) == 1 + len(tensors_of(loaded))


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder / "model.safetensors", **{K_PROJ: None})
    fails(folder, str(folder), "1 tensors are missing", K_PROJ)


def test_a_surplus_tensor_is_named(folder: Path) -> None:
    change_tensors(folder / "model.safetensors", extra=torch.zeros(2))
    fails(folder, "model.safetensors", "surplus tensor extra")


def test_a_misshapen_tensor_is_named_with_both_shapes(folder: Path) -> None:
    change_tensors(folder / "model.safetensors", **{K_PROJ: torch.zeros(32, 24)})
    fails(folder, "model.safetensors", K_PROJ, "[32, 24]", "[24, 32]")


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int64, "I64"), (torch.float64, "F64"), (torch.uint8, "U8")]
)
def test_a_tensor_of_another_type_is_named(folder: Path, dtype: torch.dtype, name: str) -> None:
    change_tensors(folder / "model.safetensors", **{K_PROJ: torch.zeros(24, 32, dtype=dtype)})
    fails(folder, K_PROJ, name, "supported: F16, BF16, F32")


def test_a_missing_weight_file_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    fails(folder, "model.safetensors", "missing")


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 200], ids=len)
def test_a_broken_weight_file_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    fails(folder, "model.safetensors", "not a readable safetensors file")


def test_a_truncated_weight_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    fails(folder, "model.safetensors", "not a readable safetensors file")


def test_a_missing_shard_is_named(folder: Path) -> None:
    write_shards(folder)
    (folder / "b.safetensors").unlink()
    fails(folder, "b.safetensors", "missing")


@pytest.mark.parametrize("shard", ["../a.safetensors", "/a.safetensors", "b/a.safetensors", 7])
def test_an_index_cannot_point_outside_its_folder(folder: Path, shard: str) -> None:
    write_shards(folder, index={K_PROJ: shard})
    fails(folder, "index.json", repr(shard), "file name in the same folder")


@pytest.mark.parametrize("shard", ["", ".", ".."])
def test_an_index_cannot_point_to_a_folder(folder: Path, shard: str) -> None:
    write_shards(folder, index={K_PROJ: shard})
    fails(folder, str(folder))


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": {}}}'], ids=str
)
def test_a_broken_index_is_named(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    fails(folder, "model.safetensors.index.json", "cannot be read")


def test_a_tensor_in_two_shards_is_named(folder: Path) -> None:
    write_shards(folder)
    twice = load_file(folder / "a.safetensors")
    change_tensors(folder / "b.safetensors", **dict([next(iter(twice.items()))]))
    fails(folder, "b.safetensors", "surplus tensor", next(iter(twice)))


def test_another_architecture_is_named(folder: Path) -> None:
    change_json(folder / "config.json", architectures=["LlamaForCausalLM"])
    fails(folder, "config.json", "architectures", "LlamaForCausalLM")


def test_a_config_of_another_size_is_found_out(folder: Path) -> None:
    change_json(folder / "config.json", intermediate_size=40)
    fails(folder, ".mlp.", "48", "config.json says", "40")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", ["q_proj", "o_proj"]),
        ("layers_to_transform", [0]),
        ("use_rslora", True),
        ("use_dora", True),
        ("bias", "all"),
        ("peft_type", "LOHA"),
        ("modules_to_save", ["lm_head"]),
        ("r", 0),
        ("r", 2.5),
        ("r", None),
        ("lora_alpha", "8"),
        ("lora_alpha", None),
    ],
)
def test_an_unsupported_adapter_value_is_named(folder: Path, key: str, value: object) -> None:
    change_json(folder / "linear_spec_lora" / "adapter_config.json", **{key: value})
    fails(folder, "adapter_config.json", key)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_adapter_file_is_named(folder: Path, name: str) -> None:
    (folder / "linear_spec_lora" / name).unlink()
    fails(folder, name)


def test_a_misshapen_adapter_tensor_is_named(folder: Path) -> None:
    path = folder / "linear_spec_lora" / "adapter_model.safetensors"
    change_tensors(path, **{LORA_A: torch.zeros(5, 48)})
    fails(folder, "adapter_model.safetensors", LORA_A, "[5, 48]", "[4, 48]")


def test_a_missing_adapter_tensor_is_named(folder: Path) -> None:
    path = folder / "linear_spec_lora" / "adapter_model.safetensors"
    change_tensors(path, **{LORA_A: None})
    fails(folder, "linear_spec_lora", "1 tensors are missing", LORA_A)


def test_an_index_that_names_no_shard_is_refused(tmp_path: Path, tiny_config_dict: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config_dict))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="names no shard"):
        load_model(tmp_path, torch.float32)
