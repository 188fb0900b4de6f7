"""The rules as Triton functions: the third and last place where an optimizer's update is written.

Each has ``constants``, formed on the host in double from the hyperparameters of ``fastwrs.spec``, in the order in which
the kernel reads them; ``prepare``, the numbers that one step of one tensor needs; and ``update``, which takes weights,
gradients and up to three states and returns new weights, the step ``u`` before the learning rate, and new states.

A rule with a gate takes a step in two passes. Its constants begin with those of ``table.GATE_CONTROL``. ``advance``
takes gradients and a tuple of states and returns new states; ``direction`` makes of these, as they are stored, the step
that the gate looks at; ``update`` takes weights, gradients, states, what a step loses in terms of the weights, and
whether the gate is open, and returns new weights, ``u``, and the first state as it is where the gate has changed it.

One with a shifted L2 term is another rule, whose gradient has got the term. Its constants begin with those of
``table.SHIFT_CONTROL``.
"""

# Triton reads these functions as a language of its own, with other types than Python's.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastwrs.triton_kernels.numeric import one_minus_power, quotient, square_root


class Rule(NamedTuple):
    """One rule: what the test against ``fastwrs.spec`` compares, and its functions."""

    hypers: tuple[str, ...]
    slots: tuple[str, ...]
    constants: Callable[[Mapping[str, float]], list[float]]
    prepare: Any
    update: Any
    advance: Any = None
    direction: Any = None
    look: str | None = None
    """What it looks at before the step: "gate" or "shift"."""
    updates: bool = True
    """Whether it changes weights by a gradient. If not, ``update`` is not called, and no gradient is read."""

    @property
    def gated(self) -> bool:
        """Whether it has a gate."""
        return self.look == "gate"


# ---- SGD with (Nesterov) momentum: torch.optim.SGD; Sutskever et al., ICML 2013 ------------------------------------


def _sgd_constants(h: Mapping[str, float]) -> list[float]:
    return [h["momentum"], 1 - h["dampening"], h["nesterov"], h["weight_decay"]]


@triton.jit
def _sgd_prepare(constants, lr, t, first):
    momentum, one_minus_dampening = tl.load(constants), tl.load(constants + 1)
    nesterov, weight_decay = tl.load(constants + 2), tl.load(constants + 3)
    return lr, momentum, one_minus_dampening, nesterov, weight_decay, first


@triton.jit
def _sgd_update(w, g, s0, s1, s2, scalars, SLOTS: tl.constexpr):
    lr, momentum, one_minus_dampening, nesterov, weight_decay, first = scalars
    g = tl.where(weight_decay != 0, g + weight_decay * w, g)
    u = g
    if SLOTS == 1:
        s0 = tl.where(first, g, momentum * s0 + one_minus_dampening * g)
        u = tl.where(nesterov != 0, g + momentum * s0, s0)
    return w - lr * u, u, s0, s1, s2


# ---- SGD with the epsilon-shifted L2 term: arXiv 1911.05920; what is made of a channel's weights is in shift.py ------


def _sgd_shifted_constants(h: Mapping[str, float]) -> list[float]:
    return [h["shifted_l2_lam"], h["shifted_l2_eps"], *_sgd_constants(h)]


@triton.jit
def _sgd_shifted_prepare(constants, lr, t, first):
    return _sgd_prepare(constants + 2, lr, t, first)


@triton.jit
def shifted(w, g, slope, mean, lam):
    """The gradient with the term: slope is lam * (1 - eps / s)."""
    return g + (slope * (w - mean) + lam * mean)


# ---- Adam, AdamW, AMSGrad: Kingma and Ba, ICLR 2015; Loshchilov and Hutter, ICLR 2019; Reddi et al., ICLR 2018 ------


def _beta_constants(h: Mapping[str, float]) -> list[float]:
    logs = [math.log(h[name]) if h[name] > 0 else -math.inf for name in ("beta1", "beta2")]
    return [h["beta1"], 1 - h["beta1"], logs[0], h["beta2"], 1 - h["beta2"], logs[1]]


