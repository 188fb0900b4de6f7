"""Steps over large lists that are planned, not run, for the tests that count launches."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import torch
from cases import DTYPES, PROJECTIONS, Case, mask_of
from torch import Tensor

from fastwrs.benchmark import lists


def step_over(name: str, option: str, axis: Any) -> tuple[Case, tuple[Any, ...]]:
    """A step over a list, with its weights rescaled: the case, and what an op takes first, up to ``lrs``."""
    params = lists.LISTS[name].params()
    rows = tuple(tuple(PROJECTIONS[project].items()) for project in ("rescale", "none"))
    case = Case("launches", option, (), DTYPES[0], rows)
    arrays, *states = untouched([param.shape for param in params], 1 + len(case.slots))
    masks = [mask_of(axis if param.role == lists.WEIGHT else None, len(param.shape)) for param in params]
    hyper = [value for row in range(len(rows)) for value in case.hyper(row).values()]
    groups = [int(mask == 0) for mask in masks]
    flat = [tensor for of_slot in states for tensor in of_slot]
    return case, (case.rule, arrays, arrays, flat, [torch.zeros(()) for _ in arrays], hyper, groups, masks, [], [])


def untouched(shapes: Sequence[tuple[int, ...]], copies: int) -> list[list[Tensor]]:
    """Lists of fp32 tensors of these shapes, each in a place of its own: addresses that no memory stands behind yet.

    The lists are of many gigabytes.
    """
    sizes = [math.prod(shape) for shape in shapes]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    reserved = mmap.mmap(-1, 4 * copies * sum(sizes), flags=flags)
    pieces = torch.frombuffer(reserved, dtype=torch.float32).split(sizes * copies)
    tensors = [piece.view(shape) for piece, shape in zip(pieces, [*shapes] * copies, strict=True)]
    return [tensors[k * len(sizes) : (k + 1) * len(sizes)] for k in range(copies)]
