"""The lives that are lived in ``fuzz.py`` and drawn in ``lives.py``, as plain data, and the tensors in them.

The ``repr`` of a ``Life`` is the code that makes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from calls import place
from torch import Tensor

Options = dict[str, Any]
LEAST = 1 / 4
"""The share of a tensor's root mean square that each of its weights has at least, unless it is 0."""


@dataclass(frozen=True)
class Scalar:
    """A hyperparameter that is given as a tensor."""

    value: float
    dtype: str = "float32"
    shape: tuple[int, ...] = ()

    def tensor(self) -> Tensor:
        return torch.full(self.shape, self.value, dtype=getattr(torch, self.dtype))


@dataclass(frozen=True)
class Weight:
    """A parameter."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    grad_dtype: str | None = None
    """None: that of the parameter."""
    layout: str = "c"
    data: str = "plain"
    """"plain", "sparse" (a third are zeros), "const", "zero_row" (the first of dimension 0)."""
    size: float = 1.0
    """What weights and gradients are multiplied by."""


@dataclass(frozen=True)
class Group:
    """A param group, and the options that it is made with."""

    weights: tuple[Weight, ...]
    options: Options = field(default_factory=dict)


@dataclass(frozen=True)
class Grad:
    """A gradient that a step gets."""

    data: str = "plain"
    """"plain", "zero", "sparse", a key of ``SIZES``, "missing", or "kept": the one that is there, or none."""
    layout: str = "c"
    """One of ``calls.LAYOUTS``, or "expanded": the elements along dimension 0 are one."""


@dataclass(frozen=True)
class Step:
    """A step. The parameters take the gradients in turn."""

    grads: tuple[Grad, ...] = (Grad(),)
    seed: int = 0
    grad_scale: float | None = None
    found_inf: float | None = None
    closure: bool = False


@dataclass(frozen=True)
class Reload:
    """A state dict through a file, into the same optimizer or into a new one with parameters of its own."""

    anew: bool = True
    layout: str = "c"
    """Of the new parameters."""
    late: int = 0
    """What is added to every step count in the file."""


@dataclass(frozen=True)
class Copy:
    """Life goes on with a copy; the original has to stay as it is."""

    pickled: bool = False


@dataclass(frozen=True)
class Add:
    """A param group is added."""

    group: Group


@dataclass(frozen=True)
class Change:
    """Options of a param group change. A learning rate that is a tensor changes in place."""

    group: int
    options: Options


@dataclass(frozen=True)
class ZeroGrad:
    """The gradients go, or become zero."""

    set_to_none: bool = True


@dataclass(frozen=True)
class Watch:
    """A monitor takes the place of the one that there is; None: of none."""

    every: int | None = 1


@dataclass(frozen=True)
class Rebind:
    """The ``.data`` of a parameter is replaced."""

    param: int
    layout: str = "c"


@dataclass(frozen=True)
class Bad:
    """Options that are wrong everywhere are refused, and nothing changes."""

    where: str
    """"new", "add", "change" or "load"; or "gradient": one is sparse, whatever the options."""
    options: Options = field(default_factory=dict)


Action = Step | Reload | Copy | Add | Change | ZeroGrad | Watch | Rebind | Bad


@dataclass(frozen=True)
class Life:
    """An optimizer and what becomes of it."""

    kind: str
    options: Options
    groups: tuple[Group, ...]
    actions: tuple[Action, ...]
    named: bool = False
    state_dtype: str | None = None


# ---- values ---------------------------------------------------------------------------------------------------------

SIZES = {"small": 2.0**-8, "large": 2.0**4, "tiny": 2.0**-30, "huge": 2.0**30}
"""What gradients are multiplied by, where the range of the type and of squares in fp32 has room for it."""


def _signed(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> Tensor:
    """Numbers of either sign with magnitudes of 2 ** low to 2 ** high, in fp64."""
    sign = 1 - 2 * (torch.rand(shape, generator=generator) < 0.5).double()
    return sign * 2 ** (low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64))


def scale(weight: Weight) -> float:
    """That of rows with norms near 1."""
    rows = weight.shape[0] if len(weight.shape) > 1 else 1
    return weight.size / math.sqrt(max(1, math.prod(weight.shape) // max(1, rows)))


def weights(weight: Weight, seed: int) -> Tensor:
    """The values of a new parameter."""
    generator = torch.Generator().manual_seed(seed)
    values = _signed(weight.shape, -1, 1, generator)
    if weight.data == "const":
        values = torch.ones_like(values)
    elif weight.data == "sparse":
        values = torch.where(torch.rand(weight.shape, generator=generator) < 0.33, 0.0, values)
    elif weight.data == "zero_row" and values.ndim:
        values[:1] = 0
    return values * scale(weight)


def gradient(weight: Weight, grad: Grad, seed: int) -> Tensor:
    """The values of a gradient of such a parameter."""
    generator = torch.Generator().manual_seed(seed)
    extreme = grad.data in ("tiny", "huge")
    fits = not extreme or (weight.size == 1 and weight.dtype != "float16")
    size = SIZES.get(grad.data, 1.0) if fits else 1.0
    values = _signed(weight.shape, -2, 1, generator) * 0.5 * scale(weight) * size
    if grad.data == "zero":
        values = torch.zeros_like(values)
    elif grad.data == "sparse":
        values = torch.where(torch.rand(weight.shape, generator=generator) < 0.33, 0.0, values)
    return values


def laid(values: Tensor, layout: str, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """A tensor in the layout, and the buffer that it lies in; what does not fit its shape is contiguous."""
    if layout == "expanded":
        return None, values[:1].to(dtype).expand(values.shape) if values.ndim else values.to(dtype)
    return place(values, "c" if layout == "cl" and values.ndim not in (4, 5) else layout, dtype, "cpu")


def lifted(values: Tensor, which: Tensor) -> Tensor:
    """The values, of which those that are far below their root mean square are made larger."""
    least = values.square().mean().sqrt() * LEAST
    return torch.where(which & (values.abs() < least), least.copysign(values), values)


def settled(values: Tensor, moving: Tensor, size: float, shifted: bool) -> Tensor:
    """Weights of which a tolerance can be derived: none is far below the others, and no channel is narrow.

    A weight that is all but 0 has hardly an ulp to lose, whatever its update was a sum of. A mean that is all but 0 has
    lost its own to the weights that it is a sum of, and a weight of 0 or of the mean shows it; so has the inverse of a
    deviation that is all but 0. A weight that is 0 and has momentum, ``moving``, becomes as large as ``size`` says.
    """
    if not values.numel():
        return values
    values = torch.where((values == 0) & moving, size, values)
    which = values != 0
    if shifted and values.ndim >= 2:
        rows = values.reshape(len(values), -1)
        largest, spread = rows.abs().amax(dim=1, keepdim=True), rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)
        signs = 1 - 2 * (torch.arange(rows.shape[1]) % 2).double()
        values = torch.where((spread > 0) & (spread < largest / 4), rows * signs, rows).reshape(values.shape)
        which |= (spread > 0).expand(rows.shape).reshape(values.shape)
        rows = lifted(values, which).reshape(rows.shape)
        beyond = rows - rows.mean(dim=1, keepdim=True)
        near = (beyond.abs() < spread / 16) & (spread > 0)
        return torch.where(near, rows + (spread / 8).copysign(beyond), rows).reshape(values.shape)
    return lifted(values, which)
