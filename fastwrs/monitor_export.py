"""What :class:`fastwrs.Monitor` makes of its records: derived curves, JSON lines, pandas, TensorBoard, plots.

A record is a plain dict of numbers and strings. Packages that are not needed otherwise are imported when they are used.
"""

from __future__ import annotations

import importlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastwrs.spec import MEASURED

Record = dict[str, Any]
Curves = Callable[[str], dict[str, list[tuple[int, float]]]]

STATISTICS = ("min", "mean", "max", "total")
"""Of a parameter's norm groups. The total of norms is the root of the sum of their squares, the norm of the tensor."""
NORMS = ("norm_before", "norm_updated", "norm_after", "grad_norm", "update_norm")


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


def minimum_norm(layers: Iterable[Record], weights: set[str]) -> list[Record]:
    """For each step the least norm after it over all groups of the named weights."""
    least: dict[int, Record] = {}
    for record in layers:
        norm, step = record["norm_after.min"], record["step"]
        if norm is None or record["name"] not in weights:
            continue
        if step not in least or norm < least[step]["minimum_norm"]:
            least[step] = {"step": step, "minimum_norm": norm, "name": record["name"]}
    return list(least.values())


def gradient_over_loss(layers: Iterable[Record], losses: Mapping[int, float]) -> list[Record]:
    """For each step with a loss the squared gradient norm of all parameters, the loss, and the one over the other."""
    squares: defaultdict[int, list[float]] = defaultdict(list)
    unknown = set()
    for record in layers:
        if record["grad_norm.total"] is None:
            unknown.add(record["step"])
        else:
            squares[record["step"]].append(record["grad_norm.total"] ** 2)
    found = []
    for step, parts in squares.items():
        if step in losses and step not in unknown:
            total, loss = math.fsum(parts), losses[step]
            ratio = plain_number(total / loss) if loss else None
            found.append({"step": step, "squared_gradient_norm": total, "loss": plain_number(loss), "ratio": ratio})
    return found


def to_jsonl(path: Any, records: Iterable[Record]) -> None:
    """One JSON object per line."""
    with Path(path).open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)


def to_pandas(records: Sequence[Record]) -> Any:
    """The records as a DataFrame."""
    return _optional("pandas", "to_pandas").DataFrame.from_records(records)


def to_tensorboard(
    writer: Any, statistic: str, layers: Sequence[Record], minimum: Sequence[Record], ratios: Sequence[Record]
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


def plot(path: Any, figures: Sequence[str], curve: Curves, minimum: Sequence[Record], ratios: Sequence[Record]) -> None:
    """A panel for each figure with a line per parameter, then the derived curves."""
    panels = {f"{figure} (mean over groups)": curve(figure) for figure in figures}
    panels["minimum norm over groups of weights"] = {"": [(r["step"], r["minimum_norm"]) for r in minimum]}
    if ratios:
        points = [(r["step"], r["ratio"]) for r in ratios if r["ratio"] is not None]
        panels["squared gradient norm / loss"] = {"": points}
    # Not pyplot, which would choose a display and keep every figure.
    drawing = _optional("matplotlib.figure", "plot").Figure(figsize=(9, 3 * len(panels)), layout="constrained")
    for axes, (title, lines) in zip(drawing.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        for name, points in lines.items():
            axes.plot([step for step, _ in points], [value for _, value in points], label=name, linewidth=1)
        values = [value for points in lines.values() for _, value in points]
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
