"""The reader against plain slices of what safetensors itself loads."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimode.replicas.errors import CheckpointError
from trimode.replicas.model import safetensors_reader
from trimode.replicas.model.safetensors_header import locate
from trimode.replicas.model.safetensors_reader import LoadReport, read_tensors
from trimode.replicas.model.staging import Staging
from trimode.replicas.model.target import Part, Target

FLOATS = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a handful of rows is many ranges, more than are in flight at once."""
    monkeypatch.setattr(safetensors_reader, "RANGE_BYTES", 64)


# Empty memory of a shape, in every order that a model keeps weights in.
LAYOUTS: dict[str, Callable[[tuple[int, int], torch.dtype], Tensor]] = {
    "row by row": lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    "column by column": lambda shape, dtype: torch.zeros(shape[::-1], dtype=dtype).t(),
    "rows of a fused matrix": lambda shape, dtype: torch.zeros(shape[0] + 5, shape[1], dtype=dtype)[
        2:-3
    ],
    "rows of a fused matrix, column by column": lambda shape, dtype: torch.zeros(
        shape[1], shape[0] + 5, dtype=dtype
    ).t()[2:-3],
    "columns of a wider matrix": lambda shape, dtype: torch.zeros(
        shape[0], shape[1] + 5, dtype=dtype
    )[:, 2:-3],
    "every other element": lambda shape, dtype: torch.zeros(
        2 * shape[0], 3 * shape[1], dtype=dtype
    )[::2, ::3],
}


def save(path: Path, **tensors: Tensor) -> Path:
    save_file(tensors, path)
    return path


def read(files: list[Path], targets: dict[str, Target]) -> LoadReport:
    stored = locate(files, {name: target.stored_shape for name, target in targets.items()})
    return read_tensors(stored, targets)


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("wanted", [*FLOATS, torch.float64])
def test_every_layout_is_filled_and_nothing_beside_it(
    tmp_path: Path, layout: str, stored: torch.dtype, wanted: torch.dtype
) -> None:
    tensor = noise((37, 11), stored)
    view = LAYOUTS[layout]((37, 11), wanted)
    read([save(tmp_path / "a", x=tensor)], {"x": Target(view)})
    assert torch.equal(view, tensor.to(wanted))
    whole = torch.empty(0, dtype=wanted).set_(view.untyped_storage())
    assert whole.count_nonzero() == view.count_nonzero()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_slice_of_any_tensor_is_what_indexing_gives(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    dim = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[dim] - 1))
    length = data.draw(st.integers(1, shape[dim] - start))
    wanted = noise(shape).narrow(dim, start, length)
    view = torch.zeros(
        wanted.shape, dtype=data.draw(st.sampled_from([torch.float32, torch.float64]))
    )
    path = save(tmp_path_factory.mktemp("slices") / "a", x=noise(shape))
    read([path], {"x": Target(view, Part(dim, start, shape[dim]))})
    assert torch.equal(view, wanted.to(view.dtype))


def test_a_slice_of_rows_reads_its_own_bytes_only(tmp_path: Path) -> None:
    path = save(tmp_path / "a", x=noise((40, 8)))
    report = read([path], {"x": Target(torch.zeros(10, 8), Part(0, 30, 40))})
    assert report.read_bytes == report.filled_bytes == 10 * 8 * 4


def test_a_slice_of_columns_reads_whole_rows(tmp_path: Path) -> None:
    path = save(tmp_path / "a", x=noise((40, 8)))
    report = read([path], {"x": Target(torch.zeros(40, 2), Part(1, 6, 8))})
    assert (report.read_bytes, report.filled_bytes) == (40 * 8 * 4, 40 * 2 * 4)


def test_scalars_and_vectors_are_read(tmp_path: Path) -> None:
    tensors = {"scalar": torch.tensor(2.5), "vector": noise((100,))}
    views = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    read([save(tmp_path / "a", **tensors)], {name: Target(view) for name, view in views.items()})
    assert all(torch.equal(views[name], tensors[name]) for name in tensors)


