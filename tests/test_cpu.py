"""Lane 2: the C++ kernels against the oracle, and what they promise beyond it: norms, bits, and memory left alone."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import projecting
import pytest
import tolerances
import torch
from calls import Call, one_thread, same
from cases import CASES, DTYPES, PROJECTIONS, Case, TensorCase, dims_of, mask_of, select
from projecting import FLOATS
from tolerances import NORM_BOUND
from torch import Tensor

from fastwrs import dispatch, library
from fastwrs.spec import RULES

pytestmark = pytest.mark.cpu


@pytest.fixture(scope="module", autouse=True)
def _extension() -> None:
    library.load()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What holds on one thread holds on any number, as ``test_threads_change_no_bit`` sees to."""
    with one_thread():
        yield


def run(call: Call) -> Call:
    torch.ops.fastwrs.step(*call.args())
    return call


def simple(option: str, dtypes: tuple[str, str, str], *tensors: TensorCase, **more: Any) -> Case:
    numbers = PROJECTIONS[more.pop("project", "rescale")] | more.pop("numbers", {})
    return Case("simple", option, tensors, dtypes, (tuple(numbers.items()),), **more)


# ---- against the oracle ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_step(case: Case) -> None:
    call = case.build()
    before, around, all_before = tolerances.snapshot(call), call.around(), call.written()
    run(call)
    assert same(call.around(), around), "memory that belongs to no tensor was written"
    if case.found_inf:
        assert same(call.written(), all_before)
    else:
        assert [float(step) for step in call.steps] == [tensor.t for tensor in case.tensors]
        tolerances.check_call(before, call)


@pytest.mark.parametrize("found", [-1.0, 1e-30, 2.0, math.inf, math.nan])
@pytest.mark.parametrize("option", ["sgd.mom", "adamw.ams"])
def test_any_found_inf_skips_the_step_and_leaves_every_byte(option: str, found: float) -> None:
    tensors = TensorCase((13, 29), t=1), TensorCase((4, 3, 2, 2), "in")
    call = simple(option, DTYPES[0], *tensors, found_inf=found, grad_scale=2.0).build()
    before = call.written()
    assert same(run(call).written(), before)
    call.found_inf = torch.tensor(0.0)
    assert not same(run(call).written(), before)


def test_dry_run_writes_nothing() -> None:
    for case in select(3000, every=9):
        call = case.build()
        before = call.written()
        torch.ops.fastwrs.step(*call.args(), True)
        assert same(call.written(), before), case.id


# ---- rescale_ and channel_norms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=list(FLOATS))
def test_rescale_op(dtype: torch.dtype) -> None:
    projecting.check_rescale(torch.ops.fastwrs.rescale_, dtype)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=list(FLOATS))
def test_channel_norms_op(dtype: torch.dtype) -> None:
    projecting.check_norms(dispatch._MODULES["cpu"].channel_norms, dtype)


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=list(FLOATS))
@pytest.mark.parametrize("axis", ["out", "tensor", (0,)], ids=str)
@pytest.mark.parametrize("length", [28_672, 1_000_000])
def test_norms_after_a_rescale(length: int, axis: Any, dtype: torch.dtype) -> None:
    """The bounds of the design, for constant rows (the worst case for running sums) and others, of any norm."""
    shape = (length, 2) if axis == (0,) else (2, length)
    dims = dims_of(axis, 2) or ()
    generator = torch.Generator().manual_seed(length)
    for norm in (1.0, 0.03, 40.0) if dtype == torch.float16 else (1.0, 1e-15, 1e15):
        for values in (torch.ones(shape), torch.rand(shape, generator=generator) + 0.5):
            w = (values.double() * norm / math.sqrt(length)).to(dtype)
            stepped = w.clone()
            torch.ops.fastwrs.rescale_([w], [mask_of(axis, 2)], 1.0)
            assert tolerances.norm_deviation(w, dims, 1.0) <= NORM_BOUND[dtype]
            hyper = {"lr": 0.1, "lr_tensor": -1, "every": 1, "stop": math.inf, "target": 1.0}
            names = simple("sgd", DTYPES[0]).hyper(0)
            torch.ops.fastwrs.step(
                "sgd", [stepped], [torch.zeros_like(w)], [], [torch.tensor(6.0)], [hyper.get(n, 0.0) for n in names],
                [0], [mask_of(axis, 2)], [], [], None, None, None, None,
            )  # fmt: skip
            assert tolerances.norm_deviation(stepped, dims, 1.0) <= NORM_BOUND[dtype]


