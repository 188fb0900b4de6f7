"""The rules: from weights, gradient and states to the step ``u`` before the learning rate, one function each.

All of them have the same shape. ``w`` and ``g`` are the weights before the step and the gradient (unscaled, negated
if maximizing), ``states`` the moments by name and ``h`` the hyperparameters by name. ``t`` (the step, from 1),
``first`` (there is no momentum yet), ``lr`` and ``stored`` (rounds a state, see ``step``) are given to all; a rule
takes those that it needs. They return ``Update(u, decay, states)``, which the step applies as ``w * decay - lr * u``.
Without weight decay the weights are not looked at, so that a NaN in them stays out of the moments (as in torch). The
rules with a gate look at whole tensors, that with a shifted L2 term at whole channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

States = dict[str, Tensor]
Hypers = Mapping[str, float]
Stored = Callable[[Tensor], Tensor]


class Update(NamedTuple):
    """What a rule decides: the step before the learning rate, the factor of decoupled decay, and the new states."""

    u: Tensor
    decay: float
    states: States
    removed: Tensor | None = None
    """What a gate took out of u; None where it was closed, and from rules without one."""
    removed_terms: Tensor | None = None
    """The sum of the magnitudes of what ``removed`` is a sum of, in which they may cancel."""
    added: Tensor | None = None
    """The largest of the numbers whose sum shifted L2 added to g. None: it did not."""


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


def shifted_l2(w: Tensor, h: Hypers) -> tuple[Tensor, Tensor] | None:
    """What the epsilon-shifted L2 regulariser adds to the gradient, and the largest of the numbers that it is a sum of.

    ::

        lam * ((1 - eps / s) * (w - mu) + mu)

    with the mean mu and the unbiased standard deviation s of the weights of each channel (index of dimension 0). Where
    s is 0 (all weights equal) or there is none (a single weight), ``lam * mu`` is left. None for tensors without
    channels, those of less than two dimensions, and with lam = 0.

    Source: arXiv 1911.05920.
    """
    if h["shifted_l2_lam"] == 0 or w.ndim < 2 or w.numel() == 0:
        return None
    lam, rest = h["shifted_l2_lam"], tuple(range(1, w.ndim))
    mu = w.mean(dim=rest, keepdim=True)
    # torch.std goes through the weights one by one, and loses digits by it
    s = ((w - mu).square().sum(dim=rest, keepdim=True) / (w[0].numel() - 1)).sqrt()
    # s is 0 too where squares are too small for the type
    equal = (w.amax(dim=rest, keepdim=True) == w.amin(dim=rest, keepdim=True)) | (s == 0)
    factor = torch.where(equal, 0, 1 - h["shifted_l2_eps"] / s)
    largest = torch.where(equal, 0, (h["shifted_l2_eps"] / s).clamp(min=1))
    return lam * (factor * (w - mu) + mu), lam * torch.maximum((largest * (w - mu)).abs(), mu.abs())


def sgd_shifted(w: Tensor, g: Tensor, states: States, h: Hypers, *, first: bool, **_: float) -> Update:
    """SGD whose gradient gets the epsilon-shifted L2 term of its weights, beside coupled weight decay if there is any.

    ::

        g = g + lam * ((1 - eps / s) * (w - mu) + mu)   mu, s of the channel; then as SGD

    Source: arXiv 1911.05920; ``sgd`` and ``shifted_l2`` above.
    """
    shifted = shifted_l2(w, h)
    if shifted is None:
        return sgd(w, g, states, h, first=first)
    return sgd(w, g + shifted[0], states, h, first=first)._replace(added=shifted[1])


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


class Gate(NamedTuple):
    """What a gate has decided."""

    removed: Tensor | None
    """What is to be subtracted from the step (None: closed)."""
    ratio: float
    """The factor of weight decay."""
    terms: Tensor | None = None
    """The sum of the magnitudes of what ``removed`` is a sum of."""


def gate(w: Tensor, g: Tensor, step: Tensor, h: Hypers) -> Gate:
    """AdamP's and SGDP's gate: what of a step lies along the weights, if the weights look scale-invariant.

    Scale-invariant weights are orthogonal to their gradient. So rows of dimension 0 (channels) are tried first, then
    the tensor as one row::

        cos  = |g . w| / (max(|g|, eps) * max(|w|, eps))                of each row
        open = max(cos) < delta / sqrt(length of a row)
        removed = w * (step . w) / (|w| + eps) ** 2                     of each row

    One decision for the whole tensor, by the gradient as it came in and the weights before the step. Tensors of less
    than two dimensions never pass. Returns what is to be subtracted (None: closed) and the factor of weight decay.

    Source: Heo et al., AdamP, ICLR 2021, Algorithm 2 and Eq. 12, in the form of the authors' package.
    """
    if w.ndim < 2 or w.numel() == 0:
        return Gate(None, 1.0)
    for rows in (w.shape[0], 1):
        x, y, p = (tensor.reshape(rows, -1) for tensor in (w, g, step))
        norm, slope = (row.square().sum(dim=1).sqrt() for row in (x, y))
        cosine = (x * y).sum(dim=1).abs() / (norm.clamp(min=h["eps"]) * slope.clamp(min=h["eps"]))
        if bool(cosine.max() < h["delta"] / math.sqrt(x.shape[1])):
            unit = x / (norm + h["eps"]).unsqueeze(1)
            removed = unit * (unit * p).sum(dim=1, keepdim=True)
            terms = unit.abs() * (unit * p).abs().sum(dim=1, keepdim=True)
            return Gate(removed.reshape(w.shape), h["wd_ratio"], terms.reshape(w.shape))
    return Gate(None, 1.0)


def adamp(w: Tensor, g: Tensor, states: States, h: Hypers, *, t: int, lr: float, stored: Stored, **_: bool) -> Update:
    """AdamP: Adam whose step loses its part along the weights where the gate opens.

    ::

        m = beta1 * m + (1 - beta1) * g;   v = beta2 * v + (1 - beta2) * g ** 2
        p = (beta1 * m + (1 - beta1) * g  if nesterov, else m) / (sqrt(v) / sqrt(1 - beta2 ** t) + eps)
        p, ratio = p - removed, wd_ratio   where the gate opens, else p, 1
        u = p / (1 - beta1 ** t);   decay = 1 - lr * weight_decay * ratio

    Source: Heo et al., AdamP, ICLR 2021, Algorithm 2, in the form of the authors' package ``adamp`` 0.3.0.
    """
    m = stored(h["beta1"] * states["exp_avg"] + (1 - h["beta1"]) * g)
    v = stored(h["beta2"] * states["exp_avg_sq"] + (1 - h["beta2"]) * g * g)
    ahead = h["beta1"] * m + (1 - h["beta1"]) * g if h["nesterov"] else m
    step = ahead / (v.sqrt() / math.sqrt(1 - h["beta2"] ** t) + h["eps"])
    removed, ratio, terms = gate(w, g, step, h)
    correction = 1 - h["beta1"] ** t
    decay = 1 - lr * h["weight_decay"] * ratio
    new = {"exp_avg": m, "exp_avg_sq": v}
    if removed is None or terms is None:
        return Update(step / correction, decay, new)
    return Update((step - removed) / correction, decay, new, removed / correction, terms / correction)


def sgdp(w: Tensor, g: Tensor, states: States, h: Hypers, *, lr: float, stored: Stored, **_: float) -> Update:
    """SGDP: SGD with momentum whose step loses its part along the weights where the gate opens.

    ::

        buf = momentum * buf + (1 - dampening) * g     (the buffer starts at zero)
        u   = g + momentum * buf  if nesterov, else buf
        u, ratio = u - removed, wd_ratio   where the gate opens, else u, 1
        decay = 1 - lr * weight_decay * ratio / (1 - momentum)

    In the authors' code u and the buffer are one tensor without nesterov, so that the projection changes the buffer
    too: ``project_momentum`` chooses that.

    Source: Heo et al., AdamP, ICLR 2021, Algorithm 1, in the form of the authors' package ``adamp`` 0.3.0.
    """
    buf = stored(h["momentum"] * states["momentum_buffer"] + (1 - h["dampening"]) * g)
    u = g + h["momentum"] * buf if h["nesterov"] else buf
    removed, ratio, terms = gate(w, g, u, h)
    decay = 1 - lr * h["weight_decay"] * ratio / (1 - h["momentum"])
    if removed is None:
        return Update(u, decay, {"momentum_buffer": buf})
    u = u - removed
    kept = u if h["project_momentum"] and not h["nesterov"] else buf
    return Update(u, decay, {"momentum_buffer": kept}, removed, terms)


def project(w: Tensor, g: Tensor, states: States, h: Hypers, **_: float) -> Update:  # noqa: ARG001
    """No update, whatever the gradient is: ``u = 0``. What is rescaled or shrunk is so after another optimizer's step.

    Source: none of its own; see ``fastwrs.WeightRescaler``.
    """
    return Update(torch.zeros_like(w), 1.0, {})


RULES: dict[str, Callable[..., Update]] = {
    "sgd": sgd,
    "adam": adam,
    "adamp": adamp,
    "sgdp": sgdp,
    "sgd_shifted": sgd_shifted,
    "project": project,
}
"""The rules by the names that they have in ``fastwrs.spec``."""
