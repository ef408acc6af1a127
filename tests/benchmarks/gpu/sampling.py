"""Microseconds and bandwidth of sampling: what each parameter adds to one read of the logits.
Beside it torch's operations to the same end.

    python tests/benchmarks/gpu/sampling.py

Ids, confidences and log-probabilities are checked against the reference before anything is timed,
those of larger batches against the same rows alone. A figure is the median of replays of a CUDA
graph; `launched_us` is the same without a graph, as an engine calls it: small batches then wait for
the host. Bandwidth counts one read of the logits, which are as warm as the product before leaves
them, and is beside that of a copy of 1 GiB. Writes docs/measurements/gpu_sampling.json. Without a
GPU, TRITON_INTERPRET=1 and --tiny show that all of it runs.
"""

import statistics
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from elementwise import COPY_BYTES, copy_gb_per_s, microseconds
from kernel_command import kernel_command
from torch import Tensor

from trimode.kernels.choice import Draws
from trimode.kernels.sampling import Sampled, SamplingInputs, sample_reference, sample_triton
from trimode.kernels.truncation import Truncation

MASK = 100
TEMPERATURE, TOP_K, TOP_P, NUM_TOP = 0.8, 50, 0.95, 5
NUM_CHECKED = 32  # rows that the reference answers, too
MAX_ERROR = 1e-4  # root mean square, over that of the reference


@dataclass(frozen=True, slots=True)
class Sizes:
    """What matters here; as it stands the real models'."""

    vocab_size: int = 131072
    num_rows: tuple[int, ...] = (1, 32, 128, 1024)
    repeats: int = 10  # calls that one graph holds


TINY = Sizes(300, (1, 3), 1)


@dataclass(frozen=True, slots=True)
class Case:
    """One way to sample."""

    name: str
    inputs: SamplingInputs
    by_torch: Callable[[Tensor], object]


def cases(num_rows: int, vocab_size: int, device: str) -> list[Case]:
    rows = torch.arange(num_rows, device=device)
    ones = torch.ones(num_rows, device=device)
    draws = Draws(rows, TEMPERATURE * ones, rows * 7919 + 1, rows + 1000, rows * 0)
    kept = Truncation(rows, rows * 0 + min(TOP_K, vocab_size), TOP_P * ones, 0 * ones)
    nothing = SamplingInputs(MASK)
    sure = replace(nothing, confident_rows=rows, confidence_temperatures=ones)
    return [
        Case("greedy", nothing, lambda logits: logits.argmax(-1)),
        Case("temperature", replace(nothing, draws=draws), drawn_by_torch),
        Case(
            "top-k and top-p",
            replace(nothing, draws=replace(draws, truncation=kept)),
            truncated_by_torch,
        ),
        Case("confidence", sure, confidence_by_torch),
        Case("logprob", replace(nothing, logprob_rows=rows), logprob_by_torch),
        Case(
            f"{NUM_TOP} logprobs",
            replace(nothing, logprob_rows=rows, num_top=NUM_TOP),
            top_logprobs_by_torch,
        ),
        Case(
            "temperature, confidence, logprob",
            replace(sure, draws=draws, logprob_rows=rows),
            lambda logits: (drawn_by_torch(logits), logprob_by_torch(logits)),
        ),
    ]


def race(probabilities: Tensor) -> Tensor:
    """torch.multinomial of one draw, but without its wait for a check of its argument."""
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)


def drawn_by_torch(logits: Tensor) -> Tensor:
    return race((logits.float() / TEMPERATURE).softmax(-1))


def truncated_by_torch(logits: Tensor) -> Tensor:
    ordered, ids = (logits.float() / TEMPERATURE).sort(dim=-1, descending=True)
    ordered[:, TOP_K:] = -torch.inf
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    chosen = race(probabilities.masked_fill(before >= TOP_P, 0))
    return ids.gather(1, chosen[:, None])


def confidence_by_torch(logits: Tensor) -> Tensor:
    return logits.float().softmax(-1).max(-1).values


