"""The data: scikit-learn's digits, CIFAR-10, CIFAR-100 and Tiny ImageNet, read without torchvision.

Every data set has training, validation and test images. The hyperparameters are chosen on the validation images, which
are taken out of the training set; the paper does not say how many it took.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

NAMES = ("digits", "cifar10", "cifar100", "tiny-imagenet")
TITLES = {"digits": "digits", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "tiny-imagenet": "Tiny ImageNet"}
CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "tiny-imagenet": 200}
VALIDATION = {"digits": 197, "cifar10": 5000, "cifar100": 5000, "tiny-imagenet": 10000}
DIGITS_TEST = 1000
JITTER = 0.2  # how far brightness, contrast and saturation are changed at most, and the hue in turns / 5

CIFAR10 = tuple(f"cifar-10-batches-py/{name}" for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"))
CIFAR100 = ("cifar-100-python/train", "cifar-100-python/test")
TINY = tuple(f"tiny-imagenet-200/{name}" for name in ("wnids.txt", "train", "val/images", "val/val_annotations.txt"))
FILES = {"digits": (), "cifar10": CIFAR10, "cifar100": CIFAR100, "tiny-imagenet": TINY}
SOURCES = {
    "cifar10": "unpack cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html there",
    "cifar100": "unpack cifar-100-python.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html there",
    "tiny-imagenet": "unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip there",
}


@dataclass
class Part:
    """Images, uint8 or floats in [0, 1], of shape [count, channels, height, width], and labels."""

    x: Tensor
    y: Tensor

    def of_classes(self, low: int, high: int) -> Part:
        """Those with a label of low .. high - 1, labelled from 0."""
        kept = (self.y >= low) & (self.y < high)
        return Part(self.x[kept], self.y[kept] - low)

    def to(self, device: torch.device) -> Part:
        """On a device; the memory format of the images is channels_last."""
        return Part(self.x.to(device, memory_format=torch.channels_last), self.y.to(device))


@dataclass
class Data:
    """The three parts, and what the training images go through."""

    train: Part
    val: Part
    test: Part
    classes: int
    colour: bool
    """Photographs are also mirrored, and changed in brightness, contrast, saturation and hue; digits are not."""

    def of_classes(self, low: int, high: int) -> Data:
        """The part of the data that has some of the classes."""
        parts = [part.of_classes(low, high) for part in (self.train, self.val, self.test)]
        return Data(*parts, classes=high - low, colour=self.colour)

    def noisy(self, fraction: float) -> Data:
        """With this fraction of the training labels drawn anew, evenly over the classes that are there."""
        if not fraction:
            return self
        generator, y = torch.Generator().manual_seed(1), self.train.y
        wrong = torch.rand(len(y), generator=generator) < fraction
        labels = torch.where(wrong, torch.randint(self.classes, y.shape, generator=generator), y)
        return replace(self, train=Part(self.train.x, labels))

    def to(self, device: torch.device) -> Data:
        """On a device."""
        parts = [part.to(device) for part in (self.train, self.val, self.test)]
        return Data(*parts, classes=self.classes, colour=self.colour)


def why_missing(name: str, root: Path | None) -> str | None:
    """What has to be done before the data set can be read, or None."""
    if not FILES[name]:
        return None
    if root is None:
        return f"--data {name} needs --root DIR, the folder that has {FILES[name][0].split('/')[0]}: {SOURCES[name]}"
    missing = [file for file in FILES[name] if not (root / file).exists()]
    return f"--data {name}: {root} has no {', no '.join(missing)}: {SOURCES[name]}" if missing else None


def class_ranges(name: str, parts: int) -> list[tuple[int, int]]:
    """The classes in so many parts of equal size: of each the first and the one after the last."""
    size = CLASSES[name] // parts
    return [(k * size, (k + 1) * size) for k in range(parts)]


def why_not(
    name: str, root: Path | None, train_images: int | None, test_images: int | None, batch: int, parts: int = 1
) -> str | None:
    """Why so many training images cannot be taken, the classes in so many parts, or None."""
    if train_images is None:
        return None
    labels = load(name, root, train_images, test_images).train
    if len(labels.y) < train_images:
        return f"{TITLES[name]} has {len(labels.y)}, without those for validation"
    if train_images < batch:
        return f"a batch has {batch}"
    for low, high in class_ranges(name, parts):
        count = len(labels.of_classes(low, high).y)
        if count < batch:
            return f"{count} are of the classes {low} to {high - 1}, which have a run of their own; a batch has {batch}"
    return None


@cache
def load(name: str, root: Path | None, train_images: int | None, test_images: int | None = None) -> Data:
    """Reads a data set.

    Args:
        name: one of NAMES.
        root: the folder with the files; None for digits.
        train_images: so many of the training images, None for all.
        test_images: so many of the validation and of the test images, None for all.

    Raises:
        FileNotFoundError: what :func:`why_missing` says.
    """
    if why := why_missing(name, root):
        raise FileNotFoundError(why)
    if name == "digits":
        train, test, classes = *_digits(), 10
    else:
        assert root is not None
        read = {"cifar10": _cifar10, "cifar100": _cifar100, "tiny-imagenet": _tiny_imagenet}[name]
        train, test, classes = read(root)
    order = torch.randperm(len(train.y), generator=torch.Generator().manual_seed(0))
    held = min(VALIDATION[name], len(order) // 4)
    val, rest = order[:held], order[held:][:train_images]
    val, train = (Part(train.x[some], train.y[some]) for some in (val[:test_images], rest))
    test = Part(test.x[:test_images], test.y[:test_images])
    return Data(train, val, test, classes, colour=name != "digits")


def scaled(x: Tensor) -> Tensor:
    """Images as floats in [0, 1]."""
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def augmented(x: Tensor, colour: bool, generator: torch.Generator) -> Tensor:
    """A batch of floats in [0, 1] after the paper's preprocessing.

    Zero-padding by 3 pixels for images of 32 x 32 (4 for 64 x 64) and a random crop; for photographs random mirroring,
    brightness, contrast, saturation and hue as well. All numbers are drawn on the CPU, so that they are the same
    wherever the images lie. The paper does not say how strong the changes are: here up to 20 % and 1/25 of a turn.
    """
    count, channels, height, width = x.shape
    pad = 3 if height == 32 else 4

    def draw(low: float, high: float) -> Tensor:
        return torch.empty(count, 1, 1, 1).uniform_(low, high, generator=generator).to(x.device)

    rows, columns = (torch.randint(2 * pad + 1, (count, 1), generator=generator).to(x.device) for _ in range(2))
    rows = rows + torch.arange(height, device=x.device)
    columns = columns + torch.arange(width, device=x.device)
    padded = F.pad(x, (pad,) * 4)
    if colour:
        mirrored = torch.rand(count, 1, generator=generator).to(x.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    every = torch.arange(count, device=x.device)[:, None, None]
    x = padded[every, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)  # NHWC in memory
    if colour and channels == 3:
        x = x * draw(1 - JITTER, 1 + JITTER)
        grey = _grey(x).mean(dim=(2, 3), keepdim=True)
        x = grey + (x - grey) * draw(1 - JITTER, 1 + JITTER)
        x = _recoloured(x, draw(1 - JITTER, 1 + JITTER), draw(-JITTER / 5, JITTER / 5)).clamp(0, 1)
    return x.contiguous(memory_format=torch.channels_last)


def _grey(x: Tensor) -> Tensor:
    """Luma after ITU-R BT.601."""
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _recoloured(x: Tensor, saturation: Tensor, turns: Tensor) -> Tensor:
    """Saturation and hue, as a scaled rotation of the two colour axes of YIQ."""
    yiq = x.new_tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    y, i, q = torch.einsum("ij,njhw->nihw", yiq, x).split(1, dim=1)
    cos, sin = saturation * (2 * math.pi * turns).cos(), saturation * (2 * math.pi * turns).sin()
    rotated = torch.cat([y, cos * i - sin * q, sin * i + cos * q], dim=1)
    return torch.einsum("ij,njhw->nihw", torch.linalg.inv(yiq), rotated)


def _digits() -> tuple[Part, Part]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    x = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False).clamp_(0, 1)
    y = torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(2))
    test, train = order[:DIGITS_TEST], order[DIGITS_TEST:]
    return Part(x[train], y[train]), Part(x[test], y[test])


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of numpy arrays, strings and lists, and refuses everything else, which could run code."""

    allowed = {  # noqa: RUF012
        "_reconstruct": np.empty(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "encode": __import__("codecs").encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of CIFAR")
        return self.allowed[name]


def _unpickled(path: Path, labels: bytes) -> Part:
    with path.open("rb") as file:
        found = _ArraysOnly(file, encoding="bytes").load()
    x = torch.from_numpy(np.asarray(found[b"data"], dtype=np.uint8).reshape(-1, 3, 32, 32))
    return Part(x, torch.tensor(found[labels]))


def _cifar10(root: Path) -> tuple[Part, Part, int]:
    *train, test = (_unpickled(root / file, b"labels") for file in CIFAR10)
    return Part(torch.cat([part.x for part in train]), torch.cat([part.y for part in train])), test, 10


def _cifar100(root: Path) -> tuple[Part, Part, int]:
    train, test = (_unpickled(root / file, b"fine_labels") for file in CIFAR100)
    return train, test, 100


def _tiny_imagenet(root: Path) -> tuple[Part, Part, int]:
    """The public validation images are the test images: those of the test set have no public labels."""
    from PIL import Image  # matplotlib needs it too

    folder = root / "tiny-imagenet-200"
    names = folder.joinpath("wnids.txt").read_text(encoding="utf-8").split()
    label = {name: k for k, name in enumerate(names)}

    def read(files: list[tuple[Path, int]]) -> Part:
        x = torch.empty(len(files), 3, 64, 64, dtype=torch.uint8)
        for k, (path, _) in enumerate(files):
            with Image.open(path) as image:
                x[k] = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return Part(x, torch.tensor([k for _, k in files]))

    train = [(path, label[name]) for name in names for path in sorted((folder / "train" / name / "images").iterdir())]
    lines = (folder / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t")[:2] for line in lines]
    test = [(folder / "val" / "images" / file, label[name]) for file, name in pairs]
    return read(train), read(test), len(names)
