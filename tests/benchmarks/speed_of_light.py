"""How many tokens a forward diffusion could commit if its sampler knew the answer, by block size.

    python tests/benchmarks/speed_of_light.py

The analysis of arXiv 2607.05722, section 4, on the bundled checkpoint. The target is the model's
own greedy AR continuation. A denoise pass of the oracle commits the masked positions whose arg max
is the target's token: all of them (`any`), or those before the first that is not (`prefix`). Where
that is none, the target's token is put at the first mask (a *forced* pass: no sampler that only
chooses positions could do that), so that every block ends in the target. Beside it what the modes
reach on the same prompts: block diffusion at its default threshold of 0.9, and self-speculation
with the draft adapter. Commit and verify passes are counted as forwards, prefills are not.

Writes docs/measurements/speed_of_light.json and .png. Targets that run into a loop
(docs/checkpoint.md) are left out of the figures and kept in those named `with_loops`.
"""

import argparse
import json
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from held_out import load_prompts

from trimode.replicas.checkpoint.corpus import has_loop
from trimode.replicas.config import EngineConfig
from trimode.replicas.decoding.block import Block
from trimode.replicas.decoding.self_speculation import num_agreeing
from trimode.replicas.decoding.strategy import (
    DecodingContext,
    Outcome,
    PassKind,
    Position,
    Query,
    Stage,
    Strategy,
)
from trimode.replicas.engine import Engine
from trimode.replicas.loading import build_runner
from trimode.replicas.machine import describe_machine
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.model_runner import ModelRunner
from trimode.replicas.types import Finish, Mode, Request, TokenLogprobs

matplotlib.use("Agg")
from matplotlib import pyplot

OUT = Path(__file__).parents[2] / "docs" / "measurements" / "speed_of_light"
BLOCK_SIZES = (4, 8, 16, 32)
PROMPT_LEN = 64
# The prefill gives one token; then come whole blocks of every size, each with its commit pass. Most
# greedy texts of this small model run into a loop when they are longer.
NEW_TOKENS = 1 + 32
CONFIG = EngineConfig(num_pages=1024, max_sequences=32, max_waiting=4096, prefix_cache=False)
TEMPLATE = Request("", (0,), Mode.AUTOREGRESSIVE, NEW_TOKENS, ignore_eos=True)
Prompts = Mapping[str, tuple[int, ...]]  # token ids, by domain/number
Targets = Mapping[str, list[int]]


class OracleDiffusion:
    """Block diffusion whose sampler knows the text (a Strategy)."""

    def __init__(self, context: DecodingContext, target: SequenceOf[int], prefix: bool) -> None:
        self._context = context
        self._target = target
        self._prefix = prefix
        self._block: Block | None = None
        self.num_forced = 0

    needs_host = True  # it asks the known text

    def starts_round(self, before: Query | None = None) -> bool:
        return False

    def query_ahead(self, before: Query, block_size: int | None) -> Query:
        raise NotImplementedError("answers come first")

    def next_query(self, position: Position) -> Query:
        if self._block is None:
            size, mask_id = self._context.block_size, self._context.mask_id
            self._block = Block(position.known_id, position.start, size, mask_id)
        block = self._block
        if block.masked:
            return Query(
                Stage.DENOISE, PassKind.DENOISE, block.token_ids, block.start, block.masked
            )
        last = len(block.token_ids) - 1
        return Query(Stage.COMMIT, PassKind.CAUSAL, block.token_ids, block.start, (last,))

    def accept(
        self,
        token_ids: SequenceOf[int],
        confidences: SequenceOf[float],
        logprobs: SequenceOf[TokenLogprobs] = (),
    ) -> Outcome:
        block = self._block
        assert block is not None, "accept() without a query"
        if not block.masked:
            self._block = None
            return Outcome(token_ids, num_committed=len(block.token_ids))
        first = block.start - len(self._context.request.prompt_ids)
        truth = [self._target[first + index] for index in block.masked]
        pairs = zip(token_ids, truth, strict=True)
        right = [i for i, (mine, its) in enumerate(pairs) if mine == its]
        if self._prefix:
            right = list(range(num_agreeing(truth, token_ids)))
        self.num_forced += not right
        block.fill(right or [0], truth)
        return Outcome() if block.masked else Outcome(emitted=block.token_ids[1:])


@dataclass(frozen=True, slots=True)
class Done:
    """One completion."""

    token_ids: list[int]
    finish: Finish
    num_forced: int = 0


def decode(engine: Engine, prompts: Prompts, template: Request) -> dict[str, Done]:
    """Every prompt's completion."""
    outputs: dict[str, list[int]] = {name: [] for name in prompts}
    done: dict[str, Done] = {}
    for name, prompt in prompts.items():
        engine.add(replace(template, request_id=name, prompt_ids=prompt))
    while engine.has_work:
        for name, chunk in engine.step():
            outputs[name] += chunk.token_ids
            if chunk.finish is not None:
                done[name] = Done(outputs[name], chunk.finish)
    return {name: done[name] for name in prompts}


def decode_with_oracle(
    runner: ModelRunner, prompts: Prompts, template: Request, targets: Targets, prefix: bool
) -> dict[str, Done]:
    oracles: dict[str, OracleDiffusion] = {}

    def oracle(context: DecodingContext) -> Strategy:
        name = context.request.request_id
        oracles[name] = OracleDiffusion(context, targets[name], prefix)
        return oracles[name]

    engine = Engine(runner, CONFIG, modes={Mode.BLOCK_DIFFUSION: oracle})
    done = decode(engine, prompts, template)
    return {name: replace(done[name], num_forced=oracles[name].num_forced) for name in done}


