"""The table and the plot of the digits demo."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

mpl.use("Agg")  # no display is needed
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from train import Run

Key = tuple[str, str]


def by_variant(runs: list[Run]) -> dict[Key, list[Run]]:
    """The runs by (optimizer, method), seeds together."""
    variants: dict[Key, list[Run]] = {}
    for run in runs:
        variants.setdefault((run.optimizer, run.method), []).append(run)
    return variants


def table(runs: list[Run], times: dict[Key, tuple[float, float]]) -> str:
    """Final test accuracy, and milliseconds per step."""
    lines = [
        "optimizer  method    test accuracy (%)   ms per step   torch fused + loop   ratio",
        "---------  --------  -----------------   -----------   ------------------   -----",
    ]
    for (name, method), group in by_variant(runs).items():
        final = [run.accuracy[-1] for run in group]
        spread = f"+- {statistics.stdev(final):.2f}" if len(final) > 1 else "(1 seed)"
        ours, theirs = times[name, method]
        lines.append(
            f"{name:<9}  {method:<8}  {statistics.mean(final):>7.2f} {spread:<9}   {ours:>11.3f}   {theirs:>18.3f}"
            f"   {theirs / ours:>5.2f}"
        )
    lines.append("")
    lines.append("ratio: how much longer torch's fused optimizer takes, with an eager loop over the weights where the")
    lines.append("method needs one; one thread, medians, measured in turns")
    return "\n".join(lines)


def plot(runs: list[Run], path: Path) -> None:
    """A row per optimizer: accuracy curves on the left, then for each method the norms of the watched layer."""
    variants = by_variant(runs)
    names = list(dict.fromkeys(run.optimizer for run in runs))
    methods = list(dict.fromkeys(run.method for run in runs))
    figure, axes = plt.subplots(
        len(names), 1 + len(methods), figsize=(4 + 2.6 * len(methods), 3.2 * len(names)), squeeze=False
    )
    colors = dict(zip(methods, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for row, name in zip(axes, names, strict=True):
        for method in methods:
            curves = list(zip(*(run.accuracy for run in variants[name, method]), strict=True))
            epochs = range(1, len(curves) + 1)
            row[0].plot(epochs, [statistics.mean(c) for c in curves], color=colors[method], label=method)
            low, high = [min(c) for c in curves], [max(c) for c in curves]
            row[0].fill_between(epochs, low, high, color=colors[method], alpha=0.15)
        row[0].set(title=f"{name}: test accuracy (%)", xlabel="epoch", ylim=(90, 100))
        row[0].legend(loc="lower right")
        top = 1.05 * max(max(norms) for run in runs if run.optimizer == name for norms in run.norms)
        for panel, method in zip(row[1:], methods, strict=True):
            panel.plot(variants[name, method][0].norms, color=colors[method], alpha=0.35, linewidth=0.8)
            panel.set(title=f"{method}: channel norms", xlabel="epoch", ylim=(0, top))
    figure.suptitle("scikit-learn digits; bands: least and greatest over seeds; norms: second convolution, first seed")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
