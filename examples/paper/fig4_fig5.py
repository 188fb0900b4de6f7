"""Figs. 4 and 5 of the WRS paper: the shape of the weights' distribution, as they are and in their input space.

    python examples/paper/fig4_fig5.py [--data cifar10 --root DIR] [--help]

A generalized Gaussian is fitted to all weights of a convolution of VGG16 (SGDM): beta is 2 for a Gaussian, 1 for a
Laplacian, less the sparser. Input space projection (ISP) takes the weights in the eigenbasis of the covariance of their
inputs, Eq. 12. Fig. 4a: the 6th and 9th convolution over the epochs. Fig. 4b: all convolutions at the end. Fig. 5: the
6th after ISP. Writes fig4.csv, fig5.csv, fig4.png and fig5.png.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from common import data as data_sets
from common import plots
from common.models import norm_weights
from common.recipes import METHODS, Settings
from common.runs import data_of
from common.setup import Setup, parse, text_table
from common.train import make_model, weights_file
from fig1_fig6 import run as long_run
from tqdm import tqdm

import fastwrs

COMPARED = ("off", "wrs", "wd")
LAYERS = (5, 8)  # the 6th and the 9th
SPACES = {"ISP": "-", "parameters": "--"}
BINS = 41


def run(setup: Setup, method: str) -> Settings:
    """The run that is looked into; Fig. 6a has it too."""
    return long_run(setup, ("vgg16", method, "all"), 0)


class Weights:
    """The convolutions of a run after an epoch, as they are and after ISP."""

    def __init__(self, setup: Setup, method: str, epoch: int, images: Any) -> None:
        settings, device = run(setup, method), torch.device(setup.device)
        self.model = make_model(settings, images).to(device)
        file = weights_file(setup.runs.folder / settings.name, epoch)
        self.model.load_state_dict(torch.load(file, weights_only=True, map_location=device))
        self.names = [name.removesuffix(".weight") for name, _ in norm_weights(self.model)]
        self.batches = [data_sets.scaled(x).to(device) for x in images.train.x.split(100)]

    def of(self, layers: tuple[int, ...]) -> dict[int, dict[str, torch.Tensor]]:
        """By layer and space."""
        names = [self.names[k] for k in layers]
        projected = fastwrs.analysis.input_projection(self.model, self.batches, layers=names)
        plain = dict(norm_weights(self.model))
        return {
            k: {"ISP": projected[name], "parameters": plain[f"{name}.weight"].detach()}
            for k, name in zip(layers, names, strict=True)
        }


def shapes(setup: Setup) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of Fig. 4, beta by method, epoch, layer and space; and of Fig. 5, a row for each bin."""
    first = run(setup, "wd")
    images = data_of(first, setup.runs.root)
    epochs = first.keep_weights
    rows, bins = [], []
    for method, epoch in tqdm([(m, e) for m in COMPARED for e in epochs], desc="projections"):
        weights = Weights(setup, method, epoch, images)
        layers = tuple(range(len(weights.names))) if epoch == epochs[-1] else LAYERS
        for layer, found in weights.of(layers).items():
            fits = {space: fastwrs.analysis.generalized_gaussian_fit(values) for space, values in found.items()}
            rows += [
                {"method": METHODS[method], "epoch": epoch, "layer": layer + 1, "space": space, "beta": fit.beta}
                for space, fit in fits.items()
            ]
            if layer == LAYERS[0]:
                bins += histogram(method, epoch, found["ISP"], fits["ISP"])
    return rows, bins


def histogram(method: str, epoch: int, values: torch.Tensor, fit: Any) -> list[dict[str, Any]]:
    """The density of the weights over their standard deviation."""
    scaled = (values - values.mean()).flatten().cpu().numpy() / values.std().item()
    density, edges = np.histogram(scaled, bins=BINS, range=(-4, 4), density=True)
    centres = (edges[1:] + edges[:-1]) / 2
    return [
        {"method": METHODS[method], "epoch": epoch, "beta": fit.beta, "weight_over_deviation": x, "density": y}
        for x, y in zip(map(float, centres), map(float, density), strict=True)
    ]


