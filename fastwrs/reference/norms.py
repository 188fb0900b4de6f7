"""Norm groups: their norms, and the factors by which rescaling (WRS) and shrinking (AWS) multiply them.

``dims`` are the dimensions that are reduced, as in ``torch.linalg.vector_norm(dim=dims)``: the elements that differ
only in these share one norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

Dims = tuple[int, ...]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that moments, norms and scales are computed in: fp64 for fp64, fp32 for everything shorter."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_norms(tensor: Tensor, dims: Dims) -> Tensor:
    """``sqrt(sum of squares)`` of every norm group, of the shape of the dimensions that are kept.

    The squares are summed in fp64 whatever the dtype: torch's own fp32 norm is off by 7.5e-4 at 16.8 million elements,
    and half of the peers' fp16 sums overflow. The result has the compute type.
    """
    return tensor.double().square().sum(dim=dims).sqrt().to(compute_dtype(tensor.dtype))


def spread(per_group: Tensor, dims: Dims, ndim: int) -> Tensor:
    """Gives a tensor of one number per group its reduced dimensions back (of size 1), so that it broadcasts."""
    for dim in sorted(d % ndim for d in dims):
        per_group = per_group.unsqueeze(dim)
    return per_group


def rescale_factor(norms: Tensor, target: float) -> Tensor:
    """WRS: ``target / n`` sets a group's norm to the target.

    A group of norm 0 has no direction to keep, and one that is not finite cannot be repaired: both get the factor 1.
    There is no epsilon in the quotient.

    Source: Liu et al., Weight Rescaling, Algorithm 1, lines 13 and 16 (target 1).
    """
    scalable = norms.isfinite() & (norms > 0)
    return torch.where(scalable, target / norms, torch.ones_like(norms))


def shrink_factor(norms: Tensor, *, lr: float, rate: float, power: float) -> Tensor:
    """AWS: ``max(0, 1 - lr * rate * n ** power)``, n the norm that the group had before the step.

    ``n ** 0`` is 1 for n = 0 too, so power 0 is plain decoupled weight decay. Otherwise a group of norm 0 gets the
    factor 1, and so does one that is not finite.

    Source: Li, Chen and Yang, Understanding the Disharmony between Weight Normalization Family and Weight Decay, AAAI
    2020: "a dynamic coefficient proportional to the magnitude of the parameter". Only the abstract was at hand: the
    formula is our reading of it, with power 1.
    """
    factor = (1 - (lr * rate) * norms**power).clamp(min=0)
    untouched = ~norms.isfinite() | ((norms == 0) & (power != 0))
    return torch.where(untouched, torch.ones_like(norms), factor)


def rescale(tensor: Tensor, dims: Dims, target: float = 1.0) -> Tensor:
    """The tensor with every group's norm set to the target, in the compute type (not rounded to the stored type)."""
    values = tensor.to(compute_dtype(tensor.dtype))
    return values * spread(rescale_factor(group_norms(values, dims), target), dims, tensor.ndim)
