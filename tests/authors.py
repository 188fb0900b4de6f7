"""AdamP and SGDP beside the authors' package, on gradients that open the gate by channel, as a whole, or not.

A gate opens where gradients are orthogonal to weights, so gradients are made from the weights: from those of the
authors' run, which is in fp64, and then rounded to the type of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import adamp
import torch
from tolerances import check_path
from torch import Tensor, nn

import fastwrs
from fastwrs import reference
from fastwrs.optim.records import read

CONV, LINEAR, VECTOR = (6, 4, 3, 3), (7, 5), (33,)
CHANNEL, LAYER, CLOSED = "by channel", "as a whole", "closed"
WAYS = (CHANNEL, LAYER, CLOSED)
STATES = {"AdamP": {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}, "SGDP": {"momentum_buffer": "momentum"}}
"""Our name of a state, and theirs."""
FP64 = 1e-12
"""The agreement with the authors' package in fp64 that the project promises, over 20 steps."""


def authors(name: str, clones: bool = False) -> Any:
    """Their class, which notes in ``ways`` how each gate decides. ``clones``: buffer and step are two tensors."""

    class Watched(getattr(adamp, name)):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.ways: list[str] = []

        def _layer_view(self, x: Tensor) -> Tensor:
            self.tried_both = True
            return super()._layer_view(x)

        def _projection(self, p: Tensor, grad: Tensor, perturb: Tensor, *numbers: float) -> Any:
            self.tried_both = False
            step, ratio = super()._projection(p, grad, perturb.clone() if clones else perturb, *numbers)
            self.ways.append(CLOSED if ratio == 1 else LAYER if self.tried_both else CHANNEL)
            return step, ratio

    return Watched


def start(shapes: tuple[tuple[int, ...], ...] = (CONV, LINEAR, VECTOR)) -> list[Tensor]:
    """Weights in fp64 that fp32 holds exactly."""
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(shape, generator=generator).double() for shape in shapes]


def gradient(weights: Tensor, way: str, seed: int) -> Tensor:
    """A gradient that opens the gate of these weights in this way, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
    if weights.ndim < 2 or not weights.numel():
        return noise
    w = weights.detach().reshape(weights.shape[0], -1)
    squares = w.square().sum(dim=1, keepdim=True)
    across = noise.reshape(w.shape) - w * ((noise.reshape(w.shape) * w).sum(dim=1, keepdim=True) / squares)
    along = torch.ones_like(squares)
    if way == LAYER:  # as much along half of the rows as against the others
        along[: len(w) // 2] *= -squares[len(w) // 2 :].sum() / squares[: len(w) // 2].sum()
    return (across + (0 if way == CHANNEL else 0.7) * along * w).reshape(weights.shape)


@dataclass
class Run:
    """What a run leaves: ours, the authors' in fp64, and in fp32 the oracle's formula."""

    name: str
    start: list[Tensor]
    ours: list[nn.Parameter]
    theirs: list[nn.Parameter]
    optimizer: Any
    other: Any
    formula: list[Tensor] = field(default_factory=list)
    moments: list[dict[str, Tensor]] = field(default_factory=list)

    def assert_equal(self) -> None:
        """Weights and states are the authors'; in fp32 within twice what the formula loses, plus 1 ulp."""
        for k, (mine, other) in enumerate(zip(self.ours, self.theirs, strict=True)):
            assert mine.dtype == torch.float64 or other.dtype == torch.float64
            self._assert_near(mine, other, self.start[k], self.formula[k], f"tensor {k}")
            for name, theirs in STATES[self.name].items():
                if other not in self.other.state:
                    assert mine not in self.optimizer.state
                    continue
                state, truth = self.optimizer.state[mine][name], self.other.state[other][theirs]
                self._assert_near(state, truth, torch.zeros_like(truth), self.moments[k][name], f"{name} {k}")

    def _assert_near(self, got: Tensor, truth: Tensor, before: Tensor, formula: Tensor, where: str) -> None:
        if got.dtype == torch.float64:
            torch.testing.assert_close(
                got.detach(), truth.detach(), rtol=FP64, atol=FP64, msg=lambda m: f"{where}: {m}"
            )
        else:
            check_path(got.detach(), formula, truth.detach(), before, where)


def run(
    name: str,
    way: str,
    options: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float64,
    steps: int = 20,
    weights: list[Tensor] | None = None,
    kind: Any = None,
    ours: dict[str, Any] | None = None,
    lie: Callable[[Tensor], Tensor] = torch.clone,
    late: dict[int, int] | None = None,
    after: Callable[[Tensor, Tensor], Tensor] | None = None,
    before: Callable[[Run], None] = lambda _: None,
) -> Run:
    """Runs ours and theirs, and asserts that every gate of theirs decided as it should, in every step.

    Args:
        name: the optimizer.
        way: how all gates are to decide.
        options: those that the authors have too.
        dtype: the type of ours.
        steps: how many.
        weights: where both begin.
        kind: the authors' class (default: ``authors(name)``).
        ours: options that only we have.
        lie: how our weights lie in memory.
        late: the step in which parameter k gets its first gradient.
        after: what a step of theirs is followed by: weights before and after it to what they are to become.
        before: is called before every step.
    """
    weights = start() if weights is None else weights
    mine = [nn.Parameter(lie(w.to(dtype))) for w in weights]
    theirs = [nn.Parameter(w.clone()) for w in weights]
    optimizer = getattr(fastwrs, name)(mine, **options, **(ours or {}))
    other = (kind or authors(name))(theirs, **options)
    states = [{slot: torch.zeros_like(w, dtype=dtype) for slot in STATES[name]} for w in weights]
    found = Run(name, weights, mine, theirs, optimizer, other, [w.to(dtype) for w in weights], states)
    counts = [0] * len(weights)
    for step in range(steps):
        before(found)
        old = [p.detach().clone() for p in theirs]
        for k, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if step >= (late or {}).get(k, 0):
                g = gradient(b, way, 100 * step + k).to(dtype)
                a.grad, b.grad = g, g.double()
                counts[k] += 1
                found.formula[k], found.moments[k] = _formula(found, k, g, counts[k])
        optimizer.step()
        other.step()
        for b, weights_before in zip(theirs, old, strict=True):
            if after is not None and b.grad is not None:
                b.data.copy_(after(weights_before, b.data))
    if kind is None or hasattr(other, "ways"):
        gates = sum(count for w, count in zip(weights, counts, strict=True) if w.ndim > 1)
        assert other.ways == [way] * gates
    return found


def _formula(found: Run, k: int, g: Tensor, t: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A step of the oracle in our type, from what its steps before have left."""
    rule, group = found.optimizer.rule, found.optimizer.param_groups[0]
    record = read(rule, group, found.optimizer.numbers(group))
    hyper = {known.name: value for known, value in zip(rule.record, record, strict=True)}
    hyper["lr"] = float(group["lr"])
    axis = group["rescale"] or group["shrink"]
    dims = (
        None
        if axis is None
        else {"out": tuple(range(1, g.ndim)), "in": (1,), "tensor": tuple(range(g.ndim))}[axis.axis]
    )
    step = reference.step(rule.name, found.formula[k], g, found.moments[k], t=t, hyper=hyper, dims=dims, dtype=g.dtype)
    return step.param, step.states
