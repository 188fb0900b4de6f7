"""Fig. 2 of the WRS paper: effective gradient norms, and how much depends on lambda (WD) and on tau (WRS).

    python examples/paper/fig2.py [--data cifar10 --root DIR] [--help]

(a) The gradient norm over the weight norm of VGG16's 2nd and ResNet-18's 3rd convolution; with AdamW that of the step
m-hat / (sqrt(v-hat) + eps) instead of the gradient's. (b) Final test accuracy. Writes fig2a.csv, fig2b.csv,
fig2_summary.csv and fig2.png.
"""

from __future__ import annotations

import math
from typing import Any

from common import plots
from common.recipes import METHODS, OPTIMIZERS, Settings
from common.setup import Setup, mean_and_spread, parse, text_table

PANELS = [(network, optimizer) for optimizer in ("adamw", "sgdm") for network in ("vgg16", "resnet18")]
SMOOTHING = {"adamw": 0.0, "sgdm": 0.6}  # the paper smooths the curves of SGDM


def points(setup: Setup, optimizer: str) -> list[tuple[str, dict[str, Any]]]:
    """The methods with what they change: no decay, then lambda, then tau."""
    decays = [("wd", {"weight_decay": value}) for value in setup.recipe.decay_sweep[optimizer]]
    taus = [("wrs", {"tau": value}) for value in setup.recipe.tau_sweep]
    return [("off", {}), *decays, *taus]


def runs_of(setup: Setup, network: str, optimizer: str, method: str, changes: dict[str, Any]) -> list[Settings]:
    """One point, with all seeds."""
    return [setup.settings(network, optimizer, method, seed, **changes) for seed in setup.seeds(network)]


def accuracies(setup: Setup) -> list[dict[str, Any]]:
    """A row for each point."""
    rows = []
    for network, optimizer in PANELS:
        for method, changes in points(setup, optimizer):
            found = [setup.runs.final(s) for s in runs_of(setup, network, optimizer, method, changes)]
            mean, spread = mean_and_spread(found)
            rows.append({
                "network": network, "optimizer": OPTIMIZERS[optimizer], "method": METHODS[method],
                "value": next(iter(changes.values()), None), "test_accuracy": mean, "standard_deviation": spread,
                "seeds": len(found), "of_each_seed": " ".join(f"{value:.2f}" for value in found),
            })  # fmt: skip
    return rows


def growth(setup: Setup, settings: Settings) -> float:
    """How much the effective gradient norm grows between the first two divisions of the learning rate.

    The mean over the last third of that time over the mean over the first third.
    """
    epochs, values = effective(setup, settings, smooth=False)
    first, second = settings.milestones[:2]
    third = (second - first) / 3
    start = [v for e, v in zip(epochs, values, strict=True) if first < e <= first + third]
    end = [v for e, v in zip(epochs, values, strict=True) if second - third < e <= second]
    return sum(end) / len(end) / (sum(start) / len(start)) if start and end else math.nan


