"""`trimode calibrate`: measure step times on this machine; writes a JSON profile and its plot."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from trimode.cluster.loading_bars import loading_bars
from trimode.cluster.model_folder import fetch
from trimode.replicas.calibration import measure
from trimode.replicas.config import EngineConfig
from trimode.replicas.errors import ConfigError
from trimode.replicas.loading import build_runner
from trimode.replicas.model.source import ModelSource, label
from trimode.replicas.step_profile import StepProfile

LONG_CONTEXT_PAGES = 2048  # 32,768 slots: 16 sequences of the longest context measured


def run(
    model: ModelSource, dtype: str, out: Path, seconds: float, quantization: str | None = None
) -> None:
    """Measure for about so many seconds, print, write `out` and the picture beside it. Raises
    TrimodeError.
    """
    if not out.parent.is_dir():
        raise ConfigError(f"--out: the folder {out.parent} does not exist")
    if not 0 < seconds < float("inf"):
        raise ConfigError(f"--seconds must be over 0, is {seconds}")
    if out.suffix != ".json":
        raise ConfigError(f"--out must end in .json, is {out.name}")
    console = Console(stderr=True)
    profile = _measure(fetch(model), dtype, quantization, seconds, console)
    profile.save(out)
    picture = out.with_suffix(".png")
    plot(profile, picture)
    console.print(_table(profile))
    console.print(f"wrote {out} and {picture}", highlight=False, soft_wrap=True)


def _measure(
    folder: Path, dtype: str, quantization: str | None, seconds: float, console: Console
) -> StepProfile:
    config = EngineConfig(num_pages=LONG_CONTEXT_PAGES)
    with loading_bars(label(folder)) as bars:
        runner = build_runner(
            folder,
            config,
            dtype=dtype,
            quantization=quantization,
            progress=bars.on_load,
            on_loaded=bars.on_loaded,
            on_capture=bars.on_capture,
        )
    columns = (TextColumn("measuring"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("measuring", total=None)
        return measure(
            runner, config, seconds,
            lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip


def _table(profile: StepProfile) -> Table:
    """Milliseconds at the shortest context: causal / draft."""
    context = profile.context_lens[0]
    table = Table(
        title=f"ms a pass: sequences x rows, causal / draft, {context} slots of context each"
    )
    table.add_column("sequences", justify="right", no_wrap=True)
    for rows in profile.rows_per_sequence:
        table.add_column(f"x {rows}", justify="right", no_wrap=True)
    for n, count in enumerate(profile.num_sequences):
        cells = [
            f"{1e3 * profile.causal_s[n][r][0]:.1f}/{1e3 * profile.draft_s[n][r][0]:.1f}"
            for r in range(len(profile.rows_per_sequence))
        ]
        table.add_row(str(count), *cells)
    return table


def plot(profile: StepProfile, path: Path) -> None:
    """Seconds over rows, one panel a context, one line for each number of sequences, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts = profile.context_lens
    figure, axes = pyplot.subplots(
        1, len(contexts), figsize=(4.3 * len(contexts), 3.8), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for c, (axis, context) in enumerate(zip(axes[0], contexts, strict=True)):
        for n, count in enumerate(profile.num_sequences):
            rows = [count * each for each in profile.rows_per_sequence]
            for grid, style in ((profile.causal_s, "-"), (profile.draft_s, "--")):
                label = f"{count} sequences" if style == "-" else None
                millis = [1e3 * line[c] for line in grid[n]]
                axis.plot(rows, millis, style, color=f"C{n}", marker=".", label=label)
        axis.set(title=f"{context} tokens of context each", xlabel="rows of the pass")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("ms (dashed: draft passes)")
    axes[0][0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
