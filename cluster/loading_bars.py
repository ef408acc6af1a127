"""Progress bars of an engine's start: its weights, then the passes that a GPU captures."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from trimode.replicas.model.safetensors_reader import LoadReport

WORTH_A_LINE_S = 1.0  # a load that takes longer


@dataclass(frozen=True, slots=True)
class LoadingBars:
    """What `build_engine` and `build_runner` tell their progress to."""

    bars: Progress
    load: TaskID
    capture: TaskID

    def on_load(self, done: int, total: int) -> None:
        """Bytes of weights."""
        amount = f"{decimal(done)} of {decimal(total)}"
        self.bars.update(self.load, completed=done, total=total, amount=amount)

    def on_loaded(self, report: LoadReport) -> None:
        """A line of how fast that was, where it took its time."""
        if report.seconds >= WORTH_A_LINE_S:
            self.bars.console.print(f"weights loaded: {report}", highlight=False)

    def on_capture(self, done: int, total: int) -> None:
        """Sizes of pass; shown once there are any."""
        amount = f"{done} of {total} sizes"
        self.bars.update(self.capture, completed=done, total=total, amount=amount, visible=True)


@contextmanager
def loading_bars(name: str, *, quiet: bool = False) -> Iterator[LoadingBars]:
    """Bars on stderr that go away at the end. name: of the model."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    console = Console(stderr=True, quiet=quiet)
    with Progress(*columns, console=console, transient=True) as bars:
        load = bars.add_task(f"loading {name}", total=None, amount="")
        capture = bars.add_task("capturing passes", total=None, amount="", visible=False)
        yield LoadingBars(bars, load, capture)
