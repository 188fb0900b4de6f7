"""The options ``Rescale``, ``Shrink`` and ``shifted_l2``, and what an axis means for a tensor of so many dimensions.

This module imports nothing of ours.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

Axis = str | int | tuple[int, ...]

NAMED_AXES = ("out", "in", "tensor")
ALL_DIMS = -1
"""The bitmask of a tensor that is one single norm group."""
NO_GROUPS = 0
"""The bitmask of a tensor that is neither rescaled nor shrunk."""


@dataclass(frozen=True)
class Rescale:
    """Weight rescaling (WRS): set the norm of every group to ``target``, ``w <- w * target / |w|``.

    It runs after the update of the steps with ``t % every == 0``, ``start <= t`` and (``stop is None`` or
    ``t < stop``), where t counts the steps of the parameter from 1. A group whose norm is 0 or not finite stays as it
    is. Source: Liu, Cui, Wan, Mao, Chan, *Weight Rescaling: Effective and Robust Regularization for Deep Neural
    Networks with Batch Normalization*, Algorithm 1.

    Rescaling weights leaves the running statistics of BatchNorm stale: run ``torch.optim.swa_utils.update_bn`` before
    an evaluation in eval mode. Weight decay on a rescaled group is allowed, but isotropic decay before an exact
    projection changes only the size of the step, not the norm.

    Args:
        every: rescale each time the step count is a multiple of this; an int >= 1.
        axis: ``"out"``: one norm per index of dimension 0 (WRS). ``"in"``: the norm over dimension 1, one per output
            channel and kernel position (WRS(IC)); on a 2-D weight the same as ``"out"``. ``"tensor"``: one norm.
            An int or a tuple of ints: exactly these dimensions are reduced, as in
            ``torch.linalg.vector_norm(dim=...)``. ``"out"`` and ``"in"`` need at least 2 dimensions.
        target: the norm that every group gets; finite and > 0.
        start, stop: the first step of the window, an int >= 0, and the first step after it, an int > start (None: it
            never closes).

    Raises:
        TypeError, ValueError: an option that is not allowed; the message names it.

    Example:
        >>> fastwrs.Rescale(every=10, axis="in")
        Rescale(every=10, axis='in', target=1.0, start=0, stop=None)
    """

    every: int = 1
    axis: Axis = "out"
    target: float = 1.0
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        _put(self, "every", checked_whole(self.every, "Rescale: every", low=1))
        _put(self, "axis", _checked_axis(self))
        _put(self, "target", _real(self, "target"))
        if self.target <= 0:
            raise ValueError(f"Rescale: target must be > 0, got {self.target!r}")
        for name, step in zip(("start", "stop"), checked_window(self.start, self.stop, "Rescale"), strict=True):
            _put(self, name, step)


@dataclass(frozen=True)
class Shrink:
    """Adaptive weight shrinking (AWS): ``w <- w * max(0, 1 - lr * rate * n ** power)``.

    n is the norm that the group had before the step. ``power=1`` is AWS, ``power=0`` acts like weight decay. Only the
    abstract of the paper is public, so this formula is our reading of it. A step that rescales skips the shrink, which
    would be erased. Source: Li, Chen and Yang, *Understanding the Disharmony between Weight Normalization Family and
    Weight Decay*, AAAI 2020.

    Args:
        rate: how strongly large norms are pulled down; finite and >= 0.
        axis: the norm groups, as for :class:`fastwrs.Rescale`; a group with both options needs the same axis in both.
        power: the power of the norm; finite.

    Raises:
        TypeError, ValueError: an option that is not allowed; the message names it.

    Example:
        >>> groups = fastwrs.param_groups(model, rescale=None, shrink=fastwrs.Shrink(rate=0.01))
        >>> optimizer = fastwrs.SGD(groups, lr=0.1)
    """

    rate: float
    axis: Axis = "out"
    power: float = 1.0

    def __post_init__(self) -> None:
        _put(self, "rate", _real(self, "rate"))
        if self.rate < 0:
            raise ValueError(f"Shrink: rate must be >= 0, got {self.rate!r}")
        _put(self, "axis", _checked_axis(self))
        _put(self, "power", _real(self, "power"))


Option = TypeVar("Option", Rescale, Shrink)


def shifted_pair(value: Any) -> tuple[Any, Any]:
    """``(lam, eps)`` of the option ``shifted_l2``, whatever they are; zeros for None. Bounds are in ``fastwrs.spec``.

    Raises:
        TypeError, ValueError: it is neither None nor a pair.
    """
    if value is None:
        return 0.0, 0.0
    if not isinstance(value, (tuple, list)) or any(isinstance(number, bool) for number in value):
        raise TypeError(f"Invalid shifted_l2: {value!r}: it must be None or two numbers (lam, eps)")
    if len(value) != 2:
        raise ValueError(f"Invalid shifted_l2: {value!r}: it must be None or two numbers (lam, eps)")
    return value[0], value[1]


def to_plain(option: Rescale | Shrink | tuple[Any, Any] | None) -> dict[str, Any] | list[float] | None:
    """The option as a dict or list of numbers, strings and lists, which ``torch.load(weights_only=True)`` accepts."""
    if option is None:
        return None
    if isinstance(option, (tuple, list)):
        return [float(number) for number in option]
    plain = {field.name: getattr(option, field.name) for field in fields(option)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def from_plain(kind: type[Option], plain: Option | Mapping[str, Any] | None) -> Option | None:
    """The inverse of :func:`to_plain`; an option that is one already, and None, pass through."""
    if plain is None or isinstance(plain, kind):
        return plain
    if not isinstance(plain, Mapping):
        raise TypeError(f"{kind.__name__.lower()} must be a dict, fastwrs.{kind.__name__} or None, got {plain!r}")
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(plain) - known):
        raise ValueError(f"{kind.__name__} has no option {', '.join(map(repr, unknown))}")
    return kind(**plain)


def checked(kind: type[Option], value: object) -> Option | None:
    """``value`` if it is a ``kind`` or None; otherwise a TypeError that says what is wanted."""
    if value is None or isinstance(value, kind):
        return value
    raise TypeError(f"{kind.__name__.lower()} must be None or fastwrs.{kind.__name__}(...), got {value!r}")


def common_axis(rescale: Rescale | None, shrink: Shrink | None) -> Axis | None:
    """The axis of a param group with these options, None if its weights have no norm groups."""
    if rescale is not None and shrink is not None and rescale.axis != shrink.axis:
        raise ValueError(
            f"rescale and shrink of one param group need the same axis, got {rescale.axis!r} and {shrink.axis!r}"
        )
    option = rescale or shrink
    return None if option is None else option.axis


def reduced_dims(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The dimensions that the norms of a tensor with ``ndim`` dimensions are taken over, in ascending order.

    Raises:
        ValueError: the tensor does not have this axis. The message says why; the caller names the tensor.
    """
    if axis == "tensor":
        return tuple(range(ndim))
    if isinstance(axis, str):
        if ndim < 2:
            raise ValueError(f"axis {axis!r} needs at least 2 dimensions")
        return tuple(range(1, ndim)) if axis == "out" else (1,)
    dims = (axis,) if isinstance(axis, int) else axis
    for dim in dims:
        if not -ndim <= dim < ndim:
            raise ValueError(f"axis {axis!r} has dimension {dim}, but there are {ndim} dimensions")
    normal = tuple(sorted(dim % ndim for dim in dims))
    if len(set(normal)) < len(normal):
        raise ValueError(f"axis {axis!r} names a dimension twice")
    return normal


