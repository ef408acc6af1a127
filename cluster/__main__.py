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
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line, or .jsonl. Default: built in.")
    ] = None,
    settings: Annotated[
        str, typer.Option(help="Which curves.")
    ] = "ar,diffusion,speculation-4,speculation-8,speculation-16,speculation-32,governor",
    concurrency: Annotated[str, typer.Option(help="Closed loop: users at once.")] = "1,2,4,8,16,32",
    rate: Annotated[str, typer.Option(help="Open loop: Poisson arrivals a second.")] = "",
    requests: Annotated[int, typer.Option(help="Requests of one run, at least.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of each.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling and arrivals.")] = 0,
    goodput_ttft_ms: Annotated[float | None, typer.Option(help="Limit of goodput.")] = None,
    goodput_tpot_ms: Annotated[float | None, typer.Option(help="Limit of goodput.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    out: Annotated[Path, typer.Option(help="JSON; a PNG goes beside it.")] = Path("bench.json"),
) -> None:
    """Measure every mode at every load; writes the figures and their picture."""
    from trimode.cluster.bench import command, metrics, workload

    limits = metrics.Limits(
        None if goodput_ttft_ms is None else goodput_ttft_ms / 1000,
        None if goodput_tpot_ms is None else goodput_tpot_ms / 1000,
    )
    command.run(
        command.Options(
            model=model,
            prompts=workload.load_prompts(prompts),
            settings=workload.settings_named(settings),
            concurrencies=_parse_numbers("--concurrency", concurrency, int),
            rates=_parse_numbers("--rate", rate, float) if rate else (),
            requests=requests,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            limits=limits,
            dtype=dtype,
            out=out,
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
