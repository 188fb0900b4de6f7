"""Figs. 1 and 6 of the WRS paper: decay and rescaling in a window of epochs, and what else holds the norm.

    python examples/paper/fig1_fig6.py [--data cifar100 --root DIR] [--help]

Fig. 1: SGDM with decay in all epochs, and with decay until the learning rate is divided first. Fig. 6a: VGG16 with
decay or rescaling in all epochs, before that, and after it, and without either. A window of WD is one for BatchNorm's
decay too; that of WRS is for the rescale alone, and BatchNorm is decayed in all epochs. Fig. 6b: ResNet-18 with WRS,
bounded weight norm (with mean-only BatchNorm), WD, and weight standardization with and without WD. Writes fig1_fig6.csv
(curves), fig1_fig6_summary.csv, fig1.png and fig6.png.
"""

from __future__ import annotations

from typing import Any

from common import plots
from common.recipes import METHODS, Settings
from common.setup import Setup, mean_and_spread, parse, text_table

FIG1 = ("resnet18", "wrn28-10")
FIG6B = ("wrs", "bwn", "wd", "ws", "ws+wd")
WINDOWS = ("all", "early", "late")
STYLES = {"all": "-", "early": "--", "late": ":"}
ZOOM = 10.0  # percentage points below the best that are shown where curves lie close together
Curve = tuple[str, str, str]


def run(setup: Setup, curve: Curve, seed: int) -> Settings:
    """A run with SGDM. The window ends, or begins, where the learning rate is divided for the first time."""
    network, method, window = curve
    settings = setup.settings(network, "sgdm", method, seed, **long(setup, network))
    if window == "all":
        return settings
    first = settings.milestones[0] if settings.milestones else 0
    epochs = (0, first) if window == "early" else (first, max(first + 1, settings.epochs))
    return setup.settings(network, "sgdm", method, seed, **long(setup, network), window=epochs)


def long(setup: Setup, network: str) -> dict[str, Any]:
    """VGG16 is trained by the longer schedule here. Figs. 3 to 5 look into the same runs."""
    if network != "vgg16":
        return {}
    epochs = setup.recipe.epochs["vgg16 long"]
    kept = sorted({0, *(round(epochs * part) for part in (1 / 16, 1 / 8, 1 / 4, 0.3, 0.5, 0.6, 0.8, 1))})
    every = max(1, epochs // 200)
    return {"long": True, "keep_weights": tuple(kept), "keep_norms": True, "evaluate_every": every}


def panels_of() -> dict[str, list[Curve]]:
    """The curves by panel."""
    return {
        **{f"fig1 {network}": [(network, "wd", "all"), (network, "wd", "early")] for network in FIG1},
        # Fig. 3 looks at the run without decay too.
        "fig6a": [
            *(("vgg16", method, window) for method in ("wrs", "wd") for window in WINDOWS),
            ("vgg16", "off", "all"),
        ],
        "fig6b": [("resnet18", method, "all") for method in FIG6B],
    }


def name_of(setup: Setup, curve: Curve) -> str:
    """For the legend."""
    settings = run(setup, curve, 0)
    first, end = settings.window or (0, settings.epochs)
    windowed = curve[0] == "vgg16" or "wd" in curve
    return METHODS[curve[1]] + (f", epochs {first}-{end}" if windowed and "off" not in curve else "")


def summary(setup: Setup) -> list[dict[str, Any]]:
    """Final accuracies, and how far below the best after the first division of the learning rate they are."""
    rows = []
    for panel, curves in panels_of().items():
        for curve in curves:
            runs = [run(setup, curve, seed) for seed in setup.seeds(curve[0])]
            final = [setup.runs.final(settings) for settings in runs]
            later = [
                [e["test"] for e in setup.runs[s]["epochs"] if e["epoch"] > (s.milestones or (0,))[0]] for s in runs
            ]
            lost = [max(some) - end for some, end in zip(later, final, strict=True) if some]
            mean, spread = mean_and_spread(final)
            drop = mean_and_spread(lost)[0] if lost else None  # a run may end before the learning rate is divided
            rows.append({
                "panel": panel, "network": curve[0], "method": METHODS[curve[1]], "window": curve[2],
                "test_accuracy": mean, "standard_deviation": spread, "best_minus_final": drop, "seeds": len(runs),
                "of_each_seed": " ".join(f"{value:.2f}" for value in final),
            })  # fmt: skip
    return rows


def rows_of(setup: Setup) -> list[dict[str, Any]]:
    """All curves, a row for each epoch."""
    return [
        {
            "panel": panel, "network": curve[0], "method": METHODS[curve[1]], "window": curve[2], "seed": seed,
            "epoch": epoch["epoch"], "test_accuracy": epoch["test"], "training_loss": epoch["loss"],
        }
        for panel, curves in panels_of().items()
        for curve in curves
        for seed in setup.seeds(curve[0])
        for epoch in setup.runs[run(setup, curve, seed)]["epochs"]
        if epoch["epoch"]
    ]  # fmt: skip


def draw(setup: Setup, panel: Any, curves: list[Curve], title: str, zoom: bool = False) -> None:
    """One panel of test accuracies."""
    best = 0.0
    for curve in curves:
        found = [setup.runs[run(setup, curve, seed)]["epochs"] for seed in setup.seeds(curve[0])]
        epochs = [e["epoch"] for e in found[0] if e["epoch"]]
        values = [[e["test"] for e in one if e["epoch"]] for one in found]
        style = {"color": plots.COLORS[curve[1]], "linestyle": STYLES[curve[2]], "label": name_of(setup, curve)}
        if curve[:2] == curves[0][:2] and len(curves) == 2:  # the same method in two windows
            style["color"] = plots.COLORS["wd"] if curve[2] == "all" else "#1f4e79"
        plots.curves(panel, epochs, values, **style)
        best = max(best, *(value for one in values for value in one))
    plots.milestones(panel, run(setup, curves[0], 0).milestones)
    panel.set(title=title, xlabel="epoch", ylabel="test accuracy (%)")
    if zoom:
        panel.set_ylim(best - ZOOM, best + 0.5)
    panel.legend(fontsize=8, loc="lower right")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    setup = parse(__doc__, arguments)
    by_panel = panels_of()
    every = [curve for curves in by_panel.values() for curve in curves]
    setup.runs.train([run(setup, curve, seed) for curve in every for seed in setup.seeds(curve[0])], "Figs. 1 and 6")
    rows = summary(setup)
    setup.write("fig1_fig6.csv", rows_of(setup))
    setup.write("fig1_fig6_summary.csv", rows)
    print(text_table(rows))
    note = "bands: least and greatest over seeds; dashed: the learning rate is divided by 10"
    figure, axes = plots.panels(1, len(FIG1), width=5)
    for panel, network in zip(axes[0], FIG1, strict=True):
        draw(setup, panel, by_panel[f"fig1 {network}"], f"Fig. 1: {setup.scale(network)}, SGDM", zoom=True)
    plots.save(figure, setup, "fig1.png", note)
    figure, axes = plots.panels(1, 3)
    draw(setup, axes[0][0], by_panel["fig6a"], f"Fig. 6a: {setup.scale('vgg16')}, SGDM")
    draw(setup, axes[0][1], by_panel["fig6b"], f"Fig. 6b: {setup.scale('resnet18')}, SGDM")
    draw(setup, axes[0][2], by_panel["fig6b"], "Fig. 6b, the upper end", zoom=True)
    plots.save(figure, setup, "fig6.png", note)


if __name__ == "__main__":
    main()
