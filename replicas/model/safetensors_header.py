"""What a safetensors file says it holds: names, shapes, types and byte ranges. No weight is read.

https://huggingface.co/docs/safetensors/index#format
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from trimode.replicas.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
SHOWN = 3  # of a list of names

# The types that weights are loaded from, and their bytes an element.
LOADABLE_TYPES = {"F16": 2, "BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies in which file."""

    path: Path
    dtype: str  # as the format spells it: BF16
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return prod(self.shape)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name.

    Raises CheckpointError where the file is missing, is no safetensors file or ends too early.
    """
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            text = file.read(header_bytes) if header_bytes <= MAX_HEADER_BYTES else b""
            file_bytes = file.seek(0, 2)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
    start = 8 + header_bytes
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = {name: _stored(path, entry, start) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file: its header is broken ({error!r})"
        ) from None
    _check_ranges(path, tensors, start, file_bytes)
    return tensors


def locate(files: Iterable[Path], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """Where each tensor of a plan lies; shapes: the plan's, by name.

    Raises CheckpointError that names file and tensor where one is missing, surplus, misshapen or of
    a type that cannot be loaded.
    """
    found: dict[str, StoredTensor] = {}
    folder = Path()
    for path in files:
        folder = path.parent
        for name, stored in read_header(path).items():
            if name not in shapes or name in found:
                raise CheckpointError(f"{path}: surplus tensor {name}")
            _check(stored, shapes[name], f"{path}: tensor {name}")
            found[name] = stored
    missing = sorted(shapes.keys() - found.keys())
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (" ..." if len(missing) > SHOWN else "")
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing: {shown}")
    return found


def _stored(path: Path, entry: dict[str, Any], start: int) -> StoredTensor:
    """One entry of the header. Raises the errors of a value that is not what it should be."""
    begin, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"numbers below 0 or broken in {entry}")
    if not isinstance(dtype, str):
        raise TypeError(f"dtype is {dtype!r}")
    stored = StoredTensor(path, dtype, shape, start + begin, end - begin)
    item_bytes = LOADABLE_TYPES.get(dtype)
    if item_bytes is not None and stored.num_bytes != prod(shape) * item_bytes:
        raise ValueError(f"{stored.num_bytes} bytes cannot hold {list(shape)} of {dtype}")
    return stored


def _check_ranges(
    path: Path, tensors: dict[str, StoredTensor], start: int, file_bytes: int
) -> None:
    """The tensors fill the file without gap and overlap, as the format demands."""
    end = start
    in_order = sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes))
    for name, stored in in_order:
        if stored.offset != end or stored.num_bytes < 0:
            raise CheckpointError(
                f"{path} is not a readable safetensors file: tensor {name} begins at byte "
                f"{stored.offset}, the one before it ends at {end}"
            )
        end += stored.num_bytes
    if end != file_bytes:
        raise CheckpointError(
            f"{path} is not a readable safetensors file: it has {file_bytes} bytes, "
            f"its header says {end}"
        )


def _check(stored: StoredTensor, shape: tuple[int, ...], where: str) -> None:
    if stored.shape != shape:
        raise CheckpointError(
            f"{where} has shape {list(stored.shape)}, config.json says {list(shape)}"
        )
    if stored.dtype not in LOADABLE_TYPES:
        raise CheckpointError(f"{where} is {stored.dtype}; supported: {', '.join(LOADABLE_TYPES)}")
