"""How time grows with the number of tensors and of parameters, and what memory a step takes: `make bench`."""

from __future__ import annotations

import math

import pytest
import torch
from pairs import step_bytes
from test_step import Comparison

from fastwrs.benchmark import memory
from fastwrs.benchmark.lists import WEIGHT, Param, Shape
from fastwrs.benchmark.sides import FUSED, PRECISIONS, Work, made, make_grads, ours
from fastwrs.benchmark.turns import Ratio, Step, in_turns

WRS = ours("cpu", "out")
FP32 = PRECISIONS["float32"]
LARGEST = 4096  # rows of 1,024 in a tensor
SIZES = (10**5, 10**6, 10**7, 10**8, 3 * 10**8)
HIGHEST_PEAK = 1_000_000  # bytes


def split(total: int) -> list[Shape]:
    """Matrices of rows of 1,024 that have about so many elements."""
    rows, rest = divmod(total // 1024, LARGEST)
    return [(LARGEST, 1024)] * rows + ([(rest, 1024)] if rest else [])


def both(shapes: list[Shape], rule: str = "AdamW") -> tuple[Step, Step]:
    """Our step with WRS, and torch fused without, on matrices."""
    params = [Param(shape, WEIGHT) for shape in shapes]
    grads = make_grads(params, torch.float32, "cpu")
    mine, theirs = (made(side, Work.new(rule, FP32, params, grads)) for side in (WRS, FUSED))
    return mine, theirs


@pytest.mark.parametrize("count", [10, 100, 1000, 10_000])
@pytest.mark.parametrize("rule", ["AdamW", "SGD"])
def test_tensors(rule: str, count: int, record, rounds):
    mine, theirs = both([(2, 2)] * count, rule)
    times = in_turns({"ours": mine, "theirs": theirs}, rounds, repeat=max(1, 2000 // count))
    goal = 0.6 if count == 10_000 else None
    case = Comparison(f"{count:,} tensors of 4 elements, {rule}+WRS / torch fused", rule, list, target=goal)
    size = step_bytes(rule, 4 * count)
    record(case, Ratio.of(times["ours"], times["theirs"]), times["ours"], times["theirs"], bytes_per_step=size)


@pytest.mark.parametrize("total", SIZES)
def test_parameters(total: int, record, rounds):
    shapes = split(total)
    mine, theirs = both(shapes)
    times = in_turns({"ours": mine, "theirs": theirs}, rounds, repeat=max(1, 10**7 // total), seconds=60)
    case = Comparison(f"{total:.0e} parameters, AdamW+WRS / torch fused", "AdamW", list)
    size = step_bytes("AdamW", sum(map(math.prod, shapes)))
    record(case, Ratio.of(times["ours"], times["theirs"]), times["ours"], times["theirs"], bytes_per_step=size)


def test_growth(record, rounds):
    """The time of 1e8 parameters over that of 1e7: ours over torch fused's, in the same turns."""
    sides: dict[str, Step] = {}
    for name, total in (("small", 10**7), ("large", 10**8)):
        sides[f"{name} ours"], sides[f"{name} theirs"] = both(split(total))
    times = in_turns(sides, rounds)
    mine, theirs = (
        [large / small for large, small in zip(times[f"large {whose}"], times[f"small {whose}"], strict=True)]
        for whose in ("ours", "theirs")
    )
    case = Comparison("growth from 1e7 to 1e8 parameters, AdamW+WRS / torch fused", "AdamW", list, target=1.0)
    record(case, Ratio.of(mine, theirs), times["large ours"], times["large theirs"], bytes_per_step=0)


@pytest.mark.parametrize("rule", ["AdamW", "SGD"])
@pytest.mark.parametrize("side", ["fastwrs cpu WRS", "torch fused", "torch foreach", "torch fused + loop"])
def test_memory(side: str, rule: str, keep_memory):
    peak = memory.in_a_process("resnet50", rule, side)
    keep_memory("resnet50", rule, side, peak)
    if side.startswith("fastwrs"):
        assert peak < HIGHEST_PEAK
