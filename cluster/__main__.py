"""The `trimode` command. Each subcommand imports what it needs: `generate --address` must not wait
for Ray.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import structlog
import typer
from rich.console import Console

from trimode.cluster.bench.command import bench
from trimode.cluster.chat_command import chat
from trimode.cluster.generate_command import generate
from trimode.cluster.option_values import MODEL, MODEL_HELP
from trimode.replicas.errors import TrimodeError
from trimode.replicas.model.config import BUNDLED_CHECKPOINT
from trimode.replicas.model.source import parse_source

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
app.command()(chat)


@app.command()
def calibrate(
    model: Annotated[str, MODEL] = str(BUNDLED_CHECKPOINT),
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16.")] = "auto",
    quantization: Annotated[str | None, typer.Option(help="fp8. Default: none.")] = None,
    seconds: Annotated[float, typer.Option(help="How long to measure, about.")] = 5.0,
    out: Annotated[Path, typer.Option(help="The profile; its plot lies beside it.")] = Path(
        "profile.json"
    ),
) -> None:
    """Measure this machine's step times, on which block sizes are chosen."""
    from trimode.cluster import calibrate as command

    command.run(parse_source(model), dtype, out, seconds, quantization)


app.command()(bench)


@app.command()
def check(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
) -> None:
    """Tell from its headers what a checkpoint holds, and whether all of it is there."""
    from trimode.cluster import check as command

    command.run(parse_source(model))


def main() -> None:
    """Run the command; errors raised on purpose are one line, not a trace."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    try:
        app()
    except TrimodeError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"trimode: {error}", markup=False
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
