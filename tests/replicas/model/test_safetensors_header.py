import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from trimode.replicas.errors import CheckpointError
from trimode.replicas.model.safetensors_header import locate, read_header


def write(path: Path, header: object, num_bytes: int) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    return path


def entry(begin: int, end: int, shape: tuple[int, ...], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_what_safetensors_wrote_is_found_where_it_lies(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        "x": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "y": torch.ones(4),
        "z": torch.tensor(2.5, dtype=torch.float16),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    stored = read_header(path)
    assert stored.keys() == tensors.keys()
    content = path.read_bytes()
    for name, tensor in tensors.items():
        one = stored[name]
        assert one.shape == tuple(tensor.shape)
        assert one.num_elements == tensor.numel()
        raw = content[one.offset : one.offset + one.num_bytes]
        assert raw == tensor.view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(0, 8, (2,)), "b": entry(12, 16, (1,))},
        {"a": entry(0, 8, (2,)), "b": entry(4, 16, (3,))},
        {"a": entry(4, 16, (3,))},
        {"a": entry(0, 12, (3,))},
        {"a": entry(0, 20, (5,))},
        {"a": entry(0, 16, (3,))},
        {"a": entry(16, 0, (4,)), "b": entry(0, 16, (4,))},
        {"a": entry(0, 16, (-4,))},
        {"a": entry(0, 16, (4,)) | {"dtype": 3}},
        {"a": entry(0, 16, (4,)) | {"data_offsets": [0]}},
        {"a": entry(0, 16, (4,)) | {"data_offsets": [0.0, 16.0]}},
        {"a": {"dtype": "F32"}},
        {"a": []},
        [],
        b"{",
        b"\xff",
    ],
    ids=str,
)
def test_a_header_that_does_not_fit_its_file_is_refused(tmp_path: Path, header: object) -> None:
    path = write(tmp_path / "bad.safetensors", header, 16)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors is not a readable safetensors"):
        read_header(path)


def test_a_header_of_any_length_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        read_header(path)


def test_types_that_are_not_loaded_may_be_of_any_width(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": entry(0, 3, (6,), "F4")}, 3)
    assert read_header(path)["a"].dtype == "F4"
    with pytest.raises(CheckpointError, match="tensor a is F4; supported: F16, BF16, F32"):
        locate([path], {"a": (6,)})


def test_tensors_are_located_over_all_files(tmp_path: Path) -> None:
    first = write(tmp_path / "1.safetensors", {"a": entry(0, 8, (2,))}, 8)
    second = write(tmp_path / "2.safetensors", {"b": entry(0, 4, (1, 1))}, 4)
    stored = locate([first, second], {"a": (2,), "b": (1, 1)})
    assert [stored["a"].path, stored["b"].path] == [first, second]


def test_only_some_of_many_missing_tensors_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "1.safetensors", {}, 0)
    shapes = {f"t{index}": (1,) for index in range(9)}
    with pytest.raises(CheckpointError, match=re.escape("9 tensors are missing: t0, t1, t2 ...")):
        locate([path], shapes)
