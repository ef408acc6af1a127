"""`trimode bench`: runs every setting at every load, writes the figures and the picture."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trimode.cluster.bench.local import LocalTarget
from trimode.cluster.bench.metrics import Limits, Record, Summary, summarise
from trimode.cluster.bench.plot import draw
from trimode.cluster.bench.workload import Job, Setting, poisson_arrivals
from trimode.cluster.tokenizer import Tokenizer
from trimode.replicas.config import EngineConfig
from trimode.replicas.errors import CheckpointError, ConfigError
from trimode.replicas.loading import build_engine
from trimode.replicas.machine import describe_machine
from trimode.replicas.model.config import ModelConfig

PAGE_SIZE = 16
WARM_UP_TOKENS = 16
MAX_OPEN_CONCURRENCY = 256  # users at once in an open loop; more of them wait, on the clock


class Target(Protocol):
    """What is measured: an engine here or a cluster elsewhere."""

    def run(
        self, jobs: Sequence[Job], concurrency: int, on_done: Callable[[], None]
    ) -> list[Record]: ...


@dataclass(frozen=True, slots=True)
class Options:
    """The command's options, parsed. rates: open loop where there are any, else closed."""

    model: Path
    prompts: tuple[str, ...]
    settings: tuple[Setting, ...]
    concurrencies: tuple[int, ...]
    rates: tuple[float, ...]
    requests: int  # of one run; a closed loop has at least two for each user
    max_tokens: int
    temperature: float
    seed: int
    limits: Limits
    dtype: str
    out: Path  # the JSON; the picture stands beside it

    def __post_init__(self) -> None:
        for name, values in (
            ("--concurrency", self.concurrencies),
            ("--rate", self.rates),
            ("--requests", (self.requests,)),
            ("--max-tokens", (self.max_tokens,)),
        ):
            if not all(value > 0 for value in values):
                raise ConfigError(f"{name} must be above 0, is {values}")


@dataclass(frozen=True, slots=True)
class Load:
    """One load of the sweep: so many users at once, or so many arrivals a second."""

    label: str
    concurrency: int
    rate: float | None
    requests: int


def loads(options: Options) -> list[Load]:
    """The sweep, lightest first."""
    if options.rates:
        return [
            Load(f"{rate:g}/s", MAX_OPEN_CONCURRENCY, rate, options.requests)
            for rate in sorted(options.rates)
        ]
    return [
        Load(str(users), users, None, max(options.requests, 2 * users))
        for users in sorted(options.concurrencies)
    ]


def jobs_of(options: Options, setting: Setting, load: Load) -> list[Job]:
    """The requests of one run. Every setting gets the same prompts, seeds and arrivals."""
    arrivals = (
        poisson_arrivals(load.rate, load.requests, options.seed)
        if load.rate
        else [0.0] * load.requests
    )
    return [
        Job(
            job_id=f"{setting.name}/{load.label}/{index}",
            prompt=options.prompts[index % len(options.prompts)],
            setting=setting,
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            seed=options.seed + index,
            # A run finds nothing in the prefix cache but what it put there itself.
            cache_salt=f"{setting.name}/{load.label}",
            arrival_s=arrival_s,
        )
        for index, arrival_s in enumerate(arrivals)
    ]


def warm_up_jobs(options: Options, setting: Setting, load: Load) -> list[Job]:
    return [
        Job(f"warm-up/{index}", prompt, setting, min(WARM_UP_TOKENS, options.max_tokens),
            options.temperature, options.seed, "warm-up")
        for index, prompt in enumerate(options.prompts[: load.concurrency])
    ]  # fmt: skip


def sweep(
    target: Target, options: Options, console: Console
) -> dict[str, list[tuple[str, Summary]]]:
    """Every setting at every load -> the figures by setting."""
    plan = [(setting, load) for setting in options.settings for load in loads(options)]
    curves: dict[str, list[tuple[str, Summary]]] = {s.name: [] for s in options.settings}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("bench", total=sum(load.requests for _, load in plan))
        for setting, load in plan:
            bar.update(task, description=f"{setting.name} at {load.label}")
            target.run(warm_up_jobs(options, setting, load), load.concurrency, lambda: None)
            records = target.run(
                jobs_of(options, setting, load), load.concurrency, lambda: bar.advance(task)
            )
            summary = summarise(records, options.limits)
            curves[setting.name].append((load.label, summary))
            console.print(_line(setting, load, summary), highlight=False, markup=False)
    return curves


def local_target(options: Options) -> LocalTarget:
    """An engine with room for the heaviest load. Raises CheckpointError."""
    config = ModelConfig.load(options.model)
    tokenizer = Tokenizer.load(options.model, config.bos_id)
    if tokenizer is None:
        raise CheckpointError(f"{options.model} has no tokenizer.json; bench needs text prompts")
    longest = max(len(tokenizer.encode(prompt)) for prompt in options.prompts)
    users = max(load.concurrency for load in loads(options))
    pages = (longest + options.max_tokens + config.block_size) // PAGE_SIZE + 1
    engine_config = EngineConfig(
        page_size=PAGE_SIZE,
        num_pages=users * pages,
        max_sequences=users,
        max_waiting=users,
        max_block_size=config.block_size,
    )
    governed = any(setting.is_governed for setting in options.settings)
    if governed:
        note = "the governor measures step times first, about a minute; --settings leaves it out"
        Console(stderr=True).print(note, highlight=False)
    engine = build_engine(options.model, engine_config, dtype=options.dtype, governed=governed)
    return LocalTarget(engine, tokenizer.encode)


def run(options: Options) -> None:
    """Measure, print a line a run, write JSON and PNG. Raises TrimodeError."""
    console = Console(soft_wrap=True)
    curves = sweep(local_target(options), options, console)
    write(options, curves)
    console.print(f"wrote {options.out} and {options.out.with_suffix('.png')}", highlight=False)


def write(options: Options, curves: dict[str, list[tuple[str, Summary]]]) -> None:
    """The JSON, and the picture beside it."""
    document = {
        "command": " ".join(["trimode", *sys.argv[1:]]),
        "machine": describe_machine("torch", "trimode"),
        "model": options.model.name,
        "loop": "open" if options.rates else "closed",
        "prompts": len(options.prompts),
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "settings": {
            name: {label: summary.to_dict() for label, summary in points}
            for name, points in curves.items()
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=2) + "\n")
    draw(curves, options.out.with_suffix(".png"))


def _line(setting: Setting, load: Load, summary: Summary) -> str:
    ttft = summary.ttft_ms.p50 if summary.ttft_ms else 0.0
    return (
        f"{setting.name:>15} at {load.label:>5}: "
        f"{summary.tokens_per_s_per_user:7.1f} tokens/s/user, "
        f"{summary.tokens_per_s:8.1f} in total, first token {ttft:6.1f} ms, "
        f"{summary.tokens_per_forward:.2f} tokens/forward, good {summary.good_share:.0%}"
    )
