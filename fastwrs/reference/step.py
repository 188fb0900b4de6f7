"""One whole step on one tensor: unscale, update, shrink, rescale, and what is measured on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastwrs.reference.norms import Dims, compute_dtype, group_norms, rescale_factor, shrink_factor, spread
from fastwrs.reference.rules import RULES
from fastwrs.spec import MEASURED
from fastwrs.spec import RULES as SPECS


@dataclass(frozen=True)
class Result:
    """What a step leaves behind. All tensors have the compute type: rounding to the stored types is the caller's."""

    param: Tensor
    grad: Tensor
    """The gradient as the user sees it afterwards: unscaled, not negated."""
    states: dict[str, Tensor]
    measured: Tensor | None
    """[groups, 8], the columns of ``spec.MEASURED``; None if there are no groups."""
    update: Tensor
    """u, the step before the learning rate."""
    removed: Tensor | None
    """What a gate took out of u (AdamP, SGDP)."""
    removed_terms: Tensor | None
    """The sum of the magnitudes of what it is a sum of."""
    added: Tensor | None
    """The largest of the numbers whose sum shifted L2 added to the gradient (SGD)."""


def rescale_due(hyper: Mapping[str, float], t: int, lr: float) -> bool:
    """Whether step t rescales: it is a multiple of ``every`` in the window, and the learning rate is not 0."""
    every = hyper["every"]
    return lr != 0 and every > 0 and t % every == 0 and hyper["start"] <= t < hyper["stop"]


def step(
    rule: str,
    param: Tensor,
    grad: Tensor,
    states: Mapping[str, Tensor],
    *,
    t: int,
    hyper: Mapping[str, float],
    dims: Dims | None,
    first: bool | None = None,
    lr: float | None = None,
    grad_scale: float | None = None,
    dtype: torch.dtype | None = None,
    stored: torch.dtype | None = None,
) -> Result:
    """Step number ``t`` (from 1) of ``rule`` on one tensor, out of place.

    Order: unscale; negate if maximizing; the rule (coupled decay, moments, u); ``w * decay - lr * u``; shrink; rescale.
    A step that rescales does not shrink, and with lr = 0 nothing is shrunk or rescaled.

    Args:
        rule: a key of ``spec.RULES``.
        param: the weights before the step.
        grad: their gradient, still scaled.
        states: the moments by name; which are there picks the variant (momentum, AMSGrad).
        t: the number of this step, from 1.
        hyper: the numbers of ``spec.RULES[rule].record`` by name.
        dims: the reduced dimensions of a norm group; None: no groups, so nothing is shrunk or rescaled.
        first: the momentum buffer starts as the gradient (default: in step 1).
        lr: the learning rate, where it is not ``hyper["lr"]``.
        grad_scale: the gradient is divided by it.
        dtype: computes in this type (default: the compute type of the parameter).
        stored: rounds states to this type before a rule with a gate makes its step of them, as kernels do that keep
            them in it (default: it does not, which is what the step would be).
    """
    dtype = compute_dtype(param.dtype) if dtype is None else dtype
    lr = hyper["lr"] if lr is None else lr
    w = param.to(dtype)
    g = grad.to(dtype) if grad_scale is None else grad.to(dtype) / grad_scale

    u, decay, new_states, *looked = RULES[rule](
        w,
        -g if hyper["maximize"] else g,
        {name: state.to(dtype) for name, state in states.items()},
        hyper,
        t=t,
        first=t == 1 if first is None else first,
        lr=lr,
        stored=lambda state: state if stored is None else state.to(stored).to(dtype),
    )
    updated = w * decay - lr * u
    if dims is None:
        return Result(updated, g, new_states, None, u, *looked)

    norm_before = group_norms(w, dims)
    norm_updated = group_norms(updated, dims)
    rescaling = shrinking = torch.ones_like(norm_updated)
    if param.numel() and rescale_due(hyper, t, lr):
        rescaling = rescale_factor(norm_updated, hyper["target"])
    elif param.numel() and hyper["rate"] > 0 and lr != 0:
        shrinking = shrink_factor(norm_before, lr=lr, rate=hyper["rate"], power=hyper["power"])
    new = updated * spread(rescaling * shrinking, dims, param.ndim)

    norm_u = group_norms(u, dims)
    columns = {
        "norm_before": norm_before,
        "norm_updated": norm_updated,
        "norm_after": group_norms(new, dims),
        "grad_norm": group_norms(g if SPECS[rule].updates else torch.zeros_like(w), dims),
        "update_norm": norm_u,
        "effective_grad_norm": norm_u / norm_before if param.numel() else torch.zeros_like(norm_u),
        "rescale_factor": rescaling,
        "shrink_factor": shrinking,
    }
    measured = torch.stack([columns[name].flatten() for name in MEASURED], dim=1)
    return Result(new, g, new_states, measured, u, *looked)
