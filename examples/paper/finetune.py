"""Fine-tuning as in section VI-C of the WRS paper: a network trained before is tuned on other data, with WD and WRS.

    python examples/paper/finetune.py [--data cifar100 --root DIR] [--help]

The paper tunes ImageNet's backbones for detection, segmentation and counting. Here the script trains the backbone
itself, ResNet-18 on the first half of the classes, and tunes it on the other half with a new head: with decay on all
weights, or with the groups of fastwrs.param_groups, which rescale weights and decay BatchNorm. Learning rates are a
tenth of those from scratch. Writes finetune.csv (curves), finetune_summary.csv and finetune.png.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from common import data as data_sets
from common import plots
from common.recipes import METHODS, OPTIMIZERS, Settings
from common.setup import Setup, mean_and_spread, parse, text_table

NETWORK = "resnet18"
TUNED_WITH = ("sgdm", "adamw")
COMPARED = ("wd", "wrs")


def halves(setup: Setup) -> list[tuple[int, int]]:
    """The classes of the backbone, and those it is tuned on."""
    return data_sets.class_ranges(setup.data, 2)


def backbone(setup: Setup, seed: int) -> Settings:
    """SGDM with decay, on the first half of the classes."""
    settings = setup.settings(NETWORK, "sgdm", "wd", seed, classes=halves(setup)[0])
    return replace(settings, keep_weights=(settings.epochs,))


def tuned(setup: Setup, optimizer: str, method: str, seed: int) -> Settings:
    """On the other half."""
    lr = setup.recipe.lr[optimizer] / 10
    start = backbone(setup, seed).name
    return setup.settings(NETWORK, optimizer, method, seed, lr=lr, classes=halves(setup)[1], start_from=start)


def variants() -> list[tuple[str, str]]:
    """Optimizer and method."""
    return [(optimizer, method) for optimizer in TUNED_WITH for method in COMPARED]


def rows_of(setup: Setup) -> list[dict[str, Any]]:
    """All curves, a row for each evaluation."""
    return [
        {
            "optimizer": OPTIMIZERS[optimizer], "method": METHODS[method], "seed": seed, "epoch": e["epoch"],
            "test_accuracy": e["test"], "training_loss": e["loss"],
        }
        for optimizer, method in variants()
        for seed in setup.seeds(NETWORK)
        for e in setup.runs[tuned(setup, optimizer, method, seed)]["epochs"]
    ]  # fmt: skip


def summary(setup: Setup) -> list[dict[str, Any]]:
    """Accuracies after the first evaluation and at the end."""
    rows = []
    for optimizer, method in variants():
        found = [setup.runs[tuned(setup, optimizer, method, seed)]["epochs"] for seed in setup.seeds(NETWORK)]
        mean, spread = mean_and_spread(final := [epochs[-1]["test"] for epochs in found])
        rows.append({
            "optimizer": OPTIMIZERS[optimizer], "method": METHODS[method], "test_accuracy": mean,
            "standard_deviation": spread, "seeds": len(final), "first_epoch": found[0][0]["epoch"],
            "after_first": mean_and_spread([epochs[0]["test"] for epochs in found])[0],
            "of_each_seed": " ".join(f"{value:.2f}" for value in final),
        })  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    setup = parse(__doc__, arguments, parts=2)
    setup.runs.train([backbone(setup, seed) for seed in setup.seeds(NETWORK)], "backbones")
    grid = [tuned(setup, *variant, seed) for variant in variants() for seed in setup.seeds(NETWORK)]
    setup.runs.train(grid, "fine-tuning")
    rows = summary(setup)
    setup.write("finetune.csv", rows_of(setup))
    setup.write("finetune_summary.csv", rows)
    print(text_table(rows))
    figure, axes = plots.panels(1, len(TUNED_WITH), width=5)
    for panel, optimizer in zip(axes[0], TUNED_WITH, strict=True):
        for method in COMPARED:
            runs = [setup.runs[tuned(setup, optimizer, method, seed)]["epochs"] for seed in setup.seeds(NETWORK)]
            epochs = [e["epoch"] for e in runs[0]]
            values = [[e["test"] for e in one] for one in runs]
            plots.curves(panel, epochs, values, color=plots.COLORS[method], label=METHODS[method], marker=".")
        plots.milestones(panel, tuned(setup, optimizer, "wd", 0).milestones)
        title = f"{setup.scale(NETWORK)}, tuned with {OPTIMIZERS[optimizer]}"
        panel.set(title=title, xlabel="epoch of tuning", ylabel="test accuracy (%)")
        panel.legend(fontsize=8)
    first, rest = (f"{low}-{high - 1}" for low, high in halves(setup))
    what = f"backbone: classes {first}, tuned: {rest} of {data_sets.TITLES[setup.data]}"
    plots.save(figure, setup, "finetune.png", f"{what}; bands: least and greatest over seeds")


if __name__ == "__main__":
    main()
