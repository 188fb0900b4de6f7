"""AdamP and SGDP on the CPU against the authors' package and timm's, in turns, and what WRS adds to them: `make bench`.

``open``: delta is so large that every gate opens by channel, as most do in front of a normalisation layer; there the
others look at the rows once and project. Without it gradients know nothing of weights, and nearly every gate is closed.
"""

from __future__ import annotations

import math
from typing import Any

import adamp
import pairs
import pytest
import torch
from test_step import Comparison

import fastwrs
from fastwrs.benchmark import lists, sides
from fastwrs.benchmark.turns import Ratio, Step, timed

Params = list[torch.nn.Parameter]
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamP": {"lr": 1e-3, "weight_decay": 1e-2},
    "SGDP": {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4},
    "AdamW": {"lr": 1e-3, "weight_decay": 1e-2},
}
BYTES = {"AdamP": 40, "SGDP": 28}
"""Per fp32 element: parameter, gradient and states, then parameter and states; 32 where SGDP projects its buffer."""
OPEN = 1e9


def ours(name: str, params: Params, axis: str | None = None, **more: Any) -> Step:
    """A step of fastwrs on the cpu backend; with an axis, tensors of two or more dimensions are rescaled."""
    rescale = fastwrs.Rescale(axis=axis) if axis else None
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "rescale": rescale},
        {"params": [p for p in params if p.ndim < 2]},
    ]
    return getattr(fastwrs, name)(groups, backend="cpu", **OPTIONS[name], **more).step


def theirs(whose: str, name: str, params: Params, **more: Any) -> Step:
    """A step of what ours is compared with."""
    if whose == "AdamW":
        return ours("AdamW", params)
    if whose == "without":
        return ours(name, params, **more)
    kind = sides.timm_optimizer(name) if whose == "timm's" else getattr(adamp, name)
    return kind(params, **OPTIONS[name], **more).step


def against(name: str, whose: str, opens: bool, goal: float | None) -> tuple[str, bool, Comparison]:
    title = f"resnet50 {whose} {name} / {name}{', open' if opens else ''}"
    return whose, opens, Comparison(title, name, lists.resnet50, axis=None, inverse=True, target=goal)


def rescaled(name: str, axis: str, opens: bool) -> tuple[str, bool, Comparison]:
    title = f"resnet50 {name}+WRS{'(IC)' if axis == 'in' else ''} / {name}{', open' if opens else ''}"
    goal = 1.05 if (name, axis) == ("AdamP", "out") else None
    return "without", opens, Comparison(title, name, lists.resnet50, axis=axis, target=goal)


COMPARISONS = (
    *(
        against(name, whose, opens, goal)
        for name, opens, goal in (("AdamP", False, 5.0), ("AdamP", True, 5.0), ("SGDP", True, None))
        for whose in ("authors'", "timm's")
    ),
    *(rescaled(name, "out", opens) for name, opens in (("AdamP", False), ("AdamP", True), ("SGDP", True))),
    rescaled("AdamP", "in", True),
    ("AdamW", False, Comparison("resnet50 AdamP / fastwrs AdamW", "AdamP", lists.resnet50, axis=None)),
)


def check(mine: Params, other: Params, axis: str | None) -> None:
    """A fast step that is wrong is not worth a figure: after one step, ours are theirs, projected."""
    for a, b in zip(mine, other, strict=True):
        want = b.detach().double()
        if axis is not None and want.ndim >= 2:
            dims = (1,) if axis == "in" else tuple(range(1, want.ndim))
            want = want / torch.linalg.vector_norm(want, dim=dims, keepdim=True)
        torch.testing.assert_close(a.detach().double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("whose", "opens", "case"), COMPARISONS, ids=[case.name for _, _, case in COMPARISONS])
def test_adamp(whose: str, opens: bool, case: Comparison, benchmark, record, rounds):
    mine, other = (pairs.make_params(case.shapes()) for _ in range(2))
    more = {"delta": OPEN} if opens else {}
    our_step, their_step = ours(case.rule, mine, case.axis, **more), theirs(whose, case.rule, other, **more)
    our_step()
    their_step()
    if whose != "AdamW":
        check(mine, other, case.axis)

    their_times: list[float] = []
    benchmark.pedantic(
        our_step,
        setup=lambda: their_times.append(timed(their_step, 1)),
        rounds=rounds,
        warmup_rounds=3,
    )
    our_times = benchmark.stats.stats.data
    their_times = their_times[-len(our_times) :]
    ratio = Ratio.of(their_times, our_times) if case.inverse else Ratio.of(our_times, their_times)
    size = BYTES[case.rule] + 4 * (opens and case.rule == "SGDP")
    record(case, ratio, our_times, their_times, bytes_per_step=size * sum(map(math.prod, case.shapes())))
