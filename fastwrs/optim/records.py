"""The hyperparameter records of an optimizer's param groups: read, checked and remembered for the next step.

A param group may change at any time, so its options are looked at in every step. What did not change is recognised by
the identity of its values; only a group with a new value is read and checked again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from fastwrs.options import Rescale, Shrink, checked, common_axis
from fastwrs.plan import label, shape_of
from fastwrs.spec import COMMON, NO_STOP, Hyper, Rule

Group = Mapping[str, Any]
Numbers = Callable[[Group], Mapping[str, Any]]

_WORDS = {
    "lr": "learning rate",
    "eps": "epsilon value",
    "beta1": "beta parameter at index 0",
    "beta2": "beta parameter at index 1",
    "shifted_l2_lam": "lam of shifted_l2",
    "shifted_l2_eps": "eps of shifted_l2",
}


class Records:
    """The records of all groups as one flat list of numbers, and the options that shape a plan.

    Args:
        rule: the rule whose record this is.
        names: the options of a group that a record depends on, without lr.
    """

    def __init__(self, rule: Rule, names: Sequence[str]) -> None:
        self.flat: list[float] = []
        self.lrs: list[Tensor] = []
        self.shapes: list[Any] = []
        self.rule = rule
        self._values = itemgetter(*names)
        self._seen: list[Any] = []  # per group: lr and the other values the record was made from; None: read them again

    def refresh(self, groups: Sequence[Group], numbers: Numbers) -> None:
        """Brings the records up to date. On an error nothing is remembered of the group at fault.

        ``numbers`` gives the rule's own hyperparameters of a group by the names of the record. It is not kept: it knows
        the optimizer, which would then be freed by Python's collector only.
        """
        width = len(self.rule.record)
        if len(groups) != len(self._seen):
            self._seen, self.shapes = [None] * len(groups), [None] * len(groups)
            self.flat = [0.0] * (width * len(groups))
        if self.lrs:
            self.lrs.clear()
        for g, group in enumerate(groups):
            seen, values, lr = self._seen[g], self._values(group), group["lr"]
            if seen is None or not all(map(is_, values, seen[1])):
                self._seen[g] = None
                record = read(self.rule, group, numbers(group), g)
                self.shapes[g] = shape_of(self.rule, group)
                self.flat[g * width : (g + 1) * width] = record
                # A tensor or a list can change its content and stay the same object.
                self._seen[g] = (lr, values) if all(map(_constant, values)) else None
            elif lr is not seen[0]:
                self.flat[g * width] = _checked_lr(lr, g)
                self._seen[g] = lr, values
            if isinstance(lr, Tensor):
                _checked_lr(lr, g)  # its content may have changed
                self.flat[g * width : g * width + 2] = (0.0, float(len(self.lrs)))
                wide = lr if lr.dtype in (torch.float32, torch.float64) else lr.float()
                self.lrs.append(wide.detach().reshape(()))
            else:
                self.flat[g * width + 1] = -1.0

    def on(self, device: torch.device) -> tuple[list[float], list[Tensor]]:
        """The records and the learning rates for a launch on this device.

        A learning rate on the CPU goes to another device as a number: it is at hand, and a copy would be waited for.
        """
        if all(lr.device == device for lr in self.lrs):
            return self.flat, self.lrs
        flat, width, moved = list(self.flat), len(self.rule.record), []
        for place in range(0, len(flat), width):
            if flat[place + 1] < 0:
                continue
            lr = self.lrs[int(flat[place + 1])]
            if lr.device.type == "cpu":
                flat[place : place + 2] = (float(lr), -1.0)
            else:
                flat[place + 1] = float(len(moved))
                moved.append(lr.to(device))
        return flat, moved


def read(rule: Rule, group: Group, numbers: Mapping[str, Any], g: int | None = None) -> list[float]:
    """The record of one param group, every option checked. Also takes an optimizer's defaults, which have no params.

    Raises:
        ValueError: an option is out of its bounds; the message names it, its value, what is allowed, and the group.
        TypeError: ``rescale`` or ``shrink`` is of another type.
    """
    if group["differentiable"]:
        raise ValueError(
            f"differentiable=True is not supported: the step is one kernel that autograd cannot see into{_where(g)}"
        )
    rescale, shrink = checked(Rescale, group["rescale"]), checked(Shrink, group["shrink"])
    try:
        common_axis(rescale, shrink)
    except ValueError as error:
        first = f"{label(group, g or 0, 0)}: " if group.get("params") else ""
        raise ValueError(f"{first}{error}{_where(g)}") from None
    values = {"maximize": group["maximize"], **_norm_control(rescale, shrink), **numbers}
    record = [number(hyper, values[hyper.name], g) for hyper in rule.record if hyper.name not in ("lr", "lr_tensor")]
    return [_checked_lr(group["lr"], g), -1.0, *record]


def number(hyper: Hyper, value: Any, g: int | None = None) -> float:
    """One checked number of a record; ``value`` may be a CPU tensor of one element."""
    given = value
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {hyper.name} must be 1-element, got shape {tuple(value.shape)}{_where(g)}")
        if value.device.type != "cpu":
            raise ValueError(f"Tensor {hyper.name} must be on the CPU, it is on {value.device}{_where(g)}")
        value = value.item()
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError
        value = float(value)
    except OverflowError:
        raise ValueError(f"Invalid {_word(hyper.name)}: too large for a float{_where(g)}") from None
    except (TypeError, ValueError):
        raise ValueError(f"{_lead(hyper.name, given)}: it must be a number{_where(g)}") from None
    if (hyper.name == "stop" and value == NO_STOP) or hyper.why_not(value) is None:
        return value
    raise ValueError(f"{_lead(hyper.name, given)}: {hyper.name} {hyper.why_not(value)}{_where(g)}")


def _checked_lr(lr: Any, g: int | None) -> float:
    """The learning rate; one on a device is not looked at, which would wait for the device."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu":
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}{_where(g)}")
        return 0.0
    return number(COMMON[0], lr, g)


def _norm_control(rescale: Rescale | None, shrink: Shrink | None) -> dict[str, float]:
    """The numbers of the two options as the kernels read them; without an option, those that switch it off."""
    numbers = {"every": 0, "start": 0, "stop": NO_STOP, "target": 1.0, "rate": 0.0, "power": 1.0}
    if rescale is not None:
        stop = NO_STOP if rescale.stop is None else rescale.stop
        numbers |= {"every": rescale.every, "start": rescale.start, "stop": stop, "target": rescale.target}
    if shrink is not None:
        numbers |= {"rate": shrink.rate, "power": shrink.power}
    return numbers


def _lead(name: str, value: Any) -> str:
    shown = value.item() if isinstance(value, Tensor) else value
    return f"Invalid {_word(name)}: {shown!r}"


def _word(name: str) -> str:
    return _WORDS.get(name, f"{name} value")


def _where(g: int | None) -> str:
    return "" if g is None else f" (param group {g})"


def _constant(value: Any) -> bool:
    """Whether a value that is the same object is also the same value."""
    if isinstance(value, tuple):
        return all(map(_constant, value))
    return value is None or isinstance(value, (bool, int, float, str, Rescale, Shrink))


def on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    """The tensor on the device where a launch needs it."""
    return tensor if tensor is None or tensor.device == device else tensor.to(device)
