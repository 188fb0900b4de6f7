"""Lists of tensors that the extension keeps from step to step.

To hand over a list of small tensors costs more than to work on them. States and step counts are the same tensors in
every step, so their lists are handed over once and named by a number afterwards. Their memory is looked at in every
step all the same. Parameters are not kept: what C++ holds is hidden from Python's collector, and a hook of a parameter
may know the optimizer.
"""

from __future__ import annotations

import weakref
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastwrs import library

FEWEST = 16
"""Tensors: keeping fewer takes as long as handing them over."""
MOST_BYTES = 1 << 24
"""Of a list. States that a user exchanges, to have their memory for something else, are kept until the next step."""


class KeptList:
    """A list that the extension keeps for as long as this object lives."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.number: int = torch.ops.fastwrs.keep(tensors)
        weakref.finalize(self, library.forget, self.number).atexit = False

    def is_of(self, tensors: list[Tensor]) -> bool:
        """Whether these are the tensors, one by one."""
        return len(tensors) == len(self.tensors) and all(map(is_, tensors, self.tensors))


def handed_over(name: str, tensors: list[Tensor], kept: dict[str, Any] | None) -> tuple[list[Tensor], int]:
    """What is to be handed over of a list, and the number of the list that is kept of it: one of the two is empty.

    ``kept`` remembers between the calls. A list that has changed once is not kept again. Who looks at the ops that are
    called is shown whole lists.
    """
    if kept is None or len(tensors) < FEWEST or torch._C._len_torch_dispatch_stack():
        return tensors, 0
    if name not in kept:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        kept[name] = KeptList(tensors) if size <= MOST_BYTES else None
    elif kept[name] is not None and not kept[name].is_of(tensors):
        kept[name] = None
    found = kept[name]
    return (tensors, 0) if found is None else ([], found.number)
