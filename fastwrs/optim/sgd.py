"""Stochastic gradient descent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastwrs.optim.base import FusedOptimizer
from fastwrs.options import Rescale, Shrink, shifted_pair
from fastwrs.spec import RULES, Rule


class SGD(FusedOptimizer):
    """SGD with momentum, and with the norm of every channel held (WRS) or pulled down (AWS) in the same pass.

    ::

        g   = -grad if maximize else grad
        g   = g + weight_decay * w
        g   = g + lam * ((1 - eps / s) * (w - mu) + mu)   if shifted_l2; mu and s of each channel's weights
        buf = g                                      in the first step
        buf = momentum * buf + (1 - dampening) * g   later
        u   = g + momentum * buf  if nesterov;  buf  otherwise;  g  without momentum
        w   = w - lr * u
        w   = w * max(0, 1 - lr * rate * n ** power)  for each norm group, if shrink
        w   = w * target / |w|                        for each norm group, if rescale (then there is no shrink)

    All arguments but the last five are those of ``torch.optim.SGD``. Parameters of any shape; every parameter has its
    own step count. ``foreach``, ``fused`` and ``differentiable`` are as in :class:`fastwrs.Adam`.

    Args:
        rescale: a :class:`fastwrs.Rescale` or None; may be set per param group, see :func:`fastwrs.param_groups`.
            Rescaled weights leave the running statistics of BatchNorm stale: run ``torch.optim.swa_utils.update_bn``
            before an evaluation. Isotropic weight decay before an exact projection changes only the step's size.
        shrink: a :class:`fastwrs.Shrink` or None, our reading of the abstract of the AWS paper; per group too.
        shifted_l2: None, or the numbers ``(lam, eps)`` of the epsilon-shifted L2 term, both finite and >= 0; per group
            too. The paper has ``(1e-4, 1e-3)``. A channel is an index of dimension 0, mu the mean of its weights and s
            their unbiased standard deviation. A channel whose s is 0 or not defined (all weights equal, or a single
            one) gets ``lam * mu``; one that is not finite stays so by itself. Squares of ``w - mu`` are summed in the
            weight's dtype, in fp32 for bf16 and fp16, where the norm of a channel's ``w - mu`` has to lie between 1e-19
            and 1e19: below that s has few digits or none, above it the channel becomes NaN. Parameters of less than two
            dimensions have no channels, and are left alone. It looks at the weights once before the step, and so costs
            reading them once more: 24 bytes per fp32 parameter with momentum instead of 20.
        state_dtype: None keeps the buffer in fp32 (fp64 for fp64); ``torch.bfloat16`` is for bf16 parameters.
        backend: ``"auto"``, or the name of one of :func:`fastwrs.backends`.

    Raises:
        ValueError: an option is out of its bounds, or a parameter cannot be rescaled along the axis.
        TypeError: ``rescale``, ``shrink`` or ``shifted_l2`` is of another type.
        RuntimeError: the backend that was asked for cannot run here.

    Example:
        >>> groups = fastwrs.param_groups(model, rescale=fastwrs.Rescale(every=10), weight_decay=1e-4)
        >>> optimizer = fastwrs.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
        >>> loss_fn(model(x), y).backward()
        >>> optimizer.step()

    Source: Sutskever et al., *On the importance of initialization and momentum in deep learning*, ICML 2013, in the
    form of ``torch.optim.SGD``; Liu et al., *Weight Rescaling*, Algorithm 1; Li, Chen, Xia and Yang,
    *... epsilon-shifted L2 Regularizer*, arXiv 1911.05920.
    """

    rule = RULES["sgd"]
    shifted_rule: ClassVar[Rule] = RULES["sgd_shifted"]

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
        shifted_l2: tuple[float, float] | None = None,
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
            "shifted_l2": shifted_l2,
        }
        # Only here, as in torch: a scheduler may take the momentum to 0, and then there is no Nesterov form either.
        if nesterov and not (momentum and dampening == 0):
            raise ValueError(
                "Nesterov momentum requires a momentum and zero dampening, got "
                f"momentum={momentum!r}, dampening={dampening!r}"
            )
        super().__init__(params, defaults, rescale=rescale, shrink=shrink, state_dtype=state_dtype, backend=backend)

    def rule_for(self, groups: Sequence[Mapping[str, Any]]) -> Rule:
        """The rule with the shifted term, for all groups alike, if one of them has it."""
        return self.rule if all(group["shifted_l2"] is None for group in groups) else self.shifted_rule

    def numbers(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The rule's own hyperparameters of a param group; a group without ``shifted_l2`` has zeros."""
        lam, eps = shifted_pair(group["shifted_l2"])
        return super().numbers(group) | {"shifted_l2_lam": lam, "shifted_l2_eps": eps}