def plot_betas(setup: Setup, rows: list[dict[str, Any]]) -> None:
    """Fig. 4: over epochs for two layers, over layers in the two spaces."""
    figure, axes = plots.panels(1, 4)
    last = max(row["epoch"] for row in rows)
    for method in COMPARED:
        mine = [row for row in rows if row["method"] == METHODS[method]]
        for panel, layer in zip(axes[0][:2], LAYERS, strict=True):
            for space, style in SPACES.items():
                line = [(r["epoch"], r["beta"]) for r in mine if (r["layer"], r["space"]) == (layer + 1, space)]
                label = f"{METHODS[method]}, {space}"
                panel.plot(*zip(*line, strict=True), style, color=plots.COLORS[method], marker=".", label=label)
        for panel, space in zip(axes[0][2:], SPACES, strict=True):
            line = [(r["layer"], r["beta"]) for r in mine if (r["epoch"], r["space"]) == (last, space)]
            panel.plot(*zip(*line, strict=True), color=plots.COLORS[method], marker="o", label=METHODS[method])
    for k, (panel, layer) in enumerate(zip(axes[0][:2], LAYERS, strict=True)):
        panel.set(
            title=f"(a{k + 1}) convolution {layer + 1}", xlabel="epoch", ylabel="$\\beta$ of the generalized Gaussian"
        )
        plots.milestones(panel, run(setup, "wd").milestones)
        low, high = panel.get_ylim()
        panel.set_ylim(low, high + 0.45 * (high - low))  # room for the legend
        panel.legend(fontsize=7, ncols=2, loc="upper center", handlelength=3)
    for k, (panel, space) in enumerate(zip(axes[0][2:], SPACES, strict=True)):
        panel.set(title=f"(b{k + 1}) at the end, {space}", xlabel="convolution", ylabel="$\\beta$")
        panel.legend(fontsize=8)
    figure.suptitle(f"Fig. 4: {setup.scale('vgg16')}, SGDM")
    plots.save(figure, setup, "fig4.png", "dashed vertical: the learning rate is divided by 10")


def plot_histograms(setup: Setup, bins: list[dict[str, Any]]) -> None:
    """Fig. 5: a row for each method, a column for some epochs."""
    epochs = run(setup, "wd").keep_weights
    shown = [epochs[round(k * (len(epochs) - 1) / 3)] for k in range(4)] if len(epochs) >= 4 else list(epochs)
    figure, axes = plots.panels(len(COMPARED), len(shown), width=3, height=2.3)
    for line, method in zip(axes, COMPARED, strict=True):
        for panel, epoch in zip(line, shown, strict=True):
            some = [row for row in bins if (row["method"], row["epoch"]) == (METHODS[method], epoch)]
            x, y = ([row[key] for row in some] for key in ("weight_over_deviation", "density"))
            panel.fill_between(x, y, 1e-9, step="mid", color=plots.COLORS[method], alpha=0.7)
            gaussian = np.exp(-np.square(x) / 2) / np.sqrt(2 * np.pi)
            panel.plot(x, gaussian, ":", color="black", linewidth=1)
            panel.text(0.97, 0.9, f"$\\beta$ = {some[0]['beta']:.2f}", transform=panel.transAxes, ha="right", va="top")
            panel.set(title=f"{METHODS[method]}, epoch {epoch}", ylim=(1e-3, 2), yscale="log")
            panel.set_xlabel("weight / deviation", fontsize=8)
            panel.set_ylabel("density", fontsize=8)
    figure.suptitle(f"Fig. 5: {setup.scale('vgg16')}, SGDM, convolution {LAYERS[0] + 1} after ISP")
    plots.save(figure, setup, "fig5.png", "dotted: a Gaussian (beta 2)")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    setup = parse(__doc__, arguments)
    setup.runs.train([run(setup, method) for method in COMPARED], "Figs. 4 and 5")
    rows, bins = shapes(setup)
    setup.write("fig4.csv", rows)
    setup.write("fig5.csv", bins)
    last = max(row["epoch"] for row in rows)
    print(text_table([row for row in rows if row["epoch"] == last and row["layer"] - 1 in LAYERS]))
    plot_betas(setup, rows)
    plot_histograms(setup, bins)


if __name__ == "__main__":
    main()
