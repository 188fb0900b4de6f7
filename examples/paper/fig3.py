"""Fig. 3 of the WRS paper: the norms of weights in front of BatchNorm, with and without decay.

    python examples/paper/fig3.py [--data cifar10 --root DIR] [--help]

(a) A perceptron with a learning rate of 1e-6, where training is close to the flow that Lemma 3.1 and Corollary 3.2 are
about: without decay the norms stay, with decay they follow exp(-lambda * lr * t). The changes are smaller than what
fp32 can hold, so this one is trained in fp64. (b) VGG16 with SGDM, each line the norm of an output channel of the 2nd
convolution. Writes fig3a.csv, fig3b.csv and fig3.png.
"""

from __future__ import annotations

import math
from typing import Any

from common import plots
from common.recipes import METHODS, Settings
from common.setup import Setup, parse, text_table
from fig1_fig6 import run as long_run

LEARNING_RATE, DECAY = 1e-6, 5e-4
SHOWN = ("off", "wd")


def perceptron(setup: Setup, method: str) -> Settings:
    """The run of (a)."""
    decay = DECAY if method == "wd" else 0.0
    slow = {"lr": LEARNING_RATE, "weight_decay": decay, "milestones": (), "dtype": "float64"}
    return setup.settings("mlp", "sgd", method, 0, **slow, keep_norms=True, evaluate_every=1, augment=False)


def changes(setup: Setup, method: str) -> list[dict[str, Any]]:
    """For each epoch, over the channels: the change of the norm relative to the first one, and what is predicted."""
    settings = perceptron(setup, method)
    epochs, per_epoch = setup.runs[settings]["epochs"], setup.runs[settings]["steps"] / settings.epochs
    first, rows = epochs[0]["norms"], []
    for epoch in epochs:
        relative = [norm / start - 1 for norm, start in zip(epoch["norms"], first, strict=True)]
        flow = math.expm1(-settings.weight_decay * settings.lr * epoch["epoch"] * per_epoch)
        rows.append({
            "method": METHODS[method], "step": round(epoch["epoch"] * per_epoch), "smallest_change": min(relative),
            "greatest_change": max(relative), "predicted_change": flow,
        })  # fmt: skip
    return rows


def norms(setup: Setup, method: str) -> list[dict[str, Any]]:
    """The norms of (b): a row for each epoch and channel."""
    return [
        {"method": METHODS[method], "epoch": epoch["epoch"], "channel": k, "norm": norm}
        for epoch in setup.runs[long_run(setup, ("vgg16", method, "all"), 0)]["epochs"]
        for k, norm in enumerate(epoch["norms"])
    ]


def draw_perceptron(panel: Any, rows: list[dict[str, Any]]) -> None:
    """The changes as bands, the predictions as dashes."""
    for method in SHOWN:
        some = [row for row in rows if row["method"] == METHODS[method]]
        steps, color = [row["step"] for row in some], plots.COLORS[method]
        low, high, flow = (
            [row[key] for row in some] for key in ("smallest_change", "greatest_change", "predicted_change")
        )
        panel.fill_between(steps, low, high, color=color, alpha=0.3, label=f"{METHODS[method]}: all channels")
        panel.plot(steps, flow, "--", color=color, label=f"{METHODS[method]}: predicted")
    panel.set(xlabel="step", ylabel="change of the norm, relative", title=f"(a) MLP, SGD, lr {LEARNING_RATE:g}")
    panel.legend(fontsize=8)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    setup = parse(__doc__, arguments)
    grid = [perceptron(setup, method) for method in SHOWN]
    grid += [long_run(setup, ("vgg16", method, "all"), 0) for method in SHOWN]
    setup.runs.train(grid, "Fig. 3")
    rows = [row for method in SHOWN for row in changes(setup, method)]
    channels = [row for method in SHOWN for row in norms(setup, method)]
    setup.write("fig3a.csv", rows)
    setup.write("fig3b.csv", channels)
    print(text_table([rows[len(rows) // 2 - 1], rows[-1]]))
    figure, axes = plots.panels(1, 3)
    draw_perceptron(axes[0][0], rows)
    top = 1.05 * max(row["norm"] for row in channels)
    for k, method in enumerate(SHOWN):
        panel = axes[0][1 + k]
        some = [row for row in channels if row["method"] == METHODS[method]]
        for channel in dict.fromkeys(row["channel"] for row in some):
            line = [(row["epoch"], row["norm"]) for row in some if row["channel"] == channel]
            panel.plot(*zip(*line, strict=True), color=plots.COLORS[method], linewidth=0.9)
        settings = long_run(setup, ("vgg16", method, "all"), 0)
        plots.milestones(panel, settings.milestones)
        decay = f", $\\lambda$={settings.weight_decay:g}" if method == "wd" else ""
        panel.set(title=f"(b{k + 1}) {setup.scale('vgg16')}, {METHODS[method]}{decay}", ylim=(0, top))
        panel.set(xlabel="epoch", ylabel="norm of an output channel")
    plots.save(figure, setup, "fig3.png", "(b) dashed: the learning rate is divided by 10")


if __name__ == "__main__":
    main()
