"""The optimizer inside the wrappers that training frameworks put around it."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

_FRAMEWORKS = {"accelerate", "lightning", "pytorch_lightning", "lightning_fabric"}


def unwrapped(optimizer: Any) -> Any:
    """What takes the steps: the innermost ``.optimizer``, where wrappers of Accelerate, Lightning and Fabric keep it.

    Lightning's take the class of what they wrap, so that to look at the class is not enough: what is set on them, a
    watcher say, would never reach the optimizer. Other optimizers that hold one, as Lookahead does, are left as they
    are: what they do is part of their step.
    """
    while _is_wrapper(optimizer) and isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def _is_wrapper(optimizer: Any) -> bool:
    return any(kind.__module__.partition(".")[0] in _FRAMEWORKS for kind in type(optimizer).__mro__)
