"""Trees of arrays: frozen dataclasses whose fields are arrays, numbers, None, or such dataclasses.

A pass is described by one, so that it can go to a device in one copy and to other ranks in one
message. Fields whose names begin with an underscore are caches and are not part of a tree.
"""

from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; what kernels may assume of a pointer


def leaves(tree: Any) -> Iterator[Any]:
    """The arrays of a tree, in the order of its fields."""
    for name in names_of(type(tree)):
        value = getattr(tree, name)
        if isinstance(value, np.ndarray | Tensor):
            yield value
        elif is_dataclass(value):
            yield from leaves(value)


def map_leaves(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same tree of other arrays; they are changed in the order of `leaves`."""
    changed = {}
    for name in names_of(type(tree)):
        value = getattr(tree, name)
        if isinstance(value, np.ndarray | Tensor):
            value = change(value)
        elif is_dataclass(value):
            value = map_leaves(value, change)
        changed[name] = value
    return type(tree)(**changed)


def names_of(kind: Any) -> list[str]:
    """The fields of a dataclass that belong to a tree."""
    return [name for name in kind.__dataclass_fields__ if not name.startswith("_")]


def to_device(tree: Any, device: torch.device) -> Any:
    """The tree with tensors for its numpy arrays.

    On a CPU they share the arrays' memory. To a GPU all go in one copy from pinned memory, which
    nobody waits for.
    """
    if device.type == "cpu":
        return map_leaves(tree, torch.from_numpy)
    arrays = list(leaves(tree))
    offsets, size = place(arrays)
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    fill(pinned.numpy(), arrays, offsets)
    # The allocator of pinned memory keeps it until the copy is done.
    there = pinned.to(device, non_blocking=True)
    views = iter(
        there[offset : offset + array.nbytes].view(DTYPES[array.dtype]).view(array.shape)
        for offset, array in zip(offsets, arrays, strict=True)
    )
    return map_leaves(tree, lambda _: next(views))


DTYPES = {
    np.dtype(name): getattr(torch, name)
    for name in ("bool", "uint8", "int32", "int64", "float32", "float64")
}


def place(arrays: list[np.ndarray]) -> tuple[list[int], int]:
    """Where each array begins in one buffer, aligned, and the buffer's size in bytes."""
    offsets, size = [], 0
    for array in arrays:
        offsets.append(size)
        size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, size


def fill(buffer: np.ndarray, arrays: list[np.ndarray], offsets: list[int]) -> None:
    """Copy the arrays' bytes to their places in buffer [num_bytes] uint8."""
    for array, offset in zip(arrays, offsets, strict=True):
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        buffer[offset : offset + len(flat)] = flat
