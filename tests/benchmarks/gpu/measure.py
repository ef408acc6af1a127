"""All that needs a GPU, in one go: floors, step times, the engine end to end, kernels, tests.

    python tests/benchmarks/gpu/measure.py --out docs/measurements/gpu [--budget-s 1500]
    python tests/benchmarks/gpu/measure.py --out OUT --sections floor,steps-8B

Sections run in the order of their worth, each within its own time, and write what they find at
once: a run that is cut off leaves what it had. A section that fails says so in its file, and the
next one runs. What a section needs of another is read from the folder, so the work may be split
over several commands (--sections); a finished section is not run again without --again. The last
thing printed is a table of figures and aims of everything in the folder.

--tiny runs all of it at sizes that mean nothing: that is its trial. It runs on a CPU, too, in
Triton's interpreter where a kernel is meant.
"""

import argparse
import importlib
import os
import shlex
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

# It is chosen when kernels are defined: before anything of ours is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from baseline import measure_baseline
from card import card_of, measure_card
from cold_start import measure_cold_start
from documents import Document, Facts, OutOfTime, load_documents
from end_to_end import Traffic, measure_end_to_end
from gpu_tests import measure_tests
from invariance import measure_invariance
from steps import measure_steps
from summary import table
from workbench import Spec, Workbench

from trimode.replicas.machine import describe_machine

ROOT = Path(__file__).parents[3]
BUDGET_S = 1500.0
OVERRUN_S = 30.0  # after its time, a section that looks at no clock is ended
GRACE = 2.0  # a section may take so many times its estimate, where the budget holds it


