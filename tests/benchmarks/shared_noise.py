"""What it brings that a draft and its verification draw with the same noise.

    python tests/benchmarks/shared_noise.py

Self-speculation of the bundled checkpoint at temperatures above 0 with three kinds of drafts:
`shared` draws with the noise that the verify pass draws with (as the engine does), `greedy` takes
the arg max, `independent` draws with noise of its own. The answers of the verify pass are the same
three times, so the three completions are the same tokens in different numbers of rounds. Left out
and counted: completions that run into a loop (docs/checkpoint.md), and any that differ after all
(float32 rounds differently in another batch).

Writes docs/measurements/shared_noise.json. Standard errors are a bootstrap over prompts: rounds of
one prompt are alike, those of different prompts are not.
"""

import argparse
import copy
import json
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from held_out import load_prompts

from trimode.replicas.checkpoint.corpus import has_loop
from trimode.replicas.config import EngineConfig
from trimode.replicas.decoding.strategy import Stage
from trimode.replicas.engine import Engine
from trimode.replicas.loading import build_runner
from trimode.replicas.machine import describe_machine
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.model_runner import ModelRunner
from trimode.replicas.scheduled import Answers, Scheduled
from trimode.replicas.types import Mode, Request

OUT = Path(__file__).parents[2] / "docs" / "measurements" / "shared_noise.json"
PROMPT_LEN, NEW_TOKENS = 64, 96
TEMPERATURES = (0.7, 1.0)
BLOCK_SIZES = (8, 16, 32)
RESAMPLES = 2000
OTHER_NOISE = 0x5DEECE66D  # seeds of independent drafts differ from the requests' in these bits

Redraft = Callable[[Request], Request]
DRAFTS: dict[str, Redraft] = {
    "shared": lambda request: request,
    "greedy": lambda request: replace(request, temperature=0.0),
    "independent": lambda request: replace(request, seed=request.seed ^ OTHER_NOISE),
}


class RedraftingRunner:
    """A runner that lets draft passes sample as another request would."""

    def __init__(self, runner: ModelRunner[Any], redraft: Redraft) -> None:
        self._runner = runner
        self._redraft = redraft
        self.info = runner.info

    def launch(self, scheduled: SequenceOf[Scheduled], *rest: Any) -> Any:
        return self._runner.launch([self._redrafted(item) for item in scheduled], *rest)

    def read(self, launched: Any) -> list[Answers]:
        return self._runner.read(launched)

    def _redrafted(self, item: Scheduled) -> Scheduled:
        if item.query.stage is not Stage.DRAFT:
            return item
        sequence = copy.copy(item.sequence)
        sequence.request = self._redraft(sequence.request)
        return replace(item, sequence=sequence)


@dataclass(frozen=True, slots=True)
class Run:
    """One completion: the prompt it belongs to, its tokens, and what each round accepted."""

    prompt: int
    token_ids: tuple[int, ...]
    accepted: tuple[int, ...]


def decode(
    engine: Engine, prompts: list[tuple[int, ...]], template: Request, seeds: int
) -> list[Run]:
    """Every prompt with every seed, in that order."""
    outputs: dict[str, list[int]] = {}
    accepted: dict[str, tuple[int, ...]] = {}
    for index, prompt in enumerate(prompts):
        for seed in range(seeds):
            name = f"{index}/{seed}"
            outputs[name] = []
            engine.add(
                replace(template, request_id=name, prompt_ids=prompt, seed=1000 * seed + index)
            )
    while engine.has_work:
        for name, chunk in engine.step():
            outputs[name] += chunk.token_ids
            if chunk.finish is not None:
                accepted[name] = chunk.finish.accepted
    return [
        Run(int(name.partition("/")[0]), tuple(ids), accepted[name])
        for name, ids in outputs.items()
    ]


def compare(runs: dict[str, list[Run]]) -> dict[str, Any]:
    """Accepted tokens a round of each kind, and shared over the others."""
    trials = list(zip(*runs.values(), strict=True))
    same = [trial for trial in trials if len({run.token_ids for run in trial}) == 1]
    kept = [trial for trial in same if not has_loop(list(trial[0].token_ids))]
    # Sums over each prompt, so that a resample of prompts is a sum of rows.
    owners = np.unique([trial[0].prompt for trial in kept], return_inverse=True)[1]
    tokens, rounds = (
        np.stack([np.bincount(owners, [count(run.accepted) for run in column])
                  for column in zip(*kept, strict=True)])
        for count in (sum, len)
    )  # [num_kinds, num_prompts]  # fmt: skip
    num_prompts = tokens.shape[1]
    drawn = np.random.default_rng(0).integers(num_prompts, size=(RESAMPLES, num_prompts))
    mean = dict(zip(runs, tokens.sum(1) / rounds.sum(1), strict=True))
    resampled = dict(zip(runs, tokens[:, drawn].sum(-1) / rounds[:, drawn].sum(-1), strict=True))

    def figure(value: Any, values: Any) -> dict[str, float]:
        return {"mean": float(value), "standard_error": float(values.std(ddof=1))}

    return {
        "completions": len(kept),
        "left_out_as_loops": len(same) - len(kept),
        "left_out_as_different": len(trials) - len(same),
        "rounds": dict(zip(runs, rounds.sum(1).astype(int).tolist(), strict=True)),
        "accepted": {kind: figure(mean[kind], resampled[kind]) for kind in runs},
        "shared_over": {
            kind: figure(mean["shared"] / mean[kind], resampled["shared"] / resampled[kind])
            for kind in runs if kind != "shared"
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/checkpoint"))
    parser.add_argument("--prompts", type=int, default=10, help="held-out prompts a domain")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    by_domain = load_prompts(arguments.work, arguments.prompts, PROMPT_LEN, NEW_TOKENS)
    prompts = [prompt for domain in by_domain.values() for prompt in domain]
    # One cache serves the three engines in turn, so none may count on what it finds there.
    config = EngineConfig(
        num_pages=1024, max_sequences=32, max_waiting=len(prompts) * arguments.seeds,
        prefix_cache=False,
    )  # fmt: skip
    runner = build_runner(BUNDLED_CHECKPOINT, config, dtype="float32")
    engines = {
        kind: Engine(RedraftingRunner(runner, redraft), config) for kind, redraft in DRAFTS.items()
    }
    rows: list[dict[str, Any]] = []
    document = {
        "command": f"python tests/benchmarks/shared_noise.py --prompts {arguments.prompts} "
        f"--seeds {arguments.seeds}",
        "machine": describe_machine("torch", "trimode"),
        "prompts": {domain: len(items) for domain, items in by_domain.items()},
        "seeds": arguments.seeds,
        "held_out_prompt_tokens": PROMPT_LEN,
        "new_tokens": NEW_TOKENS,
        "rows": rows,
    }
    for temperature in TEMPERATURES:
        for block_size in BLOCK_SIZES:
            template = Request(
                "", (0,), Mode.SELF_SPECULATION, NEW_TOKENS,
                temperature=temperature, block_size=block_size,
            )  # fmt: skip
            runs = {kind: decode(engine, prompts, template, arguments.seeds)
                    for kind, engine in engines.items()}  # fmt: skip
            row = {"temperature": temperature, "block_size": block_size} | compare(runs)
            rows.append(row)
            print(json.dumps(row), flush=True)
            OUT.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
