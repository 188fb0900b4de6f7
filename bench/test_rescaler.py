"""``WeightRescaler`` on the CPU against loops over weights in eager torch, in turns: `make bench`.

The loops are the ways that we know to write it; each has a line, and the goal is for the fastest of them. They divide
by the norm as it is; ours leaves groups alone whose norm is 0 or not finite, and counts steps. Both follow a step of an
optimizer that does nothing: what PyTorch itself does around any step, 0.1 ms, is on both sides.
"""

# torch._foreach_* is what users call by that name.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Callable

import pairs
import pytest
import torch
from test_step import Comparison
from torch import Tensor

import fastwrs
from fastwrs.benchmark import lists, sides
from fastwrs.benchmark.turns import Ratio, Step, timed

BYTES = 8
"""Per fp32 element: read once, written once."""
GOAL = 0.6


class Resting(torch.optim.Optimizer):
    """An optimizer whose step does nothing, so that what follows it is what there is to time."""

    def step(self, closure: None = None) -> None:
        """Nothing."""


def ours(params: list[torch.nn.Parameter]) -> Step:
    optimizer = Resting(params, {"lr": 1.0})
    fastwrs.WeightRescaler(optimizer, fastwrs.Rescale(), backend="cpu")
    return optimizer.step


def foreach_mul_of_rows(weights: list[Tensor]) -> None:
    rows = [w.view(len(w), -1) for w in weights]
    factors = [torch.linalg.vector_norm(row, dim=1, keepdim=True) for row in rows]
    torch._foreach_reciprocal_(factors)
    torch._foreach_mul_(rows, factors)


def foreach_squares(weights: list[Tensor]) -> None:
    rows = [w.view(len(w), -1) for w in weights]
    sums = [torch.einsum("ij,ij->i", row, row).unsqueeze(1) for row in rows]
    torch._foreach_rsqrt_(sums)
    torch._foreach_mul_(rows, sums)


def normalize(weights: list[Tensor]) -> None:
    for w in weights:
        rows = w.view(len(w), -1)
        torch.nn.functional.normalize(rows, dim=1, out=rows)


Loop = Callable[[list[Tensor]], None]
LOOPS: dict[str, Loop] = {
    "foreach_div": sides.divided_by_foreach,
    "foreach_mul_of_rows": foreach_mul_of_rows,
    "foreach_squares": foreach_squares,
    "one_by_one": sides.divided,
    "normalize": normalize,
}


@pytest.mark.parametrize("name", LOOPS)
def test_rescaler(name: str, benchmark, record, rounds):
    goal = GOAL if "foreach" in name else None
    case = Comparison(f"resnet50 WeightRescaler / {name}", "project", lists.resnet50, target=goal)
    mine = pairs.make_params(case.shapes())
    against_loop(case, mine, ours(mine), LOOPS[name], benchmark, record, rounds)


@pytest.mark.parametrize("name", [name for name in LOOPS if "foreach" in name])
def test_floor(name: str, benchmark, record, rounds):
    """What no rescaling in place can be faster than: the weights are read and written once, and nothing is summed."""
    case = Comparison(f"resnet50 WeightRescaler's floor, foreach_mul / {name}", "project", lists.resnet50)
    mine = pairs.make_params(case.shapes())
    weights = [param.detach() for param in mine if param.ndim >= 2]
    resting = Resting(mine, {"lr": 1.0})
    sides.divided_by_foreach(weights)

    def multiplied() -> None:
        resting.step()
        torch._foreach_mul_(weights, 1.0)

    against_loop(case, mine, multiplied, LOOPS[name], benchmark, record, rounds)


def against_loop(case, mine, our_step, loop, benchmark, record, rounds):
    """Takes turns with the loop over the weights of as many other parameters, which has to leave them the same."""
    other = pairs.make_params(case.shapes())
    weights = [param.detach() for param in other if param.ndim >= 2]
    resting = Resting(other, {"lr": 1.0})
    our_step()
    loop(weights)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    their_times: list[float] = []

    def theirs() -> None:
        their_times.append(timed(lambda: (resting.step(), loop(weights)), 1))

    benchmark.pedantic(our_step, setup=theirs, rounds=rounds, warmup_rounds=3)
    our_times = benchmark.stats.stats.data
    their_times = their_times[-len(our_times) :]
    elements = sum(math.prod(shape) for shape in case.shapes() if len(shape) >= 2)
    record(case, Ratio.of(our_times, their_times), our_times, their_times, bytes_per_step=BYTES * elements)
