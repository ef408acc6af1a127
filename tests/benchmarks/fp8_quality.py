"""How far float8 moves what the bundled checkpoint writes.

    python tests/benchmarks/fp8_quality.py

Beside float32, on held-out texts: what each makes of the texts themselves (nats a token, the same
most likely token), how long greedy completions stay the same, and how many tokens a round of
self-speculation keeps at temperature 1, where few completions run into a loop. bfloat16 is measured
likewise, to tell what any rounding does.

Writes docs/measurements/fp8_quality.json.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from held_out import Prompts, load_prompts
from torch import Tensor
from torch.nn import functional

from trimode.kernels.rope import Rotary
from trimode.replicas.checkpoint.corpus import has_loop
from trimode.replicas.config import EngineConfig
from trimode.replicas.engine import Engine
from trimode.replicas.loading import build_engine, torch_dtype
from trimode.replicas.machine import describe_machine
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.model.transformer import dense_attention
from trimode.replicas.model.weights import load_model
from trimode.replicas.types import Mode, Request

OUT = Path(__file__).parents[2] / "docs" / "measurements" / "fp8_quality.json"
PROMPT_LEN, TEXT_LEN, NEW_TOKENS = 64, 256, 96
SETTINGS = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "fp8": ("float32", "fp8"),
    "fp8, bfloat16": ("bfloat16", "fp8"),
}
REFERENCE = "float32"

Read = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Written:
    """By domain."""

    greedy: dict[str, list[list[int]]]  # completions
    rounds: dict[str, list[int]]  # tokens kept of each round, completions with a loop left out


@torch.inference_mode()
def read(setting: str, texts: Prompts) -> Read:
    """Log probabilities [num_texts, TEXT_LEN - 1, vocab_size] of what follows, by domain."""
    dtype, quantization = SETTINGS[setting]
    model = load_model(BUNDLED_CHECKPOINT, torch_dtype(dtype), quantization=quantization)
    model.prepare()
    mask = torch.ones(TEXT_LEN, TEXT_LEN, dtype=torch.bool).tril()

    def attend(layer: int, qkv: Tensor, rotary: Rotary) -> Tensor:
        return dense_attention(qkv, rotary, mask)

    def of(text: tuple[int, ...]) -> Tensor:
        hidden = model(torch.tensor(text), torch.arange(len(text)), attend)
        return functional.log_softmax(model.logits(hidden)[:-1].float(), dim=-1)

    return {domain: torch.stack([of(text) for text in items]) for domain, items in texts.items()}


def write(setting: str, prompts: Prompts, block_size: int) -> Written:
    """Greedy completions, and the rounds of completions at temperature 1."""
    dtype, quantization = SETTINGS[setting]
    count = sum(map(len, prompts.values()))
    config = EngineConfig(num_pages=12 * count, max_sequences=count, prefix_cache=False)
    engine = build_engine(BUNDLED_CHECKPOINT, config, dtype=dtype, quantization=quantization)
    template = Request("", (0,), Mode.SELF_SPECULATION, NEW_TOKENS, block_size=block_size)
    greedy = {domain: [output for output, _ in decoded]
              for domain, decoded in decode(engine, prompts, template).items()}  # fmt: skip
    hot = decode(engine, prompts, replace(template, temperature=1.0))
    rounds = {
        domain: [kept for output, each in decoded if not has_loop(output) for kept in each]
        for domain, decoded in hot.items()
    }
    return Written(greedy, rounds)


def decode(
    engine: Engine, prompts: Prompts, template: Request
) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Every prompt's completion and what each round kept of it, by domain; all at once."""
    done: dict[str, list[tuple[list[int], list[int]]]] = {
        domain: [([], []) for _ in items] for domain, items in prompts.items()
    }
    for domain, items in prompts.items():
        for index, prompt in enumerate(items):
            name = f"{domain}/{index}"
            engine.add(replace(template, request_id=name, prompt_ids=prompt, seed=index))
    while engine.has_work:
        for request_id, chunk in engine.step():
            domain, _, index = request_id.partition("/")
            output, rounds = done[domain][int(index)]
            output += chunk.token_ids
            if chunk.finish is not None:
                rounds += chunk.finish.accepted
    return done


def agreement(got: list[int], wanted: list[int]) -> int:
    """Tokens before the first that differs."""
    same = [a == b for a, b in zip(got, wanted, strict=False)]
    return same.index(False) if False in same else len(same)


def reading_row(texts: Prompts, got: Read, wanted: Read) -> dict[str, Any]:
    """What a setting makes of the texts, by domain."""
    rows = {}
    for domain, items in texts.items():
        nats = -got[domain].gather(-1, torch.tensor(items)[:, 1:, None]).mean().item()
        same = got[domain].argmax(-1) == wanted[domain].argmax(-1)
        rows[domain] = {
            "nats_per_token": round(nats, 4),
            "same_most_likely": round(same.float().mean().item(), 4),
        }
    return rows


def writing_row(got: Written, wanted: Written) -> dict[str, Any]:
    """What a setting writes, over all domains."""
    pairs = [
        pair for domain in got.greedy
        for pair in zip(got.greedy[domain], wanted.greedy[domain], strict=True)
    ]  # fmt: skip
    kept = {domain: round(float(np.mean(each)), 3) for domain, each in got.rounds.items() if each}
    rounds = [count for each in got.rounds.values() for count in each]
    return {
        "completions": len(pairs),
        "same_completions": sum(a == b for a, b in pairs),
        "tokens_before_divergence_median": float(np.median([agreement(*pair) for pair in pairs])),
        "rounds": len(rounds),
        "accepted_per_round": round(float(np.mean(rounds)), 3),
        "accepted_per_round_by_domain": kept,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/checkpoint"))
    parser.add_argument("--prompts", type=int, default=10, help="held-out prompts a domain")
    parser.add_argument("--block-size", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    prompts = load_prompts(options.work, options.prompts, PROMPT_LEN, NEW_TOKENS)
    texts = load_prompts(options.work, options.prompts, TEXT_LEN, 0)
    del texts["default"]  # they are of any length
    read_by = {setting: read(setting, texts) for setting in SETTINGS}
    written = {setting: write(setting, prompts, options.block_size) for setting in SETTINGS}
    document = {
        "command": "python tests/benchmarks/fp8_quality.py",
        "machine": describe_machine("torch", "trimode"),
        "prompts_a_domain": options.prompts,
        "text_tokens": TEXT_LEN,
        "prompt_tokens": PROMPT_LEN,
        "new_tokens": NEW_TOKENS,
        "block_size": options.block_size,
        "temperature_of_rounds": 1.0,
        "reference": REFERENCE,
        "settings": {
            setting: writing_row(written[setting], written[REFERENCE])
            | {"texts": reading_row(texts, read_by[setting], read_by[REFERENCE])}
            for setting in SETTINGS
        },
    }
    OUT.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document["settings"], indent=1))


if __name__ == "__main__":
    main()
