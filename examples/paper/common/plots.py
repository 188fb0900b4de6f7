"""Plots that look alike: a colour for each method, a note about the data below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .setup import Setup

COLORS = {
    "off": "#888888",
    "wd": "#d95f02",
    "ws": "#a6761d",
    "ws+wd": "#7570b3",
    "bwn": "#e7298a",
    "wrs": "#1b9e77",
    "wrs-ic": "#1f78b4",
}


def panels(rows: int, columns: int, width: float = 4.2, height: float = 3.2) -> tuple[Figure, Any]:
    """A figure and its axes, of shape [rows, columns]."""
    figure = Figure(figsize=(width * columns, height * rows + 0.3), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Figure, setup: Setup, name: str, note: str = "") -> None:
    """Writes the plot, with what the data are below it."""
    text = f"{setup.note()}{'; ' if note else ''}{note}"
    wrapped = textwrap.fill(text, int(17 * figure.get_figwidth()))
    figure.supxlabel(wrapped, fontsize=8, color="#555555")
    path = setup.out / name
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


def curves(axes: Any, x: Sequence[float], many: Sequence[Sequence[float]], **style: Any) -> None:
    """The mean of some curves with a band from the least to the greatest, where there are several."""
    values = np.array(many, dtype=float)
    (line,) = axes.plot(x, values.mean(0), **style)
    if len(values) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)


def milestones(axes: Any, epochs: Sequence[int]) -> None:
    """Dashed lines where the learning rate is divided by 10."""
    for epoch in epochs:
        axes.axvline(epoch, color="black", linestyle="--", linewidth=0.6, alpha=0.6)


def smoothed(values: Sequence[float], decay: float) -> list[float]:
    """The exponential moving average, of the first value at first: e <- decay * e + (1 - decay) * value."""
    found: list[float] = []
    for value in values:
        found.append(value if not found else decay * found[-1] + (1 - decay) * value)
    return found
