"""The lists of parameters that are measured, by formula: real networks, 2,000 tiny tensors, a billion parameters.

Every parameter has the role that ``fastwrs.param_groups`` gives it: weights are rescaled, norms are decayed, the rest
is neither. The counts of tensors and elements are the published ones, and are checked whenever a list is made.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

import fastwrs

Shape = tuple[int, ...]
WEIGHT, NORM, PLAIN = "weight", "norm", "plain"
ROLES = (WEIGHT, NORM, PLAIN)


class Param(NamedTuple):
    """One parameter of a list."""

    shape: Shape
    role: str


@dataclass(frozen=True)
class ParamList:
    """A list by its formula, and what it has to come to."""

    make: Callable[[], list[Param]]
    tensors: int
    elements: int
    convolutions: bool = False
    """Whether an axis ``"in"`` differs from ``"out"``."""

    def params(self) -> list[Param]:
        """The parameters in the order of the network."""
        found = self.make()
        elements = sum(math.prod(param.shape) for param in found)
        assert (len(found), elements) == (self.tensors, self.elements), (len(found), elements)
        return found


def resnet50_params() -> list[Param]:
    """ResNet-50 for 1,000 classes."""
    params: list[Param] = []

    def conv_and_norm(inputs: int, outputs: int, kernel: int) -> None:
        params.extend([Param((outputs, inputs, kernel, kernel), WEIGHT), *[Param((outputs,), NORM)] * 2])

    conv_and_norm(3, 64, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            conv_and_norm(inputs, width, 1)
            conv_and_norm(width, width, 3)
            conv_and_norm(width, 4 * width, 1)
            if block == 0:  # the projection on the shortcut
                conv_and_norm(inputs, 4 * width, 1)
            inputs = 4 * width
    return [*params, Param((1000, inputs), WEIGHT), Param((1000,), PLAIN)]


def vgg16_bn_params() -> list[Param]:
    """VGG-16 with BatchNorm for 1,000 classes; its longest row has 25,088 elements."""
    params: list[Param] = []
    inputs = 3
    for outputs in (64, 64, 128, 128, 256, 256, 256, *[512] * 6):
        params += [Param((outputs, inputs, 3, 3), WEIGHT), Param((outputs,), PLAIN), *[Param((outputs,), NORM)] * 2]
        inputs = outputs
    for rows, columns in ((4096, 512 * 7 * 7), (4096, 4096), (1000, 4096)):
        params += [Param((rows, columns), WEIGHT), Param((rows,), PLAIN)]
    return params


def wrn_28_10_params() -> list[Param]:
    """WRN-28-10 for 10 classes and pictures of 32 x 32 pixels."""
    params = [Param((16, 3, 3, 3), WEIGHT)]
    inputs = 16
    for width in (160, 320, 640):
        for block in range(4):
            for channels in (inputs, width):
                params += [*[Param((channels,), NORM)] * 2, Param((width, channels, 3, 3), WEIGHT)]
            if block == 0:  # the projection on the shortcut
                params.append(Param((width, inputs, 1, 1), WEIGHT))
            inputs = width
    return [*params, *[Param((inputs,), NORM)] * 2, Param((10, inputs), WEIGHT), Param((10,), PLAIN)]


def vit_params(width: int, layers: int) -> list[Param]:
    """A ViT/16 for 224 x 224 pixels and 1,000 classes, attention as ``nn.MultiheadAttention`` has it."""
    mlp = 4 * width
    norm = [Param((width,), NORM)] * 2

    def linear(rows: int, columns: int) -> list[Param]:
        return [Param((rows, columns), WEIGHT), Param((rows,), PLAIN)]

    block = [*norm, *linear(3 * width, width), *linear(width, width), *norm, *linear(mlp, width), *linear(width, mlp)]
    stem = [Param((width, 3, 16, 16), WEIGHT), Param((width,), PLAIN)]
    tokens = [Param((1, 1, width), PLAIN), Param((1, 197, width), PLAIN)]
    return [*stem, *tokens, *block * layers, *norm, *linear(1000, width)]


def llama_params(width: int, mlp: int, layers: int, kv: int) -> list[Param]:
    """A Llama 3.2 whose head is its embedding; ``kv`` is the width of keys and of values."""
    weights = [(width, width), (kv, width), (kv, width), (width, width), (mlp, width), (mlp, width), (width, mlp)]
    layer = [*(Param(shape, WEIGHT) for shape in weights), *[Param((width,), NORM)] * 2]
    return [Param((128_256, width), PLAIN), *layer * layers, Param((width,), NORM)]


def tiny_params(count: int = 2000, largest: int = 256) -> list[Param]:
    """``count`` tensors of 1 to ``largest`` elements, every other one a matrix."""
    dice = random.Random(0)
    params: list[Param] = []
    for k in range(count):
        elements = dice.randint(1, largest)
        rows = next(r for r in range(math.isqrt(elements), 0, -1) if elements % r == 0)
        params.append(Param((rows, elements // rows), WEIGHT) if k % 2 else Param((elements,), NORM))
    return params


def billion_params() -> list[Param]:
    """A billion parameters in rows of 4,096."""
    return [Param((15_259, 4096), WEIGHT)] * 16


LISTS: dict[str, ParamList] = {
    "resnet50": ParamList(resnet50_params, 161, 25_557_032, convolutions=True),
    "vgg16_bn": ParamList(vgg16_bn_params, 58, 138_365_992, convolutions=True),
    "wrn_28_10": ParamList(wrn_28_10_params, 80, 36_479_194, convolutions=True),
    "vit_s": ParamList(lambda: vit_params(384, 12), 152, 22_050_664),
    "vit_l": ParamList(lambda: vit_params(1024, 24), 296, 304_326_632),
    "llama_1b": ParamList(lambda: llama_params(2048, 8192, 16, 512), 146, 1_235_814_400),
    "llama_3b": ParamList(lambda: llama_params(3072, 8192, 28, 1024), 254, 3_212_749_824),
    "tiny": ParamList(tiny_params, 2000, 256_102),
    "billion": ParamList(billion_params, 16, 1_000_013_824),
}
"""All lists by name."""


def of_model(model: nn.Module) -> list[Param]:
    """The parameters of a model that are trained, with the roles that ``fastwrs.param_groups`` gives them."""
    roles = {}
    for group in fastwrs.param_groups(model, weight_decay=1.0):
        role = WEIGHT if group["rescale"] is not None else NORM if group["weight_decay"] else PLAIN
        roles |= {id(param): role for param in group["params"]}
    return [Param(real_shape(param), roles[id(param)]) for param in model.parameters() if param.requires_grad]


def real_shape(tensor: Tensor) -> Shape:
    """The shape of what a step works on: of a complex tensor its real view."""
    return (*tensor.shape, 2) if tensor.is_complex() else tuple(tensor.shape)


def resnet50() -> list[Shape]:
    """The shapes of ResNet-50's parameters."""
    return [param.shape for param in LISTS["resnet50"].params()]


def tiny() -> list[Shape]:
    """The shapes of the tiny tensors."""
    return [param.shape for param in LISTS["tiny"].params()]


def shrunk(params: list[Param], count: int = 12, largest: int = 16) -> list[Param]:
    """A few parameters of a list with every dimension cut, for rehearsals: all roles and numbers of dimensions."""
    kinds = {(param.role, len(param.shape)) for param in params}
    firsts = [next(k for k, p in enumerate(params) if (p.role, len(p.shape)) == kind) for kind in sorted(kinds)]
    chosen = sorted({*firsts, *range(max(0, count - len(firsts)))} & set(range(len(params))))
    return [Param(tuple(min(size, largest) for size in params[k].shape), params[k].role) for k in chosen]
