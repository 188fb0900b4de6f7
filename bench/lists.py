"""The lists of parameters that are measured, by formula: ResNet-50's, and 2,000 tiny tensors."""

from __future__ import annotations

import math
import random

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """The 161 parameters of ResNet-50 (1,000 classes) in the order of the network: 25,557,032 elements."""
    shapes: list[Shape] = []

    def conv_and_norm(inputs: int, outputs: int, kernel: int) -> None:
        shapes.extend([(outputs, inputs, kernel, kernel), (outputs,), (outputs,)])

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
    shapes.extend([(1000, inputs), (1000,)])
    assert len(shapes) == 161
    assert sum(map(math.prod, shapes)) == 25_557_032
    return shapes


def tiny(count: int = 2000, largest: int = 256) -> list[Shape]:
    """``count`` tensors of 1 to ``largest`` elements, every other one a matrix."""
    dice = random.Random(0)
    shapes: list[Shape] = []
    for k in range(count):
        elements = dice.randint(1, largest)
        rows = next(r for r in range(math.isqrt(elements), 0, -1) if elements % r == 0)
        shapes.append((rows, elements // rows) if k % 2 else (elements,))
    return shapes
