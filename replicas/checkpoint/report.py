"""Measures the bundled checkpoint on held-out text and draws its training.

python -m trimode.replicas.checkpoint.report measure   # -> docs/measurements/checkpoint.json
python -m trimode.replicas.checkpoint.report plot      # -> docs/checkpoint-training.png
"""

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tokenizers import Tokenizer

from trimode.replicas.checkpoint import corpus
from trimode.replicas.checkpoint.objective import run_dense
from trimode.replicas.checkpoint.train import CHECKPOINT, SEED, Work
from trimode.replicas.config import EngineConfig
from trimode.replicas.engine import Engine
from trimode.replicas.loading import build_engine
from trimode.replicas.machine import describe_machine
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.model.weights import load_model
from trimode.replicas.types import Finish, Mode, Request

PROMPT_LEN, NEW_TOKENS = 64, 48
WINDOW_LEN = 256
DOCS = CHECKPOINT.parent.parent / "docs"

app = typer.Typer(no_args_is_help=True, add_completion=False)
Completions = dict[str, tuple[list[int], Finish]]


@app.command()
def measure(work: Work = Path("build/checkpoint"), prompts: int = 24) -> None:
    """Acceptance, tokens per forward and perplexity by domain, greedy, on held-out documents."""
    corpora = corpus.load_corpora(work, Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")))
    config = EngineConfig(num_pages=1024, max_sequences=32)
    engine = build_engine(CHECKPOINT, config, dtype="float32")
    model = load_model(CHECKPOINT, torch.float32)
    rows = {}
    for domain in corpora:
        windows = _windows(domain, PROMPT_LEN, prompts)
        rows[domain.domain] = _figures(engine, windows) | {
            "perplexity": _perplexity(model, _windows(domain, WINDOW_LEN, prompts))
        }
    rows["mean"] = {
        key: float(np.mean([row[key] for row in rows.values()])) for key in rows["prose"]
    }
    document = {
        "command": f"python -m trimode.replicas.checkpoint.report measure --prompts {prompts}",
        "machine": describe_machine("torch", "trimode"),
        "prompts_per_domain": prompts,
        "prompt_tokens": PROMPT_LEN,
        "new_tokens": NEW_TOKENS,
        "domains": rows,
    }
    target = DOCS / "measurements" / "checkpoint.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(document, indent=2) + "\n")
    _print(rows)


@app.command()
def plot(work: Work = Path("build/checkpoint")) -> None:
    """Draw the losses and the draft acceptance over training steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    panels = (
        ("ar", {"ar": "AR"}, "Stage 1: AR alone", "cross-entropy, nats"),
        ("joint", {"ar": "AR", "diffusion": "diffusion, 1/p-weighted"},
         "Stage 2: AR + 0.3 diffusion", "nats a token"),
        ("adapter", {"accepted": "drafts agreed per block"},
         "Draft adapter", "tokens of 31"),
    )  # fmt: skip
    for axis, (stage, series, title, unit) in zip(axes, panels, strict=True):
        lines = [json.loads(line) for line in (work / f"{stage}.jsonl").read_text().splitlines()]
        by_step = {line["step"]: line for line in lines}  # a resumed run repeats a few
        steps = sorted(by_step)
        for key, label in series.items():
            values = [by_step[step][key] for step in steps]
            axis.plot(steps, _smoothed(values), label=label)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(DOCS / "checkpoint-training.png", dpi=120)


def _windows(domain: corpus.Corpus, length: int, count: int) -> list[list[int]]:
    """Random windows of held-out documents, the same every time."""
    random = np.random.default_rng([SEED, *domain.domain.encode()])
    long_enough = [document for document in domain.held_out if len(document) > length + NEW_TOKENS]
    chosen = random.choice(len(long_enough), count)
    starts = [random.integers(len(long_enough[i]) - length) for i in chosen]
    return [
        long_enough[i][start : start + length].tolist()
        for i, start in zip(chosen, starts, strict=True)
    ]


def _figures(engine: Engine, prompts: list[list[int]]) -> dict[str, float]:
    speculation = Request("", (0,), Mode.SELF_SPECULATION, NEW_TOKENS)
    diffusion = replace(speculation, mode=Mode.BLOCK_DIFFUSION)
    figures: dict[str, float] = {}
    for block_size in (8, 16, 32):
        for adapter in (False, True):
            done = _run(engine, prompts, replace(
                speculation, block_size=block_size, use_adapter=adapter
            ))  # fmt: skip
            name = f"accepted_block_{block_size}" + ("_adapter" if adapter else "")
            figures[name] = _mean_accepted(_without_loops(done))
    figures["loops"] = float(len(done) - len(_without_loops(done)))
    for threshold in (0.9, 0.7):
        done = _run(engine, prompts, replace(diffusion, threshold=threshold))
        kept = _without_loops(done) or list(done.values())
        figures[f"diffusion_tokens_per_forward_{threshold}"] = sum(
            finish.completion_tokens for _, finish in kept
        ) / sum(finish.forwards for _, finish in kept)
    return figures


def _run(engine: Engine, prompts: list[list[int]], template: Request) -> Completions:
    outputs: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    finishes: dict[str, Finish] = {}
    for name, prompt in zip(outputs, prompts, strict=True):
        engine.add(replace(template, request_id=name, prompt_ids=tuple(prompt)))
    label = f"{template.mode.value} block {template.block_size} adapter {template.use_adapter}"
    for _ in track(prompts, description=label, console=Console(stderr=True)):
        before = len(finishes)
        while engine.has_work and len(finishes) == before:
            for name, chunk in engine.step():
                outputs[name] += chunk.token_ids
                if chunk.finish is not None:
                    finishes[name] = chunk.finish
    return {name: (outputs[name], finish) for name, finish in finishes.items()}


def _without_loops(done: Completions) -> list[tuple[list[int], Finish]]:
    return [item for item in done.values() if not corpus.has_loop(item[0])]


def _mean_accepted(kept: Iterable[tuple[list[int], Finish]]) -> float:
    counts = [count for _, finish in kept for count in finish.accepted]
    return sum(counts) / len(counts) if counts else math.nan


def _perplexity(model: NemotronLabsDiffusionModel, windows: list[list[int]]) -> float:
    tokens = torch.tensor(windows)
    mask = torch.ones(WINDOW_LEN, WINDOW_LEN, dtype=torch.bool).tril()
    with torch.inference_mode():
        hidden = run_dense(model, tokens, torch.arange(WINDOW_LEN), mask)
        logits = model.logits(hidden[:, :-1].flatten(0, 1))
        loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    return math.exp(loss.item())


def _smoothed(values: list[float], width: int = 9) -> Any:
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def _print(rows: dict[str, dict[str, float]]) -> None:
    table = Table()
    table.add_column("figure")
    for domain in rows:
        table.add_column(domain, justify="right")
    for key in rows["prose"]:
        table.add_row(key, *(f"{row[key]:.2f}" for row in rows.values()))
    Console().print(table)


if __name__ == "__main__":
    app()
