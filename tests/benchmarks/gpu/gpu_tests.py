"""The test-suite's part that runs on a GPU: what is marked so, and every kernel's tests."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from documents import Document

ROOT = Path(__file__).parents[3]
TRIAL = {"kernels": ["tests/kernels/test_norm.py"]}
# Processes at once, where pytest-xdist is there; each has a context of its own on the GPU.
WORKERS = 8
# Not ours, and it warns when tests run in several processes: a warning is an error here.
OPTIONS = ["-q", "--no-header", "--tb=short", "-p", "no:benchmark"]
COUNTED = re.compile(r"(\d+) (passed|failed|skipped|errors?|deselected)")


def measure_tests(document: Document, is_tiny: bool) -> None:
    """Counts, and what failed; all that pytest said is beside it as text. A run that is cut off is
    one failure.
    """
    for name, arguments in (TRIAL if is_tiny else runs()).items():
        command = [sys.executable, "-m", "pytest", *OPTIONS, *arguments]
        seconds = max(30.0, document.ends - document.clock())
        try:
            # Without a terminal width of its own the summary's lines are cut.
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True,
                timeout=None if seconds == float("inf") else seconds,
                env={**os.environ, "COLUMNS": "200"},
            )  # fmt: skip
            output = done.stdout + done.stderr
        except subprocess.TimeoutExpired as cut:
            output = (cut.stdout or b"").decode() + "\n1 failed: out of time"
        document.path.with_name(f"tests-{name.replace(' ', '-')}.txt").write_text(output)
        document.append("runs", {"name": name, **outcome(output)})


def runs() -> dict[str, list[str]]:
    """Arguments by name. Files are named one by one: others import what a GPU machine may lack."""
    files = (ROOT / "tests").rglob("test_*.py")
    marked = [str(path) for path in sorted(files) if "mark.gpu" in path.read_text()]
    workers = [] if find_spec("xdist") is None else ["-n", str(WORKERS)]
    return {
        # One after the other: some take all the memory there is.
        "marked gpu": ["-m", "gpu", *marked],
        "kernels": ["-m", "not slow and not gpu", *workers, "tests/kernels"],
    }


def outcome(output: str) -> dict[str, object]:
    """Counts of pytest's last line, and the names of what failed."""
    lines = output.splitlines()
    counts: dict[str, int] = {}
    for line in lines[-4:]:
        for count, kind in COUNTED.findall(line):
            counts["errors" if kind.startswith("error") else kind] = int(count)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"counts": counts, "failed": failed[:40]}
