"""``param_groups``: which parameters of a model are rescaled, which are decayed, and what an output channel is.

After Algorithm 1 of Liu et al., *Weight Rescaling*: convolution and fully connected weights are rescaled and not
decayed, the parameters of normalisation layers are decayed and not rescaled, everything else is left alone.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fastwrs.options import Axis, Rescale, Shrink, checked, checked_real, common_axis

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_MHA_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

_PLAIN, _NORM, _SKIP = "plain", "norm", "skip"
Role = tuple[Literal["rescale"], Axis] | Literal["plain", "norm", "skip"]
"""Rescaled along an axis; neither rescaled nor decayed; decayed; taken out of rescaling wherever else it appears."""


def param_groups(
    model: nn.Module,
    *,
    rescale: Rescale | None = Rescale(),  # noqa: B008 (frozen)
    shrink: Shrink | None = None,
    weight_decay: float = 0.0,
    head: str | tuple[str, ...] = "rescale",
    norm_types: type[nn.Module] | tuple[type[nn.Module], ...] = (),
) -> list[dict[str, Any]]:
    """Sorts the parameters of a model into param groups for a fastwrs optimizer. Every parameter is in exactly one.

    ========  =======  =======================================================================================
    rescaled  decayed  parameter
    ========  =======  =======================================================================================
    yes       no       weight of ``Linear``, ``Conv*d``, ``ConvTranspose*d`` with ``groups=1``, ``Conv1D`` of
                       transformers; ``in_proj_weight`` and ``q/k/v_proj_weight`` of ``MultiheadAttention``
    no        yes      all of a normalisation layer (torch's and ``norm_types``)
    no        no       biases, embeddings, recurrent, parametrized and complex weights, the rest
    ========  =======  =======================================================================================

    An output channel of ``ConvTranspose*d`` lies in dimension 1, so there ``"out"`` becomes every dimension but 1, and
    ``"in"`` becomes dimension 0. With ``groups > 1`` it is not rescaled, and a warning names it. A convolution with one
    input channel per group (depthwise) takes ``"out"`` where the rest takes ``"in"``, which would leave only signs;
    so does a ``ConvTranspose*d`` with one input channel, and ``"out"`` means there what it says above. GPT-2's
    ``Conv1D`` is a ``Linear`` with a transposed weight: its output channels lie in dimension 1 too.
    A tied parameter appears once, in its first role; but where any of its roles is a skipped head, it is left alone.

    Args:
        model: the model; its parameters may be frozen or on any device.
        rescale: the option of the rescaled groups, or None.
        shrink: the option of the same groups, or None; it needs the axis that ``rescale`` has.
        weight_decay: the decay of the normalisation layers; all other groups get 0.
        head: ``"rescale"`` treats the head, the last ``Linear`` in ``model.named_modules()``, like the rest;
            ``"skip"`` leaves it alone; a tuple of module names leaves these modules alone, with what they contain,
            except that normalisation layers among them stay decayed.
        norm_types: further classes of normalisation layers.

    Returns:
        Param groups with ``params``, ``param_names``, ``rescale``, ``shrink`` and ``weight_decay``; none is empty.

    Raises:
        TypeError, ValueError: an option is not allowed; the message names it.

    Example:
        >>> layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> for group in fastwrs.param_groups(layers, weight_decay=1e-4):
        ...     print(group["param_names"], group["rescale"] is not None, group["weight_decay"])
        ['0.weight'] True 0.0
        ['1.weight', '1.bias'] False 0.0001
        ['0.bias'] False 0.0

    Source: Liu et al., *Weight Rescaling*, Algorithm 1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    axis = common_axis(checked(Rescale, rescale), checked(Shrink, shrink))
    decay = checked_real(weight_decay, "weight_decay")
    if decay < 0:
        raise ValueError(f"weight_decay must be >= 0, got {weight_decay!r}")
    norms = norm_types if isinstance(norm_types, tuple) else (norm_types,)
    if not all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in norms):
        raise TypeError(f"norm_types must be module classes, got {norm_types!r}")
    roles = _roles(model, axis, _skipped(model, head), (*_NORMS, *norms))

    groups: dict[Role, dict[str, Any]] = {}
    for name, param in model.named_parameters():
        role = roles.get(param, _PLAIN)
        if role == _SKIP:
            role = _PLAIN
        if role not in groups:
            scaled = isinstance(role, tuple)
            groups[role] = {
                "params": [],
                "param_names": [],
                "rescale": replace(rescale, axis=role[1]) if scaled and rescale else None,
                "shrink": replace(shrink, axis=role[1]) if scaled and shrink else None,
                "weight_decay": decay if role == _NORM else 0.0,
            }
        groups[role]["params"].append(param)
        groups[role]["param_names"].append(name)
    order = sorted(groups, key=lambda role: (not isinstance(role, tuple), role == _PLAIN))  # stable within a kind
    return [groups[role] for role in order]


