"""StepProfile: how long one pass takes on this hardware, from measured points.

The governor decides on it, `trimode calibrate` writes it, a simulated runner sleeps by it.
"""

import json
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trimode.replicas.errors import ConfigError

Floats = NDArray[np.float64]
Grid = tuple[tuple[tuple[float, ...], ...], ...]

AXES = ("num_sequences", "rows_per_sequence", "context_lens")
GRIDS = ("causal_s", "draft_s")
FAR_ROWS = 1_000_000.0  # rows per sequence up to which the last two knots are prolonged


@dataclass(frozen=True, slots=True)
class RowCurve:
    """Seconds of a pass over its rows, the number of sequences and their context being fixed:
    linear between knots.
    """

    rows: Floats  # [num_knots], ascending
    causal_s: Floats  # [num_knots]: no row drafts
    draft_s: Floats  # [num_knots]: every row drafts


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Seconds of a pass over a grid of three axes; raises ConfigError that names the key.

    Both grids are indexed [num_sequences][rows_per_sequence][context_lens].
    """

    num_sequences: tuple[int, ...]
    rows_per_sequence: tuple[int, ...]
    context_lens: tuple[int, ...]  # slots that each sequence has cached before the pass
    causal_s: Grid
    draft_s: Grid  # with the draft adapter where the model has one
    machine: Mapping[str, Any] = field(default_factory=dict)  # what it was measured on
    model: Mapping[str, Any] = field(default_factory=dict)
    _grids: Floats = field(init=False, repr=False, compare=False)  # [2, sequences, knots, contexts]
    _knots: Floats = field(init=False, repr=False, compare=False)  # rows of the whole pass

    def __post_init__(self) -> None:
        for name in AXES:
            _check_axis(name, getattr(self, name))
        shape = tuple(len(getattr(self, name)) for name in AXES)
        grids = np.stack([_grid(name, getattr(self, name), shape) for name in GRIDS])
        # A larger pass that measured faster is noise, and a price below zero would mislead.
        grids = np.maximum.accumulate(grids, axis=2)
        rows = np.outer(self.num_sequences, self.rows_per_sequence).astype(np.float64)
        knots = np.unique(np.append(rows, (0.0, rows[-1, -1] + FAR_ROWS)))
        object.__setattr__(self, "_grids", _on_knots(grids, rows, knots))
        object.__setattr__(self, "_knots", knots)

    def seconds(
        self, num_rows: int, num_sequences: int, context_tokens: int, drafts: bool
    ) -> float:
        """Of one pass: linear between the points measured, prolonged beyond them, never less for
        more rows. context_tokens: cached slots, summed over the sequences.
        """
        curve = self.row_curve(num_sequences, context_tokens)
        return float(np.interp(num_rows, curve.rows, curve.draft_s if drafts else curve.causal_s))

    def row_curve(self, num_sequences: int, context_tokens: int) -> RowCurve:
        """The seconds of every number of rows at once; num_sequences is at least 1.

        Between two numbers of sequences it is the rows of the whole pass that are alike: they are
        what a pass costs most for.
        """
        first, weight = _locate(self.context_lens, context_tokens / num_sequences)
        pair = self._grids[..., first : first + 2]
        seconds = pair[..., 0] + weight * (pair[..., -1] - pair[..., 0])  # [2, sequences, knots]
        first, weight = _locate(self.num_sequences, num_sequences)
        pair = seconds[:, first : first + 2]
        causal, draft = np.maximum.accumulate(
            pair[:, 0] + weight * (pair[:, -1] - pair[:, 0]), axis=1
        )
        return RowCurve(self._knots, causal, draft)

    def save(self, path: Path) -> None:
        """As JSON, the grid's axes by name."""
        fields = (*AXES, *GRIDS, "machine", "model")
        document = {name: getattr(self, name) for name in fields}
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "StepProfile":
        """Raises ConfigError that names the file and the key."""
        try:
            document = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"step profile {path}: {error}") from error
        try:
            return cls.from_dict(document)
        except ConfigError as error:
            raise ConfigError(f"step profile {path}: {error}") from error

    @classmethod
    def from_dict(cls, document: Any) -> "StepProfile":
        """Of what save() wrote; raises ConfigError that names the key."""
        if not isinstance(document, dict):
            raise ConfigError("must be a JSON object")
        missing = [name for name in (*AXES, *GRIDS) if name not in document]
        if missing:
            raise ConfigError(f"{missing[0]} is missing")
        try:
            grids: dict[str, Any] = {
                name: tuple(tuple(tuple(line) for line in plane) for plane in document[name])
                for name in GRIDS
            }
            axes: dict[str, Any] = {name: tuple(document[name]) for name in AXES}
        except TypeError as error:
            raise ConfigError(f"{', '.join((*AXES, *GRIDS))} must be lists: {error}") from error
        return cls(
            **axes,
            **grids,
            machine=document.get("machine", {}),
            model=document.get("model", {}),
        )


def _check_axis(name: str, axis: tuple[int, ...]) -> None:
    lowest = 0 if name == "context_lens" else 1
    if not axis or not all(isinstance(value, int) for value in axis):
        raise ConfigError(f"{name} must be a list of at least one integer")
    if axis[0] < lowest or any(a >= b for a, b in pairwise(axis)):
        raise ConfigError(f"{name} must ascend from at least {lowest}, is {list(axis)}")


def _grid(name: str, values: Grid, shape: tuple[int, ...]) -> Floats:
    try:
        grid = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} must hold numbers of shape {list(shape)}: {error}") from error
    if grid.shape != shape:
        raise ConfigError(f"{name} has shape {list(grid.shape)}, its axes say {list(shape)}")
    if not (np.isfinite(grid) & (grid > 0)).all():
        raise ConfigError(f"{name} must hold seconds over 0")
    return grid


def _on_knots(grids: Floats, rows: Floats, knots: Floats) -> Floats:
    """Both grids [2, sequences, rows per sequence, contexts], measured at rows [sequences, rows per
    sequence], on the same knots for all sequences. Behind its own last row each goes on as the next
    number of sequences does, the largest one straight on.
    """
    out = np.empty((*grids.shape[:2], len(knots), grids.shape[3]))
    for kind, n, c in reversed(list(np.ndindex(*grids.shape[:2], grids.shape[3]))):
        own, seconds = rows[n], grids[kind, n, :, c]
        slopes = np.diff(seconds) / np.diff(own) if len(own) > 1 else np.zeros(1)
        inside = np.interp(knots, own, seconds)
        before = seconds[0] - slopes[0] * np.maximum(own[0] - knots, 0)
        behind = slopes[-1] * np.maximum(knots - own[-1], 0)
        if n + 1 < len(rows):
            later = out[kind, n + 1, :, c]
            behind = np.maximum(later - later[np.searchsorted(knots, own[-1])], 0)
            behind[knots <= own[-1]] = 0
        out[kind, n, :, c] = np.where(knots < own[0], np.maximum(before, 0), inside + behind)
    return out


def _locate(axis: tuple[int, ...], value: float) -> tuple[int, float]:
    """The axis point to start from, and how far to go to the next one: over 1 beyond the end."""
    if len(axis) == 1 or value <= axis[0]:
        return 0, 0.0
    first = min(bisect_right(axis, value), len(axis) - 1) - 1
    return first, (value - axis[first]) / (axis[first + 1] - axis[first])
