"""SGDP."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastwrs.optim.base import FusedOptimizer
from fastwrs.options import Rescale, Shrink
from fastwrs.spec import RULES


class SGDP(FusedOptimizer):
    """SGDP: SGD whose step loses its part along the weights where these look scale-invariant; and WRS or AWS with it.

    ::

        g   = -grad if maximize else grad
        buf = momentum * buf + (1 - dampening) * g        the buffer starts at zero
        p   = g + momentum * buf  if nesterov, else buf
        p, ratio = p - w * (p . w) / (|w| + eps) ** 2, wd_ratio   where the gate opens as in AdamP, else p, 1
        buf = p                                           where it opens, with project_momentum and without nesterov
        w   = w * (1 - lr * weight_decay * ratio / (1 - momentum)) - lr * p
        w   = w * max(0, 1 - lr * rate * n ** power)      for each norm group, if shrink
        w   = w * target / |w|                            for each norm group, if rescale (then there is no shrink)

    The gate is that of :class:`fastwrs.AdamP`. The arguments up to ``wd_ratio`` are those of the authors' package,
    whose state dicts load: their buffer is called ``momentum``, ours ``momentum_buffer``. So do timm's, known by their
    option ``caution`` (since timm 1.0.26), which has to be False: they set ``project_momentum`` to False.

    Args:
        params, lr: as in :class:`fastwrs.SGD`; the learning rate has no default.
        momentum: in [0, 1).
        dampening: enters from the first step on.
        weight_decay: decoupled, and divided by ``1 - momentum``.
        nesterov: looks one step ahead.
        eps, delta, wd_ratio: as in :class:`fastwrs.AdamP`.
        project_momentum: in the authors' code step and buffer are one tensor without nesterov, so that the projection
            changes the buffer too. True does as they do; False leaves the buffer alone, as timm since 1.0.26.
        maximize, foreach, fused, differentiable: as in :class:`fastwrs.Adam`; the last one is refused.
        rescale, shrink, state_dtype, backend: as in :class:`fastwrs.SGD`.

    Raises:
        ValueError: an option is out of its bounds, or a parameter cannot be rescaled along the axis.
        TypeError: ``rescale`` or ``shrink`` is of another type.
        RuntimeError: the backend that was asked for cannot run here.

    Example:
        >>> optimizer = fastwrs.SGDP(fastwrs.param_groups(model, weight_decay=1e-2), lr=0.1, momentum=0.9)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()

    Source: Heo et al., *AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights*, ICLR
    2021, in the form of the authors' package ``adamp`` 0.3.0.
    """

    rule = RULES["sgdp"]

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        project_momentum: bool = True,
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
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "eps": eps,
            "delta": delta,
            "wd_ratio": wd_ratio,
            "project_momentum": project_momentum,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, rescale=rescale, shrink=shrink, state_dtype=state_dtype, backend=backend)
