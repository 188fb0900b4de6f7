"""Fig. 2 of the WRS paper: effective gradient norms, and how much depends on lambda (WD) and on tau (WRS).

    python examples/paper/fig2.py [--data cifar10 --root DIR] [--help]

(a) The gradient norm over the weight norm of VGG16's 2nd and ResNet-18's 3rd convolution; with AdamW that of the step
m-hat / (sqrt(v-hat) + eps) instead of the gradient's. (b) Final test accuracy. Writes fig2a.csv (every step that was
measured), fig2a_summary.csv, fig2b.csv, fig2b_summary.csv and fig2.png. The CSV files have raw values of all seeds; the
plot smooths the curves of SGDM, as the paper's does: e <- 0.6 e + 0.4 value.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from common import plots
from common.recipes import METHODS, OPTIMIZERS, Settings
from common.setup import Setup, mean_and_spread, parse, text_table

PANELS = [(network, optimizer) for optimizer in ("adamw", "sgdm") for network in ("vgg16", "resnet18")]
SMOOTHING = {"adamw": 0.0, "sgdm": 0.6}  # the paper smooths the curves of SGDM
LEGEND_ROOM = 0.3  # so much of the logarithmic axis above the curves


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


def mean_between(curve: dict[float, float], first: float, last: float) -> float | None:
    """The mean over the epochs from ``first``, which is not among them, to ``last``; None if no step was measured."""
    values = [value for epoch, value in curve.items() if first < epoch <= last]
    return statistics.mean(values) if values else None


def level(setup: Setup, settings: Settings) -> float | None:
    """The mean effective gradient norm after the first division of the learning rate."""
    return mean_between(effective(setup, settings), settings.milestones[0], settings.epochs)


def growth(setup: Setup, settings: Settings) -> float | None:
    """How much the effective gradient norm grows between the first two divisions of the learning rate.

    The mean over the last third of that time over the mean over the first third; None where there are no steps, or
    where the gradients of the first third have vanished.
    """
    curve, (first, second) = effective(setup, settings), settings.milestones[:2]
    third = (second - first) / 3
    start, end = mean_between(curve, first, first + third), mean_between(curve, second - third, second)
    return end / start if start and end is not None else None


def trend(setup: Setup, settings: Settings) -> float | None:
    """The correlation of the effective gradient norm with the epoch after the first division of the learning rate."""
    later = {e: v for e, v in effective(setup, settings).items() if e > settings.milestones[0]}
    return statistics.correlation(list(later), list(later.values())) if len(set(later.values())) > 1 else None


FIGURES: dict[str, Callable[[Setup, Settings], float | None]] = {
    "first_epoch": lambda setup, settings: mean_between(effective(setup, settings), 0, 1),
    "level": level,
    "growth": growth,
    "trend": trend,
}


def gradient_summary(setup: Setup) -> list[dict[str, Any]]:
    """A row for each point: what its curves do, with the mean and the standard deviation over seeds of each figure."""
    rows = []
    for network, optimizer in PANELS:
        for method, changes in points(setup, optimizer):
            runs = runs_of(setup, network, optimizer, method, changes)
            row: dict[str, Any] = {
                "network": network, "optimizer": OPTIMIZERS[optimizer], "method": METHODS[method],
                "value": next(iter(changes.values()), None), "seeds": len(runs),
                "default": int((method, changes) == default(setup, optimizer, method)),
            }  # fmt: skip
            for name, figure in FIGURES.items():
                found = [value for settings in runs if (value := figure(setup, settings)) is not None]
                mean, spread = mean_and_spread(found) if len(found) == len(runs) else (None, None)
                row |= {name: mean, f"{name}_standard_deviation": spread}
            rows.append(row)
    return rows


def accuracy_summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each panel the best mean of WD and of WRS, and the range of the means over the sweep.

    That of WD also without its greatest lambda, with which nothing may be learnt any more.
    """
    found = []
    for network, optimizer in PANELS:
        row: dict[str, Any] = {"network": network, "optimizer": OPTIMIZERS[optimizer]}
        for method in ("off", "wd", "wrs"):
            key = network, OPTIMIZERS[optimizer], METHODS[method]
            some = [r["test_accuracy"] for r in rows if (r["network"], r["optimizer"], r["method"]) == key]
            row[f"best_{method}"] = max(some)
            if method != "off":
                row[f"range_{method}"] = max(some) - min(some)
            if method == "wd":
                row["range_wd_without_greatest"] = max(some[:-1]) - min(some[:-1]) if len(some) > 1 else None
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


