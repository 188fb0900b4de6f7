"""The gate of AdamP and SGDP in the oracle: numbers worked out by hand, and its decisions in the cases of all lanes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from cases import CASES, GATED, Case
from tolerances import Inputs, snapshot
from torch import Tensor

from fastwrs import reference
from fastwrs.reference.rules import gate
from fastwrs.spec import NO_STOP, RULES

pytestmark = pytest.mark.oracle


def matrix(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def approx(tensor: Tensor | None, *values: float) -> bool:
    assert tensor is not None
    return tensor.flatten().tolist() == pytest.approx(list(values), rel=1e-14)


def record(rule: str, **values: float) -> dict[str, float]:
    """A record with nothing switched on but the gate, and these values."""
    usual = {"lr_tensor": -1, "stop": NO_STOP, "target": 1, "power": 1, "delta": 0.1, "wd_ratio": 0.2}
    return {h.name: float((usual | values).get(h.name, 0)) for h in RULES[rule].record}


WEIGHTS, STEP = matrix((3, 4), (0, 5)), matrix((1, 1), (2, 3))
NUMBERS = {"delta": 0.1, "eps": 0.0, "wd_ratio": 0.2}


def test_open_by_channel_by_hand() -> None:
    across = matrix((4, -3), (1, 0))
    removed, ratio, _ = gate(WEIGHTS, across, STEP, NUMBERS)
    # w . step is 7 and 15, |w| ** 2 is 25: 7 / 25 of the first row, 15 / 25 of the second
    assert approx(removed, 0.84, 1.12, 0, 3)
    assert ratio == 0.2
    removed, *_ = gate(WEIGHTS, across, STEP, NUMBERS | {"eps": 1.0})
    assert approx(removed, 7 / 36 * 3, 7 / 36 * 4, 0, 15 / 36 * 5)


def test_open_as_a_whole_by_hand() -> None:
    """Along the first row as much as against the second: each row is as far from orthogonal as can be."""
    removed, ratio, _ = gate(WEIGHTS, matrix((3, 4), (0, -5)), STEP, NUMBERS)
    # w . step is 22 and |w| ** 2 is 50
    assert approx(removed, 1.32, 1.76, 0, 2.2)
    assert ratio == 0.2


def test_closed_by_hand() -> None:
    bad = matrix((4, -3), (math.nan, 0)), matrix((4, -3), (1, math.inf))
    for grad in (WEIGHTS, -WEIGHTS, matrix((4, -3), (0, 5)), *bad):
        assert gate(WEIGHTS, grad, STEP, NUMBERS) == (None, 1.0, None)
    assert gate(matrix((3, 4))[0], matrix((4, -3))[0], STEP[0], NUMBERS) == (None, 1.0, None)  # a vector has no gate
    for empty in ((0, 3), (3, 0)):
        nothing = torch.ones(empty)
        assert gate(nothing, nothing, nothing, NUMBERS) == (None, 1.0, None)


def test_the_bound_itself_is_closed() -> None:
    """The cosine is 1 / 2, and so is delta / sqrt(4)."""
    weights, grad = matrix((1, 1, 1, 1)), matrix((1, 0, 0, 0))
    assert gate(weights, grad, grad, NUMBERS | {"delta": 1.0})[0] is None
    assert gate(weights, grad, grad, NUMBERS | {"delta": 1.0000001})[0] is not None
    assert gate(weights, -grad, grad, NUMBERS | {"delta": 1.0})[0] is None
    for delta in (0.0, -1.0):  # never, not even for a cosine of 0
        assert gate(weights, matrix((1, -1, 1, -1)), grad, NUMBERS | {"delta": delta})[0] is None


def test_a_norm_below_eps_counts_as_eps() -> None:
    weights = matrix((1, 1, 1, 1)) / 2  # of norm 1, so that the cosine is 1 / eps ** 2; the bound is 0.05
    for eps, opens in ((0.5, False), (4.0, False), (5.0, True)):
        removed, *_ = gate(weights, weights, weights, NUMBERS | {"eps": eps})
        assert (removed is not None) == opens
    assert approx(removed, *[0.5 / 36] * 4)


def test_adamp_by_hand() -> None:
    hyper = record("adamp", lr=0.1, beta1=0.5, beta2=0.75, eps=1, weight_decay=0.5)
    w, across, states = matrix((3, 4)), matrix((4, -3)), {"exp_avg": matrix((2, 3)), "exp_avg_sq": matrix((1, 1))}
    # m = 1 + 2, 1.5 - 1.5; v = 0.75 + 0.25 * 16, 0.75 + 0.25 * 9; corrections of step 2 are 0.75 and 0.4375
    roots = [math.sqrt(v / 0.4375) + 1 for v in (4.75, 3.0)]
    for nesterov, m in ((0, (3, 0)), (1, (3.5, -1.5))):  # 0.5 * m + 0.5 * g
        p = [a / b for a, b in zip(m, roots, strict=True)]
        along = (3 * p[0] + 4 * p[1]) / 36  # (|w| + eps) ** 2
        u = [(p[0] - 3 * along) / 0.75, (p[1] - 4 * along) / 0.75]
        step = reference.step("adamp", w, across, states, t=2, hyper=hyper | {"nesterov": nesterov}, dims=None)
        assert approx(step.states["exp_avg"], 3, 0)
        assert approx(step.states["exp_avg_sq"], 4.75, 3)
        assert approx(step.update, *u)
        assert approx(step.removed, 3 * along / 0.75, 4 * along / 0.75)
        assert approx(step.param, 3 * 0.99 - 0.1 * u[0], 4 * 0.99 - 0.1 * u[1])  # 1 - lr * weight_decay * wd_ratio
        closed = hyper | {"nesterov": nesterov, "delta": 0}
        step = reference.step("adamp", w, across, states, t=2, hyper=closed, dims=None)
        assert approx(step.param, 3 * 0.95 - 0.1 * p[0] / 0.75, 4 * 0.95 - 0.1 * p[1] / 0.75)


def test_sgdp_by_hand() -> None:
    hyper = record("sgdp", lr=0.1, momentum=0.5, dampening=0.25, weight_decay=0.5, project_momentum=1)
    w, across, states = matrix((3, 4)), matrix((4, -3)), {"momentum_buffer": matrix((2, 2))}
    # buf = 1 + 3, 1 - 2.25, and w . buf = 7; the decay is 0.1 * 0.5 / (1 - 0.5) times wd_ratio
    u = (4 - 0.84, -1.25 - 1.12)
    for project, buffer in ((1, u), (0, (4, -1.25))):
        step = reference.step("sgdp", w, across, states, t=1, hyper=hyper | {"project_momentum": project}, dims=None)
        assert approx(step.update, *u)
        assert approx(step.states["momentum_buffer"], *buffer)
        assert approx(step.param, 3 * 0.98 - 0.1 * u[0], 4 * 0.98 - 0.1 * u[1])
    step = reference.step("sgdp", w, across, states, t=1, hyper=hyper | {"nesterov": 1}, dims=None)
    assert approx(step.update, 6 - 0.42, -3.625 - 0.56)  # g + 0.5 * buf, and w . that = 3.5
    assert approx(step.states["momentum_buffer"], 4, -1.25)
    step = reference.step("sgdp", w, across, states, t=1, hyper=hyper | {"delta": 0}, dims=None)
    assert approx(step.update, 4, -1.25)
    assert approx(step.param, 3 * 0.9 - 0.4, 4 * 0.9 + 0.125)


# ---- the cases of all lanes -----------------------------------------------------------------------------------------


def gated() -> Iterator[tuple[Case, Inputs]]:
    for case in CASES:
        if case.option in GATED:
            yield from ((case, inputs) for inputs in snapshot(case.build()))


def cosine(inputs: Inputs, rows: int) -> tuple[float, float]:
    """The largest cosine of so many rows, and the bound that it has to stay below."""
    w, g = (tensor.double().reshape(rows, -1) for tensor in (inputs.param, inputs.grad))
    norms = torch.linalg.vector_norm(w, dim=1) * torch.linalg.vector_norm(g, dim=1)
    return float(((w * g).sum(dim=1).abs() / norms).max()), inputs.hyper["delta"] / math.sqrt(w.shape[1])


def test_the_cases_open_by_channel_as_a_whole_and_not_at_all() -> None:
    """For each rule and in each type; and no decision hangs on a rounding."""
    ways: Counter[tuple[str, str, str]] = Counter()
    for case, inputs in gated():
        if inputs.param.ndim < 2 or not inputs.param.numel() or case.tensors[0].data != "plain":
            continue
        (by_rows, bound), (whole, other) = cosine(inputs, inputs.param.shape[0]), cosine(inputs, 1)
        way = "by channel" if by_rows < bound else "as a whole" if whole < other else "closed"
        opened = inputs.run(torch.float64).removed is not None
        assert opened == (way != "closed"), case.id
        assert abs(by_rows - bound) > 1e-5 * bound, case.id
        assert way == "by channel" or abs(whole - other) > 1e-5 * other, case.id
        ways[inputs.rule, way, case.dtypes[0]] += 1
    for rule in ("adamp", "sgdp"):
        for way in ("by channel", "as a whole", "closed"):
            for dtype in ("float32", "float64", "bfloat16", "float16"):
                assert ways[rule, way, dtype] >= 3, (rule, way, dtype, ways)


def test_every_gated_option_has_cases_that_open() -> None:
    opened = {case.option for case, inputs in gated() if inputs.run(torch.float64).removed is not None}
    assert opened >= {option for option, values in GATED.items() if values.hyper["delta"] > 0.1}