def _skipped(model: nn.Module, head: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names of the modules that are left alone."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(head, str):
        if head not in ("rescale", "skip"):
            raise ValueError(f"head must be 'rescale', 'skip' or a tuple of module names, got {head!r}")
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        return tuple(linear[-1:]) if head == "skip" else ()
    if not isinstance(head, tuple) or not all(isinstance(name, str) for name in head):
        raise TypeError(f"head must be 'rescale', 'skip' or a tuple of module names, got {head!r}")
    if unknown := [name for name in head if name not in modules]:
        raise ValueError(f"head: the model has no module {', '.join(map(repr, unknown))}")
    return head


def _roles(
    model: nn.Module, axis: Axis | None, skipped: tuple[str, ...], norms: tuple[type[nn.Module], ...]
) -> dict[nn.Parameter, Role]:
    """The role of every parameter that some module uses: its first one, unless a later one is a skip."""
    roles: dict[nn.Parameter, Role] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        alone = any(path == name or not name or path.startswith(f"{name}.") for name in skipped)
        for key, param in module.named_parameters(recurse=False, remove_duplicate=False):
            role = _NORM if isinstance(module, norms) else _weight_role(module, key, path, axis)
            if param.dtype.is_complex:
                role = _PLAIN
            if alone and role != _NORM:
                role = _SKIP
            if param not in roles or role == _SKIP:
                roles[param] = role
    return roles


def _weight_role(module: nn.Module, key: str, path: str, axis: Axis | None) -> Role:
    """The role that a parameter has by its layer alone."""
    # The exact names leave out what torch's old weight_norm and spectral_norm put in their place; parametrizations
    # move the weight into a module of their own.
    if isinstance(module, nn.MultiheadAttention):
        weight = key in _MHA_WEIGHTS
    else:
        weight = key == "weight" and (isinstance(module, (nn.Linear, _ConvNd)) or _is_conv1d(module))
    if not weight or axis is None:
        return _PLAIN
    if isinstance(module, _ConvTransposeNd) and module.groups > 1:
        warnings.warn(
            f"{path or 'the model'}: the weight of a {type(module).__name__} with groups={module.groups} is not "
            "rescaled or shrunk: no axis describes its output channels",
            stacklevel=4,
        )
        return _PLAIN
    if axis == "in" and isinstance(module, _ConvNd) and module.in_channels == module.groups:
        axis = "out"
    if isinstance(module, _ConvTransposeNd):
        axis = _transposed(axis, len(module.kernel_size) + 2)
    if _is_conv1d(module):
        axis = _transposed(axis, 2)
    return "rescale", axis


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is the layer of GPT-2 and its kin. Known by its name: transformers need not be installed."""
    names = {(kind.__module__, kind.__name__) for kind in type(module).__mro__}
    return ("transformers.pytorch_utils", "Conv1D") in names


def _transposed(axis: Axis, ndim: int) -> Axis:
    """The axis for a weight whose output channels lie in dimension 1, and its input channels in dimension 0."""
    if axis == "out":
        return tuple(dim for dim in range(ndim) if dim != 1)
    return (0,) if axis == "in" else axis
