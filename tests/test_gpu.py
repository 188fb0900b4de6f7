"""Lane 7: the kernels for a GPU, CUDA's and Triton's, on a real one, against the oracle.

The optimizers are in test_gpu_training.py, what only Triton has is in test_gpu_triton.py.

Nothing is skipped: without a GPU, or without kernels for it, every test here fails and says why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import on_gpu
import pytest
import tolerances
import torch
from calls import one_thread, place, same
from cases import CASES, DTYPES, PROJECTIONS, Case, TensorCase, dims_of, mask_of, select
from on_gpu import context, gpu, kernels  # noqa: F401 (fixtures)
from parity import parameters
from tolerances import NORM_BOUND, Inputs, norm_deviation
from torch import Tensor

import fastwrs
from fastwrs import dispatch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("context")]
both = pytest.mark.usefixtures("kernels")

FLOATS = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
AXES = ("out", "in", "tensor", (0,))
COLUMNS = 4096


def _rows() -> int:
    """Rows of a bf16 matrix with more than 2^31 elements; a GPU with less than 12 GiB free gets what fits."""
    rows = 2**31 // COLUMNS + 3
    if not torch.cuda.is_available():
        return rows  # to be collected without a GPU
    free, _ = torch.cuda.mem_get_info()
    return min(rows, free // 6 // COLUMNS)


ROWS = _rows()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The oracle works on small tensors on the CPU."""
    with one_thread():
        yield


def simple(option: str, dtypes: tuple[str, str, str], *tensors: TensorCase, **more: Any) -> Case:
    numbers = PROJECTIONS[more.pop("project", "rescale")]
    return Case("simple", option, tensors, dtypes, (tuple(numbers.items()),), **more)


# ---- one call of the op ---------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_step(case: Case) -> None:
    on_gpu.check_case(case)


@both
@pytest.mark.parametrize("found", [-1.0, 1e-30, 2.0, math.inf, math.nan])
@pytest.mark.parametrize("option", ["sgd.mom", "adamw.ams"])
def test_any_found_inf_skips_the_step_and_leaves_every_byte(option: str, found: float) -> None:
    tensors = TensorCase((13, 29), t=1), TensorCase((4, 3, 2, 2), "in"), TensorCase((2, 70001), "tensor")
    call = simple(option, DTYPES[0], *tensors, found_inf=found, grad_scale=2.0).build(on_gpu.DEVICE)
    before = on_gpu.on_cpu(call).written()
    assert same(on_gpu.on_cpu(on_gpu.run(call)).written(), before)
    assert call.found_inf is not None
    call.found_inf.zero_()
    assert not same(on_gpu.on_cpu(on_gpu.run(call)).written(), before)


@both
def test_dry_run_writes_nothing() -> None:
    for case in select(3000, every=19):
        call = case.build(on_gpu.DEVICE)
        before = on_gpu.on_cpu(call).written()
        call.workspace = on_gpu.planned(*call.args())
        on_gpu.take(*call.args(), True)
        assert same(on_gpu.on_cpu(call).written(), before), case.id


@both
def test_the_same_call_gives_the_same_bits() -> None:
    """However blocks are scheduled, and with whatever in the workspace."""
    cases = [*select(20000, every=7), simple("adamw", DTYPES[0], *[TensorCase((700, 1003), axis) for axis in AXES])]
    for case in cases:
        first, *others = (on_gpu.on_cpu(on_gpu.run(case.build(on_gpu.DEVICE))).written() for _ in range(3))
        assert all(same(first, other) for other in others), case.id


@both
def test_splitting_and_reversing_a_list_changes_no_bit() -> None:
    cases = [case for case in CASES if len(case.tensors) > 1 and not case.found_inf][::4]
    assert len(cases) > 40
    for case in cases:
        together, odd_even, reverse = (case.build(on_gpu.DEVICE) for _ in range(3))
        on_gpu.run(together)
        n = len(case.tensors)
        odd_even.run_part(range(1, n, 2), on_gpu.step)
        odd_even.run_part(range(0, n, 2), on_gpu.step)
        reverse.run_part(range(n)[::-1], on_gpu.step)
        written = on_gpu.on_cpu(together).written()
        assert same(written, on_gpu.on_cpu(odd_even).written()), case.id
        assert same(written, on_gpu.on_cpu(reverse).written()), case.id


@both
@pytest.mark.parametrize("axis", AXES, ids=str)
def test_a_nan_in_one_group_changes_no_bit_of_the_others(axis: Any) -> None:
    case = simple("adamw", DTYPES[0], TensorCase((6, 5, 3, 3), axis), TensorCase((9, 33), axis), TensorCase((4,), None))
    clean, dirty = case.build(on_gpu.DEVICE), case.build(on_gpu.DEVICE)
    dirty.grads[0][2, 1, 1, 1] = math.nan
    dirty.params[1][3, 4] = math.inf
    left, right = (on_gpu.on_cpu(on_gpu.run(call)) for call in (clean, dirty))
    for i, spot in enumerate([(2, 1, 1, 1), (3, 4)]):
        dims = dims_of(axis, len(spot)) or ()
        others = torch.ones(right.params[i].shape, dtype=torch.bool)
        others[tuple(slice(None) if dim in dims else k for dim, k in enumerate(spot))] = False
        assert torch.equal(left.params[i][others], right.params[i][others])
        assert not bool(right.params[i][spot].isfinite())
    assert torch.equal(left.params[2], right.params[2])


