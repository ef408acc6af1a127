"""Makes the bundled checkpoint: tokenizer, tri-mode base weights, draft adapter. Run it stage by
stage:

    python -m trimode.replicas.checkpoint.train tokenizer
    python -m trimode.replicas.checkpoint.train base       # AR first, then AR + 0.3 x diffusion
    python -m trimode.replicas.checkpoint.train more       # goes on from the bundled weights
    python -m trimode.replicas.checkpoint.train adapter    # draft LoRA, base frozen

Every stage is seeded, saves its state each few minutes and goes on from there when it is started
again.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from trimode.replicas.checkpoint import corpus
from trimode.replicas.checkpoint.muon import Muon
from trimode.replicas.checkpoint.objective import adapter_loss, ar_loss, doubled_mask, joint_loss
from trimode.replicas.config import EngineConfig
from trimode.replicas.loading import build_engine
from trimode.replicas.model.config import ModelConfig
from trimode.replicas.model.transformer import NemotronLabsDiffusionModel
from trimode.replicas.model.weights import load_model, save_adapter, save_model
from trimode.replicas.types import Mode, Request

CHECKPOINT = Path(__file__).parent
SEED = 20261121
SEQ_LEN = 256
SAVE_EVERY_S = 180.0

# (tokens [batch, SEQ_LEN], generator) -> (loss, figures to show)
Objective = Callable[[Tensor, torch.Generator], tuple[Tensor, dict[str, float]]]
# (batch, random) -> tokens [batch, length]
Batches = Callable[[int, np.random.Generator], Tensor]

app = typer.Typer(no_args_is_help=True, add_completion=False)
Work = Annotated[Path, typer.Option(help="Folder for the text, token streams and training state.")]


@dataclass(frozen=True, slots=True)
class Stage:
    """Lengths and learning rates of one stage. Rates warm up, stay, then fall to zero (WSD)."""

    name: str
    num_steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 100
    decay_share: float = 0.0  # of num_steps, at the end

    def rate(self, step: int) -> float:
        left = (self.num_steps - step) / max(1.0, self.num_steps * self.decay_share)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps, left)


AR_STAGE = Stage("ar", num_steps=900, batch_size=16, learning_rate=3e-3)
JOINT_STAGE = Stage("joint", num_steps=2850, batch_size=8, learning_rate=3e-3, decay_share=0.5)
MORE_STAGE = Stage("more", num_steps=4000, batch_size=8, learning_rate=2e-3, decay_share=0.6)
ADAPTER_STAGE = Stage("adapter", num_steps=600, batch_size=16, learning_rate=2e-3, decay_share=0.5)
ADAPTER_RANK, ADAPTER_ALPHA = 64, 256.0
PROMPT_LEN, OWN_TEXTS = 64, 4096
OWN_TEXT_TEMPERATURES = (0.0, 0.0, 0.7, 1.0)


@app.command()
def tokenizer(work: Work = Path("build/checkpoint")) -> None:
    """Train the byte-level BPE on the training documents."""
    corpus.train_tokenizer(work).save(str(CHECKPOINT / "tokenizer.json"))


@app.command()
def base(
    work: Work = Path("build/checkpoint"), ar_steps: int = AR_STAGE.num_steps,
    joint_steps: int = JOINT_STAGE.num_steps,
) -> None:  # fmt: skip
    """Train the base weights: AR alone, then the joint objective."""
    torch.manual_seed(SEED)
    model = NemotronLabsDiffusionModel(ModelConfig.load(CHECKPOINT))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    typer.echo(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    trainer = Trainer(model, list(model.named_parameters()), work)
    batches = partial(text_windows, _corpora(work), SEQ_LEN)

    def ar(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        loss = ar_loss(model, tokens)
        return loss, {"ar": loss.item()}

    trainer.run(replace(AR_STAGE, num_steps=ar_steps), ar, batches)
    trainer.run(replace(JOINT_STAGE, num_steps=joint_steps), _joint_objective(model), batches)
    save_model(model, CHECKPOINT, torch.bfloat16)


@app.command()
def more(
    work: Work = Path("build/checkpoint"), steps: int = MORE_STAGE.num_steps,
    bfloat16: Annotated[
        bool, typer.Option(help="Products in bfloat16: faster where the CPU has AVX512-BF16.")
    ] = False,
) -> None:  # fmt: skip
    """Train the bundled base weights further; then train the adapter anew."""
    model = load_model(CHECKPOINT, torch.float32, adapter=False).requires_grad_(True)
    trainer = Trainer(model, list(model.named_parameters()), work)
    batches = partial(text_windows, _corpora(work), SEQ_LEN)
    objective = _joint_objective(model, bfloat16)
    trainer.run(replace(MORE_STAGE, num_steps=steps), objective, batches)
    save_model(model, CHECKPOINT, torch.bfloat16)


def _joint_objective(model: NemotronLabsDiffusionModel, bfloat16: bool = False) -> Objective:
    mask = doubled_mask(SEQ_LEN, model.config.block_size)

    def joint(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss, ar_part, diffusion_part = joint_loss(model, tokens, mask, generator)
        return loss, {"ar": ar_part.item(), "diffusion": diffusion_part.item()}

    return joint


@app.command()
def adapter(work: Work = Path("build/checkpoint"), steps: int = ADAPTER_STAGE.num_steps) -> None:
    """Train the draft LoRA against the finished base weights."""
    torch.manual_seed(SEED)
    model = load_model(CHECKPOINT, torch.float32, adapter=False)
    model.add_draft_adapter(ADAPTER_RANK, ADAPTER_ALPHA)
    trained = [(n, p) for n, p in model.named_parameters() if "draft_adapter" in n]
    for name, parameter in trained:
        parameter.requires_grad_(True)
        if name.endswith("lora_a"):
            nn.init.kaiming_uniform_(parameter, a=5**0.5)
    texts = own_text(_corpora(work), work, OWN_TEXTS)
    mask = doubled_mask(2 * PROMPT_LEN, model.config.block_size)

    def draft(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        loss, accepted = adapter_loss(model, tokens, mask, PROMPT_LEN)
        return loss, {"loss": loss.item(), "accepted": accepted.item()}

    def batches(size: int, random: np.random.Generator) -> Tensor:
        return texts[torch.from_numpy(random.choice(len(texts), size))]

    Trainer(model, trained, work).run(replace(ADAPTER_STAGE, num_steps=steps), draft, batches)
    save_adapter(model, CHECKPOINT, ADAPTER_ALPHA)


def _corpora(work: Path) -> list[corpus.Corpus]:
    return corpus.load_corpora(work, Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")))


class Trainer:
    """Runs stages over one set of parameters; matrices inside layers by Muon, everything else by
    AdamW.
    """

    def __init__(
        self,
        model: NemotronLabsDiffusionModel,
        trained: list[tuple[str, nn.Parameter]],
        work: Path,
    ) -> None:
        self.model, self.work = model, work
        self.trained = trained
        inner = [p for n, p in trained if p.ndim == 2 and ".layers." in n and "adapter" not in n]
        outer = [p for _, p in trained if all(p is not q for q in inner)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(outer, betas=(0.9, 0.95), weight_decay=0.01)
        ]
        if inner:
            self.optimizers.append(Muon(inner))

    def run(self, stage: Stage, objective: Objective, batches: Batches) -> None:
        """Train one stage to its end, from its saved state where there is one."""
        state, log = self.work / f"{stage.name}.safetensors", self.work / f"{stage.name}.jsonl"
        start = self._restore(state)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeRemainingColumn(), TextColumn("{task.fields[shown]}"))  # fmt: skip
        saved = time.monotonic()
        with Progress(*columns) as progress, log.open("a") as out:
            task = progress.add_task(stage.name, total=stage.num_steps, completed=start, shown="")
            for step in range(start, stage.num_steps):
                figures = self._step(stage, step, objective, batches)
                shown = " ".join(f"{name} {value:.3f}" for name, value in figures.items())
                progress.update(task, advance=1, shown=shown)
                if step % 10 == 0:
                    out.write(json.dumps({"step": step, **figures}) + "\n")
                    out.flush()
                if time.monotonic() - saved > SAVE_EVERY_S:
                    self._save(state, step + 1)
                    saved = time.monotonic()
        self._save(state, stage.num_steps)

    def _step(
        self, stage: Stage, step: int, objective: Objective, batches: Batches
    ) -> dict[str, float]:
        # Seeded by stage and step, so that a resumed run sees the batches that an unbroken one
        # would.
        random = np.random.default_rng([SEED, step, *stage.name.encode()])
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        loss, figures = objective(batches(stage.batch_size, random), generator)
        loss.backward()
        nn.utils.clip_grad_norm_([p for _, p in self.trained], 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = stage.rate(step)
            optimizer.step()
            optimizer.zero_grad()
        return figures

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and optimizer state under stable names."""
        for name, parameter in self.trained:
            yield f"parameter.{name}", parameter.detach()
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    yield f"optimizer.{name}.{key}", torch.as_tensor(value)

    def _save(self, path: Path, step: int) -> None:
        temporary = path.with_suffix(".tmp")
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors()}
        save_file(tensors | {"step": torch.tensor(step)}, temporary)
        temporary.replace(path)

    def _restore(self, path: Path) -> int:
        if not path.exists():
            return 0
        with safe_open(path, framework="pt") as tensors:
            names = set(tensors.keys())
            for name, parameter in self.trained:
                parameter.data.copy_(tensors.get_tensor(f"parameter.{name}"))
                prefix = f"optimizer.{name}."
                found = {n.removeprefix(prefix) for n in names if n.startswith(prefix)}
                for optimizer in self.optimizers:
                    if any(parameter is p for g in optimizer.param_groups for p in g["params"]):
                        optimizer.state[parameter] = {
                            key: tensors.get_tensor(prefix + key) for key in found
                        }
            return int(tensors.get_tensor("step"))


