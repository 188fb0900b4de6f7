"""Off-default choices of each rule's own hyperparameters, by name, for the cases of all lanes."""

from __future__ import annotations

from typing import NamedTuple


class Option(NamedTuple):
    """An off-default choice of a rule's own hyperparameters."""

    rule: str
    slots: tuple[str, ...]
    hyper: dict[str, float]


def _sgd(**hyper: float) -> Option:
    return Option("sgd", ("momentum_buffer",) if hyper.get("momentum") else (), {"lr": 0.05} | hyper)


def _adam(*, amsgrad: bool = False, **hyper: float) -> Option:
    slots = ("exp_avg", "exp_avg_sq") + ("max_exp_avg_sq",) * amsgrad
    return Option("adam", slots, {"lr": 0.003, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8} | hyper)


def _adamp(**hyper: float) -> Option:
    betas = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    return Option("adamp", ("exp_avg", "exp_avg_sq"), {"lr": 0.004, "delta": 0.1, "wd_ratio": 0.1} | betas | hyper)


def _sgdp(**hyper: float) -> Option:
    gate = {"delta": 0.1, "wd_ratio": 0.1, "eps": 1e-8, "project_momentum": 1}
    return Option("sgdp", ("momentum_buffer",), {"lr": 0.05, "momentum": 0.9} | gate | hyper)


def _shifted(lam: float, eps: float, **hyper: float) -> Option:
    plain = _sgd(**hyper)
    return Option("sgd_shifted", plain.slots, plain.hyper | {"shifted_l2_lam": lam, "shifted_l2_eps": eps})


OPTIONS: dict[str, Option] = {
    "sgd": _sgd(),
    "sgd.wd.max": _sgd(weight_decay=0.03, maximize=1),
    "sgd.mom": _sgd(momentum=0.9),
    "sgd.mom.damp": _sgd(momentum=0.8, dampening=0.3),
    "sgd.mom.wd": _sgd(momentum=0.9, weight_decay=0.05, lr=0.02),
    "sgd.nesterov": _sgd(momentum=0.7, nesterov=1),
    "sgd.nesterov.wd": _sgd(momentum=0.9, nesterov=1, weight_decay=0.02),
    "sgd.all": _sgd(momentum=0.6, dampening=0.1, weight_decay=0.07, maximize=1, lr=0.11),
    "adam": _adam(),
    "adam.wd": _adam(weight_decay=0.04, beta1=0.85),
    "adam.ams.max": _adam(amsgrad=True, maximize=1, beta2=0.95),
    "adam.betas.eps": _adam(beta1=0.5, beta2=0.9, eps=1e-3),
    "adam.beta0": _adam(beta1=0.0, beta2=0.5, weight_decay=0.01),
    "adam.all": _adam(amsgrad=True, maximize=1, weight_decay=0.06, beta1=0.7, beta2=0.98, eps=1e-5, lr=0.01),
    "adamw": _adam(decoupled_weight_decay=1, weight_decay=0.1),
    "adamw.ams": _adam(decoupled_weight_decay=1, weight_decay=0.3, amsgrad=True, beta2=0.97),
    "adamw.max": _adam(decoupled_weight_decay=1, weight_decay=0.2, maximize=1, beta1=0.6, eps=1e-4, lr=0.02),
}
"""Rule options by name; `fresh`, the step count and lr as a tensor are swept elsewhere."""

# Gradients here know nothing of their weights: the cosine of a row of n elements is about 1 / sqrt(n), so that a delta
# of 6 opens nearly every gate by its rows, one of 0.9 some, mostly as a whole, and one of 0.1 hardly any. Not 1: that
# is the cosine of rows of one element, and a rounding would decide.
GATED: dict[str, Option] = {
    "adamp": _adamp(weight_decay=0.2),
    "adamp.open": _adamp(delta=6.0, weight_decay=0.3, wd_ratio=0.4),
    "adamp.some": _adamp(delta=0.9, beta1=0.5, beta2=0.9, eps=1e-3, weight_decay=0.1),
    "adamp.nesterov": _adamp(delta=6.0, nesterov=1, weight_decay=0.2, wd_ratio=0.5, maximize=1),
    "adamp.beta0": _adamp(delta=0.9, nesterov=1, beta1=0.0, beta2=0.5),
    "sgdp": _sgdp(weight_decay=0.03, dampening=0.3),
    "sgdp.open": _sgdp(delta=6.0, weight_decay=0.05, wd_ratio=0.4),
    "sgdp.apart": _sgdp(delta=6.0, momentum=0.7, weight_decay=0.02, project_momentum=0, maximize=1),
    "sgdp.some": _sgdp(delta=0.9, momentum=0.6, dampening=0.1, eps=1e-3),
    "sgdp.nesterov": _sgdp(delta=6.0, nesterov=1, weight_decay=0.04, wd_ratio=0.2),
    "sgdp.momentum0": _sgdp(delta=0.9, momentum=0.0, weight_decay=0.1, lr=0.02),
}
"""Options of the rules with a gate, which have cases of their own."""

# Rows have a root of the mean of their squares between 0.6 and 1.6 over that of their length, 0.03 for the longest: eps
# is above and below the standard deviations that there are.
SHIFTED: dict[str, Option] = {
    "shifted": _shifted(0.3, 0.1),
    "shifted.mom": _shifted(0.5, 0.5, momentum=0.9),
    "shifted.nesterov": _shifted(0.2, 0.3, momentum=0.7, nesterov=1, weight_decay=0.02),
    "shifted.all": _shifted(0.8, 0.05, momentum=0.6, dampening=0.1, weight_decay=0.07, maximize=1, lr=0.11),
    "shifted.eps0": _shifted(0.4, 0.0, maximize=1, momentum=0.5),
    "shifted.lam0": _shifted(0.0, 0.2, momentum=0.8),
}
"""Options of SGD with a shifted L2 term, which have cases of their own too."""

PROJECTED: dict[str, Option] = {
    "project": Option("project", (), {"lr": 0.05}),
    "project.max": Option("project", (), {"lr": 0.3, "maximize": 1}),
}
"""Of the rule without an update, whose gradients are poisoned: nobody may read them."""
ALL_OPTIONS = OPTIONS | GATED | SHIFTED | PROJECTED
