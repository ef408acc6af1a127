"""Reads tensors of safetensors files into memory that is there already: many byte ranges at once,
straight into place where the bytes can stay as they are, else by way of a few staging buffers.
"""

import ctypes
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from trimode.replicas.errors import CheckpointError
from trimode.replicas.model.safetensors_header import StoredTensor
from trimode.replicas.model.staging import Buffer, Staging
from trimode.replicas.model.target import Part, Target

# One read. Long enough that Python's part of it (some 50 microseconds) does not count, short enough
# that the last reads of a file, which nobody helps with, do not either.
RANGE_BYTES = 8 * 1024 * 1024
# Page cache and disks both give more to several readers; beyond eight nothing more came.
NUM_READERS = 8
# As many ranges wait for their turn as are being read; as many again are being copied to a GPU.
MAX_IN_FLIGHT = 2 * NUM_READERS
NUM_BUFFERS = 3 * NUM_READERS  # 192 MiB of staging in all, whatever the size of the model

TORCH_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}

# Told once with (0, total) and then after every range with (bytes filled so far, total).
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load took. read_bytes: of the files; a slice of columns reads whole rows."""

    read_bytes: int
    filled_bytes: int
    seconds: float

    @property
    def gb_per_s(self) -> float:
        """Read from the files, in 10^9 bytes a second."""
        return self.read_bytes / self.seconds / 1e9

    def __str__(self) -> str:
        return f"{self.read_bytes / 1e9:.2f} GB in {self.seconds:.1f} s ({self.gb_per_s:.2f} GB/s)"


@dataclass(frozen=True, slots=True)
class _Range:
    """Some rows of a stored tensor and the rows of the view that they fill."""

    name: str
    stored: StoredTensor
    offset: int  # in the file
    num_bytes: int
    rows: Tensor  # of the view
    part: Part | None  # of another dimension than the first

    @property
    def is_direct(self) -> bool:
        """Whether the file's bytes are what the view's memory holds afterwards."""
        return (
            self.part is None
            and self.rows.device.type == "cpu"
            and self.rows.dtype == TORCH_TYPES[self.stored.dtype]
            and self.rows.is_contiguous()
        )


def read_tensors(
    stored: Mapping[str, StoredTensor],
    targets: Mapping[str, Target],
    *,
    progress: Progress | None = None,
    on_filled: Callable[[str], None] | None = None,
) -> LoadReport:
    """Fill every target with the stored tensor of its name.

    on_filled: called with a name once its view is complete, from the caller's own thread; what it
    then launches on the device's current stream sees the values.
    Raises CheckpointError that names the file which cannot be read.
    """
    begun = time.perf_counter()
    total = sum(target.view.nbytes for target in targets.values())
    if progress is not None:
        progress(0, total)
    ranges = list(_ranges(stored, targets))
    left = Counter(one.name for one in ranges)
    filled = 0
    with _reader(ranges) as reader:
        for one in reader.fill(ranges):
            filled += one.rows.nbytes
            left[one.name] -= 1
            if on_filled is not None and left[one.name] == 0:
                reader.staging.publish()
                on_filled(one.name)
            if progress is not None:
                progress(filled, total)
    return LoadReport(sum(one.num_bytes for one in ranges), filled, time.perf_counter() - begun)


def _ranges(stored: Mapping[str, StoredTensor], targets: Mapping[str, Target]) -> Iterator[_Range]:
    """All targets in ranges of whole rows, in the order in which they lie in the files."""
    in_order = sorted(targets, key=lambda name: (stored[name].path, stored[name].offset))
    for name in in_order:
        yield from _ranges_of(name, stored[name], targets[name])


def _ranges_of(name: str, stored: StoredTensor, target: Target) -> Iterator[_Range]:
    view, part, shape = target.view, target.part, stored.shape
    assert shape == target.stored_shape, f"{name}: the plan was not checked against the file"
    if not view.numel():
        return
    if view.dim() == 0:
        view, shape = view[None], (1,)
    row_bytes = prod(shape[1:]) * TORCH_TYPES[stored.dtype].itemsize
    first = 0
    if part is not None and part.dim == 0:
        first, part = part.start, None
    step = max(1, RANGE_BYTES // row_bytes)
    for row in range(0, len(view), step):
        rows = view[row : row + step]
        offset = stored.offset + (first + row) * row_bytes
        yield _Range(name, stored, offset, len(rows) * row_bytes, rows, part)


@contextmanager
def _reader(ranges: Sequence[_Range]) -> Iterator["_Reader"]:
    """What reads these ranges. Their views are complete on the device once it is left."""
    devices = {one.rows.device for one in ranges} - {torch.device("cpu")}
    device = devices.pop() if devices else torch.device("cpu")  # some views may be on the host
    staged_bytes = max((one.num_bytes for one in ranges if not one.is_direct), default=0)
    with ExitStack() as stack:
        files = {
            path: stack.enter_context(_opened(path)) for path in {one.stored.path for one in ranges}
        }
        staging = stack.enter_context(Staging(device, staged_bytes, NUM_BUFFERS))
        yield _Reader(files, staging, stack.enter_context(ThreadPoolExecutor(NUM_READERS)))


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads in threads, a window of ranges at a time, and fills in the order of the files."""

    files: dict[Path, int]  # descriptors
    staging: Staging
    pool: ThreadPoolExecutor

    def fill(self, ranges: Sequence[_Range]) -> Iterator[_Range]:
        """The ranges, each once its values are in place, or on their way there on the device."""
        window: deque[tuple[_Range, Buffer | None, Future[None]]] = deque()
        for one in ranges:
            if len(window) == MAX_IN_FLIGHT:
                yield self._fill(*window.popleft())
            buffer = None if one.is_direct else self.staging.take()
            into = one.rows if buffer is None else buffer.memory
            window.append((one, buffer, self.pool.submit(self._read, one, into)))
        while window:
            yield self._fill(*window.popleft())

    def _fill(self, one: _Range, buffer: Buffer | None, read: Future[None]) -> _Range:
        read.result()
        if buffer is not None:
            shape = (len(one.rows), *one.stored.shape[1:])
            values = self.staging.bring(buffer, TORCH_TYPES[one.stored.dtype], shape)
            if one.part is not None:
                values = values.narrow(one.part.dim, one.part.start, one.rows.shape[one.part.dim])
            self.staging.copy(values, one.rows)
        return one

    def _read(self, one: _Range, into: Tensor) -> None:
        """Read the range to the beginning of `into`, contiguous memory of the host."""
        assert into.is_contiguous() and into.nbytes >= one.num_bytes
        # Not by numpy(), after which torch could not free the memory of a quantised weight early.
        memory = memoryview((ctypes.c_ubyte * one.num_bytes).from_address(into.data_ptr()))
        file, done = self.files[one.stored.path], 0
        try:
            while done < one.num_bytes:
                count = os.preadv(file, [memory[done:]], one.offset + done)
                if count == 0:
                    raise CheckpointError(f"{one.stored.path} became shorter while it was read")
                done += count
        except OSError as error:
            raise CheckpointError(f"{one.stored.path} cannot be read: {error}") from None


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)