def text_windows(
    corpora: list[corpus.Corpus], length: int, size: int, random: np.random.Generator
) -> Tensor:
    """[size, length] int64: random windows of training text, domains drawn by their weights."""
    windows = []
    for index in random.choice(len(corpora), size, p=corpus.DOMAIN_WEIGHTS):
        stream = corpora[index].train
        start = random.integers(len(stream) - length)
        windows.append(stream[start : start + length].astype(np.int64))
    return torch.from_numpy(np.stack(windows))


def own_text(corpora: list[corpus.Corpus], work: Path, size: int) -> Tensor:
    """[size, 2 * PROMPT_LEN] int64: prompts of training text, continued by the model itself.

    Drafts are verified in the model's own text, so that is what the adapter is taught on. Half of
    it is greedy; texts that met an end of sequence or ran into a loop are left out. Written once to
    work/own_text.npz.
    """
    cache = work / "own_text.npz"
    if not cache.exists():
        prompts = text_windows(corpora, PROMPT_LEN, size, np.random.default_rng(SEED))
        config = EngineConfig(num_pages=1024, max_sequences=64, max_waiting=size)
        engine = build_engine(CHECKPOINT, config, dtype="float32", adapter=False)
        rows = [prompt.tolist() for prompt in prompts]
        for index, row in enumerate(rows):
            temperature = OWN_TEXT_TEMPERATURES[index % len(OWN_TEXT_TEMPERATURES)]
            request = Request(
                str(index),
                tuple(row),
                Mode.AUTOREGRESSIVE,
                PROMPT_LEN,
                temperature=temperature,
                seed=index,
            )
            engine.add(request)
        with Progress() as progress:
            task = progress.add_task("writing its own text", total=size)
            while engine.has_work:
                for name, chunk in engine.step():
                    rows[int(name)] += chunk.token_ids
                    progress.update(task, advance=chunk.finish is not None)
        whole = [
            row
            for row in rows
            if len(row) == 2 * PROMPT_LEN and not corpus.has_loop(row[PROMPT_LEN:])
        ]
        np.savez(cache, tokens=np.array(whole, dtype=np.uint16))
    with np.load(cache, allow_pickle=False) as arrays:
        return torch.from_numpy(arrays["tokens"].astype(np.int64))


if __name__ == "__main__":
    app()
