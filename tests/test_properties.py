"""Lane 2: what must hold for any tensors at all, on examples that hypothesis looks for (the same ones every time)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import tolerances
import torch
from calls import LAYOUTS, Call, bits, one_thread, place, same
from cases import DTYPES, OPTIONS, PROJECTIONS, Case, TensorCase, axes_for, dims_of, mask_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import NORM_BOUND, RESCALED_TWICE_ULPS, ulp
from torch import Tensor

from fastwrs import library

pytestmark = pytest.mark.cpu
examples = settings(max_examples=300, deadline=None, derandomize=True, database=None)

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(tuple)
shapes = sizes.filter(lambda shape: math.prod(shape) <= 20_000)
kinds = st.tuples(st.sampled_from(list(OPTIONS)), st.sampled_from(DTYPES), st.sampled_from(list(PROJECTIONS)))


@pytest.fixture(scope="module", autouse=True)
def _extension() -> Iterator[None]:
    library.load()
    with one_thread():
        yield


def layouts_for(shape: tuple[int, ...]) -> st.SearchStrategy[str]:
    return st.sampled_from([name for name in LAYOUTS if name != "cl" or len(shape) == 4])


@st.composite
def tensor_cases(draw: st.DrawFn) -> TensorCase:
    shape = draw(shapes)
    param, grad, state = (draw(layouts_for(shape)) for _ in range(3))
    data = draw(st.sampled_from(["plain", "sparse", "const", "zero_row"]))
    axis = draw(st.sampled_from(axes_for(shape)))
    return TensorCase(shape, axis, (param, grad, state), t=draw(st.integers(1, 6)), data=data)


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


@st.composite
def projected(draw: st.DrawFn, dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16", "float16")) -> Projected:
    """Elements within a factor of 8 of each other, some groups of zeros, norms of 1e-14 to 1e14 (fp16: near 1)."""
    shape, name = draw(shapes), draw(st.sampled_from(dtypes))
    axis = draw(st.sampled_from([axis for axis in axes_for(shape) if axis is not None]))
    layout = draw(layouts_for(shape))
    narrow = name == "float16"
    norm = 10.0 ** draw(st.floats(-1, 1) if narrow else st.floats(-14, 14))
    target = 10.0 ** draw(st.floats(-0.5, 1) if narrow else st.floats(-3, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    values = values.sign() * values.abs().clamp(0.5, 4)
    values *= norm / math.sqrt(math.prod(shape[dim] for dim in dims_of(axis, len(shape)) or ()))
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
    assert bool(((norms[~zero] - w.target).abs() <= NORM_BOUND[after.dtype] * w.target).all())


@examples
@given(projected(("float32",)))
def test_rescaling_twice_moves_no_element_by_more_than_6_ulps(w: Projected) -> None:
    once = w.rescale().clone()
    twice = w.rescale()
    assert float(((twice.double() - once.double()).abs() / ulp(once, torch.float32)).max()) <= RESCALED_TWICE_ULPS


def call_of(kind: tuple[str, tuple[str, str, str], str], *tensors: TensorCase) -> Call:
    option, dtypes, project = kind
    return Case("property", option, tensors, dtypes, (tuple(PROJECTIONS[project].items()),)).build()


@examples
@given(kinds, tensor_cases(), st.data())
def test_permuting_channels_permutes_results(kind: Any, tensor: TensorCase, data: st.DataObject) -> None:
    if tensor.dims is not None and 0 in tensor.dims:  # the channels share a norm, whose sum has an order
        tensor = replace(tensor, axis=None)
    plain, moved = call_of(kind, tensor), call_of(kind, tensor)
    order = torch.tensor(data.draw(st.permutations(range(tensor.shape[0]))))
    for values in [*moved.params, *moved.grads, *moved.states]:
        values.copy_(values[order])
    for call in (plain, moved):
        torch.ops.fastwrs.step(*call.args())
    for one, other in zip([*plain.params, *plain.states], [*moved.params, *moved.states], strict=True):
        assert torch.equal(bits(one[order]), bits(other))
    if plain.measured is not None and moved.measured is not None:
        rows, permuted = (measured.view(tensor.shape[0], -1) for measured in (plain.measured, moved.measured))
        assert torch.equal(bits(rows[order]), bits(permuted))


@examples
@given(kinds, st.lists(tensor_cases(), min_size=2, max_size=5), st.data())
def test_splitting_a_list_changes_nothing(kind: Any, tensors: list[TensorCase], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(tensors) - 1))
    whole, parts = call_of(kind, *tensors), call_of(kind, *tensors)
    torch.ops.fastwrs.step(*whole.args())
    for ks in (range(cut, len(tensors)), range(cut)):
        parts.run_part(ks, torch.ops.fastwrs.step)
    assert same(whole.written(), parts.written())


@examples
@given(kinds, tensor_cases())
def test_any_step_is_within_the_tolerance(kind: Any, tensor: TensorCase) -> None:
    call = call_of(kind, tensor)
    before = tolerances.snapshot(call)
    torch.ops.fastwrs.step(*call.args())
    tolerances.check_call(before, call)
