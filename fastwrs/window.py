"""``WeightDecayWindow``: weight decay in some steps of a training only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from torch.optim import Optimizer

from fastwrs.options import checked_whole, checked_window
from fastwrs.wrapper import unwrapped

_KEY, _OWN = "weight_decay", "initial_weight_decay"
_taken: WeakSet[Optimizer] = WeakSet()
"""Optimizers that have a window: two would undo each other."""


class WeightDecayWindow:
    """Weight decay in the steps ``start <= t`` with (``stop is None`` or ``t < stop``), and none in the others.

    t counts from 1, and so do the steps of :class:`fastwrs.Rescale`, whose window is written in the same way. Here it
    is one count for the whole optimizer: :meth:`step` is called once after each step of the optimizer, as that of a
    scheduler. In a training of 200 epochs with n steps each, "decay in the first 60 epochs" is ``stop=60 * n + 1``.

    It sets ``group["weight_decay"]`` of every param group, to the group's own value while the window is open and to 0
    otherwise. A group's own value is what it had when the window first saw it: when the window was made, or for a group
    that came later, before the step that followed. It is kept in ``group["initial_weight_decay"]``, as schedulers keep
    ``initial_lr``, and so is in the optimizer's state dict. The schedulers of ``torch.optim.lr_scheduler`` leave weight
    decay alone, so both go together. A captured CUDA graph keeps the weight decay of its capture.

    To resume, load the optimizer's state dict and the window's, in any order.

    Args:
        optimizer: any optimizer whose param groups have ``weight_decay``, of torch or of fastwrs, or the wrapper that a
            training framework has put around one.
        start, stop: the first step of the window, an int >= 0, and the first step after it, an int > start (None: it
            never closes).

    Raises:
        TypeError, ValueError: an argument is not allowed; the message names it.

    Example:
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        >>> window = fastwrs.WeightDecayWindow(optimizer, stop=60 * len(loader) + 1)
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     loss_fn(model(x), y).backward()
        ...     optimizer.step()
        ...     window.step()

    Source: Liu et al., *Weight Rescaling*, Figs. 1 and 6 ("WD init": weight decay in epochs 0 to 60 of 200).
    """

    optimizer: Optimizer
    start: int
    stop: int | None
    steps: int
    """How many steps are over: the next one is t = steps + 1."""
    _hooks: tuple[Any, ...] = ()

    def __init__(self, optimizer: Optimizer, start: int = 0, stop: int | None = None) -> None:
        optimizer = unwrapped(optimizer)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"WeightDecayWindow: optimizer must be an Optimizer, got {type(optimizer).__name__}")
        if _KEY not in optimizer.defaults and not all(_KEY in group for group in optimizer.param_groups):
            raise ValueError(f"WeightDecayWindow: {type(optimizer).__name__} has no weight_decay")
        if optimizer in _taken:
            raise ValueError("WeightDecayWindow: the optimizer has a window already; remove() it before another comes")
        self.optimizer, self.steps = optimizer, 0
        self.start, self.stop = checked_window(start, stop, "WeightDecayWindow")
        self._attach()
        self._apply()

    @property
    def open(self) -> bool:
        """Whether the next step decays."""
        return self.start <= self.steps + 1 and (self.stop is None or self.steps + 1 < self.stop)

    def step(self) -> None:
        """Says that a step of the optimizer is over."""
        self.steps += 1
        self._apply()

    def remove(self) -> None:
        """Gives every param group its own weight decay back, and leaves the optimizer alone."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()
        _taken.discard(self.optimizer)
        for group in self.optimizer.param_groups:
            group[_KEY] = group.pop(_OWN, group[_KEY])

    def state_dict(self) -> dict[str, Any]:
        """The window, and the number of steps that are over."""
        return {"start": self.start, "stop": self.stop, "steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads a state dict; the saved window wins.

        Raises:
            ValueError, TypeError: the dict does not fit. The message says where; nothing has changed.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"WeightDecayWindow: a state dict must be a mapping, got {state_dict!r}")
        lacking = [key for key in ("start", "stop", "steps") if key not in state_dict]
        if lacking:
            raise ValueError(f"WeightDecayWindow: the state dict lacks {', '.join(map(repr, lacking))}")
        window = checked_window(state_dict["start"], state_dict["stop"], "WeightDecayWindow")
        steps = checked_whole(state_dict["steps"], "WeightDecayWindow: steps")
        (self.start, self.stop), self.steps = window, steps
        self._apply()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": len(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _hooks=())
        if state["_hooks"]:
            self._attach()

    def __repr__(self) -> str:
        return f"WeightDecayWindow(start={self.start}, stop={self.stop}, steps={self.steps})"

    def _attach(self) -> None:
        # Before each step, since a group may have come after the last one, or a state dict been loaded.
        self._hooks = (
            self.optimizer.register_step_pre_hook(lambda *_: self._apply()),
            self.optimizer.register_load_state_dict_pre_hook(_with_own_values),
        )
        _taken.add(self.optimizer)

    def _apply(self) -> None:
        if not self._hooks:
            return  # removed
        is_open = self.open
        for group in self.optimizer.param_groups:
            if _OWN not in group:
                group[_OWN] = group.get(_KEY, self.optimizer.defaults.get(_KEY))
            group[_KEY] = group[_OWN] if is_open else 0.0


def _with_own_values(_optimizer: Optimizer, state_dict: Any) -> Any:
    """An optimizer's state dict; what it has of a run without a window are own values."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return state_dict  # the optimizer will say what is wrong
    own = [{_OWN: group[_KEY], **group} if _KEY in group else group for group in groups]
    return {**state_dict, "param_groups": own}
