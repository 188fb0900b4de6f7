"""What :class:`fastwrs.Monitor` makes of its records: derived curves, JSON lines, pandas, TensorBoard, plots.

A record is a plain dict of numbers and strings. Packages that are not needed otherwise are imported when they are used.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastwrs.spec import MEASURED

Record = dict[str, Any]
Curves = dict[str, list[tuple[int, float]]]
"""Steps and values, by name."""

STATISTICS = ("min", "mean", "max", "total")
"""Of a parameter's norm groups. The total of norms is the root of the sum of their squares, the norm of the tensor."""
NORMS = ("norm_before", "norm_updated", "norm_after", "grad_norm", "update_norm")
KEYS = {
    f"{figure}.{statistic}": place * len(MEASURED) + column
    for place, statistic in enumerate(STATISTICS)
    for column, figure in enumerate(MEASURED)
    if statistic != "total" or figure in NORMS
}
"""What the records of layers have of each parameter, and its place in the row of all statistics of all figures."""


def plain_number(value: float) -> float | None:
    """The number, or None if it is not finite, which JSON cannot say."""
    return value if math.isfinite(value) else None


def checked_key(figure: str, statistic: str) -> str:
    """The key of a figure in the records of layers, or a ValueError that lists what there is."""
    if figure not in MEASURED:
        raise ValueError(f"there is no figure {figure!r}; allowed: {', '.join(MEASURED)}")
    allowed = STATISTICS if figure in NORMS else STATISTICS[:-1]
    if statistic not in allowed:
        raise ValueError(f"{figure} has no statistic {statistic!r}; allowed: {', '.join(allowed)}")
    return f"{figure}.{statistic}"


def minimum_norm(steps: Iterable[tuple[int, Iterable[tuple[str, float]]]]) -> list[Record]:
    """For each step the least of the named norms; the first that is NaN, if one is."""
    found = []
    for step, norms in steps:
        least = min(norms, key=lambda norm: (not math.isnan(norm[1]), norm[1]), default=None)
        if least is not None:
            found.append({"step": step, "minimum_norm": least[1], "name": least[0]})
    return found


def gradient_over_loss(steps: Iterable[tuple[int, Sequence[float], float]]) -> list[Record]:
    """For each step with its gradient norms and loss the sum of the squares, the loss, and the one over the other."""
    found = []
    for step, norms, loss in steps:
        if norms and all(map(math.isfinite, norms)):
            total = math.fsum(norm**2 for norm in norms)
            ratio = plain_number(total / loss) if loss else None
            found.append({"step": step, "squared_gradient_norm": total, "loss": plain_number(loss), "ratio": ratio})
    return found


def to_jsonl(path: Any, records: Iterable[Record]) -> None:
    """One JSON object per line."""
    line = json.JSONEncoder(allow_nan=False).encode
    with Path(path).open("w", encoding="utf-8") as out:
        out.writelines(line(record) + "\n" for record in records)


def to_pandas(records: Sequence[Record]) -> Any:
    """The records as a DataFrame."""
    return _optional("pandas", "to_pandas").DataFrame.from_records(records)


def to_tensorboard(
    writer: Any, statistic: str, layers: Iterable[Record], minimum: Sequence[Record], ratios: Sequence[Record]
) -> None:
    """Scalars by step. ``writer`` is a SummaryWriter, or anything else with ``add_scalar``."""
    if not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(f"to_tensorboard: writer must have add_scalar(tag, value, step), got {type(writer).__name__}")
    if statistic not in STATISTICS:
        raise ValueError(f"to_tensorboard: statistic must be one of {', '.join(STATISTICS)}, got {statistic!r}")
    for record in layers:
        for figure in NORMS if statistic == "total" else MEASURED:
            key = f"{figure}.{statistic}"
            if record[key] is not None:
                writer.add_scalar(f"{key}/{record['name']}", record[key], record["step"])
    for records, key in ((minimum, "minimum_norm"), (ratios, "ratio")):
        tag = key if key == "minimum_norm" else "gradient_over_loss"
        for record in records:
            if record[key] is not None:
                writer.add_scalar(tag, record[key], record["step"])


def plot(path: Any, means: Mapping[str, Curves], minimum: Sequence[Record], ratios: Sequence[Record]) -> None:
    """A panel for each figure with a line per parameter, then the derived curves."""
    panels = {f"{figure} (mean over groups)": curves for figure, curves in means.items()}
    panels["minimum norm over groups of weights"] = {"": [(r["step"], r["minimum_norm"]) for r in minimum]}
    if ratios:
        points = [(r["step"], r["ratio"]) for r in ratios if r["ratio"] is not None]
        panels["squared gradient norm / loss"] = {"": points}
    # Not pyplot, which would choose a display and keep every figure.
    drawing = _optional("matplotlib.figure", "plot").Figure(figsize=(9, 3 * len(panels)), layout="constrained")
    for axes, (title, lines) in zip(drawing.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for name, points in lines.items():
            axes.plot([step for step, _ in points], [value for _, value in points], label=name, linewidth=1)
        values = [value for points in lines.values() for _, value in points if math.isfinite(value)]
        if values and min(values) > 0:
            axes.set_yscale("log")
        axes.set(title=title, xlabel="step")
        if 1 < len(lines) <= 12:
            axes.legend(fontsize="x-small")
    drawing.savefig(path)


def _optional(module: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(f"monitor.{what} needs {package}: pip install {package} ({error})") from error