# ---- the same bits --------------------------------------------------------------------------------------------------


def digests(cases: list[Case]) -> dict[str, str]:
    """A hash of all that each case leaves in memory."""
    found = {}
    for case in cases:
        digest = hashlib.sha256()
        for part in run(case.build()).written():
            digest.update(part.numpy().tobytes())
        found[case.id] = digest.hexdigest()
    return found


def test_threads_change_no_bit() -> None:
    alone = digests(CASES)
    assert len(set(alone.values())) > len(CASES) - 20  # empty lists are alike
    for count in (2, 3):
        torch.set_num_threads(count)
        different = [case for case, digest in digests(CASES).items() if digest != alone[case]]
        assert not different, f"{count} threads"


def test_threads_change_no_bit_of_long_and_of_many_tensors() -> None:
    """One long tensor, in one pass and in two, and a thousand short ones: each way to cut work for threads."""
    lists = (
        [TensorCase((500, 2003))],
        [TensorCase((3, 300_007))],
        [TensorCase((500, 2003), "tensor")],
        [TensorCase((2003, 500), (0,))],
        [TensorCase((k % 40 + 1, k % 7 + 1), "in") for k in range(1000)],
    )
    for tensors in lists:
        case = simple("adamw", DTYPES[0], *tensors)
        alone = run(case.build()).written()
        for count in (2, 3, 8):
            call = case.build()
            torch.set_num_threads(count)
            assert same(run(call).written(), alone), f"{tensors[0]} on {count} threads"


