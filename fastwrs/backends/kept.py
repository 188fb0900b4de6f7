"""Lists of tensors that the extension keeps from step to step.

To hand over a list of small tensors costs more than to work on them. States and step counts are the same tensors in
every step, so their lists are handed over once and named by a number afterwards. What they are and where their memory
lies is looked at in every step all the same.

What C++ holds is hidden from Python's collector. So parameters are not kept, since a hook of one may know the
optimizer; and a state that is given an attribute that knows the optimizer keeps it alive. Torch refuses to swap a state
by ``torch.utils.swap_tensors``, as any tensor that C++ holds.
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
"""Of memory behind a list. States that a user exchanges, to have their memory back, are kept until the next step."""


class KeptList:
    """A list that the extension keeps for as long as this object lives."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.number: int = torch.ops.fastwrs.keep(tensors)
        # No op, nor an import: objects are freed at any time, in the middle of what somebody traces, say.
        weakref.finalize(self, library.extension().forget, self.number).atexit = False

    def is_of(self, tensors: list[Tensor]) -> bool:
        """Whether these are the tensors, one by one, and none has become a view that stands for its negative.

        Torch refuses such views where a list is handed over; C++ does not see what they are.
        """
        same = len(tensors) == len(self.tensors) and all(map(is_, tensors, self.tensors))
        return same and not any(map(Tensor.is_neg, tensors))


def handed_over(name: str, tensors: list[Tensor], kept: dict[str, Any] | None) -> tuple[list[Tensor], int]:
    """What is to be handed over of a list, and the number of the list that is kept of it: one of the two is empty.

    ``kept`` remembers between the calls; None where nothing is to be kept. A list that has changed once is not kept
    again. Who looks at the ops that are called is shown whole lists.
    """
    if kept is None or len(tensors) < FEWEST or _observed():
        return tensors, 0
    if name not in kept:
        size = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        kept[name] = KeptList(tensors) if size <= MOST_BYTES else None
    elif kept[name] is not None and not kept[name].is_of(tensors):
        kept[name] = None
    found = kept[name]
    return (tensors, 0) if found is None else ([], found.number)


def _observed() -> bool:
    """Whether a mode of Python's sees, or traces, the ops that are called."""
    modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    return bool(modes) or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