@triton.jit
def _prepare_betas(constants, lr, t):
    """The betas and their rests, and the three numbers that correct the bias."""
    beta1, rest1, log1 = tl.load(constants), tl.load(constants + 1), tl.load(constants + 2)
    beta2, rest2, log2 = tl.load(constants + 3), tl.load(constants + 4), tl.load(constants + 5)
    correction1, correction2 = one_minus_power(log1, t), one_minus_power(log2, t)
    step_size, inverse1 = quotient(lr, correction1), quotient(1.0, correction1)
    inverse_root2 = quotient(1.0, square_root(correction2))
    return beta1, rest1, beta2, rest2, step_size, inverse1, inverse_root2


@triton.jit
def _first_moment(beta, rest, m, g):
    # Near 1, beta and 1 - beta are rounded too differently to be used together.
    return tl.where(beta > 0.5, m + rest * (g - m), beta * m + rest * g)


@triton.jit
def _second_moment(beta, rest, v, g):
    return beta * v + rest * g * g


@triton.jit
def _adam_direction(m, v, inverse_root2, eps):
    return quotient(m, square_root(v) * inverse_root2 + eps)


def _adam_constants(h: Mapping[str, float]) -> list[float]:
    decay, decoupled = h["weight_decay"], h["decoupled_weight_decay"] != 0
    coupled, apart = (0.0, decay) if decoupled else (decay, 0.0)
    return [*_beta_constants(h), h["eps"], coupled, apart]


@triton.jit
def _adam_prepare(constants, lr, t, first):
    beta1, rest1, beta2, rest2, step_size, inverse1, inverse_root2 = _prepare_betas(constants, lr, t)
    eps, coupled, apart = tl.load(constants + 6), tl.load(constants + 7), tl.load(constants + 8)
    return beta1, rest1, beta2, rest2, eps, coupled, 1 - lr * apart, step_size, inverse1, inverse_root2


@triton.jit
def _adam_update(w, g, s0, s1, s2, scalars, SLOTS: tl.constexpr):
    beta1, rest1, beta2, rest2, eps, coupled, keep, step_size, inverse1, inverse_root2 = scalars
    g = tl.where(coupled != 0, g + coupled * w, g)
    s0 = _first_moment(beta1, rest1, s0, g)
    s1 = _second_moment(beta2, rest2, s1, g)
    largest = s1
    if SLOTS == 3:
        s2 = tl.where((s1 > s2) | (s1 != s1), s1, s2)
        largest = s2
    direction = _adam_direction(s0, largest, inverse_root2, eps)
    return w * keep - step_size * direction, direction * inverse1, s0, s1, s2


# ---- AdamP and SGDP: Heo et al., ICLR 2021, in the form of the authors' package; the gate is in gate.py --------------


@triton.jit
def _behind_gate(w, step, along, is_open, keep, open_keep, step_size):
    """New weights, and the step without its part along the weights. These may be infinite where nothing is lost."""
    step = tl.where(along != 0, step - along * w, step)
    return w * tl.where(is_open, open_keep, keep) - step_size * step, step


def _adamp_constants(h: Mapping[str, float]) -> list[float]:
    decay = h["weight_decay"]
    return [h["delta"], h["eps"], h["nesterov"], 0.0, *_beta_constants(h), decay, decay * h["wd_ratio"]]


@triton.jit
def _adamp_prepare(constants, lr, t, first):
    eps, nesterov = tl.load(constants + 1), tl.load(constants + 2)
    beta1, rest1, beta2, rest2, step_size, inverse1, inverse_root2 = _prepare_betas(constants + 4, lr, t)
    keep, open_keep = 1 - lr * tl.load(constants + 10), 1 - lr * tl.load(constants + 11)
    return eps, nesterov, beta1, rest1, beta2, rest2, keep, open_keep, step_size, inverse1, inverse_root2


@triton.jit
def _adamp_advance(g, states, scalars):
    _eps, _nesterov, beta1, rest1, beta2, rest2, _k, _o, _s, _i, _r = scalars
    return _first_moment(beta1, rest1, states[0], g), _second_moment(beta2, rest2, states[1], g)


