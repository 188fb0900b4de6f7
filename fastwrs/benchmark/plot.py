"""Bars of bytes per second beside those of a copy of memory: steps do little but move memory.

A copy on a CPU also fetches the lines that it will write, which nobody counts; a step has read them anyway. So a step
may reach 1.5 times a copy.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Panel(NamedTuple):
    """Bars by the names of their sides, in GB/s, and the speed of a copy in the same turns."""

    bars: dict[str, float]
    copy: float


def why_not(path: Path) -> str | None:
    """Why nothing can be drawn there, or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed"
    try:
        kinds = importlib.import_module("matplotlib.backend_bases").FigureCanvasBase.get_supported_filetypes()
    except Exception as error:  # another numpy than it was built for, say
        return f"matplotlib cannot be imported ({type(error).__name__}: {error})"
    kind = path.suffix.removeprefix(".")
    return None if kind in kinds else f"{kind!r} is no kind of picture; there are {', '.join(sorted(kinds))}"


def draw(panels: Mapping[str, Panel], path: Path) -> None:
    """Writes a picture with a panel for each title."""
    # not pyplot, which would choose a display
    drawing = importlib.import_module("matplotlib.figure").Figure
    heights = [len(panel.bars) + 2.0 for panel in panels.values()]
    figure = drawing(figsize=(8, 0.3 * sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for ax, (title, panel) in zip(axes, panels.items(), strict=True):
        names = list(panel.bars)[::-1]
        colours = ["tab:blue" if name.startswith("fastwrs") else "tab:gray" for name in names]
        ax.barh(names, [panel.bars[name] for name in names], color=colours)
        ax.axvline(panel.copy, color="black", linestyle="--", label="a copy of memory")
        ax.set_title(title)
        ax.set_xlabel("bytes that a step cannot do without over its time, GB/s")
        ax.legend(loc="lower right")
    figure.savefig(path, dpi=120)
