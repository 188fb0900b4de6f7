"""One training run, which goes on where it was interrupted, with the same bits."""

from __future__ import annotations

import fcntl
import json
import math
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

import fastwrs
from fastwrs.optim.base import FusedOptimizer

from . import data as data_sets
from . import models
from .data import Data, Part
from .recipes import RESCALED, Settings

STATISTICS_BATCHES = 10
"""So many batches of training images, not augmented, give BatchNorm's statistics before an evaluation."""

RESULT = "result.json"
Record = dict[str, Any]


def make_model(settings: Settings, data: Data) -> nn.Sequential:
    """The network, its weights drawn from the seed, with what the method puts in place of the weights."""
    torch.manual_seed(settings.seed)
    pixels = data.train.x[0].numel()
    if settings.network == "mlp":
        model = models.mlp(pixels, data.classes, settings.width)
    elif settings.network == "wn-mlp":
        model = models.wn_mlp(pixels, data.classes, settings.width, spread=settings.init_spread)
    else:
        norm = models.MeanOnlyBatchNorm if settings.method == "bwn" else nn.BatchNorm2d
        make = models.CONVOLUTIONAL[settings.network]
        model = make(data.train.x.shape[1], data.classes, settings.width, norm=norm)
    for module in [module for module in model.modules() if isinstance(module, nn.Conv2d)]:
        if settings.method in ("ws", "ws+wd"):
            fastwrs.nn.weight_standardization(module)
        elif settings.method == "bwn":
            fastwrs.nn.bounded_weight_norm(module)
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    return model.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def make_groups(model: nn.Module, settings: Settings, steps_per_epoch: int) -> list[dict[str, Any]]:
    """The parameters by method. What BatchNorm has is decayed by all but ``off``, a bias of the head by none."""
    if settings.method in RESCALED:
        first, end = settings.window or (0, None)
        rescale = fastwrs.Rescale(
            every=settings.tau,
            axis="in" if settings.method == "wrs-ic" else "out",
            start=first * steps_per_epoch + 1,
            stop=None if end is None else end * steps_per_epoch + 1,
        )
        return fastwrs.param_groups(model, rescale=rescale, weight_decay=settings.weight_decay)
    norms = [
        param
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        for param in module.parameters(recurse=False)
    ]
    weights = [param for param in model.parameters() if param.ndim >= 2]
    rest = [param for param in model.parameters() if not any(param is other for other in (*norms, *weights))]
    decays = settings.weight_decay, settings.weight_decay, 0.0
    groups = zip((weights, norms, rest), decays, strict=True)
    return [{"params": params, "weight_decay": decay} for params, decay in groups if params]


def make_optimizer(model: nn.Module, settings: Settings, steps_per_epoch: int) -> FusedOptimizer:
    """The optimizer, of the learning rate of the settings."""
    groups, options = make_groups(model, settings, steps_per_epoch), {"lr": settings.lr, "backend": settings.backend}
    if settings.optimizer in ("sgd", "sgdm"):
        return fastwrs.SGD(groups, momentum=0.9 if settings.optimizer == "sgdm" else 0.0, **options)
    return {"adam": fastwrs.Adam, "adamw": fastwrs.AdamW, "adamp": fastwrs.AdamP}[settings.optimizer](groups, **options)


