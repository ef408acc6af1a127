"""Each published size against its tensor plan, written down here from the published headers. The
files hold a header and a hole: they have their full size and take no room.
"""

import json
import re
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest

from trimode.replicas.errors import CheckpointError
from trimode.replicas.model.check import check_checkpoint
from trimode.replicas.model.config import BUNDLED_CHECKPOINT, ModelConfig

FIXTURES = Path(__file__).parent / "fixtures"
VOCAB, QUERY, KEY_VALUE, RANK = 131072, 4096, 1024, 128

Plan = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class Size:
    """A published model: what its config says, and what its files come to."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    tensors: int
    parameters: int
    num_bytes: int
    gb_a_pass: float
    kv_bytes: int
    adapter_mib: int


SIZES = [
    Size("3B", 26, 3072, 9216, 237, 3_831_659_520, 7_663_319_040, 6.86, 106_496, 91),
    Size("8B", 34, 4096, 14336, 309, 8_489_553_920, 16_979_107_840, 15.91, 139_264, 136),
    Size("14B", 40, 5120, 16384, 363, 13_506_073_600, 27_012_147_200, 25.67, 163_840, 180),
]


def base_plan(size: Size) -> Plan:
    hidden, wide = size.hidden, size.intermediate
    shapes: dict[str, tuple[int, ...]] = {
        "diffusion_head.weight": (VOCAB, hidden),
        "encoder.embed_tokens.weight": (VOCAB, hidden),
        "encoder.norm.weight": (hidden,),
    }
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (QUERY, hidden),
        "self_attn.k_proj": (KEY_VALUE, hidden),
        "self_attn.v_proj": (KEY_VALUE, hidden),
        "self_attn.o_proj": (hidden, QUERY),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    for layer in range(size.layers):
        shapes |= {f"encoder.layers.{layer}.{name}.weight": s for name, s in of_layer.items()}
    return {name: (shape, "BF16") for name, shape in shapes.items()}


def adapter_plan(size: Size) -> Plan:
    plan: Plan = {}
    for layer in range(size.layers):
        stem = f"base_model.model.encoder.layers.{layer}.self_attn.o_proj"
        plan[f"{stem}.lora_A.weight"] = ((RANK, QUERY), "F32")
        plan[f"{stem}.lora_B.weight"] = ((size.hidden, RANK), "F32")
    return plan


def write_hollow(path: Path, plan: Plan) -> None:
    """A safetensors file with a true header and a hole for its weights."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in plan.items():
        begin, end = end, end + prod(shape) * {"BF16": 2, "F32": 4, "I32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_base(folder: Path, size: Size, plan: Plan) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(FIXTURES / size.name / "config.json", folder)
    write_hollow(folder / "model.safetensors", plan)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text("{}")


def write_checkpoint(folder: Path, size: Size) -> None:
    write_base(folder, size, base_plan(size))
    shutil.copytree(FIXTURES / size.name / "linear_spec_lora", folder / "linear_spec_lora")
    write_hollow(folder / "linear_spec_lora" / "adapter_model.safetensors", adapter_plan(size))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The 3B checkpoint."""
    write_checkpoint(tmp_path, SIZES[0])
    return tmp_path


def fails(folder: Path, *parts: str) -> None:
    pattern = "(?s)" + ".*".join(re.escape(part) for part in parts)
    with pytest.raises(CheckpointError, match=pattern):
        check_checkpoint(folder)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_each_published_size_is_what_its_config_promises(size: Size, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, size)
    report = check_checkpoint(tmp_path)
    assert (report.base.num_tensors, report.base.num_parameters) == (size.tensors, size.parameters)
    assert (report.base.num_bytes, report.base.dtypes) == (size.num_bytes, ("BF16",))
    assert round(report.bytes_a_pass / 1e9, 2) == size.gb_a_pass
    assert report.kv_bytes_per_token == size.kv_bytes
    assert report.adapter is not None
    assert report.adapter.num_tensors == 2 * size.layers
    assert report.adapter.num_bytes // 2**20 == size.adapter_mib
    assert (report.adapter.dtypes, report.adapter_rank) == (("F32",), RANK)
    assert report.has_tokenizer and report.has_chat_template


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_a_base_checkpoint_has_no_adapter_and_rotates_as_its_own_config_says(
    size: Size, tmp_path: Path
) -> None:
    write_base(tmp_path, size, base_plan(size))
    raw = json.loads((tmp_path / "config.json").read_text())
    raw |= {"max_position_embeddings": 4096, "eos_token_id": 2}
    raw["rope_parameters"]["factor"] = 0.25
    (tmp_path / "config.json").write_text(json.dumps(raw))
    report = check_checkpoint(tmp_path)
    assert (report.base.num_parameters, report.adapter) == (size.parameters, None)
    assert (report.config.eos_id, report.config.rope.factor) == (2, 0.25)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_the_configs_hold_the_published_values(size: Size) -> None:
    config = ModelConfig.load(FIXTURES / size.name)
    assert (config.num_layers, config.hidden_size) == (size.layers, size.hidden)
    assert config.intermediate_size == size.intermediate
    assert (config.query_width, config.kv_width) == (QUERY, KEY_VALUE)
    assert (config.eos_id, config.mask_id, config.block_size) == (11, 100, 32)
    assert (config.max_positions, config.rope.original_max_positions) == (262144, 16384)
    assert config.rope.theta == (1e9 if size.name == "14B" else 1e6)


def test_a_checkpoint_in_shards_counts_the_same(tmp_path: Path) -> None:
    size = SIZES[0]
    plan = base_plan(size)
    write_base(tmp_path, size, plan)
    (tmp_path / "model.safetensors").unlink()
    names = sorted(plan)
    shards = {"a.safetensors": names[:100], "b.safetensors": names[100:]}
    for shard, part in shards.items():
        write_hollow(tmp_path / shard, {name: plan[name] for name in part})
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert check_checkpoint(tmp_path).base.num_bytes == size.num_bytes


def test_the_bundled_checkpoint_can_be_served() -> None:
    report = check_checkpoint(BUNDLED_CHECKPOINT)
    assert report.adapter_rank == 64
    assert report.has_tokenizer and not report.has_chat_template


@pytest.mark.parametrize(
    ("name", "entry", "complaint"),
    [
        ("encoder.layers.7.mlp.up_proj.weight", None, "tensors are missing"),
        ("encoder.layers.26.mlp.up_proj.weight", ((9216, 3072), "BF16"), "surplus tensor"),
        ("encoder.layers.7.mlp.up_proj.weight", ((3072, 9216), "BF16"), "[9216, 3072]"),
        ("encoder.norm.weight", ((3072,), "I32"), "is I32; supported"),
    ],
    ids=["missing", "surplus", "misshapen", "of another type"],
)
def test_a_wrong_tensor_is_named_with_its_file(
    folder: Path, name: str, entry: tuple[tuple[int, ...], str] | None, complaint: str
) -> None:
    plan = base_plan(SIZES[0])
    plan.pop(name, None)
    if entry is not None:
        plan[name] = entry
    write_hollow(folder / "model.safetensors", plan)
    fails(folder, str(folder))
    fails(folder, name)
    fails(folder, complaint)


def test_a_wrong_adapter_tensor_is_named_with_its_file(folder: Path) -> None:
    plan = adapter_plan(SIZES[0])
    name = "base_model.model.encoder.layers.3.self_attn.o_proj.lora_B.weight"
    plan[name] = ((RANK, 3072), "F32")
    write_hollow(folder / "linear_spec_lora" / "adapter_model.safetensors", plan)
    fails(folder, "adapter_model.safetensors", name, "[128, 3072]", "[3072, 128]")


def test_a_file_that_ends_early_is_named_with_both_sizes(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(whole - 1)
    fails(folder, str(path), f"{whole - 1} bytes", str(whole))
