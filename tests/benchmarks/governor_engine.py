"""The governor against every fixed setting, at every load and on one that changes.

    python tests/benchmarks/governor_engine.py    # half an hour

Fixed settings run on an engine without a governor, so that what it costs is on its side alone; both
are on one runner, without a prefix cache. All settings take turns. The best fixed setting is the
one with the best median; ratios are of runs of the same turn.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console

from trimode.cluster.bench.local import LocalTarget, engine_config, load_encoder
from trimode.cluster.bench.measure import Curves, Entry, Target, measure
from trimode.cluster.bench.metrics import Limits, Ratio, Record
from trimode.cluster.bench.settings import AR, GOVERNOR, SPECULATION
from trimode.cluster.bench.workload import Job, Load, Sampling, closed_load
from trimode.replicas import calibration
from trimode.replicas.acceptance import load_prior
from trimode.replicas.config import EngineConfig
from trimode.replicas.engine import Engine
from trimode.replicas.governor import Governor
from trimode.replicas.loading import build_runner
from trimode.replicas.machine import describe_machine
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.step_profile import StepProfile

OUT = Path(__file__).parents[2] / "docs" / "measurements" / "governor_engine.json"
USERS = (1, 2, 4, 8, 16, 32, 64)
FIXED = (AR, *SPECULATION)
PROMPTS = {
    "tables": (
        "    '\\x00'     #  0x00 -> NULL\n    '\\x01'     #  0x01 -> START OF HEADING\n",
        "    '\\x40'     #  0x40 -> COMMERCIAL AT\n    'A'     #  0x41 -> LATIN CAPITAL LETTER A\n",
        "    0x0080: 0x00c7,     # LATIN CAPITAL LETTER C WITH CEDILLA\n",
        "    '0'     #  0x30 -> DIGIT ZERO\n    '1'     #  0x31 -> DIGIT ONE\n",
    ),
    "prose": (
        "To the Senate and House of Representatives: In my last annual message I",
        "The expenditures of the Government for the fiscal year ending June 30",
        "Our relations with the nations of the world have been peaceful, and the treaty with",
        "I recommend to the attention of Congress the report of the Secretary of the Navy, who",
    ),
    "code": (
        "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n",
        "import os\nimport sys\n\ndef main():\n    if len(sys.argv) != 2:\n",
        "    def read(self, size=-1):\n        if self.closed:\n            raise ValueError(",
        "def walk(top):\n    for name in os.listdir(top):\n        path = join(top, name)\n",
    ),
}


@dataclass(frozen=True, slots=True)
class Phase:
    """Part of a load that changes: so many users at once, all of one domain."""

    domain: str
    users: int
    requests: int


# A few seconds each; the end is the beginning again.
PHASES = (
    Phase("tables", 1, 4),
    Phase("prose", 32, 64),
    Phase("code", 4, 12),
    Phase("tables", 1, 4),
)


class PhasedTarget:
    """Runs its jobs phase by phase; one begins when the one before is done."""

    def __init__(self, target: Target, phases: Sequence[Phase]) -> None:
        self._target = target
        self._phases = phases

    def run(
        self, jobs: Sequence[Job], concurrency: int, on_done: Callable[[], None]
    ) -> list[Record]:
        ahead, records = iter(jobs), []
        for phase in self._phases:
            some = list(islice(ahead, phase.requests))  # none: a warm-up, which is shorter
            if some:
                records += self._target.run(some, phase.users, on_done)
        return records


def changing_load(phases: Sequence[Phase], sampling: Sampling) -> Load:
    asks = [
        ask
        for phase in phases
        for ask in closed_load(PROMPTS[phase.domain], 1, phase.requests, sampling).asks
    ]
    return Load("changing", max(phase.users for phase in phases), tuple(asks))


def build_engines(config: EngineConfig, profile: Path | None) -> tuple[Engine, Engine]:
    """Without and with a governor, on one runner, so that neither has luckier memory. Without a
    prefix cache: each would find what the other has overwritten.
    """
    config = replace(config, prefix_cache=False)
    runner = build_runner(BUNDLED_CHECKPOINT, config, dtype="float32")
    steps = StepProfile.load(profile) if profile else calibration.measure(runner, config)
    governor = Governor(steps, config.max_block_size, load_prior(BUNDLED_CHECKPOINT))
    return Engine(runner, config), Engine(runner, config, governor=governor)


def row(curves: Curves, index: int) -> dict[str, object]:
    """The governor beside the best fixed setting, at one load."""
    speeds = {name: points[index].speeds for name, points in curves.items()}
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    best = max((setting.name for setting in FIXED), key=lambda name: medians[name])
    return {
        "best_fixed": best,
        "governor_over_best_fixed": Ratio.of(speeds[GOVERNOR.name], speeds[best]).to_dict(),
        "tokens_per_s": medians,
        "tokens_per_s_of_repeats": speeds,
    }


def entries(load: Load, plain: Target, governed: Target) -> list[Entry]:
    fixed = [Entry(setting.name, setting, load, plain) for setting in FIXED]
    return [*fixed, Entry(GOVERNOR.name, GOVERNOR, load, governed)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--users", type=int, nargs="+", default=USERS)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--profile", type=Path, help="of `trimode calibrate`; default: measured")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    sampling = Sampling(options.max_tokens, options.temperature, ignore_eos=True)
    prompts = [prompt for domain in PROMPTS.values() for prompt in domain]
    loads = [closed_load(prompts, users, options.requests, sampling) for users in options.users]
    loads.append(changing_load(PHASES, sampling))
    encode = load_encoder(BUNDLED_CHECKPOINT)
    config = engine_config(BUNDLED_CHECKPOINT, encode, loads)
    # On one thread, CPU time is the wall's without what other processes take.
    clock = time.process_time if options.threads == 1 else time.perf_counter
    plain, governed = (
        LocalTarget(engine, encode, clock=clock)
        for engine in build_engines(config, options.profile)
    )
    groups = [entries(load, plain, governed) for load in loads[:-1]]
    groups.append(entries(loads[-1], PhasedTarget(plain, PHASES), PhasedTarget(governed, PHASES)))
    curves = measure(groups, options.repeats, Limits(), Console(soft_wrap=True))

    rows = {load.label: row(curves, index) for index, load in enumerate(loads)}
    for label, figures in rows.items():
        print(label, figures["best_fixed"], json.dumps(figures["governor_over_best_fixed"]))
    document = {
        "command": " ".join(["python", *sys.argv]),
        "machine": describe_machine("torch", "trimode"),
        "threads": options.threads,
        "clock": f"time.{clock.__name__}",
        "repeats": options.repeats,
        "requests": options.requests,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "wanted": "0.98 of the best fixed setting at each load, above it where that changes",
        "phases": [f"{p.users} users, {p.domain}, {p.requests} requests" for p in PHASES],
        "loads": rows,
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