def decode_all(
    runner: ModelRunner, prompts: Prompts, targets: Targets, size: int
) -> dict[str, dict[str, Done]]:
    """Every way to decode, at one block size."""
    engine = Engine(runner, CONFIG)
    diffusion = replace(TEMPLATE, mode=Mode.BLOCK_DIFFUSION, block_size=size)
    speculation = replace(diffusion, mode=Mode.SELF_SPECULATION)
    return {
        "oracle, any": decode_with_oracle(runner, prompts, diffusion, targets, prefix=False),
        "oracle, prefix": decode_with_oracle(runner, prompts, diffusion, targets, prefix=True),
        "block diffusion": decode(engine, prompts, diffusion),
        "self-speculation": decode(engine, prompts, speculation),
    }


def figures(done: list[Done], size: int) -> dict[str, float]:
    """Of one domain and one way to decode."""
    rounds = [count for item in done for count in item.finish.accepted]
    if rounds:
        accepted = sum(rounds) / len(rounds)
        return {"tokens_per_forward": accepted / 2, "accepted_per_round": accepted}
    num_blocks = len(done) * (NEW_TOKENS - 1) // size
    num_denoised = sum(item.finish.forwards - 1 for item in done) - num_blocks
    return {
        "tokens_per_forward": num_blocks * size / (num_denoised + num_blocks),
        "tokens_per_denoise_pass": num_blocks * (size - 1) / num_denoised,
        "forced_share_of_denoise_passes": sum(item.num_forced for item in done) / num_denoised,
    }


def with_mean(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The rows of the domains, and the mean of those that are held out."""
    held_out = [row for domain, row in rows.items() if domain != "default" and row]
    mean = {key: float(np.mean([row[key] for row in held_out])) for key in held_out[0]}
    return rows | {"mean": mean}


def plot(rows: list[dict[str, Any]]) -> None:
    figure, axes = pyplot.subplots(1, 2, figsize=(10.5, 3.8), layout="constrained")
    for way in rows[0]["without_loops"]:
        means = [row["without_loops"][way]["mean"]["tokens_per_forward"] for row in rows]
        axes[0].plot(BLOCK_SIZES, means, marker="o", label=way)
    axes[0].axhline(1, color="grey", linestyle="--", label="autoregressive")
    axes[0].set(title="Mean of the held-out domains", ylabel="tokens a forward, commits included")
    by_domain = [row["without_loops"]["oracle, any"] for row in rows]
    for domain in by_domain[0]:
        values = [row[domain].get("tokens_per_forward", np.nan) for row in by_domain]
        axes[1].plot(BLOCK_SIZES, values, marker="o", label=domain)
    axes[1].set(title="The oracle (any) by domain")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(BLOCK_SIZES, [str(size) for size in BLOCK_SIZES])
        axis.set(xlabel="block size", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(OUT.with_suffix(".png"), dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/checkpoint"))
    parser.add_argument("--prompts", type=int, default=80, help="held-out prompts a domain")
    arguments = parser.parse_args()
    by_domain = load_prompts(arguments.work, arguments.prompts, PROMPT_LEN, NEW_TOKENS)
    prompts = {
        f"{name}/{i}": ids for name, group in by_domain.items() for i, ids in enumerate(group)
    }
    runner = build_runner(BUNDLED_CHECKPOINT, CONFIG, dtype="float32")
    texts = decode(Engine(runner, CONFIG), prompts, TEMPLATE)
    targets = {name: done.token_ids for name, done in texts.items()}
    without_loops = {name for name, ids in targets.items() if not has_loop(ids)}

    def summary(done: dict[str, Done], names: set[str], size: int) -> dict[str, dict[str, float]]:
        chosen = {
            domain: [item for name, item in done.items()
                     if name in names and name.startswith(f"{domain}/")]
            for domain in by_domain
        }  # fmt: skip
        return with_mean({d: figures(items, size) if items else {} for d, items in chosen.items()})

    rows: list[dict[str, Any]] = []
    for size in BLOCK_SIZES:
        ways = decode_all(runner, prompts, targets, size)
        rows.append(
            {
                "block_size": size,
                "equal_to_target": {
                    way: sum(item.token_ids == targets[name] for name, item in done.items())
                    for way, done in ways.items()
                },
                "without_loops": {w: summary(d, without_loops, size) for w, d in ways.items()},
                "with_loops": {w: summary(d, set(prompts), size) for w, d in ways.items()},
            }
        )
        means = {way: row["mean"] for way, row in rows[-1]["without_loops"].items()}
        print(size, json.dumps(means), flush=True)
    document = {
        "command": f"python tests/benchmarks/speed_of_light.py --prompts {arguments.prompts}",
        "machine": describe_machine("torch", "trimode"),
        "prompts": {domain: len(items) for domain, items in by_domain.items()},
        "targets_without_loops": {
            domain: sum(name.startswith(f"{domain}/") for name in without_loops)
            for domain in by_domain
        },
        "held_out_prompt_tokens": PROMPT_LEN,
        "new_tokens": NEW_TOKENS,
        "rows": rows,
    }
    OUT.with_suffix(".json").write_text(json.dumps(document, indent=2) + "\n")
    plot(rows)


if __name__ == "__main__":
    main()