def test_instruction_sets_change_no_bit() -> None:
    """Each in a process of its own, as the choice is made once; only those that this processor has."""
    code = (
        "import test_cpu, torch, fastwrs.library as library\n"
        "print(library.cpu_isa())\n"
        "torch.set_num_threads(1)\n"
        "for item in test_cpu.digests(test_cpu.CASES).items(): print(*item)\n"
    )
    here = Path(__file__).parent
    found = {}
    for isa in library.cpu_features():
        path = os.pathsep.join([str(here), *filter(None, sys.path)])
        env = {**os.environ, "FASTWRS_CPU_ISA": isa, "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, cwd=here, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        used, *lines = done.stdout.splitlines()
        assert used == isa
        found[isa] = dict(line.rsplit(" ", 1) for line in lines)
        assert len(found[isa]) == len(CASES)
    for isa, digest in found.items():
        different = [case for case in digest if digest[case] != found["plain"][case]]
        assert not different, f"{isa} against plain"


def test_splitting_and_reversing_a_list_changes_no_bit() -> None:
    cases = [case for case in CASES if len(case.tensors) > 1 and not case.found_inf]
    assert len(cases) > 100
    for case in cases:
        together, odd_even, reverse = run(case.build()), case.build(), case.build()
        n = len(case.tensors)
        odd_even.run_part(range(1, n, 2), torch.ops.fastwrs.step)
        odd_even.run_part(range(0, n, 2), torch.ops.fastwrs.step)
        reverse.run_part(range(n)[::-1], torch.ops.fastwrs.step)
        assert same(together.written(), odd_even.written()), case.id
        assert same(together.written(), reverse.written()), case.id


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@pytest.mark.parametrize("axis", ["out", "in", "tensor", (0,)], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nan_in_one_group_changes_no_bit_of_the_others(bad: float, axis: Any, dtypes: tuple[str, str, str]) -> None:
    for option, project in (("sgd.nesterov.wd", "rescale"), ("adam.all", "shrink"), ("adamw", "rescale")):
        tensors = [TensorCase((6, 5, 3, 3), axis), TensorCase((9, 33), axis), TensorCase((4,), None)]
        case = simple(option, dtypes, *tensors, project=project)
        clean, dirty = run(case.build()), case.build()
        dirty.grads[0][2, 1, 1, 1] = bad
        dirty.params[1][3, 4] = bad
        run(dirty)
        for i, spot in enumerate([(2, 1, 1, 1), (3, 4)]):
            dims = dims_of(axis, len(spot)) or ()
            others = torch.ones(dirty.params[i].shape, dtype=torch.bool)
            others[tuple(slice(None) if dim in dims else k for dim, k in enumerate(spot))] = False
            left = {"param": clean.params[i], **clean.states_of(i)}
            right = {"param": dirty.params[i], **dirty.states_of(i)}
            for name, tensor in left.items():
                assert torch.equal(tensor[others], right[name][others])
                assert int((~right[name].isfinite()).sum()) <= 1
            assert not bool(dirty.params[i][spot].isfinite())
        assert torch.equal(clean.params[2], dirty.params[2])


def test_a_workspace_changes_no_bit() -> None:
    for case in select(20000, every=6):
        without = run(case.build())
        for size in (0, 10, 100_000):
            call = case.build()
            call.workspace = torch.full((size,), math.nan)
            assert same(run(call).written(), without.written()), case.id


# ---- torch.library --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "dtypes"),
    [
        *(("adamw.ams", dtypes) for dtypes in DTYPES),
        *((name, DTYPES[0]) for name in ("sgd", "sgd.nesterov.wd", "adam")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_opcheck_step(option: str, dtypes: tuple[str, str, str]) -> None:
    tensors = TensorCase((8, 6)), TensorCase((4, 3, 3, 3), "in", ("cl", "cl", "cl")), TensorCase((5,), None)
    for more in ({}, {"grad_scale": 2.0, "found_inf": 0.0, "lr_tensor": "float32"}):
        call = simple(option, dtypes, *tensors, **more).build()
        if call.measured is not None:
            call.measured.zero_()  # opcheck compares what is written, and a NaN equals nothing
        plain = [argument.clone() if isinstance(argument, Tensor) else argument for argument in call.args()]
        plain = [[t.clone() for t in a] if isinstance(a, list) and a and isinstance(a[0], Tensor) else a for a in plain]
        torch.library.opcheck(torch.ops.fastwrs.step.default, tuple(plain))


@pytest.mark.parametrize("dtype", FLOATS.values(), ids=list(FLOATS))
def test_opcheck_projection(dtype: torch.dtype) -> None:
    tensors = [torch.randn(8, 6).to(dtype), torch.randn(4, 3, 3, 3).to(dtype, memory_format=torch.channels_last)]
    torch.library.opcheck(torch.ops.fastwrs.rescale_.default, (tensors, [2, -1], 0.5))
    out = torch.zeros(9, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    torch.library.opcheck(torch.ops.fastwrs.channel_norms.default, (tensors, [2, -1], out))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stored_types_round_to_nearest_even(dtype: torch.dtype) -> None:
    """Where the update is exact in fp32, the stored weight is torch's own rounding of it, to the bit."""
    seed = torch.Generator().manual_seed(0)
    weight, grad = (torch.randn(5000, generator=seed).to(dtype) for _ in range(2))
    grad[:8] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0, 6e-8, -6e-8, 6e4, -6e4]).to(dtype)
    want = (weight.float() - grad.float()).to(dtype)
    record = [{"lr": 1.0, "lr_tensor": -1.0}.get(hyper.name, 0.0) for hyper in RULES["sgd"].record]
    torch.ops.fastwrs.step(
        "sgd", [weight], [grad], [], [torch.zeros(())], record, [0], [0], [], [], None, None, None, None
    )
    assert torch.equal(weight.isnan(), want.isnan())
    assert torch.equal(weight.nan_to_num(7.0).view(torch.int16), want.nan_to_num(7.0).view(torch.int16))
