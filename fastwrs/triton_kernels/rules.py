"""The rules as Triton functions: the third and last place where an optimizer's update is written.

Each has ``constants``, formed on the host in double from the hyperparameters of ``fastwrs.spec``, in the order in which
the kernel reads them; ``prepare``, the numbers that one step of one tensor needs; and ``update``, which takes weights,
gradients and up to three states and returns new weights, the step ``u`` before the learning rate, and new states.
"""

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


# ---- Adam, AdamW, AMSGrad: Kingma and Ba, ICLR 2015; Loshchilov and Hutter, ICLR 2019; Reddi et al., ICLR 2018 ------


def _adam_constants(h: Mapping[str, float]) -> list[float]:
    logs = [math.log(h[name]) if h[name] > 0 else -math.inf for name in ("beta1", "beta2")]
    decay, decoupled = h["weight_decay"], h["decoupled_weight_decay"] != 0
    coupled, apart = (0.0, decay) if decoupled else (decay, 0.0)
    return [h["beta1"], 1 - h["beta1"], logs[0], h["beta2"], 1 - h["beta2"], logs[1], h["eps"], coupled, apart]


@triton.jit
def _adam_prepare(constants, lr, t, first):
    beta1, rest1, log1 = tl.load(constants), tl.load(constants + 1), tl.load(constants + 2)
    beta2, rest2, log2 = tl.load(constants + 3), tl.load(constants + 4), tl.load(constants + 5)
    eps, coupled, apart = tl.load(constants + 6), tl.load(constants + 7), tl.load(constants + 8)
    correction1, correction2 = one_minus_power(log1, t), one_minus_power(log2, t)
    step_size, inverse1 = quotient(lr, correction1), quotient(1.0, correction1)
    inverse_root2 = quotient(1.0, square_root(correction2))
    return beta1, rest1, beta2, rest2, eps, coupled, 1 - lr * apart, step_size, inverse1, inverse_root2


@triton.jit
def _adam_update(w, g, s0, s1, s2, scalars, SLOTS: tl.constexpr):
    beta1, rest1, beta2, rest2, eps, coupled, keep, step_size, inverse1, inverse_root2 = scalars
    g = tl.where(coupled != 0, g + coupled * w, g)
    # Near 1, beta1 and 1 - beta1 are rounded too differently to be used together.
    s0 = tl.where(beta1 > 0.5, s0 + rest1 * (g - s0), beta1 * s0 + rest1 * g)
    s1 = beta2 * s1 + rest2 * g * g
    largest = s1
    if SLOTS == 3:
        s2 = tl.where((s1 > s2) | (s1 != s1), s1, s2)
        largest = s2
    direction = quotient(s0, square_root(largest) * inverse_root2 + eps)
    return w * keep - step_size * direction, direction * inverse1, s0, s1, s2


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
}
