"""How fast weights come from files to where they are served: our reader beside safetensors' own,
which copies one tensor at a time. Writes docs/measurements/cold_start.json.

    python tests/benchmarks/cold_start.py

Makes a checkpoint of random weights in the published layout, the 3B model's width, and deletes it.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trimode.replicas.machine import describe_machine
from trimode.replicas.model.config import BUNDLED_CHECKPOINT, ModelConfig
from trimode.replicas.model.safetensors_reader import read_tensors
from trimode.replicas.model.target import Target
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.model.weights import empty_model, locate_weights

OUT = Path(__file__).parents[2] / "docs" / "measurements" / "cold_start.json"
WIDTH = {
    "vocab_size": 131072,
    "hidden_size": 3072,
    "intermediate_size": 9216,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}

Views = dict[str, Tensor]


def write_checkpoint(folder: Path, num_layers: int) -> Path:
    """Random bits that are finite numbers; returns the weight file."""
    raw = json.loads((BUNDLED_CHECKPOINT / "config.json").read_text())
    raw |= WIDTH | {"num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(raw))
    shapes = empty_model(ModelConfig.load(folder), None).published_tensors()
    tensors = {
        name: torch.empty(view.shape, dtype=torch.int16).random_(0, 16000).view(torch.bfloat16)
        for name, view in shapes.items()
    }
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)  # else DONTNEED would leave what was not written back
    os.close(descriptor)
    return path


def drop(path: Path) -> None:
    """Put a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def touch(path: Path) -> None:
    """Read a file with one thread into one small buffer."""
    buffer = bytearray(8 * 1024 * 1024)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and seconds of this process on processors: what others do slows the first only."""
    begun, cpu_begun = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begun, time.process_time() - cpu_begun


def model_as_served(folder: Path, dtype: torch.dtype, device: str) -> NemotronLabsDiffusionModel:
    return empty_model(ModelConfig.load(folder), None).to(dtype).to_empty(device=device)


def rows(folder: Path, dtype: torch.dtype, device: str) -> Views:
    """Memory in the files' own order."""
    shapes = empty_model(ModelConfig.load(folder), None).published_tensors()
    return {n: torch.empty(v.shape, dtype=dtype, device=device) for n, v in shapes.items()}


def read_ours(folder: Path, views: Views) -> None:
    stored = locate_weights(folder, empty_model(ModelConfig.load(folder), None))
    read_tensors(stored, {name: Target(view) for name, view in views.items()})


def read_safetensors(folder: Path, views: Views) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict, only keys() iterates
            views[name].copy_(tensors.get_tensor(name))
    if torch.cuda.is_available():
        torch.cuda.synchronize()


READERS: dict[str, Callable[[Path, Views], None]] = {
    "ours": read_ours,
    "safetensors": read_safetensors,
}


def destinations(device: str) -> dict[str, Callable[[Path], tuple[Any, Views]]]:
    """By name: what makes the memory; the first of the pair keeps the second alive."""

    def served(folder: Path, dtype: torch.dtype) -> tuple[Any, Views]:
        model = model_as_served(folder, dtype, device)
        return model, model.published_tensors()

    made: dict[str, Callable[[Path], tuple[Any, Views]]] = {
        "bfloat16, rows": lambda folder: (None, rows(folder, torch.bfloat16, device)),
        "bfloat16, as served": lambda folder: served(folder, torch.bfloat16),
    }
    if device == "cpu":
        made["float32, as served"] = lambda folder: served(folder, torch.float32)
    return made


def summary(num_bytes: int, taken: list[tuple[float, float]]) -> dict[str, Any]:
    rates = [num_bytes / seconds / 1e9 for seconds, _ in taken]
    return {
        "gb_per_s": round(statistics.median(rates), 2),
        "gb_per_s_of_turns": [round(rate, 2) for rate in rates],
        "cpu_s": round(statistics.median(cpu_s for _, cpu_s in taken), 2),
    }


def measure(folder: Path, path: Path, device: str, repeats: int, console: Console) -> list[Any]:
    """Every destination, reader and state of the page cache, in turns."""
    taken: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for turn in range(repeats):
        for cache, prepare in (("warm", touch), ("cold", drop)):
            for where, make in destinations(device).items():
                for reader, read in READERS.items():
                    owner, views = make(folder)
                    prepare(path)
                    seconds = timed(partial(read, folder, views))
                    taken.setdefault((where, cache, reader), []).append(seconds)
                    del owner, views
            prepare(path)
            floor = ("one buffer again and again", cache, "one thread")
            taken.setdefault(floor, []).append(timed(partial(touch, path)))
        console.print(f"turn {turn + 1} of {repeats}")
    return [
        {"into": where, "page_cache": cache, "reader": reader}
        | summary(path.stat().st_size, seconds)
        for (where, cache, reader), seconds in taken.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="of torch's copies")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as name:
        path = write_checkpoint(Path(name), arguments.layers)
        size = path.stat().st_size
        console.print(f"{size / 1e9:.2f} GB in {path}")
        load_before = os.getloadavg()[0]
        results = measure(Path(name), path, arguments.device, arguments.repeats, console)
    document = {
        "command": shlex.join(["python", "tests/benchmarks/cold_start.py", *sys.argv[1:]]),
        "machine": describe_machine("torch", "safetensors", "trimode"),
        "device": arguments.device,
        "threads": torch.get_num_threads(),
        "load_average": {"before": round(load_before, 1), "after": round(os.getloadavg()[0], 1)},
        "file_bytes": size,
        "repeats": arguments.repeats,
        "results": results,
    }
    arguments.out.write_text(json.dumps(document, indent=2) + "\n")
    for result in results:
        console.print(result)


if __name__ == "__main__":
    main()
