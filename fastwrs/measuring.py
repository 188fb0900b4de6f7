"""What a step measures on request: who may ask, how much, and which rows of the figures belong to which parameter.

A step writes the eight figures of ``spec.MEASURED`` for every norm group into a buffer on the device. Nothing here
reads such a buffer, which would wait for the device.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from enum import IntEnum
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from fastwrs.options import masked_dims
from fastwrs.spec import MEASURED

_shape_of = attrgetter("shape")

TAKEN = MEASURED.index("rescale_factor")
"""A column that is NaN where the step was skipped, and never where it was taken."""


class Scope(IntEnum):
    """Which tensors a step measures."""

    NOTHING = 0
    PROJECTED = 1
    """Those that are rescaled or shrunk, by their axis."""
    EVERYTHING = 2
    """The others too, by ``options.measured_mask``."""


@dataclass(eq=False)
class Rows:
    """Whose rows a launch measures. The same object as long as nothing about it changes."""

    params: list[Tensor]
    counts: list[int]
    """How many rows each parameter has, one for every norm group in row-major order of the dimensions that are kept."""
    shapes: list[torch.Size] = field(default_factory=list)
    """Of the parameters, when they were counted."""
    spare: Tensor | None = None
    """A buffer that has been read and that nobody keeps, for the next step."""


@dataclass(frozen=True)
class Measured:
    """What one launch has measured."""

    rows: Rows
    values: Tensor
    """[sum(counts), 8] in fp32, the columns of ``spec.MEASURED``. A skipped step leaves NaN in all of them."""


class Watcher(Protocol):
    """What an optimizer asks before a step, and tells after it."""

    @property
    def keeps(self) -> bool:
        """Whether the figures are read after ``after_step``. Where nobody does, the next step writes over them."""
        ...

    def before_step(self) -> Scope:
        """What the step that begins now is to measure. May refuse the step: nothing has changed yet."""
        ...

    def after_step(self, measured: list[Measured], loss: Any) -> None:
        """The step was launched, one item for each launch that measured. ``loss`` is what the closure returned."""
        ...


@functools.lru_cache(maxsize=4096)
def group_count(shape: tuple[int, ...], mask: int) -> int:
    """How many norm groups a tensor has, which is the product of the dimensions that are kept; 0 without groups."""
    dims = masked_dims(mask, len(shape))
    return 0 if dims is None else math.prod(size for dim, size in enumerate(shape) if dim not in dims)


def rows_of(params: list[Tensor], axes: list[int], known: Rows | None) -> Rows:
    """The rows that a launch measures; those that are ``known`` of the same parameters, if they still hold."""
    shapes = list(map(_shape_of, params))
    if known is not None and known.shapes == shapes:
        return known
    return Rows(params, list(map(group_count, shapes, axes)), shapes)


def buffer_for(rows: Rows, device: torch.device, may_skip: bool) -> Tensor | None:
    """The buffer that a launch fills, None if nothing in it has norm groups.

    NaN says that a figure was not taken, as in a step that is skipped; one that cannot be writes every figure.
    """
    buffer, rows.spare = rows.spare, None
    if buffer is None:
        shape = sum(rows.counts), len(MEASURED)
        if shape[0] == 0:
            return None
        buffer = torch.empty(shape, dtype=torch.float32, device=device)
    return buffer.fill_(math.nan) if may_skip else buffer


def give_back(measured: list[Measured]) -> None:
    """The buffers go to the next step: to make one of this size anew costs as much as to write it.

    On a CPU only: a captured graph goes on writing where it wrote, also when the rows are gone. Not out of
    ``torch.inference_mode()``: no other step may write into its tensors.
    """
    for launch in measured:
        if launch.values.device.type == "cpu" and not launch.values.is_inference():
            launch.rows.spare = launch.values
