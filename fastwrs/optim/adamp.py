"""AdamP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastwrs.optim.adam import with_betas
from fastwrs.optim.base import FusedOptimizer
from fastwrs.options import Rescale, Shrink
from fastwrs.spec import RULES


class AdamP(FusedOptimizer):
    """AdamP: Adam whose step loses its part along the weights where these look scale-invariant; and WRS or AWS with it.

    ::

        g = -grad if maximize else grad
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g ** 2
        p = (beta1 * m + (1 - beta1) * g  if nesterov, else m) / (sqrt(v) / sqrt(1 - beta2 ** t) + eps)
        for rows in (those of dimension 0, the whole tensor as one):       # of tensors with at least 2 dimensions
            if max(|g . w| / (max(|g|, eps) * max(|w|, eps))) < delta / sqrt(length of a row):
                p = p - w * (p . w) / (|w| + eps) ** 2;   ratio = wd_ratio;   break
        else: ratio = 1
        w = w * (1 - lr * weight_decay * ratio) - lr / (1 - beta1 ** t) * p
        w = w * max(0, 1 - lr * rate * n ** power)    for each norm group, if shrink
        w = w * target / |w|                          for each norm group, if rescale (then there is no shrink)

    One decision for each tensor, made where the tensor is: nothing is waited for, and any layout will do. The arguments
    up to ``nesterov`` are those of the authors' package, whose state dicts load, and timm's where ``caution`` is False.
    With states in bf16 the step is made of the moments as they are stored.

    Args:
        params, lr, betas, eps: as in :class:`fastwrs.Adam`.
        weight_decay: decoupled; where the gate is open it is multiplied by ``wd_ratio``.
        delta: how small a cosine has to be; 0 or less never opens a gate.
        wd_ratio: what is left of the weight decay of scale-invariant weights; >= 0.
        nesterov: looks one step ahead in the first moment.
        maximize, foreach, fused, differentiable: as in :class:`fastwrs.Adam`; the last one is refused.
        rescale, shrink, state_dtype, backend: as in :class:`fastwrs.Adam`.

    Raises:
        ValueError: an option is out of its bounds, or a parameter cannot be rescaled along the axis.
        TypeError: ``rescale`` or ``shrink`` is of another type.
        RuntimeError: the backend that was asked for cannot run here.

    Example:
        >>> optimizer = fastwrs.AdamP(fastwrs.param_groups(model, weight_decay=1e-2), lr=1e-3, nesterov=True)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()

    Source: Heo et al., *AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights*, ICLR
    2021, in the form of the authors' package ``adamp`` 0.3.0.
    """

    rule = RULES["adamp"]

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        rescale: Rescale | None = None,
        shrink: Shrink | None = None,
        state_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, rescale=rescale, shrink=shrink, state_dtype=state_dtype, backend=backend)

    def numbers(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The betas under the names that they have in the record."""
        return super().numbers(with_betas(group))
