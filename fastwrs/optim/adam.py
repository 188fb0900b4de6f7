"""Adam and AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastwrs.optim.base import FusedOptimizer
from fastwrs.options import Rescale, Shrink
from fastwrs.spec import RULES


def with_betas(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group, with its two betas under names of their own."""
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    if isinstance(betas[0], Tensor) != isinstance(betas[1], Tensor):
        raise ValueError(f"betas must be either both floats or both Tensors, got {betas!r}")
    return {**group, "beta1": betas[0], "beta2": betas[1]}


class Adam(FusedOptimizer):
    """Adam, and with the norm of every channel held (WRS) or pulled down (AWS) in the same pass.

    ::

        g = -grad if maximize else grad
        g = g + weight_decay * w                      (unless decoupled_weight_decay)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g ** 2;         with amsgrad the largest v so far takes the place of v below
        u = m / (1 - beta1 ** t) / (sqrt(v / (1 - beta2 ** t)) + eps)
        w = w * (1 - lr * weight_decay) - lr * u      (w - lr * u unless decoupled_weight_decay)
        w = w * max(0, 1 - lr * rate * n ** power)    for each norm group, if shrink
        w = w * target / |w|                          for each norm group, if rescale (then there is no shrink)

    All arguments but the last four are those of ``torch.optim.Adam``. Parameters of any shape; every parameter has its
    own step count t. ``foreach`` is accepted and ignored, and so is ``fused``, but for ``fused=False``, with which
    GradScaler unscales the gradients and skips steps itself. ``capturable`` is accepted: the step never waits for the
    device. ``differentiable=True`` is refused. ``betas`` may be CPU tensors, which are read in each step.

    Args:
        rescale: a :class:`fastwrs.Rescale` or None; may be set per param group, see :func:`fastwrs.param_groups`.
            Rescaled weights leave the running statistics of BatchNorm stale: run ``torch.optim.swa_utils.update_bn``
            before an evaluation. Isotropic weight decay before an exact projection changes only the step's size.
        shrink: a :class:`fastwrs.Shrink` or None, our reading of the abstract of the AWS paper; per group too.
        state_dtype: None keeps the moments in fp32 (fp64 for fp64); ``torch.bfloat16`` is for bf16 parameters.
        backend: ``"auto"``, or the name of one of :func:`fastwrs.backends`.

    Raises:
        ValueError: an option is out of its bounds, or a parameter cannot be rescaled along the axis.
        TypeError: ``rescale`` or ``shrink`` is of another type.
        RuntimeError: the backend that was asked for cannot run here.

    Example:
        >>> optimizer = fastwrs.Adam(fastwrs.param_groups(model, rescale=fastwrs.Rescale(axis="in")), lr=1e-3)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()

    Source: Kingma and Ba, *Adam*, ICLR 2015; Reddi et al., *On the Convergence of Adam and Beyond*, ICLR 2018, in the
    form of ``torch.optim.Adam`` (the maximum is taken before the bias correction); Liu et al., *Weight Rescaling*,
    Algorithm 1.
    """

    rule = RULES["adam"]

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
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
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, rescale=rescale, shrink=shrink, state_dtype=state_dtype, backend=backend)

    def numbers(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The betas under the names that they have in the record."""
        return super().numbers(with_betas(group))


class AdamW(Adam):
    """Adam with decoupled weight decay: :class:`fastwrs.Adam` with ``decoupled_weight_decay=True`` and a decay of 1e-2.

    The weights are multiplied by ``1 - lr * weight_decay`` and the decay enters no moment. All arguments but the last
    four are those of ``torch.optim.AdamW``; formula, options and errors are those of :class:`fastwrs.Adam`.

    Example:
        >>> groups = fastwrs.param_groups(model, shrink=fastwrs.Shrink(0.01), rescale=None)
        >>> optimizer = fastwrs.AdamW(groups, lr=1e-3)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()

    Source: Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, ICLR 2019.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        rescale: Rescale | None = None,
        shrink: Shrink | None = None,
        state_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            rescale=rescale,
            shrink=shrink,
            state_dtype=state_dtype,
            backend=backend,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # also where the state of an Adam was loaded
