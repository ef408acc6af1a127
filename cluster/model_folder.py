"""From a model as it was named to a folder, behind a progress bar where that is a download."""

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from trimode.replicas.model.hub import local_folder
from trimode.replicas.model.source import ModelSource, label


def fetch(source: ModelSource, *, quiet: bool = False) -> Path:
    """The folder of a source; download and check are shown on stderr where it is a terminal.

    Raises CheckpointError.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    console = Console(stderr=True, quiet=quiet)
    # A disabled bar leaves no empty line in a log.
    disable = quiet or not sys.stderr.isatty()
    with Progress(*columns, console=console, transient=True, disable=disable) as bar:
        task = bar.add_task("", total=None, visible=False)

        def show(doing: str, done: int, total: int) -> None:
            description = f"{doing} {label(source)}"
            bar.update(task, description=description, completed=done, total=total, visible=True)

        return local_folder(source, report=show)
