"""What the tests of lane 7 share: whether they can run, and how a call of the op gets to the GPU and back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tolerances
import torch
from calls import Call, same
from cases import Case
from torch import Tensor

import fastwrs
from fastwrs import dispatch
from fastwrs.plan import StepCall

BACKENDS = ("cuda", "triton")
DEVICE = BACKEND = "cuda"
"""Where the tests run, and on which kernels: the fixture ``kernels`` takes one after the other."""
NAMES = {"cuda": ("fastwrs",), "triton": ("gate_kernel", "shift_kernel", "step_kernel", "project_kernel")}
"""What the names of a backend's kernels contain."""
LOST = 9
"""What pytest exits with when a test has broken the CUDA context: no test after it could pass."""


def why_not(backend: str = "cuda") -> str | None:
    """Why nothing can be tested here, or None."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    return fastwrs.backends()[backend]


def require(backend: str = "cuda") -> None:
    """Fails a test where there is no GPU: a lane that skips proves nothing."""
    if (why := why_not(backend)) is not None:
        pytest.fail(f"lane gpu needs a GPU and kernels that were built for it: {why}")


@pytest.fixture(scope="module")
def gpu() -> None:
    """Fails every test of a module where there is no GPU."""
    require()


@pytest.fixture(scope="module", params=BACKENDS)
def kernels(gpu: None, request: pytest.FixtureRequest) -> Iterator[str]:  # noqa: ARG001 (comes first)
    """Whose kernels a test runs on: all tests of a module with one, then all with the other."""
    global BACKEND
    before = BACKEND
    if request.param != before:
        require(request.param)
    BACKEND = request.param
    yield request.param
    BACKEND = before


@pytest.fixture
def context(gpu: None, request: pytest.FixtureRequest) -> Iterator[None]:  # noqa: ARG001 (comes first)
    """Ends the run where a test has broken the CUDA context, so that it is that test which gets the blame."""
    yield
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"{request.node.nodeid} has broken the CUDA context: {error}", returncode=LOST)


def take(*args: Any) -> None:
    """One step on the backend that is tested, with the arguments of the op in order."""
    if BACKEND == "triton":
        dispatch.choose(BACKEND).step(StepCall(*args[:14]), *args[14:])
    else:
        torch.ops.fastwrs.step(*args)


def tickets() -> int:
    """How many words of a workspace are tickets."""
    module: Any = dispatch._MODULES[BACKEND]
    return module.TICKET_BYTES // 4


def planned(*args: Any) -> Tensor | None:
    """A workspace that is just large enough for a call of the op, poisoned but for its tickets."""
    if BACKEND == "triton":
        call = StepCall(*args[:13])  # it makes its own, in a dry run too
        dispatch.choose(BACKEND).step(call, dry_run=True)
        if call.workspace is not None:
            call.workspace[tickets() :] = math.nan
        return call.workspace
    device = next(arg for arg in args if isinstance(arg, list) and arg)[0].device
    if device.type == "cpu" and not torch._C._dispatch_has_kernel_for_dispatch_key("fastwrs::step_plan", "CPU"):
        return None  # a rehearsal on the kernels for the CPU, which need none
    size, _ = torch.ops.fastwrs.step_plan(*args)
    workspace = torch.full(((size + 3) // 4,), math.nan, device=device)
    workspace[: tickets()] = 0
    return workspace


def run(call: Call) -> Call:
    """One step; afterwards the tickets of the workspace have to be 0 again."""
    call.workspace = planned(*call.args())
    take(*call.args())
    used = call.workspace
    assert used is None or not used[: tickets()].view(torch.int32).any(), "a ticket is not back at 0"
    return call


def step(*args: Any) -> None:
    """The op as ``Call.run_part`` takes it."""
    take(*args[:-1], planned(*args))


def on_cpu(call: Call) -> Call:
    """A copy of a call on the CPU: the same strides, and the memory around."""
    buffers = []
    for buffer, tensor in call.buffers:
        copy = buffer.cpu() if buffer.is_cuda else buffer.clone()
        buffers.append((copy, copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())))
    tensors, n = [tensor for _, tensor in buffers], len(call.params)

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to("cpu", copy=True)

    return replace(
        call,
        params=tensors[:n],
        grads=tensors[n : 2 * n],
        states=tensors[2 * n :],
        steps=[step.to("cpu", copy=True) for step in call.steps],
        lrs=[lr.to("cpu", copy=True) for lr in call.lrs],
        grad_scale=moved(call.grad_scale),
        found_inf=moved(call.found_inf),
        measured=moved(call.measured),
        workspace=None,
        buffers=buffers,
    )


def check_case(case: Case, call: Call | None = None) -> None:
    """Runs a case, and compares all that it may and may not have written with the oracle."""
    call = case.build(DEVICE) if call is None else call
    start = on_cpu(call)
    before, around = tolerances.snapshot(start), start.around()
    done = on_cpu(run(call))
    assert same(done.around(), around), "memory that belongs to no tensor was written"
    if case.found_inf:
        assert same(done.written(), start.written()), "a step that is skipped has written"
        return
    assert [float(step) for step in done.steps] == [tensor.t for tensor in case.tensors]
    tolerances.check_call(before, done)
