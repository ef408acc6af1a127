"""Cold start: a checkpoint of random weights from files to the device, in GB/s.

Once with its files in the page cache, once after the system was asked to forget them.
"""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from documents import Document
from gpu_time import synchronize
from workbench import Workbench

from trimode.replicas.model.safetensors_reader import LoadReport
from trimode.replicas.model.weights import load_model, save_adapter, save_model

FREE_BYTES = 24e9  # that a checkpoint of 8B needs, with some to spare


def measure_cold_start(bench: Workbench, document: Document) -> None:
    """8B where the disk holds it, else 3B."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = "8B" if shutil.disk_usage(folder).free > FREE_BYTES else "3B"
        bench.drop_runner()
        model = bench.model(size)
        begun = time.perf_counter()
        (folder / "config.json").write_text(json.dumps(bench.raw(size)))
        save_model(model, folder, bench.dtype)
        save_adapter(model, folder, bench.adapter(size).alpha)
        del model
        bench.release()
        files = [path for path in folder.rglob("*") if path.is_file()]
        num_bytes = sum(path.stat().st_size for path in files)
        document.write(model=size, num_bytes=num_bytes, write_s=time.perf_counter() - begun)
        for cache in ("warm", "cold", "warm", "cold"):
            if cache == "cold":
                _forget(files)
            begun = time.perf_counter()
            reports: list[LoadReport] = []
            loaded = load_model(folder, bench.dtype, bench.device, on_loaded=reports.append)
            synchronize(bench.device)
            seconds = time.perf_counter() - begun
            del loaded
            bench.release()
            document.append(
                "rows",
                {
                    "page_cache": cache,
                    "load_s": seconds,  # all that load_model does
                    "gb_per_s": num_bytes / seconds / 1e9,
                    "reading_gb_per_s": reports[0].gb_per_s,
                },
            )


def _forget(files: list[Path]) -> None:
    """Write them out and drop them from the page cache, where the system obeys."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