def effective(setup: Setup, settings: Settings) -> dict[float, float]:
    """By epoch the norm of the gradient (AdamW: of the step) over that of the weights, of the watched layer."""
    result, per_epoch = setup.runs[settings]["measured"], setup.runs[settings]["steps"] / settings.epochs
    key = "update_norm" if settings.optimizer == "adamw" else "grad_norm"
    kept = [r for r in result if r["norm_before"] and r[key] is not None]
    return {r["step"] / per_epoch: r[key] / r["norm_before"] for r in kept}


def gradients(setup: Setup) -> list[dict[str, Any]]:
    """A row for each step that was measured, of all seeds, not smoothed."""
    return [
        {
            "network": network, "optimizer": OPTIMIZERS[optimizer], "method": METHODS[method],
            "value": next(iter(changes.values()), None), "seed": settings.seed, "epoch": epoch,
            "effective_gradient_norm": value,
        }
        for network, optimizer in PANELS
        for method, changes in points(setup, optimizer)
        for settings in runs_of(setup, network, optimizer, method, changes)
        for epoch, value in effective(setup, settings).items()
    ]  # fmt: skip


def draw_gradients(setup: Setup, panel: Any, network: str, optimizer: str) -> None:
    """No decay, two sizes of lambda around the default, WRS with the default tau."""
    sweep = setup.recipe.decay_sweep[optimizer]
    shown: list[tuple[str, dict[str, Any], str]] = [("off", {}, "-")]
    shown += [("wd", {"weight_decay": v}, style) for v, style in zip(sweep[1:3], ("-", "--"), strict=False)]
    shown.append((*default(setup, optimizer, "wrs"), "-"))
    for method, changes, style in shown:
        runs = runs_of(setup, network, optimizer, method, changes)
        value = f" $\\lambda$={runs[0].weight_decay:g}" if method == "wd" else ""
        value = f" $\\tau$={runs[0].tau}" if method == "wrs" else value
        found = [effective(setup, settings) for settings in runs]
        epochs = [epoch for epoch in found[0] if all(epoch in one for one in found)]
        values = [plots.smoothed([one[epoch] for epoch in epochs], SMOOTHING[optimizer]) for one in found]
        plots.curves(panel, epochs, values, color=plots.COLORS[method], linestyle=style, label=METHODS[method] + value)
    plots.milestones(panel, setup.settings(network, optimizer, "off", 0).milestones)
    what = "step norm / weight norm" if optimizer == "adamw" else "gradient norm / weight norm"
    panel.set(title=f"(a) {setup.scale(network)}, {OPTIMIZERS[optimizer]}", xlabel="epoch", ylabel=what, yscale="log")
    low, high = panel.get_ylim()
    panel.set_ylim(low, high * (high / low) ** LEGEND_ROOM)
    panel.legend(fontsize=7, ncols=2, loc="upper center")


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
    curves, short = gradient_summary(setup), accuracy_summary(rows)
    setup.write("fig2a.csv", gradients(setup))
    setup.write("fig2a_summary.csv", curves)
    setup.write("fig2b.csv", rows)
    setup.write("fig2b_summary.csv", short)
    means = [{key: value for key, value in row.items() if not key.endswith("deviation")} for row in curves]
    print(f"{text_table(means)}\n\n{text_table(short)}")
    figure, axes = plots.panels(2, len(PANELS), width=3.9)
    for k, (network, optimizer) in enumerate(PANELS):
        draw_gradients(setup, axes[0][k], network, optimizer)
        some = [r for r in rows if (r["network"], r["optimizer"]) == (network, OPTIMIZERS[optimizer])]
        draw_accuracies(axes[1][k], some, f"(b) {setup.scale(network)}, {OPTIMIZERS[optimizer]}")
    note = "(a) mean, least and greatest over seeds, SGDM as a moving average; (b) bars: standard deviation over seeds"
    plots.save(figure, setup, "fig2.png", note)


if __name__ == "__main__":
    main()
