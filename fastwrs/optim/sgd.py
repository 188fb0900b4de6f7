"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastwrs.optim.base import FusedOptimizer
from fastwrs.options import Rescale, Shrink
from fastwrs.spec import RULES


class SGD(FusedOptimizer):
    """SGD with momentum, and with the norm of every channel held (WRS) or pulled down (AWS) in the same pass.

    ::

        g   = -grad if maximize else grad
        g   = g + weight_decay * w
        buf = g                                      in the first step
        buf = momentum * buf + (1 - dampening) * g   later
        u   = g + momentum * buf  if nesterov;  buf  otherwise;  g  without momentum
        w   = w - lr * u
        w   = w * max(0, 1 - lr * rate * n ** power)  for each norm group, if shrink
        w   = w * target / |w|                        for each norm group, if rescale (then there is no shrink)

    All arguments but the last four are those of ``torch.optim.SGD``. Parameters of any shape; every parameter has its
    own step count. ``foreach`` and ``fused`` are accepted and ignored.

    Args:
        rescale: a :class:`fastwrs.Rescale` or None; may be set per param group, see :func:`fastwrs.param_groups`.
            Rescaled weights leave the running statistics of BatchNorm stale: run ``torch.optim.swa_utils.update_bn``
            before an evaluation. Isotropic weight decay before an exact projection changes only the step's size.
        shrink: a :class:`fastwrs.Shrink` or None, our reading of the abstract of the AWS paper; per group too.
        state_dtype: None keeps the buffer in fp32 (fp64 for fp64); ``torch.bfloat16`` is for bf16 parameters.
        backend: ``"auto"``, or the name of one of :func:`fastwrs.backends`.

    Raises:
        ValueError: an option is out of its bounds, or a parameter cannot be rescaled along the axis.
        TypeError: ``rescale`` or ``shrink`` is of another type.
        RuntimeError: the backend that was asked for cannot run here.

    Source: Sutskever et al., *On the importance of initialization and momentum in deep learning*, ICML 2013, in the
    form of ``torch.optim.SGD``; Liu et al., *Weight Rescaling*, Algorithm 1.
    """

    rule = RULES["sgd"]

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
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
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        # Only here, as in torch: a scheduler may take the momentum to 0, and then there is no Nesterov form either.
        if nesterov and not (momentum and dampening == 0):
            raise ValueError(
                "Nesterov momentum requires a momentum and zero dampening, got "
                f"momentum={momentum!r}, dampening={dampening!r}"
            )
        super().__init__(params, defaults, rescale=rescale, shrink=shrink, state_dtype=state_dtype, backend=backend)
