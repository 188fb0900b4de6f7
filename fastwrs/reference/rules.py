"""The rules: from weights, gradient and states to the step ``u`` before the learning rate, one function each.

All of them have the same shape. ``w`` and ``g`` are the weights before the step and the gradient (unscaled, negated
if maximizing), ``states`` the moments by name and ``h`` the hyperparameters by name. ``t`` (the step, from 1),
``first`` (there is no momentum yet) and ``lr`` are given to all; a rule takes those that it needs. They return
``Update(u, decay, states)``, which the step applies as ``w * decay - lr * u``. Without weight decay the weights are not
looked at, so that a NaN in them stays out of the moments (as in torch).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

States = dict[str, Tensor]
Hypers = Mapping[str, float]


class Update(NamedTuple):
    """What a rule decides: the step before the learning rate, the factor of decoupled decay, and the new states."""

    u: Tensor
    decay: float
    states: States


def sgd(w: Tensor, g: Tensor, states: States, h: Hypers, *, first: bool, **_: float) -> Update:
    """SGD with (Nesterov) momentum and coupled weight decay.

    ::

        g   = g + weight_decay * w
        buf = g                                     in the first step (no dampening there)
        buf = momentum * buf + (1 - dampening) * g  later
        u   = g + momentum * buf   if nesterov
        u   = buf                  otherwise; g if there is no buffer

    Source: the algorithm in the documentation of torch.optim.SGD; Sutskever et al., On the importance of initialization
    and momentum in deep learning, ICML 2013 (torch multiplies by the learning rate outside of the buffer).
    """
    if h["weight_decay"] != 0:
        g = g + h["weight_decay"] * w
    if "momentum_buffer" not in states:
        return Update(g, 1.0, {})
    buf = g if first else h["momentum"] * states["momentum_buffer"] + (1 - h["dampening"]) * g
    u = g + h["momentum"] * buf if h["nesterov"] else buf
    return Update(u, 1.0, {"momentum_buffer": buf})


def adam(w: Tensor, g: Tensor, states: States, h: Hypers, *, t: int, lr: float, **_: bool) -> Update:
    """Adam, AdamW (decoupled weight decay) and AMSGrad (if there is a state for the maximum).

    ::

        g     = g + weight_decay * w                if coupled
        m     = beta1 * m + (1 - beta1) * g
        v     = beta2 * v + (1 - beta2) * g ** 2
        v_max = max(v_max, v)                       AMSGrad, which then takes v_max for v
        u     = m / (1 - beta1 ** t) / (sqrt(v / (1 - beta2 ** t)) + eps)
        decay = 1 - lr * weight_decay               if decoupled

    Source: Kingma and Ba, ICLR 2015, Algorithm 1; Loshchilov and Hutter, ICLR 2019, Algorithm 2; Reddi et al., ICLR
    2018, Algorithm 2. Sources disagree on AMSGrad: torch takes the maximum of the uncorrected moments and corrects it
    afterwards, as here; others correct first.
    """
    decoupled = bool(h["decoupled_weight_decay"])
    if h["weight_decay"] != 0 and not decoupled:
        g = g + h["weight_decay"] * w
    m = h["beta1"] * states["exp_avg"] + (1 - h["beta1"]) * g
    v = h["beta2"] * states["exp_avg_sq"] + (1 - h["beta2"]) * g * g
    new = {"exp_avg": m, "exp_avg_sq": v}
    if "max_exp_avg_sq" in states:
        v = new["max_exp_avg_sq"] = torch.maximum(states["max_exp_avg_sq"], v)
    m_hat = m / (1 - h["beta1"] ** t)
    v_hat = v / (1 - h["beta2"] ** t)
    return Update(m_hat / (v_hat.sqrt() + h["eps"]), 1 - lr * h["weight_decay"] if decoupled else 1.0, new)


RULES: dict[str, Callable[..., Update]] = {"sgd": sgd, "adam": adam}
"""The rules by the names that they have in ``fastwrs.spec``."""
