"""The check that a side has to pass before anything is reported of it: a fast step that is wrong is no figure."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastwrs import reference
from fastwrs.benchmark.lists import WEIGHT
from fastwrs.benchmark.sides import DECAY, LR, SLOTS, Side, Work, norms, values
from fastwrs.benchmark.turns import Step
from fastwrs.spec import RULES

CHECKED_STEPS = (1.0, -0.5)
"""What the gradients are multiplied by in each of the steps that are checked: exact, and taken back exactly."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3 * 2.0**-7}
"""How far a weight may be from the oracle's, relative to the largest of its group: a check for sides of other makes,
which round in other places. How exact fastwrs is, tests/tolerances.py decides."""
NORM_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-6}
"""How far the norm of a rescaled channel may be from 1, on any side."""
CHUNK = 1 << 24
"""Elements that are checked at once: the oracle runs in fp64 and makes many copies."""


def check(side: Side, work: Work, step: Step, most: float = math.inf) -> list[str]:
    """Takes two steps; returns what is wrong with the weights afterwards. The gradients are as before.

    Of large lists, tensors of up to ``most`` elements together are looked at in full, and of all others the norms.
    """
    seen = _looked_at(work, most)
    faults = _steps(side, work, step, [] if side.formula else seen)
    if side.axis == "out":
        faults += _lengths(work)
    if side.formula:
        faults += _against_the_oracle(side, work, seen)
    return faults


def _steps(side: Side, work: Work, step: Step, seen: list[int]) -> list[str]:
    """Takes the steps: these parameters have to move, at first not along their gradients; no gradient may change."""
    faults, along = [], 0.0
    for factor in CHECKED_STEPS:
        for grad in work.grads:
            grad.mul_(factor)
        before = {k: work.params[k].detach().clone() for k in seen}
        sums = [grad.detach().sum(dtype=torch.float64) for grad in work.grads]
        step()
        for k, old in before.items():
            param = work.params[k].detach()
            if torch.equal(param, old) or not bool(param.isfinite().all()):
                faults.append(f"parameter {k} has not moved in a step, or is not finite")
            if factor == CHECKED_STEPS[0]:
                along += float(((param - old).double() * work.grads[k]).sum())
        if side.own_grads:
            continue
        for k, (param, grad, total) in enumerate(zip(work.params, work.grads, sums, strict=True)):
            if param.grad is not grad or grad.sum(dtype=torch.float64) != total:
                faults.append(f"the gradient of parameter {k}, which all sides share, has been changed")
    for grad in work.grads:
        grad.div_(math.prod(CHECKED_STEPS))
    if along > 0 and side.axis is None:
        faults.append("the first step goes along the gradients, not against them")
    return faults


def _lengths(work: Work) -> list[str]:
    """The norms of what is rescaled are 1."""
    faults = []
    for k, (param, role) in enumerate(zip(work.params, work.roles, strict=True)):
        if role != WEIGHT or not param.numel():
            continue
        off = (norms(param.detach().double()) - 1).abs()
        if not bool((off <= NORM_TOLERANCE[param.dtype]).all()):
            faults.append(f"parameter {k} has norms that are off by up to {float(off.max()):.2g}")
    return faults


def _against_the_oracle(side: Side, work: Work, seen: list[int]) -> list[str]:
    """These parameters are what the oracle makes of the same values and gradients."""
    faults = []
    for k in seen:
        role = work.roles[k]
        param, slope = (tensor.detach().reshape(tensor.shape or (1,)) for tensor in (work.params[k], work.grads[k]))
        start = values(k, work.params[k].detach()).reshape(param.shape)
        rows = max(1, CHUNK // max(1, param[:1].numel()))
        pieces = (tensor.split(rows) for tensor in (param, start, slope))
        for got, w, grad in zip(*pieces, strict=True):
            truth, dims = _truth(side, work, role, w, grad)
            scale = truth.abs().amax(dims, keepdim=True) if dims else torch.maximum(truth.abs(), w.abs().double())
            off = (got.double() - truth).abs() / scale
            if not bool((off <= TOLERANCE[got.dtype]).all()):
                faults.append(f"parameter {k} is off by up to {float(off.max()):.2g} of the largest of a group")
                break
    return faults


def _looked_at(work: Work, most: float) -> list[int]:
    """Of each role the largest tensor that fits, then as many as fit, in their order; none without elements."""
    sizes = {k: param.numel() for k, param in enumerate(work.params) if param.numel()}
    largest = {work.roles[k]: k for k in sorted(sizes, key=lambda k: sizes[k]) if sizes[k] <= most}
    chosen, left = set(largest.values()), most - sum(sizes[k] for k in largest.values())
    for k, size in sizes.items():
        if k not in chosen and size <= left:
            chosen.add(k)
            left -= size
    return sorted(chosen)


def _truth(side: Side, work: Work, role: str, w: Tensor, grad: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
    """The oracle's weights after the checked steps, and the dimensions that were rescaled together."""
    rule = RULES["sgd" if work.rule == "SGD" else "adam"]
    numbers = {"lr": LR, "momentum": 0.9, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "decoupled_weight_decay": 1}
    rescales = side.axis is not None and role == WEIGHT
    numbers |= {"weight_decay": DECAY if role in side.decays else 0.0, "every": int(rescales), "stop": float("inf")}
    hyper = {known.name: float(numbers.get(known.name, 0)) for known in rule.record} | {"target": 1.0}
    dims = None
    if rescales:
        dims = (1,) if side.axis == "in" else tuple(range(1, w.ndim))
    w = w.double()
    states = {slot.name: torch.zeros_like(w) for slot in rule.slots[: SLOTS[work.rule]]}
    scale = 1.0
    for t, factor in enumerate(CHECKED_STEPS, 1):
        scale *= factor
        done = reference.step(rule.name, w, grad.double() * scale, states, t=t, hyper=hyper, dims=dims)
        w, states = done.param, done.states
    return w, dims
