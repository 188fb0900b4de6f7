"""Lane 2: what must hold for any tensors at all, on examples that hypothesis looks for (the same ones every time)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import tolerances
import torch
from cases import (
    DTYPES,
    LAYOUTS,
    OPTIONS,
    PROJECTIONS,
    Call,
    Case,
    TensorCase,
    axes_for,
    dims_of,
    mask_of,
    one_thread,
    place,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import NORM_BOUND, RESCALED_TWICE_ULPS, ulp
from torch import Tensor

from fastwrs import library

pytestmark = pytest.mark.cpu
examples = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module", autouse=True)
def _extension():
    library.load()
    with one_thread():
        yield


@dataclass
class Projected:
    """A tensor to rescale."""

    tensor: Tensor
    axis: Any
    target: float

    @property
    def dims(self) -> tuple[int, ...]:
        return dims_of(self.axis, self.tensor.ndim) or ()

    def rescale(self) -> Tensor:
        torch.ops.fastwrs.rescale_([self.tensor], [mask_of(self.axis, self.tensor.ndim)], self.target)
        return self.tensor


shapes = (
    st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple).filter(lambda shape: math.prod(shape) <= 20_000)
)


@st.composite
def tensor_cases(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> TensorCase:
    shape = draw(shapes) if shape is None else shape
    fitting = [name for name in LAYOUTS if name != "cl" or len(shape) == 4]
    layouts = tuple(draw(st.sampled_from(fitting)) for _ in range(3))
    data = draw(st.sampled_from(["plain", "sparse", "const", "zero_row"]))
    return TensorCase(shape, draw(st.sampled_from(axes_for(shape))), layouts, t=draw(st.integers(1, 6)), data=data)


@st.composite
def projected(draw: st.DrawFn, dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16", "float16")) -> Projected:
    """Elements within a factor of 8 of each other, groups of zeros, norms of 1e-15 to 1e15 before (not in fp16)."""
    shape, name = draw(shapes), draw(st.sampled_from(dtypes))
    axis = draw(st.sampled_from([axis for axis in axes_for(shape) if axis is not None]))
    layout = draw(st.sampled_from([name for name in LAYOUTS if name != "cl" or len(shape) == 4]))
    narrow = name == "float16"
    norm = 10.0 ** draw(st.floats(-1, 1) if narrow else st.floats(-14, 14))
    target = 10.0 ** draw(st.floats(-0.5, 1) if narrow else st.floats(-3, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    values = values.sign() * values.abs().clamp(0.5, 4)
    dims = dims_of(axis, len(shape)) or ()
    values *= norm / math.sqrt(math.prod(shape[dim] for dim in dims))
    if draw(st.booleans()):
        values[:1] *= 0
    return Projected(place(values, layout, getattr(torch, name), "cpu")[1], axis, target)


@examples
@given(projected())
def test_a_rescaled_group_has_its_norm(w: Projected) -> None:
    zero = w.tensor.double().square().sum(dim=w.dims) == 0
    after = w.rescale()
    norms = after.double().square().sum(dim=w.dims).sqrt()
    assert bool((norms[zero] == 0).all())
    bound = NORM_BOUND[after.dtype] * w.target
    assert float((norms[~zero] - w.target).abs().max() if not zero.all() else 0) <= bound


@examples
@given(projected(("float32",)))
def test_rescaling_twice_moves_no_element_by_more_than_6_ulps(w: Projected) -> None:
    once = w.rescale().clone()
    twice = w.rescale()
    assert float(((twice.double() - once.double()).abs() / ulp(once, torch.float32)).max()) <= RESCALED_TWICE_ULPS


def outcome(call: Call) -> list[Tensor]:
    """What a step leaves in its tensors (not around them), as bytes."""
    torch.ops.fastwrs.step(*call.args())
    measured = [] if call.measured is None else [call.measured]
    return [tensor.contiguous() for tensor in [*call.params, *call.grads, *call.states, *call.steps, *measured]]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    for one, other in zip(left, right, strict=True):
        assert torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def case_of(option: str, dtypes: Any, project: str, tensors: list[TensorCase]) -> Case:
    return Case("property", option, tuple(tensors), dtypes, (tuple(PROJECTIONS[project].items()),))


options = st.tuples(st.sampled_from(list(OPTIONS)), st.sampled_from(DTYPES), st.sampled_from(list(PROJECTIONS)))


@examples
@given(options, tensor_cases(), st.data())
def test_permuting_channels_permutes_results(kind: Any, tensor: TensorCase, data: st.DataObject) -> None:
    channels = tensor.shape[0]
    if tensor.dims is not None and 0 in tensor.dims:  # channels share a norm, whose sum has an order
        tensor = TensorCase(tensor.shape, None, tensor.layouts, tensor.t, data=tensor.data)
    case = case_of(*kind, [tensor])
    plain, moved = case.build(), case.build()
    order = torch.tensor(data.draw(st.permutations(range(channels))))
    for permuted in [*moved.params, *moved.grads, *moved.states]:
        permuted.copy_(permuted[order].clone())
    measured = plain.measured
    left, right = outcome(plain), outcome(moved)
    for k in range(len(case.slots) + 2):
        left[k] = left[k][order]
    if measured is not None and len(measured):
        left[-1] = measured.view(channels, -1)[order].view_as(measured)
    assert_same([one.contiguous() for one in left], right)


@examples
@given(options, st.lists(tensor_cases(), min_size=2, max_size=5), st.data())
def test_splitting_a_list_changes_nothing(kind: Any, tensors: list[TensorCase], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(tensors) - 1))
    whole, parts = case_of(*kind, tensors).build(), case_of(*kind, tensors).build()
    outcome(whole)
    rows = [parts.measured_of(k) for k in range(len(tensors))]
    n, slots = len(tensors), range(len(parts.case.slots))
    for ks in (range(cut, n), range(cut)):
        mine = [row for k in ks if (row := rows[k]) is not None]
        measured = torch.full((sum(map(len, mine)), 8), math.nan)
        torch.ops.fastwrs.step(
            parts.rule, *([column[k] for k in ks] for column in (parts.params, parts.grads)),
            [parts.states[s * n + k] for s in slots for k in ks], [parts.steps[k] for k in ks], parts.hyper,
            [parts.groups[k] for k in ks], [parts.axes[k] for k in ks], [], [], None, None, measured, None,
        )  # fmt: skip
        for row, values in zip(mine, measured.split([len(row) for row in mine]), strict=True):
            row.copy_(values)
    assert_same([buffer for buffer, _ in whole.buffers], [buffer for buffer, _ in parts.buffers])
    assert_same([*whole.steps, whole.measured], [*parts.steps, parts.measured])  # type: ignore[list-item]


@examples
@given(options, tensor_cases())
def test_any_step_is_within_the_tolerance(kind: Any, tensor: TensorCase) -> None:
    call = case_of(*kind, [tensor]).build()
    before = tolerances.snapshot(call)
    outcome(call)
    tolerances.check_call(before, call)