@both
def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    case = simple("adamw", DTYPES[0], TensorCase((13, 29)), TensorCase((5, 2, 70001), (0, 2)))
    faults = ("no workspace", "a workspace on the CPU", "a state on the CPU", "another shape")
    for fault in faults[on_gpu.BACKEND == "triton" :]:  # Triton's backend makes its own
        call = case.build(on_gpu.DEVICE)
        before = on_gpu.on_cpu(call).written()
        call.workspace = on_gpu.planned(*call.args())
        assert call.workspace is not None
        if fault == "no workspace":
            call.workspace = None
        elif fault == "a workspace on the CPU":
            call.workspace = call.workspace.cpu()
        elif fault == "a state on the CPU":
            call.states[1] = call.states[1].cpu()
        else:
            call.grads[1] = call.grads[1][:4]
        with pytest.raises(RuntimeError):
            on_gpu.take(*call.args())
        torch.cuda.synchronize()
        assert same(on_gpu.on_cpu(call).written(), before), fault


@both
@pytest.mark.parametrize("option", ["adamw.ams", "sgd.nesterov.wd"])
def test_opcheck(option: str) -> None:
    op = torch.ops.fastwrs.triton_step if on_gpu.BACKEND == "triton" else torch.ops.fastwrs.step
    tensors = TensorCase((8, 6)), TensorCase((4, 3, 3, 3), "in", ("cl", "cl", "cl")), TensorCase((5,), None)
    case = simple(option, DTYPES[2], *tensors, grad_scale=2.0, found_inf=0.0, lr_tensor="float32")
    call = case.build(on_gpu.DEVICE)
    assert call.measured is not None
    call.measured.zero_()  # opcheck compares what is written, and a NaN equals nothing
    call.workspace = on_gpu.planned(*call.args())
    assert call.workspace is not None
    call.workspace.zero_()

    def alone(argument: object) -> object:
        """Without the memory around it, which opcheck would compare too."""
        if isinstance(argument, list):
            return [alone(item) for item in argument]
        return argument.clone() if isinstance(argument, Tensor) else argument

    torch.library.opcheck(op.default, tuple(alone(argument) for argument in call.args()))


# ---- sizes ----------------------------------------------------------------------------------------------------------


def _large(seed: int, scale: float) -> Tensor:
    generator = torch.Generator(on_gpu.DEVICE).manual_seed(seed)
    return torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16, device=on_gpu.DEVICE).normal_(0, scale, generator=generator)


@both
@pytest.mark.parametrize("axis", ["out", None, "tensor"], ids=str)
def test_more_than_2_to_the_31_elements(axis: Any) -> None:
    """SGD without momentum on one bf16 tensor: rows at the start, on both sides of element 2^31, and at the end."""
    case = Case(
        "large", "sgd", (TensorCase((ROWS, COLUMNS), axis),), DTYPES[2], ((("every", float(axis is not None)),),)
    )
    scale = 1 / math.sqrt(ROWS * COLUMNS) if axis == "tensor" else 1 / math.sqrt(COLUMNS)
    param, grad = _large(1, scale), _large(2, scale)
    border = min(2**31 // COLUMNS, ROWS - 4)
    rows = sorted({0, 1, ROWS // 2, border - 1, border, border + 1, ROWS - 2, ROWS - 1})
    start, slope = param[rows].cpu(), grad[rows].cpu()
    steps = [torch.zeros((), device=on_gpu.DEVICE)]
    hyper = case.hyper(0)
    mask = mask_of(axis, 2)
    on_gpu.step("sgd", [param], [grad], [], steps, [*hyper.values()], [0], [mask], [], [], None, None, None, None)
    assert int(steps[0]) == 1
    assert torch.equal(grad[rows].cpu(), slope)
    if axis == "tensor":
        squares = sum(float(part.double().square().sum()) for part in param.split(1 << 14))
        assert abs(math.sqrt(squares) - 1) <= NORM_BOUND[torch.bfloat16]
        moved = start.double() - hyper["lr"] * slope.double()
        factors = param[rows].cpu().double().norm(dim=1) / moved.norm(dim=1)
        assert float((factors / factors.median() - 1).abs().max()) <= NORM_BOUND[torch.bfloat16]
        return
    inputs = Inputs("sgd", start, slope, {}, 1, True, hyper["lr"], hyper, dims_of(axis, 2))
    tolerances.check(inputs, {"param": param[rows].cpu(), "grad": slope})


# ---- the projection alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=list(FLOATS))
def test_rescale_and_channel_norms(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    shapes = [((13, 29), "out"), ((5, 7, 3, 3), "in"), ((3, 40001), "tensor"), ((2000, 17), (0,)), ((0, 4), "out")]
    for shape, axis in shapes:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        dims = dims_of(axis, len(shape)) or ()
        for layout in ("c", "off", "two"):
            buffer, tensor = place(values, layout, dtype, on_gpu.DEVICE)
            (norms,) = fastwrs.channel_norms(tensor, axis)  # type: ignore[arg-type]
            assert norms.device == tensor.device
            tolerances.check_norms(norms.cpu(), tensor.cpu(), dims)
            fastwrs.rescale_(tensor, axis, 0.5)  # type: ignore[arg-type]
            assert norm_deviation(tensor.cpu(), dims, 0.5) <= NORM_BOUND[dtype]
            tensor.fill_(math.nan)
            assert bool(buffer.isnan().all()), "memory that belongs to no tensor was written"


def test_auto_takes_the_kernels_for_cuda() -> None:
    for triple in DTYPES:
        assert dispatch.choose("auto", "cuda", triple).NAME == "cuda"
        assert dispatch.choose("auto", "cpu", triple).NAME == "cpu"
    params = parameters(shapes=((4, 3),))
    params[0].grad = torch.ones(4, 3)
    before = params[0].detach().clone()
    for name in on_gpu.BACKENDS:
        with pytest.raises(RuntimeError, match=name):
            fastwrs.AdamW(params, backend=name).step()
        assert torch.equal(params[0], before)
