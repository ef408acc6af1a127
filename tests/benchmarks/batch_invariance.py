"""How often a request's tokens depend on its company: divergences per 10,000 tokens.

    python tests/benchmarks/batch_invariance.py

Every request is decoded alone, autoregressively; then all of them at once, in random order and
random modes, each as often as there are shuffles. Where the arithmetic is exact all tokens are the
same. Counted is the first token that differs of each completion, over the tokens up to there: what
follows it is another text. On a GPU the same is done with `batch_invariant`, and what that costs is
the ratio of the times.

Writes docs/measurements/batch_invariance.json.
"""

import argparse
import json
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from held_out import load_prompts

from trimode.replicas.config import EngineConfig
from trimode.replicas.engine import Engine
from trimode.replicas.loading import build_engine
from trimode.replicas.machine import describe_machine
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.types import Mode, Request

OUT = Path(__file__).parents[2] / "docs" / "measurements" / "batch_invariance.json"
PROMPT_LEN = 64
MODES = (Mode.AUTOREGRESSIVE, Mode.SELF_SPECULATION)
BLOCK_SIZES = (4, 8, 16, 32)  # of self-speculation, by turns

Outputs = dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to multiply."""

    dtype: str
    quantization: str | None
    batch_invariant: bool


@dataclass(slots=True)
class Count:
    """What was compared of one mode."""

    completions: int = 0
    tokens: int = 0  # up to the first that differs, with it
    divergences: int = 0

    def add(self, got: list[int], wanted: list[int]) -> None:
        pairs = zip(got, wanted, strict=False)
        same = next((at for at, (a, b) in enumerate(pairs) if a != b), None)
        self.completions += 1
        self.tokens += len(wanted) if same is None else same + 1
        self.divergences += same is not None

    def to_dict(self) -> dict[str, float]:
        per_10k = 1e4 * self.divergences / max(1, self.tokens)
        return asdict(self) | {"divergences_per_10000_tokens": round(per_10k, 2)}


def decode(engine: Engine, requests: list[Request]) -> Outputs:
    """All at once; what each wrote."""
    outputs: Outputs = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for request_id, chunk in engine.step():
            outputs[request_id] += chunk.token_ids
    return outputs


def crowd(requests: list[Request], rng: random.Random) -> list[Request]:
    """The requests in another order, each in some mode and with blocks of some size."""
    mixed = []
    for request in rng.sample(requests, len(requests)):
        mode = rng.choice(MODES)
        block_size = rng.choice(BLOCK_SIZES) if mode is Mode.SELF_SPECULATION else None
        mixed.append(replace(request, mode=mode, block_size=block_size))
    return mixed


def measure(
    folder: Path, setting: Setting, requests: list[Request], users: int, shuffles: int
) -> dict[str, Any]:
    """One setting's divergences by mode, and the seconds of the crowds."""
    longest = max(len(request.prompt_ids) + request.max_tokens for request in requests)
    config = EngineConfig(
        num_pages=users * (longest // 16 + 4), max_sequences=users, max_waiting=len(requests),
        prefix_cache=False, batch_invariant=setting.batch_invariant,
    )  # fmt: skip
    engine = build_engine(folder, config, dtype=setting.dtype, quantization=setting.quantization)
    alone: Outputs = {}
    for request in requests:
        alone |= decode(engine, [request])
    counts = {mode: Count() for mode in MODES}
    rng, seconds = random.Random(0), 0.0
    for _ in range(shuffles):
        mixed = crowd(requests, rng)
        begun = time.perf_counter()
        together = decode(engine, mixed)
        seconds += time.perf_counter() - begun
        for request in mixed:
            counts[request.mode].add(together[request.request_id], alone[request.request_id])
    return asdict(setting) | {
        "seconds_of_crowds": round(seconds, 2),
        **{mode.value: count.to_dict() for mode, count in counts.items()},
    }


def settings(dtypes: list[str], quantizations: list[str | None], on_gpu: bool) -> list[Setting]:
    return [
        Setting(dtype, quantization, invariant)
        for dtype in dtypes
        for quantization in quantizations
        for invariant in ((False, True) if on_gpu else (False,))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=BUNDLED_CHECKPOINT)
    parser.add_argument("--work", type=Path, default=Path("build/checkpoint"))
    parser.add_argument("--prompts", type=int, default=10, help="held-out prompts a domain")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--users", type=int, default=16, help="at once in the crowd")
    parser.add_argument("--shuffles", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--quantizations", nargs="+", default=["none", "fp8"])
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    by_domain = load_prompts(options.work, options.prompts, PROMPT_LEN, options.max_tokens)
    prompts = [prompt for domain in by_domain.values() for prompt in domain]
    requests = [
        Request(str(index), prompt, Mode.AUTOREGRESSIVE, options.max_tokens, ignore_eos=True)
        for index, prompt in enumerate(prompts)
    ]
    quantizations = [None if name == "none" else name for name in options.quantizations]
    rows: list[dict[str, Any]] = []
    document = {
        "command": "python tests/benchmarks/batch_invariance.py",
        "machine": describe_machine("torch", "trimode"),
        "model": options.model.name,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "prompts": len(prompts),
        "new_tokens": options.max_tokens,
        "users": options.users,
        "shuffles": options.shuffles,
        "rows": rows,
    }
    for setting in settings(options.dtypes, quantizations, torch.cuda.is_available()):
        row = measure(options.model, setting, requests, options.users, options.shuffles)
        rows.append(row)
        print(json.dumps(row), flush=True)
        options.out.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