def test_bytes_that_can_stay_as_they_are_take_no_detour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Staging, "take", lambda _: pytest.fail("took a staging buffer"))
    fused = torch.zeros(50, 16, dtype=torch.bfloat16)
    path = save(tmp_path / "a", x=noise((30, 16), torch.bfloat16))
    read([path], {"x": Target(fused[10:40])})
    assert torch.equal(fused[10:40], noise((30, 16), torch.bfloat16))


def test_several_files_are_read(tmp_path: Path) -> None:
    tensors = {f"t{index}": noise((20 + index, 6)) for index in range(5)}
    files = [save(tmp_path / name, **{name: tensor}) for name, tensor in tensors.items()]
    views = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    report = read(files, {name: Target(view) for name, view in views.items()})
    assert all(torch.equal(views[name], tensors[name]) for name in tensors)
    assert report.read_bytes == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("wanted", [torch.float32, torch.float64], ids=["direct", "staged"])
def test_each_tensor_is_told_of_once_and_is_complete_by_then(
    tmp_path: Path, wanted: torch.dtype
) -> None:
    tensors = {"a": noise((64, 16)), "b": noise((3,)), "c": noise((200, 4))}
    path = save(tmp_path / "a", **tensors)
    views = {name: torch.zeros(tensor.shape, dtype=wanted) for name, tensor in tensors.items()}
    complete: list[str] = []

    def on_filled(name: str) -> None:
        assert torch.equal(views[name], tensors[name].to(wanted))
        complete.append(name)

    stored = locate([path], {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    targets = {name: Target(view) for name, view in views.items()}
    read_tensors(stored, targets, on_filled=on_filled)
    assert sorted(complete) == ["a", "b", "c"]


def test_a_file_that_is_gone_by_then_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a", x=noise((4, 4)))
    stored = locate([path], {"x": (4, 4)})
    path.unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{path} cannot be read")):
        read_tensors(stored, {"x": Target(torch.zeros(4, 4))})


@pytest.mark.parametrize("wanted", [torch.float32, torch.float64], ids=["direct", "staged"])
def test_a_file_that_became_shorter_is_named(tmp_path: Path, wanted: torch.dtype) -> None:
    path = save(tmp_path / "a", x=noise((400, 4)))
    stored = locate([path], {"x": (400, 4)})
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=re.escape(f"{path} became shorter")):
        read_tensors(stored, {"x": Target(torch.zeros(400, 4, dtype=wanted))})


def test_staging_stays_the_same_however_much_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    make = Staging.__init__

    def count(self: Staging, device: torch.device, num_bytes: int, num_buffers: int) -> None:
        asked.append((num_bytes, num_buffers))
        make(self, device, num_bytes, num_buffers)

    monkeypatch.setattr(Staging, "__init__", count)
    path = save(tmp_path / "a", x=noise((5000, 4)))
    read([path], {"x": Target(torch.zeros(5000, 4, dtype=torch.float64))})
    assert asked == [(64, safetensors_reader.NUM_BUFFERS)]


def test_a_report_reads_like_a_sentence() -> None:
    report = LoadReport(read_bytes=16_979_107_840, filled_bytes=16_979_107_840, seconds=4.0)
    assert str(report) == "16.98 GB in 4.0 s (4.24 GB/s)"


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wanted", FLOATS)
def test_a_gpu_gets_what_a_cpu_gets(tmp_path: Path, layout: str, wanted: torch.dtype) -> None:
    path = save(tmp_path / "a", x=noise((500, 48), torch.bfloat16))
    view = LAYOUTS[layout]((500, 48), wanted)
    on_gpu = torch.empty(0, dtype=wanted, device="cuda").set_(
        view.untyped_storage().cuda(), view.storage_offset(), view.shape, view.stride()
    )
    half = on_gpu[:, :24]
    read([path], {"x": Target(on_gpu)})
    assert torch.equal(on_gpu.cpu(), load_file(path)["x"].to(wanted))
    read([path], {"x": Target(half, Part(1, 24, 48))})
    assert torch.equal(half.cpu(), load_file(path)["x"][:, 24:].to(wanted))