def batches(part: Part, settings: Settings, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, without the last incomplete batch."""
    order = torch.randperm(len(part.y), generator=generator)
    for k in range(steps_in(part, settings)):
        some = order[k * settings.batch :][: settings.batch].to(part.y.device)
        yield part.x[some], part.y[some]


def steps_in(part: Part, settings: Settings) -> int:
    """The steps of an epoch."""
    if len(part.y) < settings.batch:
        raise ValueError(f"{len(part.y)} training images are fewer than a batch of {settings.batch}")
    return len(part.y) // settings.batch


def accuracy(model: nn.Module, part: Part, batch: int = 250) -> float:
    """In percent, in eval mode, with the statistics as they are."""
    model.eval()
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        pairs = zip(part.x.split(batch), part.y.split(batch), strict=True)
        hits = sum(int((model(data_sets.scaled(x).to(dtype)).argmax(1) == y).sum()) for x, y in pairs)
    model.train()
    return 100 * hits / len(part.y)


def evaluate(model: nn.Module, data: Data, settings: Settings, last: bool) -> Record:
    """Accuracies with BatchNorm's statistics taken anew, for every method: a rescale leaves the running ones stale."""
    dtype = next(model.parameters()).dtype
    number = min(STATISTICS_BATCHES, steps_in(data.train, settings))  # whole batches: of one image there is no variance
    some = data.train.x[: number * settings.batch].split(settings.batch)
    update_bn((data_sets.scaled(x).to(dtype) for x in some), model)
    found = {"test": accuracy(model, data.test)}
    return {**found, "val": accuracy(model, data.val)} if last else found  # validation images choose among whole runs


def harvest(monitor: fastwrs.Monitor, watched: str, hidden: set[str]) -> list[Record]:
    """What a Monitor has measured since the last time, a record for each step, and forgets it."""
    ratios = {record["step"]: record for record in monitor.gradient_over_loss()}
    steps: dict[int, Record] = {}
    for layer in monitor.layers():
        record = steps.setdefault(layer["step"], {"step": layer["step"], "minimum_norm": math.inf})
        if layer["name"] in hidden:
            least = layer["norm_after.min"]
            record["minimum_norm"] = min(record["minimum_norm"], math.nan if least is None else least)
        if layer["name"] == watched:
            record |= {key: layer[f"{key}.total"] for key in ("norm_before", "grad_norm", "update_norm")}
    for step, record in steps.items():
        found = ratios.get(step)
        record |= {"loss": None, "gradient_over_loss": None} if found is None else {
            "loss": found["loss"], "gradient_over_loss": found["ratio"]
        }  # fmt: skip
    monitor.clear()
    return list(steps.values())


class Run:
    """A training run with its folder: a checkpoint after each epoch, result.json at the end, weights on request."""

    def __init__(self, settings: Settings, data: Data, folder: Path) -> None:
        low, high = settings.classes or (0, data.classes)
        device = torch.device(settings.device)
        self.settings, self.folder = settings, folder / settings.name
        self.data = data.of_classes(low, high).noisy(settings.label_noise).to(device)
        self.model = make_model(settings, self.data)
        if settings.start_from is not None:
            _load_backbone(self.model, load_file(weights_file(folder / settings.start_from), settings.device))
        self.steps = steps_in(self.data.train, settings)
        self.optimizer = make_optimizer(self.model, settings, self.steps)
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, list(settings.milestones), gamma=0.1)
        self.window = None
        if settings.window is not None and settings.method not in RESCALED:
            start, stop = (epoch * self.steps + 1 for epoch in settings.window)
            self.window = fastwrs.WeightDecayWindow(self.optimizer, start, stop)
        self.monitor = None
        if settings.measure_every:
            names = self.model.named_parameters()
            self.monitor = fastwrs.Monitor(self.optimizer, settings.measure_every, names, channels=0)
        self.generator = torch.Generator().manual_seed(settings.seed)
        hidden = models.norm_weights(self.model)
        self.watched = hidden[models.WATCHED[settings.network]]
        self.hidden = {name for name, _ in hidden}
        self.epoch = 0
        self.epochs: list[Record] = []
        self.measured: list[Record] = []

    def train(self, progress: Callable[[], None] = lambda: None) -> Record:
        """The whole run, from its checkpoint if there is one. ``progress`` is called after each epoch.

        Returns:
            What result.json has: ``settings``; ``steps``, their number; ``epochs``, a record for each evaluation;
            ``measured``, one for each step that was measured.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder.with_name(f"{self.folder.name}.lock")):
            finished = self.folder / RESULT
            # another script may have trained it meanwhile
            return load_result(finished) if finished.exists() else self._train(progress)

    def _train(self, progress: Callable[[], None]) -> Record:
        checkpoint = self.folder / "checkpoint.pt"
        if checkpoint.exists():
            self._resume(load_file(checkpoint, self.settings.device))
        elif self.epoch == 0:
            self._note(None)
        while self.epoch < self.settings.epochs:
            loss = self._train_epoch()
            self.epoch += 1
            self._note(loss)
            with replaced(checkpoint) as file:
                torch.save(self._state(), file)
            progress()
        steps = self.steps * self.settings.epochs
        result = {
            "settings": self.settings.plain(), "steps": steps, "epochs": self.epochs, "measured": self.measured
        }  # fmt: skip
        with replaced(self.folder / RESULT) as file:
            file.write_text(json.dumps(result), encoding="utf-8")
        checkpoint.unlink()
        return result

    def _train_epoch(self) -> float:
        """Trains for one epoch and returns the mean loss."""
        settings, model = self.settings, self.model
        total = torch.zeros((), device=self.data.train.y.device)
        dtype = next(model.parameters()).dtype
        for x, y in batches(self.data.train, settings, self.generator):
            x = data_sets.scaled(x)
            if settings.augment:
                x = data_sets.augmented(x, self.data.colour, self.generator)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(model(x.to(dtype)), y)
            loss.backward()
            if self.monitor is not None:
                self.monitor.log_loss(loss)
            self.optimizer.step()
            if self.window is not None:
                self.window.step()
            total += loss.detach()
        self.schedule.step()
        return total.item() / self.steps

    def _note(self, loss: float | None) -> None:
        """Evaluates, measures and keeps what the settings ask for after this epoch."""
        settings, epoch = self.settings, self.epoch
        if self.monitor is not None and epoch:
            self.measured += harvest(self.monitor, self.watched[0], self.hidden)
        last = epoch == settings.epochs
        if last or (epoch % settings.evaluate_every == 0 and (epoch or settings.keep_norms)):
            record = {"epoch": epoch, "loss": loss}
            if epoch:
                record |= evaluate(self.model, self.data, settings, last)
            if settings.keep_norms:
                record["norms"] = fastwrs.channel_norms([self.watched[1]])[0].tolist()
            self.epochs.append(record)
        if epoch in settings.keep_weights:
            with replaced(weights_file(self.folder, epoch)) as file:
                torch.save(self.model.state_dict(), file)

    def _state(self) -> Record:
        kept = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        optional = {"window": self.window, "monitor": self.monitor}
        kept |= {name: part for name, part in optional.items() if part is not None}
        return {
            **{name: part.state_dict() for name, part in kept.items()},
            "generator": self.generator.get_state(),
            "epoch": self.epoch,
            "epochs": self.epochs,
            "measured": self.measured,
        }

    def _resume(self, state: Record) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.window is not None:
            self.window.load_state_dict(state["window"])
        if self.monitor is not None:
            self.monitor.load_state_dict(state["monitor"])
        self.generator.set_state(state["generator"].cpu())
        self.epoch, self.epochs, self.measured = state["epoch"], state["epochs"], state["measured"]


def load_file(path: Path, device: str) -> Record:
    """What ``torch.save`` has written."""
    try:
        return torch.load(path, weights_only=True, map_location=device)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(path) from error


def load_result(path: Path) -> Record:
    """What a run has left when it was finished, see :meth:`Run.train`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not text
        raise _damaged(path) from error
    if not isinstance(found, dict) or not {"settings", "steps", "epochs", "measured"} <= set(found):
        raise _damaged(path)
    return found


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged: remove {path.parent} and start again")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time: of two scripts with a run in common one waits."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def weights_file(folder: Path, epoch: int | None = None) -> Path:
    """Where the weights after an epoch are; the last ones that were kept if none is named."""
    if epoch is not None:
        return folder / f"weights-{epoch}.pt"
    return max(folder.glob("weights-*.pt"), key=lambda path: int(path.stem.split("-")[1]))


def _load_backbone(model: nn.Module, trained: dict[str, Tensor]) -> None:
    """All but the head, the last linear layer, whose classes are others."""
    head = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    kept = {name: value for name, value in trained.items() if not name.startswith(f"{head}.")}
    missing, unexpected = model.load_state_dict(kept, strict=False)
    if unexpected or {name.rsplit(".", 1)[0] for name in missing} != {head}:
        raise ValueError(f"the trained weights do not fit: missing {missing}, unexpected {unexpected}")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write that takes its place at once, when it is complete."""
    part = path.with_name(path.name + ".part")
    yield part
    os.replace(part, path)
