"""Table I of the WRS paper: WD, WS with WD, and WRS, each with SGDM and Adam, on three networks.

    python examples/paper/table1.py [--data cifar10 --root DIR] [--help]

For each cell the hyperparameters are chosen on the validation images with seed 0, as in the paper: the decay for WD and
WS, decay and tau for WRS (at the small size the decay alone, so that all methods have the same number of trials). Then
the other seeds are trained with them. Writes table1.csv, table1_search.csv, table1_tests.csv (the paired t-tests of the
caption, over the cells of this data set, and over all data sets in --out with the same recipe, without digits) and
table1.png.
"""

from __future__ import annotations

import csv
from typing import Any

from common import plots
from common.paired import paired_t
from common.recipes import METHODS, OPTIMIZERS, Settings
from common.setup import Setup, mean_and_spread, parse, text_table

NETWORKS = ("vgg16", "resnet18", "wrn28-10")
COMPARED = ("wd", "ws+wd", "wrs")
TRAINED_WITH = ("sgdm", "adam")
Cell = tuple[str, str, str]


def cells() -> list[Cell]:
    """Network, optimizer and method."""
    return [(network, optimizer, method) for network in NETWORKS for optimizer in TRAINED_WITH for method in COMPARED]


def candidates(setup: Setup, cell: Cell) -> list[Settings]:
    """The runs of seed 0 among which the validation images choose."""
    taus = setup.recipe.tau_search if cell[2] == "wrs" else (0,)
    decays = setup.recipe.decay_search
    return [setup.settings(*cell, 0, weight_decay=decay, tau=tau) for decay in decays for tau in taus]


def chosen(setup: Setup, cell: Cell) -> Settings:
    """The best of them; of equals the first."""
    return max(candidates(setup, cell), key=lambda settings: setup.runs.final(settings, "val"))


def with_seeds(setup: Setup, cell: Cell) -> list[Settings]:
    """The chosen run with all seeds."""
    best = chosen(setup, cell)
    return [setup.settings(*cell, seed, weight_decay=best.weight_decay, tau=best.tau) for seed in setup.seeds(cell[0])]


def table(setup: Setup) -> list[dict[str, Any]]:
    """A row for each cell."""
    rows = []
    for cell in cells():
        runs = with_seeds(setup, cell)
        mean, spread = mean_and_spread(found := [setup.runs.final(settings) for settings in runs])
        network, optimizer, method = cell
        rows.append({
            "network": network, "optimizer": OPTIMIZERS[optimizer], "method": METHODS[method],
            "test_accuracy": mean, "standard_deviation": spread, "seeds": len(found),
            "weight_decay": runs[0].weight_decay, "tau": runs[0].tau or None,
            "of_each_seed": " ".join(f"{value:.2f}" for value in found),
        })  # fmt: skip
    return rows


def search(setup: Setup) -> list[dict[str, Any]]:
    """A row for each candidate."""
    return [
        {
            "network": cell[0], "optimizer": OPTIMIZERS[cell[1]], "method": METHODS[cell[2]],
            "weight_decay": settings.weight_decay, "tau": settings.tau or None,
            "validation_accuracy": setup.runs.final(settings, "val"), "test_accuracy": setup.runs.final(settings),
            "chosen": "yes" if settings == chosen(setup, cell) else "",
        }
        for cell in cells()
        for settings in candidates(setup, cell)
    ]  # fmt: skip


def tests(tables: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """WRS against the others, paired by data set, network and optimizer, on the means over seeds as in the paper."""
    means = {
        (data, row["network"], row["optimizer"], row["method"]): float(row["test_accuracy"])
        for data, rows in tables.items()
        for row in rows
    }
    pairs = list(dict.fromkeys(key[:3] for key in means))
    ours = [means[(*pair, METHODS["wrs"])] for pair in pairs]
    rows = []
    for method in COMPARED[:2]:
        theirs = [means[(*pair, METHODS[method])] for pair in pairs]
        found = paired_t(ours, theirs)
        rows.append({
            "data": "+".join(tables), "comparison": f"WRS - {METHODS[method]}", "pairs": len(pairs),
            "mean_of_WRS": sum(ours) / len(ours), "mean_of_other": sum(theirs) / len(theirs),
            "difference": found.difference, "t": found.t, "df": found.df, "p": found.p,
        })  # fmt: skip
    return rows


def other_tables(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    """What was found before on other data sets of the paper, for a test over all of them."""
    found, changes = {}, setup.out.name.removeprefix(setup.data)
    for data in ("cifar10", "cifar100", "tiny-imagenet"):
        path = setup.out.parent / f"{data}{changes}" / "table1.csv"
        if path.exists() and setup.data not in ("digits", data):
            with path.open(newline="", encoding="utf-8") as file:
                found[data] = list(csv.DictReader(file))
    return found


def plot(setup: Setup, rows: list[dict[str, Any]]) -> None:
    """A panel for each optimizer: every seed a point, the mean a bar."""
    figure, axes = plots.panels(1, len(TRAINED_WITH), width=5.5)
    for panel, optimizer in zip(axes[0], TRAINED_WITH, strict=True):
        for k, method in enumerate(COMPARED):
            some = [r for r in rows if (r["optimizer"], r["method"]) == (OPTIMIZERS[optimizer], METHODS[method])]
            for x, row in enumerate(some):
                place = x + 0.25 * (k - 1)
                points = [float(value) for value in row["of_each_seed"].split()]
                panel.plot([place] * len(points), points, "o", color=plots.COLORS[method], alpha=0.6, markersize=5)
                label = METHODS[method] if x == 0 else None
                panel.hlines(row["test_accuracy"], place - 0.1, place + 0.1, plots.COLORS[method], label=label)
        panel.set(title=OPTIMIZERS[optimizer], ylabel="test accuracy (%)")
        panel.set_xticks(range(len(NETWORKS)), [setup.scale(network) for network in NETWORKS], fontsize=8)
        panel.legend()
    plots.save(figure, setup, "table1.png", "a point for each seed")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    setup = parse(__doc__, arguments)
    setup.runs.train([settings for cell in cells() for settings in candidates(setup, cell)], "Table I, search")
    setup.runs.train([settings for cell in cells() for settings in with_seeds(setup, cell)], "Table I, seeds")
    rows = table(setup)
    found = tests({setup.data: rows})
    if others := other_tables(setup):
        found += tests({setup.data: rows, **others})
    for name, part in (("table1.csv", rows), ("table1_search.csv", search(setup)), ("table1_tests.csv", found)):
        setup.write(name, part)
    print(f"{text_table(rows)}\n\n{text_table(found)}")
    plot(setup, rows)


if __name__ == "__main__":
    main()