@dataclass(frozen=True, slots=True)
class Run:
    """What sections are given."""

    bench: Workbench
    out: Path
    commit: str | None = None

    def documents(self) -> dict[str, Facts]:
        return load_documents(self.out)


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the work. estimate_s: on one GPU of the kind that this is for."""

    estimate_s: float
    work: Callable[[Run, Document], None]


def floor(run: Run, document: Document) -> None:
    measure_card(run.bench, document)


def steps(run: Run, document: Document, spec: Spec, users: tuple[int, ...] | None = None) -> None:
    card = card_of(run.documents(), document.facts["machine"])
    more = () if users is None else (users,)
    measure_steps(run.bench, document, spec, card, *more)


def end_to_end(run: Run, document: Document, spec: Spec, traffic: Traffic) -> None:
    measure_end_to_end(run.bench, document, spec, traffic, (1, 128))


def kernel(run: Run, document: Document, name: str) -> None:
    """One of the files beside this one that check and time a kernel."""
    run.bench.release()
    module = importlib.import_module(name)
    sizes = (module.TINY,) if run.bench.is_tiny else ()
    document.write(**module.run(run.bench.device.type, *sizes))


def invariance(run: Run, document: Document) -> None:
    card = card_of(run.documents(), document.facts["machine"])
    measure_invariance(run.bench, document, "8B", card)


def baseline(run: Run, document: Document) -> None:
    ours = run.documents().get("end-to-end-8B", {})
    measure_baseline(run.bench, document, "8B", ours)


def cold_start(run: Run, document: Document) -> None:
    measure_cold_start(run.bench, document)


def tests(run: Run, document: Document) -> None:
    run.bench.release()
    measure_tests(document, run.bench.is_tiny)


FEW = Traffic(users=(1, 32))
ENDS = Traffic(users=(1, 128))
HARD = Traffic(users=(1, 8, 32), acceptance="hard")
# Those of one model in a row share its runner and its captured graphs.
SECTIONS: dict[str, Section] = {
    "floor": Section(10, floor),
    "steps-8B": Section(150, partial(steps, spec=Spec("8B"))),
    "end-to-end-8B": Section(340, partial(end_to_end, spec=Spec("8B"), traffic=Traffic())),
    "invariance": Section(120, invariance),
    "baseline": Section(60, baseline),
    "kernel-attention": Section(60, partial(kernel, name="attention")),
    "steps-14B": Section(180, partial(steps, spec=Spec("14B"))),
    "tests": Section(300, tests),
    "steps-8B-fp8": Section(80, partial(steps, spec=Spec("8B", "fp8"), users=(1, 32))),
    "end-to-end-8B-fp8": Section(80, partial(end_to_end, spec=Spec("8B", "fp8"), traffic=FEW)),
    "cold-start": Section(60, cold_start),
    "kernel-sampling": Section(30, partial(kernel, name="sampling")),
    "kernel-elementwise": Section(30, partial(kernel, name="elementwise")),
    "kernel-linear": Section(30, partial(kernel, name="linear")),
    "end-to-end-14B": Section(120, partial(end_to_end, spec=Spec("14B"), traffic=ENDS)),
    "end-to-end-8B-hard": Section(120, partial(end_to_end, spec=Spec("8B"), traffic=HARD)),
}


def describe(commit: str | None) -> Facts:
    """Machine, versions, commit and command line."""
    machine: dict[str, Any] = describe_machine("torch", "triton")
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        machine["gpu"] = {
            "name": card.name,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "multiprocessors": card.multi_processor_count,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit or _output("git", "rev-parse", "HEAD"),
        "machine": machine,
    }


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def run_section(run: Run, document: Document, work: Callable[[Run, Document], None]) -> str:
    """Write what it finds, and how it ended: done, cut or failed."""
    try:
        work(run, document)
        document.write(status="done")
    except OutOfTime:
        document.write(status="cut")
    except Exception as error:  # whatever it was, the next section may still work
        document.write(status="failed", error=f"{error!r}"[:500], trace=traceback.format_exc())
        print(traceback.format_exc(), flush=True)
        run.bench.release()
    return str(document.facts["status"])


def run_sections(run: Run, names: Sequence[str], budget_s: float, again: bool) -> None:
    """One after the other; one that cannot be half done in what is left is not begun.

    On a GPU the rest goes on in a new process where a section failed, for an error of the device
    outlives it, or did not come back in time.
    """
    ends, facts = time.monotonic() + budget_s, describe(run.commit)

    def go_on(rest: Sequence[str]) -> None:
        command = rest_of_command(run, rest, ends - time.monotonic(), again)
        os.execv(command[0], command)

    for index, name in enumerate(names):
        section, rest = SECTIONS[name], names[index + 1 :]
        left = ends - time.monotonic()
        if not again and run.documents().get(name, {}).get("status") == "done":
            print(f"{name}: done before")
            continue
        if left < section.estimate_s / 2:
            print(f"{name}: {left:.0f} s are left, not begun")
            continue
        print(f"{name}: about {section.estimate_s:.0f} s", flush=True)
        seconds = min(left, GRACE * section.estimate_s)
        document = begin_document(run, name, seconds, facts)
        with overrun_watch(seconds + OVERRUN_S, document, partial(go_on, rest)):
            status = run_section(run, document, section.work)
        print(f"{name}: {status} in {document.facts['seconds']} s", flush=True)
        if status == "failed" and run.bench.device.type == "cuda":
            go_on(rest)


def begin_document(run: Run, name: str, seconds: float, facts: Facts) -> Document:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    estimate_s = SECTIONS[name].estimate_s
    head = {"section": name, "status": "running", "at": now, "estimate_s": estimate_s}
    document = Document(run.out / f"{name}.json", head | facts, time.monotonic() + seconds)
    document.write()
    return document


@contextmanager
def overrun_watch(seconds: float, document: Document, go_on: Callable[[], None]) -> Iterator[None]:
    """Ends what does not end itself, a kernel that hangs, say."""

    def end() -> None:
        document.write(status="overran")
        print(f"overran after {seconds:.0f} s", flush=True)
        go_on()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def rest_of_command(run: Run, names: Sequence[str], left_s: float, again: bool) -> list[str]:
    """This script on the sections that remain; on none, it prints the table."""
    return [
        sys.executable, str(Path(__file__)),
        "--out", str(run.out),
        "--sections", ",".join(names),
        "--budget-s", f"{left_s:.0f}",
        *([] if run.commit is None else ["--commit", run.commit]),
        *["--again"] * again,
        *["--tiny"] * run.bench.is_tiny,
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder; one JSON file a section")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="of %(default)s")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S)
    parser.add_argument("--again", action="store_true", help="also what is done in the folder")
    parser.add_argument("--table", action="store_true", help="only print the table of the folder")
    parser.add_argument("--commit", help="where the folder is no git repository")
    parser.add_argument("--tiny", action="store_true", help="small sizes; figures mean nothing")
    options = parser.parse_args(arguments)
    names = [name for name in options.sections.split(",") if name]
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"--sections: {unknown[0]!r} is not one of {', '.join(SECTIONS)}")
    if not torch.cuda.is_available() and not (options.tiny or options.table):
        parser.error("there is no GPU; --tiny shows that all of it runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(Workbench(device, options.tiny), options.out, options.commit)
    if not options.table:
        run_sections(run, names, options.budget_s, options.again)
    printed = table(run.documents())
    print(printed)
    (options.out / "summary.txt").write_text(printed + "\n")


if __name__ == "__main__":
    main()
