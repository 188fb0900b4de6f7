"""State dicts: how our options are saved, and how a saved dict becomes the states and groups of an optimizer.

Nothing here changes the optimizer. Loading is all or nothing because everything is converted first.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastwrs.options import Rescale, Shrink, from_plain, to_plain
from fastwrs.plan import STEP, incomplete, label, plain, state_dtype_for
from fastwrs.spec import Rule

if TYPE_CHECKING:
    from fastwrs.optim.base import FusedOptimizer

# Frameworks save more than state dicts, a module's arguments or whole param groups, and load it weights_only.
torch.serialization.add_safe_globals([Rescale, Shrink])

_SHARED = (
    "lr",
    "weight_decay",
    "decoupled_weight_decay",
    "maximize",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
)
"""Options that tell nothing about which optimizer a dict comes from; those of ``_OPTIONS`` neither."""
_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "rescale": functools.partial(from_plain, Rescale),
    "shrink": functools.partial(from_plain, Shrink),
    "shifted_l2": lambda plain: tuple(plain) if isinstance(plain, list) else plain,
}
"""The options that only we have, and what makes them of their saved form."""
_GATE = {"lr", "weight_decay", "eps", "delta", "wd_ratio", "nesterov"}
_AUTHORS = {"AdamP": _GATE | {"betas"}, "SGDP": _GATE | {"momentum", "dampening"}}
"""What the param groups of the package ``adamp`` have; ours of the same name have that and more."""

_LATE = "momentum_buffer"
"""The state that starts as the first gradient, which torch does where it is missing. Ours is there before."""


def options_to_plain(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """The hook on ``state_dict()``: writes ``rescale`` and ``shrink`` as plain dicts, ``shifted_l2`` as a list.

    It leaves out the momentum buffers of parameters whose every step was skipped.
    """
    state = state_dict["state"]
    late = any(slot.name == _LATE and slot.when for slot in optimizer.rule.slots)
    for key, values in state.items() if late else ():
        if isinstance(values, Mapping) and _LATE in values and STEP in values and bool(values[STEP] == 0):
            # `state` is torch's new dict; the dicts in it are the optimizer's own.
            state[key] = {name: value for name, value in values.items() if name != _LATE}
    for group in state_dict["param_groups"]:
        group.update({name: to_plain(group[name]) for name in _OPTIONS if name in group})


def converted(optimizer: FusedOptimizer, state_dict: Mapping[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    """The param groups and the state that the optimizer has after loading ``state_dict``.

    Raises:
        ValueError, TypeError: the dict belongs to another optimizer or other parameters; the message says what differs.
    """
    _check_form(state_dict)
    saved_groups = deepcopy(state_dict["param_groups"])
    _check_sizes(optimizer, saved_groups)

    groups = []
    by_us: list[bool] = []
    places: dict[Any, tuple[dict[str, Any], int, int]] = {}
    for g, (group, saved) in enumerate(zip(optimizer.param_groups, saved_groups, strict=True)):
        _check_kind(optimizer, saved, g)
        by_us.append("rescale" in saved)
        if not by_us[-1]:
            _read_timms(optimizer, saved, g)
        ids = saved.pop("params")
        saved.update({name: made_of(saved[name]) for name, made_of in _OPTIONS.items() if name in saved})
        merged = {**group, **saved}
        optimizer.check_group(merged, g)
        places.update({key: (merged, g, i) for i, key in enumerate(ids)})
        groups.append(merged)

    state: defaultdict[Any, Any] = defaultdict(dict)
    for key, values in state_dict["state"].items():
        if key not in places:
            state[key] = values  # belongs to no parameter: kept as it is, as in torch
            continue
        group, g, i = places[key]
        param = group["params"][i]
        if not isinstance(values, Mapping):
            raise ValueError(f"{label(group, g, i)}: its saved state must be a dict, got {type(values).__name__}")
        try:
            state[param] = _states(optimizer, param, values, by_us[g])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{label(group, g, i)}: {error}") from None
    return groups, state


def _check_form(state_dict: Mapping[str, Any]) -> None:
    """Refuses what is no state dict at all."""
    if lacking := [key for key in ("state", "param_groups") if key not in state_dict]:
        raise ValueError(f"the state dict has no {' and no '.join(map(repr, lacking))}")
    groups, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(state, Mapping):
        raise ValueError(f"'state' of the state dict must be a dict, got {type(state).__name__}")
    if not isinstance(groups, (list, tuple)):
        raise ValueError(f"'param_groups' of the state dict must be a list, got {type(groups).__name__}")
    for g, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(f"param group {g} of the state dict must be a dict with a list of 'params'")
        names = group.get("param_names")
        if names is not None and len(names) != len(group["params"]):
            raise ValueError(
                f"param group {g} of the state dict has {len(group['params'])} params and {len(names)} param_names"
            )


def _check_sizes(optimizer: FusedOptimizer, saved_groups: list[dict[str, Any]]) -> None:
    saved = [len(group["params"]) for group in saved_groups]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if len(saved) != len(own):
        raise ValueError(
            f"the state dict has a different number of parameter groups: {len(saved)}, the optimizer has {len(own)}"
        )
    for g, (theirs, ours) in enumerate(zip(saved, own, strict=True)):
        if theirs != ours:
            raise ValueError(
                f"the state dict has a parameter group that doesn't match the size of the optimizer's: "
                f"group {g} has {theirs} parameters there and {ours} here"
            )


def _check_kind(optimizer: FusedOptimizer, saved: Mapping[str, Any], g: int) -> None:
    """Refuses the groups of another optimizer.

    Those that share none of the options that are the rule's own; and those that have all options of another optimizer
    of torch or of ``adamp``, if these are more than ours, or just these: RAdam's are a part of Adam's, SGD's of SGDP's.
    """
    own = [name for name in optimizer.defaults if name not in (*_SHARED, *_OPTIONS)] or list(_OPTIONS)
    if not any(name in saved for name in own):
        raise ValueError(
            f"param group {g} of the state dict has none of {', '.join(own)}: it is not that of "
            f"{type(optimizer).__name__}. It has {', '.join(sorted(map(str, saved)))}"
        )
    ours, others = set(optimizer.defaults) - set(_OPTIONS), _keys_of_torch() | _AUTHORS
    there = set(saved) & ours.union(*others.values())  # without what schedulers and users add
    for name, keys in sorted(others.items(), key=lambda other: other[1] != there):  # the very one first
        another = keys != ours and name.lower() != optimizer.rule.name
        if another and (there == keys or (keys <= there and not keys <= ours)):
            raise ValueError(
                f"param group {g} of the state dict has the options of {name}: it is not that of "
                f"{type(optimizer).__name__}. It has {', '.join(sorted(map(str, there)))}"
            )


def _read_timms(optimizer: FusedOptimizer, saved: dict[str, Any], g: int) -> None:
    """Says of a group of timm's optimizers what we call otherwise, and refuses what we cannot do.

    Its groups have ``caution`` since 1.0.26, and from then on its SGDP leaves the momentum buffer unprojected.
    """
    if saved.get("caution"):
        raise ValueError(
            f"param group {g} of the state dict has caution={saved['caution']!r}: {type(optimizer).__name__} has no "
            f"cautious updates, and would train differently"
        )
    if "caution" in saved and "project_momentum" in optimizer.defaults:
        saved.setdefault("project_momentum", False)


@functools.cache
def _keys_of_torch() -> dict[str, set[str]]:
    """What the param groups of every optimizer of torch have beside their parameters."""
    found = {}
    for name, kind in vars(torch.optim).items():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            (group,) = kind([torch.zeros(1, 1)]).param_groups  # type: ignore[call-arg]
            found[name] = set(group) - {"params"}
    return found


def _states(optimizer: FusedOptimizer, param: Tensor, values: Mapping[str, Any], by_us: bool) -> dict[str, Any]:
    """The saved states of one parameter, in our dtypes and with memory of their own.

    States that are not ours are kept as they are if fastwrs wrote them: then they are the user's.
    """
    rule: Rule = optimizer.rule
    known = {*(slot.name for slot in rule.slots), STEP}
    names = {slot.elsewhere: slot.name for slot in rule.slots if slot.elsewhere is not None}
    if twice := [f"{theirs!r} and {ours!r}" for theirs, ours in names.items() if theirs in values and ours in values]:
        raise ValueError(f"its saved state has {twice[0]}, which are the same")
    values = {names.get(name, name): value for name, value in values.items()}
    saved = {name: value for name, value in values.items() if value is not None and name in known}
    others = {name: value for name, value in values.items() if value is not None and name not in known}
    if others and not by_us:
        unknown = sorted(map(str, others))
        raise ValueError(f"{type(optimizer).__name__} keeps no state {', '.join(map(repr, unknown))}")
    if lacking := incomplete(rule, saved):
        raise ValueError(f"its saved state lacks {lacking}")
    states: dict[str, Any] = {}
    if saved:
        # A momentum buffer without a step count comes from torch.optim.SGD or SGDP: its first step is over.
        states[STEP] = torch.tensor(_count(saved.get(STEP, 1)), dtype=torch.float32, device=param.device)
    for name, value in saved.items():
        if name != STEP:
            states[name] = _moment(optimizer, param, name, value)
    for name, value in others.items():
        states[name] = value.detach().to(param.device, copy=True) if isinstance(value, Tensor) else deepcopy(value)
    return states


def _moment(optimizer: FusedOptimizer, param: Tensor, name: str, value: Any) -> Tensor:
    turns = param.is_complex()
    fits = isinstance(value, Tensor) and value.layout == torch.strided
    if not fits or not (value.is_complex() if turns else value.is_floating_point()):
        what = f"{value.dtype}, {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        kind = "complex" if turns else "real"
        raise ValueError(f"its saved state {name!r} must be a dense tensor of {kind} numbers, got {what}")
    if torch.nn.parameter.is_lazy(param):  # it has no shape yet to compare with
        return value.detach().to(param.device, state_dtype_for(param, optimizer.state_dtype), copy=True)
    if value.shape != param.shape:
        raise ValueError(f"its saved state {name!r} has the shape {tuple(value.shape)}")
    own = torch.empty_like(plain(param), dtype=state_dtype_for(param, optimizer.state_dtype), requires_grad=False)
    return own.copy_(value.detach())


def _count(step: Any) -> float:
    """A saved step count as a number; old dicts have a plain one, newer ones a tensor."""
    if isinstance(step, Tensor) and step.numel() != 1:
        raise ValueError(f"its saved step has the shape {tuple(step.shape)}, not one element")
    if isinstance(step, Tensor) and (step.is_complex() or step.device.type == "meta"):
        raise ValueError(f"its saved step is a {step.dtype} tensor on {step.device}, not a count")
    count = float(step)
    if not math.isfinite(count) or count < 0:
        raise ValueError(f"its saved step is {count}, not a count")
    return count
