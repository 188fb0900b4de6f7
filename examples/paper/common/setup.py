"""The command line that all scripts share, and what it makes: the recipe, the runs, the files that are written."""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import fastwrs

from . import data as data_sets
from . import recipes
from .models import NAMES
from .recipes import Recipe, Settings
from .runs import Runs
from .train import replaced

OUT = Path(__file__).resolve().parents[1] / "out"


@dataclass(frozen=True)
class Setup:
    """What a script has to do with."""

    data: str
    recipe: Recipe
    runs: Runs
    out: Path
    backend: str
    device: str

    def settings(self, network: str, optimizer: str, method: str, seed: int, **changes: Any) -> Settings:
        """A run of the recipe, on the device and the backend of the command line."""
        where = {"backend": self.backend, "device": self.device}
        return recipes.settings(self.recipe, self.data, network, optimizer, method, seed, **where, **changes)

    def seeds(self, network: str) -> range:
        """The seeds that a network is trained with."""
        return range(self.recipe.seeds.get(network, 1))

    def scale(self, network: str) -> str:
        """In one line how large a network and its data are, for the titles of plots."""
        width = self.recipe.width.get(network, 1)
        cut = "" if width == 1 else f" (width 1/{1 / width:.0f})" if width < 1 else f" (width x {width:g})"
        return f"{NAMES[network]}{cut}"

    def note(self) -> str:
        """What the data are and how they were cut down."""
        recipe, parts = self.recipe, [data_sets.TITLES[self.data]]
        if self.data == "digits":
            parts.append("upsampled from 8 x 8 to 32 x 32")
        parts.append(f"{recipe.train_images or 'all'} training images")
        if recipe.label_noise:
            parts.append(f"{recipe.label_noise:.0%} of their labels drawn anew")
        parts.append(f"batches of {recipe.batch}")
        return ", ".join(parts)

    def write(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes a CSV file, with the keys of the first row as header."""
        path = self.out / name
        with replaced(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: _plain(value) for key, value in row.items()} for row in rows)
        print(f"wrote {path}")


def parse(description: str | None, arguments: list[str] | None = None, parts: int = 1) -> Setup:
    """Reads the command line. Says what is missing and exits where a data set is not there.

    ``parts``: the script trains on the classes in so many parts, each by itself.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=data_sets.NAMES, default="digits", help="digits is the small size")
    parser.add_argument("--root", type=Path, help="the folder with the files of the data set")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="runs to go on with, and results in a folder for each recipe"
    )
    parser.add_argument("--backend", default="auto", help="a backend of fastwrs.backends()")
    parser.add_argument("--device", default="auto", help="cpu, cuda, ...; auto takes a GPU when there is one")
    parser.add_argument("--jobs", type=int, help="runs side by side (default: one a core, on a GPU one)")
    parser.add_argument("--seeds", type=int, help="how many for each network (default: those of the recipe)")
    parser.add_argument("--epochs", type=int, help="of all networks; the schedule keeps its proportions")
    parser.add_argument("--width", type=float, help="of all convolutional networks; 1 is the paper's")
    parser.add_argument("--train-images", type=int, help="so many of the training images")
    parser.add_argument("--tiny", action="store_true", help="only to see that the script runs: nothing is learnt")
    options = parser.parse_args(arguments)
    if why := data_sets.why_missing(options.data, options.root):
        parser.exit(1, f"{why}\n")
    recipe, variant = recipes.of(options.data), options.data
    if options.tiny:
        recipe, variant = recipes.tiny(recipe), f"{variant}-tiny"
    for name in ("seeds", "epochs", "width", "train_images", "jobs"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be > 0 and finite, got {value}")
        if value is not None and name != "jobs":
            variant += f"-{name.replace('_', '-')}-{value:g}"  # results of other recipes are not to be mixed up
    for name in ("seeds", "epochs", "width"):
        if (value := getattr(options, name)) is not None:
            recipe = replace(recipe, **{name: dict.fromkeys(getattr(recipe, name), value)})
    if options.epochs is not None:
        recipe = replace(recipe, perceptron_epochs=options.epochs)
    if options.train_images is not None:
        recipe = replace(recipe, train_images=options.train_images)
    gpu = "cuda" if torch.cuda.is_available() else "cpu"
    device = gpu if options.device == "auto" else options.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {device}: {error}")
    if options.backend != "auto" and (why := fastwrs.backends().get(options.backend, "there is no such backend")):
        parser.error(f"--backend {options.backend}: {why}; there are auto, {', '.join(fastwrs.backends())}")
    images = recipe.train_images, recipe.test_images
    if why := data_sets.why_not(options.data, options.root, *images, recipe.batch, parts):
        given = "" if options.train_images else " (the recipe's)"
        parser.error(f"--train-images {recipe.train_images}{given}: {why}")
    out = options.out / variant
    out.mkdir(parents=True, exist_ok=True)
    jobs = options.jobs or (len(os.sched_getaffinity(0)) if device == "cpu" else 1)
    setup = Setup(
        options.data, recipe, Runs(options.out / options.data, options.root, jobs), out, options.backend, device
    )
    networks = ", ".join(setup.scale(network) for network in recipe.width)
    print(f"{setup.note()}; {networks}; on {device}")
    return setup


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation, None of a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def text_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows with equal keys as aligned columns."""
    rows = [{key: _plain(value) for key, value in row.items()} for row in rows]
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def _plain(value: Any) -> str:
    """As it stands in a CSV file: six significant digits."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
