"""The command line of `trimode bench`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from trimode.cluster.bench.options import Options
from trimode.cluster.bench.prompt_files import load_prompts, load_text, load_trace
from trimode.cluster.bench.settings import Setting, settings_named
from trimode.cluster.bench.workload import DEFAULT_PROMPTS, Sampling
from trimode.cluster.option_values import MODEL, numbers
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.model.source import parse_source


def _parsed(parser: Any, metavar: str, help: str) -> Any:
    return typer.Option(parser=parser, metavar=metavar, help=help)


def bench(
    model: Annotated[str, MODEL] = str(BUNDLED_CHECKPOINT),
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a served cluster, instead of --model.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line, or .jsonl. Default: built in.")
    ] = None,
    system: Annotated[str, typer.Option(help="Text in front of every prompt.")] = "",
    system_file: Annotated[Path | None, typer.Option(help="File with that text.")] = None,
    settings: Annotated[
        Sequence[Setting] | None,
        _parsed(settings_named, "NAMES", "Which curves, as ar,speculation-8,governor."),
    ] = None,
    concurrency: Annotated[
        Sequence[int] | None,
        _parsed(numbers(int), "1,2,4", "Closed loop: users at once. Default: up to 32."),
    ] = None,
    rate: Annotated[
        Sequence[float] | None,
        _parsed(numbers(float), "2,4", "Open loop: Poisson arrivals a second."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help='Open loop: .jsonl of {"at": seconds, "prompt": ..., "max_tokens": ...}'),
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests of one run, at least.")] = 16,
    repeats: Annotated[int, typer.Option(help="Runs of each point; the median counts.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each.")] = 128,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="It ends nothing.")] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling and arrivals.")] = 0,
    goodput_ttft_ms: Annotated[float | None, typer.Option(help="Limit of goodput.")] = None,
    goodput_tpot_ms: Annotated[float | None, typer.Option(help="Limit of goodput.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="fp8. Default: none.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of torch. Default: its own.")] = None,
    profile: Annotated[
        Path | None, typer.Option(help="The governor's, of `calibrate`. Default: measured first.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="transformers: compare ar with its `generate`.")
    ] = None,
    out: Annotated[Path, typer.Option(help="JSON; a PNG goes beside it.")] = Path("bench.json"),
) -> None:
    """Measure every mode at every load; writes the figures and their picture."""
    if trace is not None and prompts is not None:
        raise typer.BadParameter("a --trace has prompts of its own; leave --prompts out")
    if system and system_file is not None:
        raise typer.BadParameter("give one of --system and --system-file")
    options = Options(
        model=parse_source(model),
        out=out,
        sampling=Sampling(max_tokens, temperature, seed, ignore_eos),
        address=address,
        prompts=load_prompts(prompts) if prompts else DEFAULT_PROMPTS,
        system=load_text(system_file) if system_file else system,
        settings=tuple(settings or ()),
        concurrencies=tuple(concurrency or ()),
        rates=tuple(rate or ()),
        trace=load_trace(trace) if trace else (),
        requests=requests,
        repeats=repeats,
        goodput_ttft_ms=goodput_ttft_ms,
        goodput_tpot_ms=goodput_tpot_ms,
        dtype=dtype,
        quantization=quantization,
        threads=threads,
        profile=profile,
        against=against,
    )
    from trimode.cluster.bench import session

    session.run(options)