def summary(setup: Setup, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each panel the best mean of WD and of WRS, the range of the means over the sweep, and how gradients grow."""
    found = []
    for network, optimizer in PANELS:
        row: dict[str, Any] = {"network": network, "optimizer": OPTIMIZERS[optimizer]}
        for method in ("off", "wd", "wrs"):
            key = network, OPTIMIZERS[optimizer], METHODS[method]
            some = [r["test_accuracy"] for r in rows if (r["network"], r["optimizer"], r["method"]) == key]
            row[f"best_{method}"] = max(some)
            if method != "off":
                row[f"range_{method}"] = max(some) - min(some)
            run = runs_of(setup, network, optimizer, *default(setup, optimizer, method))[0]
            row[f"growth_{method}"] = growth(setup, run)
        found.append(row)
    return found


def default(setup: Setup, optimizer: str, method: str) -> tuple[str, dict[str, Any]]:
    """The point of the sweep that the recipe stands for, or the nearest to it."""
    key, wanted = {
        "off": ("", 0.0),
        "wd": ("weight_decay", setup.recipe.weight_decay[optimizer]),
        "wrs": ("tau", setup.recipe.tau),
    }[method]
    some = [point for point in points(setup, optimizer) if point[0] == method]
    return min(some, key=lambda point: abs(point[1].get(key, 0.0) - wanted))


def effective(setup: Setup, settings: Settings, smooth: bool = True) -> tuple[list[float], list[float]]:
    """Epochs, and the norm of the gradient (AdamW: of the step) over that of the weights, of the watched layer."""
    result, per_epoch = setup.runs[settings]["measured"], setup.runs[settings]["steps"] / settings.epochs
    key = "update_norm" if settings.optimizer == "adamw" else "grad_norm"
    kept = [r for r in result if r["norm_before"] and r[key] is not None]
    values = [r[key] / r["norm_before"] for r in kept]
    decay = SMOOTHING[settings.optimizer] if smooth else 0.0
    return [r["step"] / per_epoch for r in kept], plots.smoothed(values, decay)


def gradients(setup: Setup) -> list[dict[str, Any]]:
    """A row for each step that was measured, of seed 0."""
    return [
        {
            "network": network, "optimizer": OPTIMIZERS[optimizer], "method": METHODS[method],
            "value": next(iter(changes.values()), None), "epoch": epoch, "effective_gradient_norm": value,
        }
        for network, optimizer in PANELS
        for method, changes in points(setup, optimizer)
        for epoch, value in zip(
            *effective(setup, runs_of(setup, network, optimizer, method, changes)[0]), strict=True
        )
    ]  # fmt: skip


def draw_gradients(setup: Setup, panel: Any, network: str, optimizer: str) -> None:
    """No decay, two sizes of lambda around the default, WRS with the default tau."""
    sweep = setup.recipe.decay_sweep[optimizer]
    shown: list[tuple[str, dict[str, Any], str]] = [("off", {}, "-")]
    shown += [("wd", {"weight_decay": v}, style) for v, style in zip(sweep[1:3], ("-", "--"), strict=False)]
    shown.append((*default(setup, optimizer, "wrs"), "-"))
    for method, changes, style in shown:
        settings = runs_of(setup, network, optimizer, method, changes)[0]
        value = f" $\\lambda$={settings.weight_decay:g}" if method == "wd" else ""
        value = f" $\\tau$={settings.tau}" if method == "wrs" else value
        color = plots.COLORS[method]
        panel.plot(*effective(setup, settings), color=color, linestyle=style, label=METHODS[method] + value)
    plots.milestones(panel, setup.settings(network, optimizer, "off", 0).milestones)
    what = "step norm / weight norm" if optimizer == "adamw" else "gradient norm / weight norm"
    panel.set(title=f"(a) {setup.scale(network)}, {OPTIMIZERS[optimizer]}", xlabel="epoch", ylabel=what, yscale="log")
    panel.legend(fontsize=7)


def draw_accuracies(panel: Any, rows: list[dict[str, Any]], title: str) -> None:
    """Lambda on the lower axis, tau on the upper one."""

    def of(method: str) -> tuple[list[float], list[float], list[float]]:
        some = [row for row in rows if row["method"] == METHODS[method]]
        return (
            [r["value"] for r in some],
            [r["test_accuracy"] for r in some],
            [r["standard_deviation"] or 0 for r in some],
        )

    decays, values, errors = of("wd")
    panel.errorbar(decays, values, errors, marker="o", color=plots.COLORS["wd"], label="WD", capsize=2)
    panel.set(xscale="log", xlabel="$\\lambda$ of WD", ylabel="test accuracy (%)")
    panel.set_title(title, pad=10)
    (off,) = [row["test_accuracy"] for row in rows if row["method"] == METHODS["off"]]
    panel.axhline(off, color=plots.COLORS["off"], linestyle=":", label="no decay")
    above = panel.twiny()
    taus, values, errors = of("wrs")
    places = range(len(taus))
    above.errorbar(places, values, errors, marker="s", color=plots.COLORS["wrs"], label="WRS", capsize=2)
    above.set_xticks(list(places), [str(tau) for tau in taus])
    above.set_xlabel("$\\tau$ of WRS (steps)")
    lines = [*panel.get_legend_handles_labels()[0], *above.get_legend_handles_labels()[0]]
    panel.legend(lines, ["no decay", "WD", "WRS"][: len(lines)], fontsize=7, loc="lower left")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    setup = parse(__doc__, arguments)
    grid = [s for panel in PANELS for point in points(setup, panel[1]) for s in runs_of(setup, *panel, *point)]
    setup.runs.train(grid, "Fig. 2")
    rows = accuracies(setup)
    short = summary(setup, rows)
    for name, part in (("fig2a.csv", gradients(setup)), ("fig2b.csv", rows), ("fig2_summary.csv", short)):
        setup.write(name, part)
    print(text_table(short))
    figure, axes = plots.panels(2, len(PANELS), width=3.9)
    for k, (network, optimizer) in enumerate(PANELS):
        draw_gradients(setup, axes[0][k], network, optimizer)
        some = [r for r in rows if (r["network"], r["optimizer"]) == (network, OPTIMIZERS[optimizer])]
        draw_accuracies(axes[1][k], some, f"(b) {setup.scale(network)}, {OPTIMIZERS[optimizer]}")
    plots.save(figure, setup, "fig2.png", "(b) bars: standard deviation over seeds")


if __name__ == "__main__":
    main()