@triton.jit
def _adamp_direction(g, states, scalars):
    eps, nesterov, beta1, rest1, _beta2, _rest2, _k, _o, _s, _i, inverse_root2 = scalars
    m = tl.where(nesterov != 0, beta1 * states[0] + rest1 * g, states[0])
    return _adam_direction(m, states[1], inverse_root2, eps)


@triton.jit
def _adamp_update(w, g, states, along, is_open, scalars):
    _eps, _nesterov, _beta1, _rest1, _beta2, _rest2, keep, open_keep, step_size, inverse1, _r = scalars
    step = _adamp_direction(g, states, scalars)
    after, step = _behind_gate(w, step, along, is_open, keep, open_keep, step_size)
    return after, step * inverse1, states[0]


def _sgdp_constants(h: Mapping[str, float]) -> list[float]:
    decay, project = h["weight_decay"] / (1 - h["momentum"]), h["project_momentum"]
    gate = [h["delta"], h["eps"], h["nesterov"], 0.0 if h["nesterov"] else project]
    return [*gate, h["momentum"], 1 - h["dampening"], decay, decay * h["wd_ratio"]]


@triton.jit
def _sgdp_prepare(constants, lr, t, first):
    nesterov, momentum, one_minus_dampening = tl.load(constants + 2), tl.load(constants + 4), tl.load(constants + 5)
    keep, open_keep = 1 - lr * tl.load(constants + 6), 1 - lr * tl.load(constants + 7)
    return lr, nesterov, momentum, one_minus_dampening, keep, open_keep


@triton.jit
def _sgdp_advance(g, states, scalars):
    _lr, _nesterov, momentum, one_minus_dampening, _keep, _open_keep = scalars
    return (momentum * states[0] + one_minus_dampening * g,)


@triton.jit
def _sgdp_direction(g, states, scalars):
    _lr, nesterov, momentum, _one_minus_dampening, _keep, _open_keep = scalars
    return tl.where(nesterov != 0, g + momentum * states[0], states[0])


@triton.jit
def _sgdp_update(w, g, states, along, is_open, scalars):
    lr, _nesterov, _momentum, _one_minus_dampening, keep, open_keep = scalars
    step = _sgdp_direction(g, states, scalars)
    after, step = _behind_gate(w, step, along, is_open, keep, open_keep, lr)
    return after, step, step


# ---- no update: what the records say of rescaling and shrinking is all that happens ---------------------------------


def _no_constants(h: Mapping[str, float]) -> list[float]:
    return []


@triton.jit
def _prepare_nothing(constants, lr, t, first):
    return (lr,)


@triton.jit
def _update_nothing(w, g, s0, s1, s2, scalars, SLOTS: tl.constexpr):
    return w, g, s0, s1, s2


RULES: dict[str, Rule] = {
    "sgd": Rule(
        ("momentum", "dampening", "nesterov", "weight_decay"),
        ("momentum_buffer",),
        _sgd_constants,
        _sgd_prepare,
        _sgd_update,
    ),
    "adam": Rule(
        ("beta1", "beta2", "eps", "weight_decay", "decoupled_weight_decay"),
        ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        _adam_constants,
        _adam_prepare,
        _adam_update,
    ),
    "adamp": Rule(
        ("beta1", "beta2", "eps", "weight_decay", "delta", "wd_ratio", "nesterov"),
        ("exp_avg", "exp_avg_sq"),
        _adamp_constants,
        _adamp_prepare,
        _adamp_update,
        _adamp_advance,
        _adamp_direction,
        "gate",
    ),
    "sgdp": Rule(
        ("momentum", "dampening", "eps", "weight_decay", "delta", "wd_ratio", "nesterov", "project_momentum"),
        ("momentum_buffer",),
        _sgdp_constants,
        _sgdp_prepare,
        _sgdp_update,
        _sgdp_advance,
        _sgdp_direction,
        "gate",
    ),
    "sgd_shifted": Rule(
        ("momentum", "dampening", "nesterov", "weight_decay", "shifted_l2_lam", "shifted_l2_eps"),
        ("momentum_buffer",),
        _sgd_shifted_constants,
        _sgd_shifted_prepare,
        _sgd_update,
        look="shift",
    ),
    "project": Rule((), (), _no_constants, _prepare_nothing, _update_nothing, updates=False),
}
