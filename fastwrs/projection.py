"""Rescaling and norms outside of an optimizer: ``rescale_`` and ``channel_norms``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parameter import is_lazy

from fastwrs import dispatch
from fastwrs.options import Axis, axis_mask, checked_axis, checked_real, masked_dims
from fastwrs.plan import (
    LAZY,
    PROJECTED,
    name_of,
    overlapping,
    overlaps_itself,
    why_not_dtype,
    why_not_plain,
    why_not_target,
)


@torch.no_grad()
def rescale_(tensors: Tensor | Iterable[Tensor], axis: Axis = "out", target: float = 1.0) -> None:
    """Sets the norm of every group of every tensor to ``target``, in place: ``w <- w * target / |w|``.

    Use it once before the first step, so that training starts from rescaled weights. A group whose norm is 0 or not
    finite stays as it is. BatchNorm's running statistics do not follow: run ``torch.optim.swa_utils.update_bn`` before
    an evaluation.

    Args:
        tensors: a tensor or several, of any shape that has the axis, on any devices, fp32, fp64, fp16 or bf16. A tensor
            that is given twice is projected once.
        axis: the norm groups, as for :class:`fastwrs.Rescale`.
        target: the norm that every group gets; finite and > 0.

    Raises:
        TypeError, ValueError: an option is not allowed, or a tensor cannot be rescaled; the message names its index and
            shape, and no tensor has been changed.

    Example:
        >>> weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> fastwrs.rescale_(weight)
        >>> weight
        tensor([[0.6000, 0.8000],
                [0.0000, 1.0000]])

    Source: Liu et al., *Weight Rescaling*, Algorithm 1, lines 8 to 17.
    """
    target = checked_real(target, "rescale_: target")
    if target <= 0:
        raise ValueError(f"rescale_: target must be > 0, got {target!r}")
    given = _listed(tensors, "rescale_")
    masks = _masks(given, axis, "rescale_")
    for k, tensor in enumerate(given):
        if why := why_not_target(tensor, target):
            raise ValueError(f"rescale_: {_name(given, k)}: {why}")
        if overlaps_itself(tensor):
            raise ValueError(f"rescale_: {_name(given, k)} overlaps itself in memory (strides {tensor.stride()})")
    once = list({id(tensor): k for k, tensor in enumerate(given)}.values())
    if clash := overlapping([given[k] for k in once]):
        one, other = (_name(given, once[k]) for k in clash)
        raise ValueError(f"rescale_: {one} and {other} share memory")
    for backend, ks in _bundles([given[k] for k in once]):
        chosen = [once[k] for k in ks]
        backend.rescale_([given[k] for k in chosen], [masks[k] for k in chosen], target)
        increment_version([given[k] for k in chosen])


@torch.no_grad()
def channel_norms(tensors: Tensor | Iterable[Tensor], axis: Axis = "out") -> list[Tensor]:
    """The norm of every group of every tensor, as ``torch.linalg.vector_norm(t, dim=dims)``, one pass over all of them.

    Args:
        tensors: a tensor or several, as for :func:`rescale_`; expanded ones are fine.
        axis: the norm groups, as for :class:`fastwrs.Rescale`.

    Returns:
        A list with one detached tensor per given one, in order: the kept dimensions, fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: an option is not allowed, or a tensor has no such norm; the message names its index.

    Example:
        >>> weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
        >>> fastwrs.channel_norms(weight), fastwrs.channel_norms(weight, axis=0)
        ([tensor([5., 2.])], [tensor([3.0000, 4.4721])])
    """
    given = _listed(tensors, "channel_norms")
    masks = _masks(given, axis, "channel_norms")
    norms = []
    for tensor, mask in zip(given, masks, strict=True):
        dims = masked_dims(mask, tensor.ndim) or ()
        kept = [size for dim, size in enumerate(tensor.shape) if dim not in dims]
        kind = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        norms.append(torch.empty(kept, dtype=kind, device=tensor.device))
    for backend, ks in _bundles(given):
        backend.channel_norms([given[k].detach() for k in ks], [masks[k] for k in ks], [norms[k] for k in ks])
    return norms


def _listed(tensors: Tensor | Iterable[Tensor], what: str) -> list[Tensor]:
    """The tensors as a list; a single one is one tensor, not a sequence of its rows."""
    if not isinstance(tensors, Iterable):
        raise TypeError(f"{what}: tensors must be a tensor or several, got {type(tensors).__name__}")
    given = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for k, tensor in enumerate(given):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{what}: tensors[{k}] must be a tensor, got {type(tensor).__name__}")
        if is_lazy(tensor):
            raise ValueError(f"{what}: tensors[{k}] {LAZY}")
        name = f"{what}: {_name(given, k)}"
        if why := why_not_plain(tensor, "it"):
            raise ValueError(f"{name}: {why}")
        if why := why_not_dtype(tensor):
            raise ValueError(f"{name}: {why}")
    return given


def _masks(tensors: list[Tensor], axis: Axis, what: str) -> list[int]:
    axis = checked_axis(axis, what)
    return [_mask(tensors, k, axis, what) for k in range(len(tensors))]


def _mask(tensors: list[Tensor], k: int, axis: Axis, what: str) -> int:
    try:
        return axis_mask(axis, tensors[k].ndim)
    except ValueError as error:
        raise ValueError(
            f"{what}: {_name(tensors, k)}: {error}. fastwrs.param_groups(model) tells which parameters have one"
        ) from None


def _bundles(tensors: list[Tensor]) -> list[tuple[dispatch.Backend, list[int]]]:
    """The indices of the tensors by device and dtype, each with its backend: all are chosen before one is used."""
    found: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for k, tensor in enumerate(tensors):
        found[tensor.device, tensor.dtype].append(k)
    return [
        (dispatch.choose("auto", device.type, PROJECTED[name_of(dtype)]), ks) for (device, dtype), ks in found.items()
    ]


def _name(tensors: list[Tensor], k: int) -> str:
    return f"tensors[{k}] of shape {tuple(tensors[k].shape)}"