def axis_mask(axis: Axis | None, ndim: int) -> int:
    """What the kernels get: a bitmask of the reduced dimensions, or ``ALL_DIMS``, or ``NO_GROUPS`` for no axis."""
    if axis is None:
        return NO_GROUPS
    dims = reduced_dims(axis, ndim)
    return ALL_DIMS if len(dims) == ndim else sum(1 << dim for dim in dims)


def measured_mask(mask: int, ndim: int) -> int:
    """The mask by which a tensor is measured: its own, or where it is neither rescaled nor shrunk that of ``"out"``.

    A tensor of less than two dimensions is then one group. Such a mask changes nothing in a step: a record without
    rescale and shrink does not project.
    """
    return mask or axis_mask("out" if ndim >= 2 else "tensor", ndim)


def masked_dims(mask: int, ndim: int) -> tuple[int, ...] | None:
    """The reduced dimensions that a bitmask stands for; None for ``NO_GROUPS``."""
    if mask == NO_GROUPS:
        return None
    return tuple(dim for dim in range(ndim) if mask >> dim & 1)


def checked_axis(axis: object, where: str) -> Axis:
    """``axis`` in its normal form (lists become tuples), or an error that begins with ``where``."""
    if isinstance(axis, str):
        if axis not in NAMED_AXES:
            raise ValueError(f"{where}: axis must be one of {NAMED_AXES}, an int or a tuple of ints, got {axis!r}")
        return axis
    many = isinstance(axis, (tuple, list))
    try:
        dims = tuple(_index(dim) for dim in (axis if many else (axis,)))  # type: ignore[union-attr]
    except TypeError:
        raise TypeError(f"{where}: axis must be one of {NAMED_AXES}, an int or a tuple of ints, got {axis!r}") from None
    if not dims:
        raise ValueError(f"{where}: axis must name at least one dimension, got {axis!r}")
    if len(set(dims)) < len(dims):
        raise ValueError(f"{where}: axis names a dimension twice: {axis!r}")
    return dims if many else dims[0]


def _checked_axis(option: Rescale | Shrink) -> Axis:
    return checked_axis(option.axis, type(option).__name__)


def _put(option: Rescale | Shrink, name: str, value: object) -> None:
    object.__setattr__(option, name, value)  # the class is frozen for users, not while it is built


def _index(value: Any) -> int:
    if isinstance(value, bool):  # True would silently mean dimension or step 1
        raise TypeError("bool is not an int here")
    return operator.index(value)


def checked_whole(value: Any, where: str, low: int = 0) -> int:
    """``value`` as an int that is at least ``low``, or an error that begins with ``where``."""
    try:
        number = _index(value)
    except TypeError:
        raise TypeError(f"{where} must be an int, got {value!r}") from None
    if number < low:
        raise ValueError(f"{where} must be >= {low}, got {value!r}")
    try:
        float(number)  # as which it travels to the kernels
    except OverflowError:
        raise ValueError(f"{where} is too large, an int of {number.bit_length()} bits") from None
    return number


def checked_window(start: Any, stop: Any, where: str) -> tuple[int, int | None]:
    """The first step and the one after the last, or an error that begins with ``where``."""
    first = checked_whole(start, f"{where}: start")
    if stop is None:
        return first, None
    end = checked_whole(stop, f"{where}: stop")
    if end <= first:
        raise ValueError(f"{where}: stop must be > start = {first}, or None, got {stop!r}")
    return first, end


def _real(option: Rescale | Shrink, name: str) -> float:
    return checked_real(getattr(option, name), f"{type(option).__name__}: {name}")


def checked_real(value: Any, where: str) -> float:
    """``value`` as a finite float, or an error that begins with ``where``."""
    if isinstance(value, (bool, str)):
        raise TypeError(f"{where} must be a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"{where} must be finite, and it is too large for a float") from None
    except (TypeError, ValueError):
        raise TypeError(f"{where} must be a number, got {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{where} must be finite, got {value!r}")
    return number
