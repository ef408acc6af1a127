"""Download: a pass's answers on their way to the host, in one copy that nobody waits for until they
are needed.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimode.replicas.array_tree import leaves, map_leaves


class Download:
    """A tree of tensors, as arrays once they are here."""

    def __init__(self, tree: Any) -> None:
        """Starts the copy; the tree's tensors may be overwritten by what is launched later."""
        self._tree = tree
        self._bytes: Tensor | None = None
        there = list(leaves(tree))
        if there[0].is_cuda:
            packed = pack(there)
            self._bytes = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
            self._bytes.copy_(packed, non_blocking=True)
            self._is_here = torch.cuda.Event()
            self._is_here.record()

    def wait(self) -> Any:
        """The tree with numpy arrays for its tensors."""
        if self._bytes is None:
            return map_leaves(self._tree, lambda tensor: tensor.numpy(force=True))
        self._is_here.synchronize()
        return unpack(self._tree, self._bytes.numpy())


def pack(tensors: list[Tensor]) -> Tensor:
    """[num_bytes] uint8: one after the other."""
    return torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])


def unpack(tree: Any, data: np.ndarray) -> Any:
    """The tree with arrays for the tensors that were packed; data [num_bytes] uint8 is copied."""
    offset = 0

    def take(tensor: Tensor) -> np.ndarray:
        nonlocal offset
        size = tensor.numel() * tensor.element_size()
        part = data[offset : offset + size].copy()
        offset += size
        return part.view(str(tensor.dtype).removeprefix("torch.")).reshape(tuple(tensor.shape))

    return map_leaves(tree, take)
