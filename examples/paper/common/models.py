"""The networks: VGG16, ResNet-18 and WRN-28-10 with BatchNorm after every convolution, and two perceptrons.

Convolutions have no bias, which BatchNorm would take out again. ``width`` cuts all channels of a network by the same
factor: 1 is the paper's network, 1/8 has an eighth of the channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

Norm = Callable[[int], nn.Module]

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
RESNET18 = ((64, 1), (128, 2), (256, 2), (512, 2))  # channels and first stride of a stage of two blocks
WRN_28_10 = ((160, 1), (320, 2), (640, 2))  # of four blocks


class MeanOnlyBatchNorm(_BatchNorm):
    """Takes away the mean of every channel of a batch and adds a bias: BatchNorm without the division.

    A subclass of torch's, so that ``update_bn`` and ``fastwrs.param_groups`` know it. Source: Salimans and Kingma,
    *Weight Normalization*, section 4; bounded weight norm is used with it.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_parameter("weight", None)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """[batch, channels, ...] to the same shape."""
        shape = (1, -1, *(1,) * (input.ndim - 2))
        assert self.running_mean is not None and self.num_batches_tracked is not None
        if not self.training:
            return input + (self.bias - self.running_mean).view(shape)
        mean = input.mean(dim=(0, *range(2, input.ndim)))
        with torch.no_grad():
            self.num_batches_tracked += 1
            # None asks for the average over all batches, which is what update_bn takes.
            factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, factor)
        return input + (self.bias - mean).view(shape)


class ConvNorm(nn.Sequential):
    """A convolution and its normalisation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, norm: Norm) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__()
        self.conv, self.norm = conv, norm(outputs)


class Block(nn.Module):
    """The basic residual block: two 3 x 3 convolutions, and a 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.first = ConvNorm(inputs, outputs, 3, stride, norm)
        self.second = ConvNorm(outputs, outputs, 3, 1, norm)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, outputs, 1, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, height, width] to [batch, outputs, height / stride, width / stride]."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


def cut(channels: int, width: float) -> int:
    """The number of channels that is left, at least 4."""
    return max(4, round(channels * width))


def vgg16(inputs: int, classes: int, width: float, norm: Norm = nn.BatchNorm2d) -> nn.Sequential:
    """Configuration D with one linear layer, as is common for small images; the average over the last positions."""
    layers: list[nn.Module] = []
    for stage in VGG16:
        for channels in stage:
            layers += [ConvNorm(inputs, cut(channels, width), 3, 1, norm), nn.ReLU()]
            inputs = cut(channels, width)
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def _residual(
    inputs: int, stem: int, stages: list[tuple[int, int]], blocks: int, classes: int, norm: Norm
) -> nn.Sequential:
    layers: list[nn.Module] = [ConvNorm(inputs, stem, 3, 1, norm), nn.ReLU()]
    inputs = stem
    for channels, stride in stages:
        for k in range(blocks):
            layers.append(Block(inputs, channels, stride if k == 0 else 1, norm))
            inputs = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def resnet18(inputs: int, classes: int, width: float, norm: Norm = nn.BatchNorm2d) -> nn.Sequential:
    """ResNet-18 as for CIFAR: a 3 x 3 stem of stride 1 without pooling."""
    stages = [(cut(channels, width), stride) for channels, stride in RESNET18]
    return _residual(inputs, stages[0][0], stages, 2, classes, norm)


def wrn28_10(inputs: int, classes: int, width: float, norm: Norm = nn.BatchNorm2d) -> nn.Sequential:
    """WRN-28-10 with BatchNorm after each convolution, those of the shortcuts too.

    In the original it comes before, so that some have none. This is how we read the WRS paper's "we add BN for all
    convolution layers".
    """
    stages = [(cut(channels, width), stride) for channels, stride in WRN_28_10]
    return _residual(inputs, cut(16, min(1.0, 10 * width)), stages, 4, classes, norm)


def mlp(pixels: int, classes: int, width: float) -> nn.Sequential:
    """Two hidden layers of 512 * width, each with BatchNorm and ReLU."""
    hidden = cut(512, width)
    sizes = [pixels, hidden, hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


class NormalizedLinear(nn.Linear):
    """``x @ (W / |W|).T``: every row of the weight divided by its norm, no gain and no bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """[batch, inputs] to [batch, outputs]."""
        return F.linear(input, F.normalize(self.weight, dim=1, eps=0.0))


def wn_mlp(pixels: int, classes: int, width: float, spread: float = 0.5) -> nn.Sequential:
    """WeightNorm with two hidden layers of 512 * width and GELU.

    The hidden weights start from a uniform distribution on [-spread / sqrt(m), spread / sqrt(m)], m the width. The
    activation is smooth, as the theory wants; which one the paper's figures have is not said in what we have of it.
    """
    hidden = cut(512, width)
    layers = [NormalizedLinear(pixels, hidden), nn.GELU(), NormalizedLinear(hidden, hidden), nn.GELU()]
    model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(hidden, classes))
    for layer in layers[::2]:
        assert isinstance(layer, NormalizedLinear)
        nn.init.uniform_(layer.weight, -spread / hidden**0.5, spread / hidden**0.5)
    return model


CONVOLUTIONAL = {"vgg16": vgg16, "resnet18": resnet18, "wrn28-10": wrn28_10}
NAMES = {"vgg16": "VGG16", "resnet18": "ResNet-18", "wrn28-10": "WRN-28-10", "mlp": "MLP", "wn-mlp": "MLP (WeightNorm)"}
WATCHED = {"vgg16": 1, "resnet18": 2, "wrn28-10": 2, "mlp": 0, "wn-mlp": 0}
"""Which weight's norms are kept in full, counted in order: VGG16's 2nd and ResNet-18's 3rd layer, as in Fig. 2a."""


def norm_weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights in front of normalisations, and those of NormalizedLinear, in order: all but the head and biases.

    Of a parametrized layer it is the raw weight.
    """
    found = [(name, param) for name, param in model.named_parameters() if param.ndim >= 2]
    return found[:-1]
