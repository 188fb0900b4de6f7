"""Table II of the WRS paper: AdamW and AdamP, each with decay, with WRS and with WRS(IC).

    python examples/paper/table2.py [--data tiny-imagenet --root DIR] [--help]

The paper takes Tiny ImageNet. Writes table2.csv and table2.png.
"""

from __future__ import annotations

from typing import Any

from common import plots
from common.recipes import METHODS, OPTIMIZERS, RESCALED, Settings
from common.setup import Setup, mean_and_spread, parse, text_table

NETWORKS = ("resnet18", "wrn28-10")
ROWS = [(optimizer, method) for method in ("wd", "wrs", "wrs-ic") for optimizer in ("adamw", "adamp")]


def label(optimizer: str, method: str) -> str:
    """As the paper's table calls it: the optimizers without more are decayed."""
    return OPTIMIZERS[optimizer] + (f"+{METHODS[method]}" if method in RESCALED else "")


def runs_of(setup: Setup, network: str, optimizer: str, method: str) -> list[Settings]:
    """A row of the table, with all seeds."""
    return [setup.settings(network, optimizer, method, seed) for seed in setup.seeds(network)]


def table(setup: Setup) -> list[dict[str, Any]]:
    """A row for each optimizer and network."""
    rows = []
    for optimizer, method in ROWS:
        for network in NETWORKS:
            runs = runs_of(setup, network, optimizer, method)
            mean, spread = mean_and_spread(found := [setup.runs.final(settings) for settings in runs])
            rows.append({
                "optimizer": label(optimizer, method), "network": network, "test_accuracy": mean,
                "standard_deviation": spread, "seeds": len(found), "weight_decay": runs[0].weight_decay,
                "tau": runs[0].tau or None, "of_each_seed": " ".join(f"{value:.2f}" for value in found),
            })  # fmt: skip
    return rows


def plot(setup: Setup, rows: list[dict[str, Any]]) -> None:
    """A panel for each network: every seed a point, the mean a bar."""
    figure, axes = plots.panels(1, len(NETWORKS), width=5.5)
    colors = {label(optimizer, method): plots.COLORS[method] for optimizer, method in ROWS}
    for panel, network in zip(axes[0], NETWORKS, strict=True):
        some = [row for row in rows if row["network"] == network]
        for x, row in enumerate(some):
            points = [float(value) for value in row["of_each_seed"].split()]
            panel.plot([x] * len(points), points, "o", color=colors[row["optimizer"]], alpha=0.6, markersize=5)
            panel.hlines(row["test_accuracy"], x - 0.25, x + 0.25, colors[row["optimizer"]])
        panel.set(title=setup.scale(network), ylabel="test accuracy (%)")
        panel.set_xticks(range(len(some)), [row["optimizer"].replace("+", "\n+") for row in some], fontsize=8)
    plots.save(figure, setup, "table2.png", "a point for each seed, a bar for their mean")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    setup = parse(__doc__, arguments)
    grid = [s for network in NETWORKS for row in ROWS for s in runs_of(setup, network, *row)]
    setup.runs.train(grid, "Table II")
    rows = table(setup)
    setup.write("table2.csv", rows)
    print(text_table(rows))
    plot(setup, rows)


if __name__ == "__main__":
    main()
