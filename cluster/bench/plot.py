"""The picture: what a user gets against what the engine gives, one curve a setting."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

from trimode.cluster.bench.measure import Point


def draw(curves: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Write a PNG. curves: setting -> its points, lightest load first."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5.2), layout="constrained")
    for name, points in curves.items():
        speeds = [point.summary.tokens_per_s_per_user for point in points]
        totals = [point.summary.tokens_per_s for point in points]
        style = {"linewidth": 2.5, "color": "black"} if name == "governor" else {}
        axis.plot(speeds, totals, marker="o", markersize=4, label=name, **style)
        for point, speed, total in zip(points, speeds, totals, strict=True):
            axis.annotate(point.label, (speed, total), fontsize=6, xytext=(3, 3),
                          textcoords="offset points")  # fmt: skip
    axis.set_xlabel("tokens/s of one user")
    axis.set_ylabel("tokens/s of all users")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
