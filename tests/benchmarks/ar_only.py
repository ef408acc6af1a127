"""What the other modes and a governor cost those who only decode autoregressively.

    python tests/benchmarks/ar_only.py    # about ten minutes -> docs/measurements/ar_only.json

Requests of AR on an engine with all modes and a governor, over the same on an engine whose
registry holds nothing but AR; a second one of its kind shows how far equals differ. They take turns
on one runner, without a prefix cache, so that none has luckier memory than the others. The clock is
the CPU time of this process, which on one thread is the wall's without what other processes take.

What is the same on both sides, the passes of the model, varies by more than what is looked for. So
the host's part of a step is measured by itself, too, on engines whose runner answers at once; what
it differs by, over the time of a pass, is `host_ratio`.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from memory import NoModel
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
from trimode.replicas.model_runner import TorchModelRunner
from trimode.replicas.step_profile import StepProfile
from trimode.replicas.types import Mode, ModelInfo, Request

OUT = Path(__file__).parents[2] / "docs" / "measurements" / "ar_only.json"
USERS = (1, 8, 32)
ALL, ONLY, AGAIN = "all modes and governor", "ar only", "ar only, another one"


def build_steps(config: EngineConfig, profile: Path | None) -> tuple[TorchModelRunner, StepProfile]:
    runner = build_runner(BUNDLED_CHECKPOINT, config, dtype="float32")
    return runner, StepProfile.load(profile) if profile else calibration.measure(runner, config)


def build_engines(
    runner: TorchModelRunner, steps: StepProfile, config: EngineConfig
) -> dict[str, Engine]:
    registry = {Mode.AUTOREGRESSIVE: Autoregressive}
    return {
        ALL: Engine(runner, config, governor=Governor(steps, config.max_block_size)),
        ONLY: Engine(runner, config, modes=registry),
        AGAIN: Engine(runner, config, modes=registry),
    }


def host_us(engine: Engine, users: int, steps: int = 600) -> float:
    """The quickest step of so many AR sequences, without a model."""
    for index in range(users):
        prompt = tuple(300 + (index + j) % 400 for j in range(16))
        request = Request(f"r{index}", prompt, Mode.AUTOREGRESSIVE, steps + 9, ignore_eos=True)
        engine.add(request)
    quickest = min(_step_s(engine) for _ in range(steps))
    for index in range(users):
        engine.abort(f"r{index}")
    return quickest * 1e6


def _step_s(engine: Engine) -> float:
    begin = time.perf_counter()
    engine.step()
    return time.perf_counter() - begin


def host_rows(info: ModelInfo, profile: StepProfile) -> dict[str, object]:
    """By users: microseconds of the host a step on both engines, and the ratio they make."""
    config = EngineConfig(num_pages=16384, max_sequences=256, prefix_cache=False)
    engines = {
        ALL: Engine(NoModel(info), config, governor=Governor(profile, config.max_block_size)),
        ONLY: Engine(NoModel(info), config, modes={Mode.AUTOREGRESSIVE: Autoregressive}),
    }
    rows: dict[str, object] = {}
    for users in USERS:
        quickest = dict.fromkeys(engines, math.inf)
        for _ in range(5):
            for name, engine in engines.items():
                quickest[name] = min(quickest[name], host_us(engine, users))
        pass_us = 1e6 * profile.seconds(users, users, 64 * users, drafts=False)
        ratio = (pass_us + quickest[ONLY]) / (pass_us + quickest[ALL])
        rows[str(users)] = {"us_a_step": quickest, "us_a_pass": pass_us, "host_ratio": ratio}
    return rows


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
    runner, steps = build_steps(config, options.profile)
    targets = {
        name: LocalTarget(engine, encode, clock=time.process_time)
        for name, engine in build_engines(runner, steps, config).items()
    }
    groups = [[Entry(name, AR, load, targets[name]) for name in targets] for load in loads]
    curves = measure(groups, options.repeats, Limits(), Console(soft_wrap=True))

    rows = {
        load.label: row({name: points[index] for name, points in curves.items()})
        for index, load in enumerate(loads)
    }
    for users, figures in rows.items():
        print(f"{users} users:", json.dumps({k: v for k, v in figures.items() if "ratio" in k}))
    host = host_rows(runner.info, steps)
    print(json.dumps(host))
    document = {
        "command": " ".join(["python", *sys.argv]),
        "machine": describe_machine("torch", "trimode"),
        "threads": 1,
        "clock": "time.process_time",
        "repeats": options.repeats,
        "requests": options.requests,
        "max_tokens": options.max_tokens,
        "ratio_wanted": 0.99,
        "users": rows,
        "host": host,
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
