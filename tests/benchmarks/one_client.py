"""What self-speculation brings one client, by kind of text, beside what calibration and acceptance
predict: A * t_AR / (t_draft + t_verify) at the best block size, A tokens kept a round.

    trimode calibrate --out profile.json
    python tests/benchmarks/one_client.py --profile profile.json
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from governor_engine import FIXED, PROMPTS, build_engines, entries
from rich.console import Console

from trimode.cluster.bench.local import LocalTarget, engine_config, load_encoder
from trimode.cluster.bench.measure import Curves, measure
from trimode.cluster.bench.metrics import Limits, Ratio
from trimode.cluster.bench.settings import AR, GOVERNOR
from trimode.cluster.bench.workload import Sampling, closed_load
from trimode.replicas.machine import describe_machine
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.step_profile import StepProfile

OUT = Path(__file__).parents[2] / "docs" / "measurements" / "one_client.json"


def predicted(profile: StepProfile, block_size: int, accepted: float, context: int) -> float:
    """Speed-up over AR of rounds of this size that keep so many tokens."""
    plain = profile.seconds(1, 1, context, drafts=False)
    draft = profile.seconds(block_size, 1, context, drafts=True)
    return accepted * plain / (draft + profile.seconds(block_size, 1, context, drafts=False))


def row(curves: Curves, index: int, profile: StepProfile, context: int) -> dict[str, object]:
    """One kind of text: every setting over AR, and the prediction."""
    points = {name: points[index] for name, points in curves.items()}
    accepted = {
        setting.name: points[setting.name].summary.accepted_per_round
        for setting in FIXED
        if setting.block_size is not None
    }
    forecasts = {
        setting.name: predicted(profile, setting.block_size, accepted[setting.name] or 1.0, context)
        for setting in FIXED
        if setting.block_size is not None
    }
    best = max(1.0, *forecasts.values())  # plain AR is one of the governor's choices
    over_ar = {
        name: Ratio.of(point.speeds, points[AR.name].speeds).to_dict()
        for name, point in points.items()
        if name != AR.name
    }
    return {
        "over_ar": over_ar,
        "accepted_per_round": accepted,
        "predicted_over_ar": forecasts,
        "governor_over_predicted": over_ar[GOVERNOR.name]["median"] / best,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--profile", type=Path, required=True, help="of `trimode calibrate`")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)

    sampling = Sampling(options.max_tokens, 0.0, ignore_eos=True)
    loads = [closed_load(prompts, 1, len(prompts), sampling) for prompts in PROMPTS.values()]
    encode = load_encoder(BUNDLED_CHECKPOINT)
    config = engine_config(BUNDLED_CHECKPOINT, encode, loads)
    plain, governed = (
        LocalTarget(engine, encode, clock=time.process_time)
        for engine in build_engines(config, options.profile)
    )
    groups = [entries(load, plain, governed) for load in loads]
    curves = measure(groups, options.repeats, Limits(), Console(soft_wrap=True))
    profile = StepProfile.load(options.profile)
    context = options.max_tokens // 2 + 24  # in the middle of an answer
    rows = {domain: row(curves, index, profile, context) for index, domain in enumerate(PROMPTS)}
    document = {
        "command": " ".join(["python", *sys.argv]),
        "machine": describe_machine("torch", "trimode"),
        "threads": 1,
        "clock": "time.process_time",
        "repeats": options.repeats,
        "max_tokens": options.max_tokens,
        "wanted": "0.95 of the prediction, 1.0 of AR, 1.5 of AR on the most predictable text",
        "texts": rows,
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
