"""Staging: a few buffers between files and weights that bytes cannot be read straight into."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Buffer:
    """Host memory; left: a CUDA event after which nobody reads it any more."""

    memory: Tensor  # [num_bytes] uint8
    left: Any = None


class Staging(AbstractContextManager["Staging"]):
    """A ring of buffers, and copies out of them.

    For a GPU they are pinned and all copies run on a stream of their own, beside the reading of
    files; leaving the context waits for them.
    """

    def __init__(self, device: torch.device, num_bytes: int, count: int) -> None:
        """num_bytes: of each buffer; 0 where none will be taken."""
        is_cuda = device.type == "cuda"
        self._device = device
        self._ring = [
            Buffer(torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_cuda))
            for _ in range(count if num_bytes else 0)
        ]
        self._num_taken = 0
        self._stream: Any = None
        if is_cuda:
            self._stream = torch.cuda.Stream(device)
            # The weights' memory may still be in use by what was launched before.
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def take(self) -> Buffer:
        """The next buffer of the ring, once nobody reads it. It is in use until `bring`, and never
        may all be.
        """
        buffer = self._ring[self._num_taken % len(self._ring)]
        self._num_taken += 1
        if buffer.left is not None:
            buffer.left.synchronize()
        return buffer

    def bring(self, buffer: Buffer, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The values in a buffer, on the device; they are valid until the buffer is taken again."""
        num_bytes = math.prod(shape) * dtype.itemsize
        values = buffer.memory[:num_bytes].view(dtype).view(shape)
        if self._stream is None:
            return values
        with self._on_stream():
            values = values.to(self._device, non_blocking=True)
            buffer.left = self._stream.record_event()
        return values

    def copy(self, values: Tensor, view: Tensor) -> None:
        """Copy what `bring` gave, or a slice of it, into a view of any strides and dtype."""
        with self._on_stream():
            if self._stream is None and view.dim() == 2 and view.stride(0) == 1:
                # Column by column: transposing tile by tile first is up to twice as fast.
                view.t().copy_(values.t().contiguous())
            else:
                view.copy_(values)

    def publish(self) -> None:
        """Let what is launched on the device's current stream from now on see all copies so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def __exit__(self, *error: object) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
