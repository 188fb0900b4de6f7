"""Figs. 1 and 2 of the weight-norm paper (Cisneros-Velarde et al.): what its bounds are made of, in training.

    python examples/paper/weight_norm.py [--data cifar10 --root DIR] [--help]

Perceptrons with WeightNorm and two hidden layers of width m = 512, 1024 and 2048, SGD with learning rate 0.001, weights
from a uniform distribution on [-0.5 / sqrt(m), 0.5 / sqrt(m)] (Fig. 1) and [-5 / sqrt(m), 5 / sqrt(m)] (Fig. 2):
(a) the least norm of a hidden neuron's weights (Definition 3.1), (b) the squared gradient norm over the loss. Writes
weight_norm.csv, weight_norm_summary.csv and weight_norm.png.
"""

from __future__ import annotations

from typing import Any

from common import plots
from common.recipes import Settings
from common.setup import Setup, parse, text_table

WIDTHS = (512, 1024, 2048)
SPREADS = {"Fig. 1": 0.5, "Fig. 2": 5.0}
STYLES = ({"color": "#e6ab02", "linewidth": 4}, {"color": "#1b9e77", "linewidth": 1.5}, {"color": "#1f4e79"})


def run(setup: Setup, spread: float, width: int) -> Settings:
    """One perceptron. The tiny size has narrow ones."""
    cut = min(1.0, 8 * setup.recipe.width["vgg16"])
    plain = {"lr": 0.001, "weight_decay": 0.0, "augment": False, "evaluate_every": 10**9}
    return setup.settings("wn-mlp", "sgd", "off", 0, width=cut * width / 512, init_spread=spread, **plain)


def rows_of(setup: Setup) -> list[dict[str, Any]]:
    """A row for each step that was measured."""
    return [
        {
            "figure": figure, "width": width, "step": r["step"], "minimum_norm": r["minimum_norm"],
            "gradient_over_loss": r["gradient_over_loss"], "loss": r["loss"],
        }
        for figure, spread in SPREADS.items()
        for width in WIDTHS
        for r in setup.runs[run(setup, spread, width)]["measured"]
    ]  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """First and last figures of each curve."""
    found = []
    for figure in SPREADS:
        for width in WIDTHS:
            some = [row for row in rows if (row["figure"], row["width"]) == (figure, width)]
            norms, ratios = ([row[key] for row in some] for key in ("minimum_norm", "gradient_over_loss"))
            found.append({
                "figure": figure, "width": width, "minimum_norm_first": norms[0], "minimum_norm_last": norms[-1],
                "ratio_first": ratios[0], "ratio_last": ratios[-1], "greatest_ratio": max(ratios),
            })  # fmt: skip
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    setup = parse(__doc__, arguments)
    grid = [run(setup, spread, width) for width in reversed(WIDTHS) for spread in SPREADS.values()]
    setup.runs.train(grid, "WeightNorm")
    rows = rows_of(setup)
    short = summary(rows)
    setup.write("weight_norm.csv", rows)
    setup.write("weight_norm_summary.csv", short)
    print(text_table(short))
    figure, axes = plots.panels(2, 2, width=5)
    for line, (name, spread) in zip(axes, SPREADS.items(), strict=True):
        for width, style in zip(WIDTHS, STYLES, strict=True):
            some = [row for row in rows if (row["figure"], row["width"]) == (name, width)]
            steps = [row["step"] for row in some]
            line[0].plot(steps, [row["minimum_norm"] for row in some], label=f"m = {width}", **style)
            line[1].plot(steps, [row["gradient_over_loss"] for row in some], label=f"m = {width}", **style)
        start = f"weights from $\\pm${spread:g}/$\\sqrt{{m}}$"
        line[0].set(title=f"{name}a: least norm, {start}", xlabel="step", ylabel="min over neurons of |W|")
        line[1].set(title=f"{name}b: {start}", xlabel="step", ylabel="|gradient|$^2$ / loss", yscale="log")
        line[0].legend(fontsize=8)
        line[1].legend(fontsize=8)
    plots.save(figure, setup, "weight_norm.png")


if __name__ == "__main__":
    main()
