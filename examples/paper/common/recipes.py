"""What a training run is made of: the paper's recipes, and the small one for scikit-learn's digits.

The paper (sections III-B and VI-A) says: batches of 100; SGDM with learning rate 0.1, Adam and AdamW with 0.001; VGG16
for 100 epochs, divided by 10 after 30 and 60; ResNet-18 for 200 epochs, divided by 10 after 60, 120 and 160 (VGG16 too
where windows are compared). It says it of CIFAR-10; here it holds for CIFAR-100, Tiny ImageNet and WRN-28-10 as well.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

FORMAT = 1
"""Counted up when a run with the same settings comes to mean something else, so that older results are left alone."""

OPTIMIZERS = {"sgd": "SGD", "sgdm": "SGDM", "adam": "Adam", "adamw": "AdamW", "adamp": "AdamP"}
METHODS = {
    "off": "no decay",
    "wd": "WD",
    "ws": "WS, no WD",
    "ws+wd": "WS + WD",
    "bwn": "BWN",
    "wrs": "WRS",
    "wrs-ic": "WRS(IC)",
}
"""``off``: nothing is decayed. ``wd``: all weights and what BatchNorm has. ``ws``: weight standardization. ``bwn``:
bounded weight norm with mean-only BatchNorm. ``wrs``: rescaled weights, and what BatchNorm has is decayed
(Algorithm 1)."""
RESCALED = ("wrs", "wrs-ic")


@dataclass(frozen=True)
class Settings:
    """All that a training run depends on. Runs with equal settings are one run, whichever script asks for it."""

    data: str
    network: str
    optimizer: str
    method: str
    seed: int
    width: float
    lr: float
    weight_decay: float
    tau: int
    epochs: int
    milestones: tuple[int, ...]
    """The learning rate is divided by 10 after these epochs."""
    batch: int
    evaluate_every: int
    """In epochs."""
    train_images: int | None
    label_noise: float
    test_images: int | None
    augment: bool = True
    window: tuple[int, int] | None = None
    """The epochs in which the weights are decayed or rescaled, the first and the one after the last; None for all."""
    classes: tuple[int, int] | None = None
    """The classes that are learnt, the first and the one after the last; None for all."""
    start_from: str | None = None
    """The name of the run whose trained weights, without the head, this one starts from."""
    keep_weights: tuple[int, ...] = ()
    """After these epochs the weights are kept; 0 is before the first."""
    keep_norms: bool = False
    """The norm of every channel of the watched layer is kept after each epoch."""
    measure_every: int = 0
    """A Monitor measures each so many-th step; 0: none."""
    dtype: str = "float32"
    init_spread: float = 0.5
    """Of the perceptron with WeightNorm."""
    backend: str = "auto"
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Unique, and short enough for a folder."""
        text = json.dumps([FORMAT, self.plain()], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        return f"{self.network}-{self.optimizer}-{self.method}-{self.seed}-{digest}"

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Recipe:
    """The numbers that a data set comes with."""

    batch: int
    epochs: dict[str, int]
    milestones: dict[str, tuple[float, ...]]
    """As fractions of the epochs."""
    lr: dict[str, float]
    weight_decay: dict[str, float]
    """By optimizer, where it is not searched: of all weights for WD, of BatchNorm alone for WRS."""
    tau: int
    evaluations: int
    """How often in a run."""
    train_images: int | None
    label_noise: float
    test_images: int | None
    width: dict[str, float]
    decay_search: tuple[float, ...]
    tau_search: tuple[int, ...]
    decay_sweep: dict[str, tuple[float, ...]]
    tau_sweep: tuple[int, ...]
    seeds: dict[str, int]
    measurements: int
    """How many steps of a run a Monitor measures."""
    perceptron_epochs: int


LONG = (0.3, 0.6, 0.8)
PAPER = Recipe(
    batch=100,
    epochs={"vgg16": 100, "vgg16 long": 200, "resnet18": 200, "wrn28-10": 200},
    milestones={"vgg16": (0.3, 0.6), "vgg16 long": LONG, "resnet18": LONG, "wrn28-10": LONG},
    lr={"sgdm": 0.1, "adam": 1e-3, "adamw": 1e-3, "adamp": 1e-3},
    weight_decay={"sgdm": 5e-4, "adam": 5e-4, "adamw": 5e-2, "adamp": 5e-2},
    tau=10,
    evaluations=200,
    train_images=None,
    label_noise=0.0,
    test_images=None,
    width={"vgg16": 1, "resnet18": 1, "wrn28-10": 1},
    decay_search=(5e-4, 5e-3, 5e-5),
    tau_search=(10, 20, 30, 40, 50),
    decay_sweep={"sgdm": (5e-5, 5e-4, 5e-3, 5e-2), "adamw": (5e-3, 5e-2, 5e-1, 5.0)},
    tau_sweep=(1, 10, 20, 50),
    seeds={"vgg16": 3, "resnet18": 3, "wrn28-10": 3},
    measurements=400,
    perceptron_epochs=20,
)
# A run has some 300 steps instead of 100,000: decay has to be stronger to change anything in that time.
SMALL = replace(
    PAPER,
    batch=25,
    epochs=dict.fromkeys(PAPER.epochs, 16),
    weight_decay={"sgdm": 5e-3, "adam": 5e-3, "adamw": 5e-1, "adamp": 5e-1},
    evaluations=8,
    train_images=500,
    label_noise=0.2,
    width={"vgg16": 1 / 8, "resnet18": 1 / 8, "wrn28-10": 1 / 20},
    decay_search=(5e-3, 5e-4),
    tau_search=(10,),
    decay_sweep={"sgdm": (5e-4, 5e-3, 5e-2, 5e-1), "adamw": (5e-2, 5e-1, 5.0, 50.0)},
    seeds={"vgg16": 1, "resnet18": 3, "wrn28-10": 1},
    measurements=64,
    perceptron_epochs=16,
)


def of(data: str) -> Recipe:
    """The recipe of a data set."""
    return SMALL if data == "digits" else PAPER


def tiny(recipe: Recipe) -> Recipe:
    """For tests of the scripts themselves: everything is so small that nothing is learnt."""
    return replace(
        recipe,
        batch=min(recipe.batch, 25),
        epochs=dict.fromkeys(recipe.epochs, 2),
        train_images=70,  # two batches; one is left when finetune.py takes half of the classes
        test_images=50,
        width=dict.fromkeys(recipe.width, 1 / 128),
        seeds=dict.fromkeys(recipe.seeds, 1),
        evaluations=1,
        measurements=2,
        perceptron_epochs=2,
        decay_sweep={name: sweep[:1] for name, sweep in recipe.decay_sweep.items()},
        tau_sweep=recipe.tau_sweep[:1],
        decay_search=recipe.decay_search[:1],
    )


def settings(
    recipe: Recipe, data: str, network: str, optimizer: str, method: str, seed: int, **changes: Any
) -> Settings:
    """The run that the recipe describes, with changes by name. ``long=True`` is VGG16's longer schedule.

    Raises:
        TypeError: there is no setting of such a name.
    """
    key = f"{network} long" if changes.pop("long", False) and network == "vgg16" else network
    epochs = recipe.epochs.get(key, recipe.perceptron_epochs)
    steps = epochs * max(1, (recipe.train_images or 50_000) // recipe.batch)
    given: dict[str, Any] = {
        "width": recipe.width.get(network, 1.0),
        "lr": recipe.lr.get(optimizer, 0.1),
        "weight_decay": 0.0 if method in ("off", "ws") else recipe.weight_decay.get(optimizer, 0.0),
        "tau": recipe.tau if method in RESCALED else 0,
        "epochs": epochs,
        "milestones": tuple(max(1, round(part * epochs)) for part in recipe.milestones.get(key, ())),
        "batch": recipe.batch,
        "evaluate_every": max(1, epochs // recipe.evaluations),
        "train_images": recipe.train_images,
        "label_noise": recipe.label_noise,
        "test_images": recipe.test_images,
        "measure_every": max(1, steps // recipe.measurements),
    }
    unknown = set(changes) - {field.name for field in fields(Settings)}
    if unknown:
        raise TypeError(f"a run has no setting {', '.join(sorted(unknown))}")
    return Settings(data, network, optimizer, method, seed, **{**given, **changes})