def logprob_by_torch(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).max(-1).values


def top_logprobs_by_torch(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1).topk(NUM_TOP, dim=-1).values


def random_logits(num_rows: int, vocab_size: int, device: str) -> Tensor:
    """Like a model's: most ids far below a few good ones. The same rows first, whatever their
    number.
    """
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(num_rows, vocab_size, device=device)
    for row in logits:
        row.normal_(std=2.5, generator=generator)
        row[row.topk(min(20, vocab_size)).indices] += 6
    # Triton's interpreter gets bfloat16 wrong by itself.
    return logits.bfloat16() if device == "cuda" else logits


def check(case: Case, logits: Tensor, alone: dict[str, Sampled]) -> None:
    """Fails where an id differs or a number is too far off. alone: what the first rows of each case
    answered in the smallest batch that had them.
    """
    got = sample_triton(logits.clone(), case.inputs)
    if len(logits) <= NUM_CHECKED:
        wanted = sample_reference(logits.clone(), case.inputs)
        alone[case.name] = got
    else:
        wanted = alone[case.name]
    count = len(wanted.token_ids)
    assert torch.equal(got.token_ids[:count], wanted.token_ids), case.name
    for name in ("confidences", "logprobs", "top_logprobs"):
        mine, theirs = getattr(got, name), getattr(wanted, name)
        if theirs is None or theirs.numel() == 0:
            continue
        error = (mine[:count].double() - theirs.double()).square().mean()
        assert error <= MAX_ERROR**2 * theirs.double().square().mean(), (case.name, name)


def launched_us(call: Callable[[int], object], device: str, repeats: int) -> float:
    """Microseconds of one of many calls in a row."""
    if device != "cuda":
        return microseconds(call, 1, device)
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for index in range(repeats):
            call(index)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / repeats * 1e6)
    return statistics.median(times)


def run(device: str, sizes: Sizes | None = None) -> dict[str, Any]:
    """Check and time everything; device 'cuda', or 'cpu' for the interpreter."""
    sizes = sizes or Sizes()
    copied = copy_gb_per_s(device, COPY_BYTES if device == "cuda" else 2**20)
    rows: list[dict[str, Any]] = []
    alone: dict[str, Sampled] = {}
    with torch.inference_mode():
        for num_rows in sizes.num_rows:
            logits = random_logits(num_rows, sizes.vocab_size, device)
            for case in cases(num_rows, sizes.vocab_size, device):
                check(case, logits, alone)

                def ours(index: int, case: Case = case, logits: Tensor = logits) -> Sampled:
                    return sample_triton(logits, case.inputs)

                def theirs(index: int, case: Case = case, logits: Tensor = logits) -> object:
                    return case.by_torch(logits)

                taken = microseconds(ours, sizes.repeats, device)
                bandwidth = logits.numel() * logits.itemsize / taken / 1e3
                rows.append(
                    {
                        "case": case.name,
                        "num_rows": num_rows,
                        "us": taken,
                        "launched_us": launched_us(ours, device, 50),
                        "torch_us": microseconds(theirs, sizes.repeats, device),
                        "gb_per_s": bandwidth,
                        "share_of_copy": bandwidth / copied,
                    }
                )
    return {"sizes": asdict(sizes), "copy_gb_per_s": copied, "rows": rows}


def table(rows: SequenceOf[dict[str, Any]]) -> str:
    lines = [
        f"{'case':34}{'rows':>6}{'us':>9}{'launched':>10}{'torch':>10}{'GB/s':>8}{'of copy':>9}"
    ]
    lines += [
        f"{row['case']:34}{row['num_rows']:6}{row['us']:9.1f}{row['launched_us']:10.1f}"
        f"{row['torch_us']:10.1f}{row['gb_per_s']:8.0f}{row['share_of_copy']:9.1%}"
        for row in rows
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(kernel_command("sampling", run, TINY)["rows"]))
