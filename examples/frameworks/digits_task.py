"""What the examples with images train: a small convolutional network, on the digits that scikit-learn ships."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset


def make_data() -> TensorDataset:
    """1797 images of 8 x 8 pixels, and their digits."""
    images, labels = load_digits(return_X_y=True)
    return TensorDataset((torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) - 8) / 6, torch.tensor(labels))


def make_model() -> nn.Sequential:
    """Two convolutions, each with BatchNorm, so that the scale of their weights does not change the function."""
    torch.manual_seed(0)
    layers = [
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
