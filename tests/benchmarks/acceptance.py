"""How likely a checkpoint's drafts are kept, by position: the governor's prior for it.

    python tests/benchmarks/acceptance.py [MODEL_FOLDER [PROMPTS_FILE]]

Writes acceptance.json into the model's folder, which a replica reads. Drafts of 31 with the draft
adapter where there is one; completions that run into a loop are left out.
"""

import json
import sys
from pathlib import Path

from rich.progress import track
from tokenizers import Tokenizer

from trimode.cluster.bench.workload import DEFAULT_PROMPTS, load_prompts
from trimode.replicas.acceptance import GROUP_ENDS, NUM_DRAFTS, PRIOR_FILE
from trimode.replicas.checkpoint.corpus import has_loop
from trimode.replicas.config import EngineConfig
from trimode.replicas.engine import Engine
from trimode.replicas.loading import build_engine
from trimode.replicas.machine import describe_machine
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.types import Mode, Request

NEW_TOKENS = 96
TEMPERATURES = (0.0, 0.7, 1.0)
SEEDS = 3  # of each temperature


def accepted(engine: Engine, request: Request) -> tuple[int, ...]:
    """Tokens of each round; none where the completion is a loop."""
    engine.add(request)
    output: list[int] = []
    rounds: tuple[int, ...] = ()
    while engine.has_work:
        for _, chunk in engine.step():
            output += chunk.token_ids
            if chunk.finish is not None:
                rounds = chunk.finish.accepted
    return () if has_loop(output) else rounds


def by_group(rounds: list[int]) -> tuple[list[int], list[int]]:
    """Drafts tried and drafts kept of each position group."""
    tried, kept, start = [], [], 0
    for end in GROUP_ENDS:
        tried.append(sum(max(0, min(count, end) - start) for count in rounds))
        kept.append(sum(max(0, min(count - 1, end) - start) for count in rounds))
        start = end
    return tried, kept


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else BUNDLED_CHECKPOINT
    prompts = load_prompts(Path(sys.argv[2])) if len(sys.argv) > 2 else DEFAULT_PROMPTS
    engine = build_engine(folder, EngineConfig(num_pages=256))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    jobs = [(p, t, s) for p in prompts for t in TEMPERATURES for s in range(SEEDS if t else 1)]
    rounds: list[int] = []
    for prompt, temperature, seed in track(jobs, description="decoding"):
        ids = tuple(tokenizer.encode(prompt).ids)
        request = Request("r", ids, Mode.SELF_SPECULATION, NEW_TOKENS, temperature=temperature,
                          seed=seed, block_size=NUM_DRAFTS + 1)  # fmt: skip
        rounds += accepted(engine, request)
    tried, kept = by_group(rounds)
    # Where next to nothing was tried, what is known of the group before counts as well.
    probabilities, before = [], 0.5
    for of, right in zip(tried, kept, strict=True):
        before = (right + 4 * before) / (of + 4)
        probabilities.append(round(before, 3))
    document = {
        "group_ends": GROUP_ENDS,
        "probabilities": probabilities,
        "measured": {
            "command": "python tests/benchmarks/acceptance.py",
            "machine": describe_machine("torch", "trimode"),
            "prompts": len(prompts),
            "new_tokens": NEW_TOKENS,
            "temperatures": TEMPERATURES,
            "seeds": SEEDS,
            "rounds": len(rounds),
            "accepted_per_round": round(sum(rounds) / len(rounds), 3),
            "tried": tried,
            "kept": kept,
        },
    }
    (folder / PRIOR_FILE).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document["measured"], indent=1), probabilities)


if __name__ == "__main__":
    main()
