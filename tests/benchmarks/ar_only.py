"""What the other modes and a governor cost those who only decode autoregressively.

    python tests/benchmarks/ar_only.py    # about ten minutes -> docs/measurements/ar_only.json

Requests of AR on an engine with all modes and a governor, over the same on an engine whose
registry holds nothing but AR; a second one of its kind shows how far equals differ. They take turns
on one runner, without a prefix cache, so that none has luckier memory than the others. The clock is
the CPU time of this process, which on one thread is the wall's without what other processes take.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from trimode.cluster.bench.local import LocalTarget, engine_config, load_encoder
from trimode.cluster.bench.measure import Entry, Point, measure
from trimode.cluster.bench.metrics import Limits, Ratio
from trimode.cluster.bench.settings import AR
from trimode.cluster.bench.workload import DEFAULT_PROMPTS, Sampling, closed_load
from trimode.replicas import calibration
from trimode.replicas.config import EngineConfig
from trimode.replicas.decoding.autoregressive import Autoregressive
from trimode.replicas.engine import Engine
from trimode.replicas.governor import Governor
from trimode.replicas.loading import build_runner
from trimode.replicas.machine import describe_machine
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.step_profile import StepProfile
from trimode.replicas.types import Mode

OUT = Path(__file__).parents[2] / "docs" / "measurements" / "ar_only.json"
USERS = (1, 8, 32)
ALL, ONLY, AGAIN = "all modes and governor", "ar only", "ar only, another one"


def build_engines(config: EngineConfig, profile: Path | None) -> dict[str, Engine]:
    runner = build_runner(BUNDLED_CHECKPOINT, config, dtype="float32")
    steps = StepProfile.load(profile) if profile else calibration.measure(runner, config)
    registry = {Mode.AUTOREGRESSIVE: Autoregressive}
    return {
        ALL: Engine(runner, config, governor=Governor(steps, config.max_block_size)),
        ONLY: Engine(runner, config, modes=registry),
        AGAIN: Engine(runner, config, modes=registry),
    }


def row(points: dict[str, Point]) -> dict[str, object]:
    speeds = {name: point.speeds for name, point in points.items()}
    return {
        "ratio": Ratio.of(speeds[ALL], speeds[ONLY]).to_dict(),
        "ratio_of_equals": Ratio.of(speeds[AGAIN], speeds[ONLY]).to_dict(),
        "tokens_per_s": speeds,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--profile", type=Path, help="of `trimode calibrate`; default: measured")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)

    sampling = Sampling(options.max_tokens, ignore_eos=True)
    loads = [closed_load(DEFAULT_PROMPTS, users, options.requests, sampling) for users in USERS]
    encode = load_encoder(BUNDLED_CHECKPOINT)
    config = replace(engine_config(BUNDLED_CHECKPOINT, encode, loads), prefix_cache=False)
    targets = {
        name: LocalTarget(engine, encode, clock=time.process_time)
        for name, engine in build_engines(config, options.profile).items()
    }
    groups = [[Entry(name, AR, load, targets[name]) for name in targets] for load in loads]
    curves = measure(groups, options.repeats, Limits(), Console(soft_wrap=True))

    rows = {
        load.label: row({name: points[index] for name, points in curves.items()})
        for index, load in enumerate(loads)
    }
    for users, figures in rows.items():
        print(f"{users} users:", json.dumps({k: v for k, v in figures.items() if "ratio" in k}))
    document = {
        "command": "python tests/benchmarks/ar_only.py",
        "machine": describe_machine("torch", "trimode"),
        "threads": 1,
        "clock": "time.process_time",
        "repeats": options.repeats,
        "requests": options.requests,
        "max_tokens": options.max_tokens,
        "ratio_wanted": 0.99,
        "users": rows,
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
