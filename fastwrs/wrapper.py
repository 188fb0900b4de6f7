"""The optimizer inside the wrappers that training frameworks put around it."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


def unwrapped(optimizer: Any) -> Any:
    """What takes the steps: the innermost ``.optimizer``, where wrappers of Accelerate, Lightning and Fabric keep it.

    Lightning's take the class of what they wrap, so that to look at the class is not enough: what is set on them, a
    watcher say, would never reach the optimizer.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer
