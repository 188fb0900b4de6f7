"""Optimizer steps on the CPU against torch's fused ones, measured in turns (A B A B ...): `make bench`.

pytest-benchmark times our side; its `setup` between two rounds runs and times the other side, so that whatever else
the machine does hits both alike. A ratio is taken per round; what is reported is its median and its quartiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pairs
import pytest
import torch

from fastwrs.benchmark import lists
from fastwrs.benchmark.turns import Ratio, Step, timed


@dataclass(frozen=True)
class Comparison:
    """One line of the report. The goal is for ours / theirs, or for theirs / ours where `inverse`."""

    name: str
    rule: str
    shapes: Callable[[], list[lists.Shape]]
    axis: str | None = "out"
    rival: Callable[..., Step] = pairs.torch_fused
    channels_last: bool = False
    inverse: bool = False
    target: float | None = None
    repeat: int = 1
    """Steps per sample: several where one is too short to time."""

    @property
    def goal(self) -> str:
        """The target in words; empty for a line that is only shown."""
        return "" if self.target is None else f"{'>=' if self.inverse else '<='} {self.target:.3f}"

    def met(self, ratio: float) -> bool:
        """Whether the ratio reaches the target."""
        assert self.target is not None
        return ratio >= self.target if self.inverse else ratio <= self.target


LOOP, INPLACE = pairs.torch_fused_and_loop, pairs.torch_fused_and_inplace_loop
BIG, TINY = lists.resnet50, lists.tiny
COMPARISONS = (
    Comparison("resnet50 AdamW+WRS / torch fused", "AdamW", BIG, target=1.0),
    Comparison("resnet50 SGD+WRS / torch fused", "SGD", BIG, target=1.0),
    Comparison("resnet50 torch fused + loop / AdamW+WRS", "AdamW", BIG, rival=LOOP, inverse=True, target=1.5),
    Comparison("resnet50 torch fused + loop / SGD+WRS", "SGD", BIG, rival=LOOP, inverse=True, target=1.5),
    Comparison("resnet50 torch fused + in-place loop / AdamW+WRS", "AdamW", BIG, rival=INPLACE, inverse=True),
    Comparison("resnet50 torch fused + in-place loop / SGD+WRS", "SGD", BIG, rival=INPLACE, inverse=True),
    Comparison("resnet50 AdamW+WRS(IC) / torch fused", "AdamW", BIG, axis="in", target=1.1),
    Comparison("resnet50 SGD+WRS(IC) / torch fused", "SGD", BIG, axis="in", target=1.1),
    Comparison(
        "resnet50 AdamW+WRS(IC), channels_last / torch fused", "AdamW", BIG, axis="in", channels_last=True, target=1.1
    ),
    Comparison(
        "resnet50 SGD+WRS(IC), channels_last / torch fused", "SGD", BIG, axis="in", channels_last=True, target=1.1
    ),
    Comparison("2,000 tiny AdamW+WRS / torch fused", "AdamW", TINY, target=0.6, repeat=5),
    Comparison("2,000 tiny SGD+WRS / torch fused", "SGD", TINY, target=0.6, repeat=5),
    Comparison("resnet50 AdamW / torch fused", "AdamW", BIG, axis=None),
    Comparison("resnet50 SGD / torch fused", "SGD", BIG, axis=None),
)


def check(ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter], axis: str | None) -> None:
    """A fast step that is wrong is not worth a figure: after one step, ours are torch's weights, projected."""
    for mine, other in zip(ours, theirs, strict=True):
        want = other.detach().double()
        if axis is not None and want.ndim >= 2:
            dims = (1,) if axis == "in" else tuple(range(1, want.ndim))
            want = want / torch.linalg.vector_norm(want, dim=dims, keepdim=True)
        torch.testing.assert_close(mine.detach().double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", COMPARISONS, ids=lambda case: case.name)
def test_step(case: Comparison, benchmark, record, rounds):
    ours, theirs = (pairs.make_params(case.shapes(), case.channels_last) for _ in range(2))
    our_step = pairs.ours(case.rule, ours, case.axis)
    their_step = case.rival(case.rule, theirs)
    our_step()
    their_step()
    check(ours, theirs, case.axis)

    warmup = 3
    their_times: list[float] = []
    benchmark.pedantic(
        lambda: [our_step() for _ in range(case.repeat)],
        setup=lambda: their_times.append(timed(their_step, case.repeat)),
        rounds=rounds,
        warmup_rounds=warmup,
    )
    our_times = [seconds / case.repeat for seconds in benchmark.stats.stats.data]
    their_times = their_times[-len(our_times) :]
    ratio = Ratio.of(their_times, our_times) if case.inverse else Ratio.of(our_times, their_times)
    elements = sum(map(math.prod, case.shapes()))
    record(case, ratio, our_times, their_times, bytes_per_step=pairs.step_bytes(case.rule, elements))
