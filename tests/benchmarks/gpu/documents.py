"""One JSON file a section, written whenever something was found, so that a run that is cut off
leaves what it had.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Facts = dict[str, Any]


class OutOfTime(Exception):
    """A section's time is up; what it has found stays."""


@dataclass(slots=True)
class Document:
    """What a section finds, in its file."""

    path: Path
    facts: Facts
    ends: float = float("inf")  # by the clock
    clock: Callable[[], float] = time.monotonic
    _begun: float = field(init=False)

    def __post_init__(self) -> None:
        self._begun = self.clock()

    def write(self, **facts: Any) -> None:
        """Add facts; the file is whole at every moment."""
        self.facts |= facts | {"seconds": round(self.clock() - self._begun, 2)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.facts, indent=1) + "\n")
        part.replace(self.path)

    def append(self, name: str, row: Facts) -> None:
        """One more row of a list; printed, too. Raises OutOfTime when that was the last."""
        rows = [*self.facts.get(name, []), row]
        self.write(**{name: rows})
        print("   ", name, json.dumps(_short(row)), flush=True)
        self.check()

    def check(self) -> None:
        """Raises OutOfTime where the section should end."""
        if self.clock() >= self.ends:
            raise OutOfTime


def load_documents(folder: Path) -> dict[str, Facts]:
    """By section, what a folder holds."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def _short(value: Any) -> Any:
    """For a line of a terminal."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _short(part) for key, part in value.items() if not isinstance(part, list)}
    return value
