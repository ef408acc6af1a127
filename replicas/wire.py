"""Trees of arrays as plain bytes: a length, a JSON header, the arrays.

Nothing is ever unpickled, and only kinds that the reader names come into being.
"""

import json
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any

import numpy as np

from trimode.replicas.array_tree import ALIGNMENT, fill, leaves, names_of, place

PREFIX_BYTES = 16  # the header's length, decimal, padded to the alignment


def encode(tree: Any) -> np.ndarray:
    """[num_bytes] uint8."""
    arrays = list(leaves(tree))
    offsets, size = place(arrays)
    header = json.dumps(_describe(tree, iter(offsets)), separators=(",", ":")).encode()
    start = PREFIX_BYTES + -(-len(header) // ALIGNMENT) * ALIGNMENT
    message = np.empty(start + size, dtype=np.uint8)
    head = str(len(header)).ljust(PREFIX_BYTES).encode() + header
    message[: len(head)] = np.frombuffer(head, dtype=np.uint8)
    fill(message[start:], arrays, offsets)
    return message


def decode(message: np.ndarray, kinds: Iterable[type]) -> Any:
    """The tree of a message [num_bytes] uint8; its arrays are views of it.

    Raises ValueError where it is malformed or holds a kind that is not named.
    """
    raw = message.tobytes() if message.size < PREFIX_BYTES else message[:PREFIX_BYTES].tobytes()
    try:
        header_len = int(raw)
        header = json.loads(message[PREFIX_BYTES : PREFIX_BYTES + header_len].tobytes())
        start = PREFIX_BYTES + -(-header_len // ALIGNMENT) * ALIGNMENT
        return _build(header, message[start:], {kind.__name__: kind for kind in kinds})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"not a message: {error!r}") from None


def _describe(value: Any, offsets: Any) -> Any:
    if isinstance(value, np.ndarray):
        return {"array": [str(value.dtype), value.shape, next(offsets)]}
    if is_dataclass(value):
        kind = type(value)
        fields = {name: _describe(getattr(value, name), offsets) for name in names_of(kind)}
        return {"kind": kind.__name__, "fields": fields}
    if isinstance(value, np.generic):
        return value.item()
    return value


def _build(described: Any, data: np.ndarray, kinds: dict[str, type]) -> Any:
    if not isinstance(described, dict):
        return described
    if "array" in described:
        dtype, shape, offset = described["array"]
        count = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(data, np.dtype(dtype), count, offset).reshape(shape)
    fields = {name: _build(value, data, kinds) for name, value in described["fields"].items()}
    return kinds[described["kind"]](**fields)
