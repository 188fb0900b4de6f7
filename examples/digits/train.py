"""Trains a small convolutional network on scikit-learn's digits with weight decay, WRS, WRS(IC) and AWS.

    python examples/digits/train.py [--seeds 3] [--epochs 15] [--backend auto] [--out examples/digits/out]

Writes digits.png (accuracy curves, norms of one layer's channels), table.txt and results.json to --out.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import report
import timing
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

import fastwrs

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (fastwrs.AdamW, {"lr": 1e-2}),
    "SGD": (fastwrs.SGD, {"lr": 0.3, "momentum": 0.9}),
}
METHODS = ("WD", "WRS", "WRS(IC)", "AWS")
DECAY = {"AdamW": 0.05, "SGD": 1e-3}
SHRINK = {"AdamW": 0.02, "SGD": 5e-4}
BATCH = 128


@dataclass
class Run:
    """What one training run leaves behind."""

    optimizer: str
    method: str
    seed: int
    accuracy: list[float] = field(default_factory=list)
    """Test accuracy in percent after each epoch."""
    norms: list[list[float]] = field(default_factory=list)
    """The norms of the watched layer's groups, before the first step and after each epoch."""


def make_model() -> nn.Sequential:
    """Three convolutions, each with BatchNorm, so that the scale of their weights does not change the function."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    layers = [*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 64)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def watched(model: nn.Sequential) -> nn.Parameter:
    """The weight whose norms are plotted: the second convolution's."""
    weight = model[3].weight
    assert isinstance(weight, nn.Parameter)
    return weight


def make_groups(model: nn.Module, optimizer: str, method: str) -> list[dict[str, Any]]:
    """The parameters by method: decay for all, or Algorithm 1's groups with rescaled or shrunk weights."""
    decay = DECAY[optimizer]
    if method == "WD":
        return [{"params": list(model.parameters()), "weight_decay": decay}]
    if method == "AWS":
        shrink = fastwrs.Shrink(SHRINK[optimizer])
        return fastwrs.param_groups(model, rescale=None, shrink=shrink, weight_decay=decay)
    rescale = fastwrs.Rescale(axis="in" if method == "WRS(IC)" else "out")
    return fastwrs.param_groups(model, rescale=rescale, weight_decay=decay)


def make_optimizer(model: nn.Module, name: str, method: str, backend: str) -> torch.optim.Optimizer:
    """The optimizer, its rescaled weights projected once, so that the first step starts from norm 1."""
    kind, options = OPTIMIZERS[name]
    optimizer = kind(make_groups(model, name, method), backend=backend, **options)
    for group in optimizer.param_groups:
        if group["rescale"] is not None:
            fastwrs.rescale_(group["params"], axis=group["rescale"].axis, target=group["rescale"].target)
    return optimizer


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels: the real scans that scikit-learn ships."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=500, random_state=0, stratify=labels)
    x, x_test = ((torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) - 8) / 6 for part in parts[:2])
    y, y_test = (torch.tensor(part) for part in parts[2:])
    return x, y, x_test, y_test


def evaluate(model: nn.Module, data: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
    """Test accuracy in percent, with BatchNorm's statistics taken anew: rescaling leaves the running ones stale."""
    x, _, x_test, y_test = data
    update_bn(x.split(BATCH), model)
    model.eval()
    with torch.no_grad():
        hits = model(x_test).argmax(1) == y_test
    model.train()
    return 100 * hits.float().mean().item()


def train(run: Run, epochs: int, backend: str, data: tuple[Tensor, Tensor, Tensor, Tensor], bar: tqdm) -> None:
    """One run. The seed fixes the initial weights and the order of the images."""
    torch.manual_seed(run.seed)
    model = make_model()
    optimizer = make_optimizer(model, run.optimizer, run.method, backend)
    x, y = data[:2]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // BATCH))
    axis = "in" if run.method == "WRS(IC)" else "out"
    for epoch in range(epochs + 1):
        if epoch:
            for batch in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
                schedule.step()
            run.accuracy.append(evaluate(model, data))
            bar.update()
        run.norms.append(fastwrs.channel_norms([watched(model)], axis=axis)[0].flatten().tolist())


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs per optimizer and method")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--backend", default="auto", help="a backend of fastwrs.backends()")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.epochs < 1:
        parser.error("--seeds and --epochs must be at least 1")

    data = load_data()
    start = time.perf_counter()
    runs = [Run(name, method, seed) for name in OPTIMIZERS for method in METHODS for seed in range(options.seeds)]
    torch.set_num_threads(1)  # the network is so small that a second thread only waits
    with tqdm(total=len(runs) * options.epochs, unit="epoch") as bar:
        for run in runs:
            bar.set_description(f"{run.optimizer} {run.method} seed {run.seed}")
            train(run, options.epochs, options.backend, data, bar)
    print("timing the optimizers' steps ...", flush=True)
    times = {
        (name, method): timing.compare(make_model, name, method, options.backend)
        for name in OPTIMIZERS
        for method in METHODS
    }

    options.out.mkdir(parents=True, exist_ok=True)
    table = report.table(runs, times)
    (options.out / "table.txt").write_text(table + "\n", encoding="utf-8")
    (options.out / "results.json").write_text(json.dumps([vars(run) for run in runs]), encoding="utf-8")
    report.plot(runs, options.out / "digits.png")
    print(f"\n{table}\n\n{time.perf_counter() - start:.0f} s; plot and table are in {options.out}")


if __name__ == "__main__":
    main()
