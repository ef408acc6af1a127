"""The `trimode` command. Each subcommand imports what it needs: `generate --address` must not wait
for Ray.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console

from trimode.cluster.generate_command import generate
from trimode.replicas.errors import TrimodeError
from trimode.replicas.model.config import BUNDLED_CHECKPOINT

Number = TypeVar("Number", int, float)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve Nemotron-Labs-Diffusion models; the decoding mode is a property of each request.",
)


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option(help="Cluster YAML. Default: a local demo.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Overrides gateway.port.")] = None,
    ray_address: Annotated[
        str | None, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster. Default: a local one.")
    ] = None,
) -> None:
    """Start gateway and pools, wait until they are ready, serve until Ctrl-C."""
    # Ray reads these when it is imported, here and in every process it starts.
    os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
    os.environ.setdefault("RAY_SERVE_ENABLE_DIRECT_INGRESS", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from trimode.cluster import serve as command

    command.run(command.load_config(config, port), ray_address)


app.command()(generate)


@app.command()
def calibrate(
    model: Annotated[Path, typer.Option(help="Model folder.")] = BUNDLED_CHECKPOINT,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    seconds: Annotated[float, typer.Option(help="How long to measure, about.")] = 5.0,
    out: Annotated[Path, typer.Option(help="The profile; its plot lies beside it.")] = Path(
        "profile.json"
    ),
) -> None:
    """Measure this machine's step times, on which block sizes are chosen."""
    from trimode.cluster import calibrate as command

    command.run(model, dtype, out, seconds)


@app.command()
def bench(
    model: Annotated[Path, typer.Option(help="Model folder.")] = BUNDLED_CHECKPOINT,
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a served cluster, instead of --model.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line, or .jsonl. Default: built in.")
    ] = None,
    system: Annotated[str, typer.Option(help="Text in front of every prompt.")] = "",
    system_file: Annotated[Path | None, typer.Option(help="File with that text.")] = None,
    settings: Annotated[
        str, typer.Option(help="Which curves, as ar,speculation-8,governor. Default: all.")
    ] = "",
    concurrency: Annotated[
        str, typer.Option(help="Closed loop: users at once. Default: 1,2,4,8,16,32.")
    ] = "",
    rate: Annotated[str, typer.Option(help="Open loop: Poisson arrivals a second.")] = "",
    trace: Annotated[
        Path | None,
        typer.Option(help='Open loop: .jsonl of {"at": seconds, "prompt": ..., "max_tokens": ...}'),
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests of one run, at least.")] = 16,
    repeats: Annotated[int, typer.Option(help="Runs of each point; the median counts.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each.")] = 128,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on to --max-tokens, always.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling and arrivals.")] = 0,
    goodput_ttft_ms: Annotated[float | None, typer.Option(help="Limit of goodput.")] = None,
    goodput_tpot_ms: Annotated[float | None, typer.Option(help="Limit of goodput.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
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
    from trimode.cluster.bench import command, options, prompt_files, workload
    from trimode.cluster.bench import settings as known

    if trace is not None and prompts is not None:
        raise typer.BadParameter("a --trace has prompts of its own; leave --prompts out")
    if system and system_file is not None:
        raise typer.BadParameter("give one of --system and --system-file")
    command.run(
        options.Options(
            model=model,
            out=out,
            sampling=workload.Sampling(max_tokens, temperature, seed, ignore_eos),
            address=address,
            prompts=prompt_files.load_prompts(prompts) if prompts else workload.DEFAULT_PROMPTS,
            system=prompt_files.load_text(system_file) if system_file else system,
            settings=known.settings_named(settings) if settings else (),
            concurrencies=_parse_numbers("--concurrency", concurrency, int) if concurrency else (),
            rates=_parse_numbers("--rate", rate, float) if rate else (),
            trace=prompt_files.load_trace(trace) if trace else (),
            requests=requests,
            repeats=repeats,
            goodput_ttft_ms=goodput_ttft_ms,
            goodput_tpot_ms=goodput_tpot_ms,
            dtype=dtype,
            threads=threads,
            profile=profile,
            against=against,
        )
    )


def _parse_numbers(option: str, text: str, kind: type[Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{option} takes numbers like 1,2,3, got {text!r}") from None


def main() -> None:
    """Run the command; errors raised on purpose are one line, not a trace."""
    try:
        app()
    except TrimodeError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"trimode: {error}", markup=False
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
