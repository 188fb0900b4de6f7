"""The Triton kernels in Triton's interpreter: how tests call them, and what is looked at while they run.

Loads and stores are wrapped: every address has to lie in an operand of the step and to be a multiple of its element's
size, alignments that the kernels claim have to be true, and bytes are counted. Three things of the interpreter are
exchanged, so that the tolerance stays the derived one: its rounding to bfloat16 (which truncates, and is wrong for
subnormal numbers) is torch's; its sums over rows, which go one after the other, are pairwise as on a GPU; and it
exchanges the functions of ``triton.language`` once instead of at every call of a function, which takes half the time.
The programs of a launch run one after the other, but in a shuffled order.

``python tests/interpreted.py [cases|gates|functions]`` runs what kernels face that were broken on purpose.
"""

from __future__ import annotations

import math
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import tolerances
import torch
from calls import Call, same
from cases import CASES as ALL
from cases import DTYPES, GATED, PROJECTIONS, SHIFTED, Case, TensorCase
from torch import Tensor

from fastwrs import dispatch
from fastwrs.plan import StepCall

TRITON: Any = dispatch._MODULES["triton"]
TICKET_BYTES = TRITON.TICKET_BYTES
PASSED = "all cases passed"


class Counts(NamedTuple):
    """Bytes of tensors and of the workspace; launches. The table is not counted: a few numbers that caches hold."""

    read: int
    written: int
    launches: int


class _Watch:
    """The operands of the step that is running, and what it has moved."""

    def __init__(self) -> None:
        self.starts = self.ends = np.zeros(0, dtype=np.uint64)
        self.read = self.written = self.launches = self.seed = 0
        self.order: list[int] = []
        self.table = self.workspace = (0, 0)

    def register(self, tensors: list[Tensor], table: Tensor, workspace: Tensor | None = None) -> None:
        self.table = _span(table)
        self.workspace = (0, 0) if workspace is None else _span(workspace)
        tensors = tensors if workspace is None else [*tensors, workspace]
        spans = sorted(_span(tensor) for tensor in (*tensors, table) if tensor.numel())
        self.starts = np.array([start for start, _ in spans], dtype=np.uint64)
        self.ends = np.array([end for _, end in spans], dtype=np.uint64)

    def check(self, addresses: np.ndarray, mask: np.ndarray, size: int, what: str) -> int:
        """The bytes that are moved; AssertionError for an address of nobody's."""
        addresses, mask = np.broadcast_arrays(addresses, mask.astype(bool))  # masks may be 0 and 1
        wanted = addresses[mask]
        if wanted.size:
            place = np.searchsorted(self.starts, wanted, side="right").astype(np.int64) - 1
            inside = (place >= 0) & (wanted + np.uint64(size) <= self.ends[np.maximum(place, 0)])
            assert bool(inside.all()), f"{what} of {int((~inside).sum())} addresses that belong to no operand"
            assert not bool((wanted % np.uint64(size)).any()), f"{what} of an address between two elements"
            if self.table[0] <= int(wanted[0]) < self.table[1]:
                return 0
            if self.workspace[0] <= int(wanted[0]) < self.workspace[1]:
                wanted = np.unique(wanted)  # what a gate says of a row, for all its elements
        return wanted.size * size


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


WATCH = _Watch()


def load() -> None:
    """Makes this process one of the interpreter. RuntimeError if Triton has been imported without it."""
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton was imported before: run these tests with TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"
    reason = TRITON.why_not("cpu")
    if reason is not None:
        raise RuntimeError(reason)
    from triton.runtime import interpreter

    from fastwrs.triton_kernels import launch

    if getattr(interpreter, "_fastwrs_watches", False):
        return
    interpreter._fastwrs_watches = True  # type: ignore[attr-defined]
    _watch_memory(interpreter)
    mend(interpreter)
    plain_run = launch.run

    def run(kernel: Any, programs: int, table: Tensor, *rest: Any) -> None:
        WATCH.launches += 1
        WATCH.order = random.Random(WATCH.seed).sample(range(programs), programs)
        try:
            with np.errstate(all="ignore"):
                plain_run(kernel, programs, table, *rest)
        finally:
            WATCH.order = []

    launch.run = run


def _watch_memory(interpreter: Any) -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    plain_load, plain_store, plain_index = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.set_grid_idx,
    )
    plain_atomic, plain_attr = builder.create_atomic_rmw, handle.set_attr

    def size_of(pointers: Any) -> int:
        return pointers.get_element_ty().primitive_bitwidth // 8

    def masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        WATCH.read += WATCH.check(pointers.data, mask.data, size_of(pointers), "a load")
        return plain_load(self, pointers, mask, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        WATCH.written += WATCH.check(pointers.data, mask.data, size_of(pointers), "a store")
        return plain_store(self, pointers, value, mask, *rest)

    def atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        WATCH.check(pointers.data, mask.data, size_of(pointers), "an atomic operation")
        return plain_atomic(self, operation, pointers, value, mask, *rest)

    def set_attr(self: Any, key: str, value: Any) -> None:
        if key == "tt.divisibility":  # it is claimed that this number, or the first of these, is a multiple
            divisor = int(np.ravel(value)[0])
            assert int(self.data.flat[0]) % divisor == 0, f"{self.data.flat[0]} is no multiple of {divisor}"
        plain_attr(self, key, value)

    def set_grid_idx(self: Any, x: int, *rest: Any) -> None:
        plain_index(self, WATCH.order[x] if WATCH.order else x, *rest)

    builder.set_grid_idx = set_grid_idx
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.create_atomic_rmw, handle.set_attr = atomic, set_attr


def mend(interpreter: Any) -> None:
    """Exchanges what the interpreter does in other ways than a GPU."""
    import triton.language as tl

    plain_convert, plain_patch = interpreter._convert_float, interpreter._patch_lang
    patched: set[int] = set()

    def convert(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            floats = torch.from_numpy(np.ascontiguousarray(values))
            return floats.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(values.shape)
        if (source, target) == (tl.bfloat16, tl.float32):
            bits = torch.from_numpy(np.ascontiguousarray(values).view(np.int16))
            return bits.view(torch.bfloat16).float().numpy().view(np.uint32).reshape(values.shape)
        return plain_convert(values, source, target, rounding)

    def total(self: Any, values: Any) -> Any:
        data = values.handle.data
        if self.axis is not None and data.ndim > 1:
            data = np.ascontiguousarray(np.moveaxis(data, self.axis, -1))
            data = data.sum(axis=-1)
            data = np.expand_dims(data, self.axis) if self.keep_dims else data
        else:
            data = np.sum(data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(data, values.dtype)

    class Kept:
        def restore(self) -> None:
            """What was exchanged stays so."""

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) not in patched:  # those of a module, which stay
            patched.add(id(fn.__globals__))
            plain_patch(fn)
        return Kept()

    interpreter._convert_float, interpreter._patch_lang = convert, patch_once
    interpreter.ReduceOps.sum = total


def counts() -> Counts:
    """What the kernels have moved since the last call."""
    found = Counts(WATCH.read, WATCH.written, WATCH.launches)
    WATCH.read = WATCH.written = WATCH.launches = 0
    return found


@contextmanager
def watched(call: StepCall) -> Iterator[None]:
    """Registers the operands of a call: what the table leads to, the table itself, and the workspace."""
    from fastwrs.triton_kernels import launch
    from fastwrs.triton_kernels.table import HEADER

    operands = [*call.params, *call.grads, *call.states, *call.steps, *call.lrs]
    operands += [t for t in (call.grad_scale, call.found_inf, call.measured) if t is not None]
    plain = launch.launch

    def launch_watched(variant: Any, table: Tensor, tiles: Any) -> None:
        assert call.workspace is not None
        WATCH.register(operands, table, call.workspace)
        plain(variant, table, tiles)
        first, end = (int(table[HEADER.index(word)]) for word in ("tickets", "step_map"))
        assert not table[first:end].any(), "a ticket of the table is not back at 0"

    launch.launch = launch_watched
    try:
        yield
    finally:
        launch.launch = plain


def run(call: Call) -> Call:
    """One step; the workspace is made by the backend and poisoned, and its ticket has to be 0 again."""
    step = StepCall(*call.args())  # type: ignore[arg-type]
    with watched(step):
        if call.params:
            TRITON.step(step, dry_run=True)  # learns how large the workspace has to be
            assert step.workspace is not None
            step.workspace.fill_(float("nan"))
            step.workspace[: TICKET_BYTES // 4] = 0
        TRITON.step(step)
    if step.workspace is not None:
        assert not step.workspace[: TICKET_BYTES // 4].view(torch.int32).any(), "the ticket is not back at 0"
    return call


def check(case: Case, every: int = 1) -> None:
    """Runs a case, and compares all that it may and may not have written with the oracle.

    Of long lists each ``every``-th tensor and the last ones: the oracle takes its time.
    """
    call = case.build()
    before, around, all_before = tolerances.snapshot(call), call.around(), call.written()
    run(call)
    assert same(call.around(), around), "memory that belongs to no tensor was written"
    if case.found_inf:
        assert same(call.written(), all_before), "a step that is skipped has written"
        return
    assert [float(step) for step in call.steps] == [tensor.t for tensor in case.tensors], "step counts"
    count = len(case.tensors)
    for k in sorted({*range(0, count, every), *range(max(0, count - 4), count)}):
        tolerances.check_soon(before[k], tolerances.outputs(call, k), f"tensor {k}: ")


RESCALED = (tuple(PROJECTIONS["rescale"].items()),)


def _long_columns(shape: tuple[int, ...], option: str, layout: str, project: str) -> Case:
    tensor = TensorCase(shape, "in", (layout, layout, layout))
    return Case("long", option, (tensor,), DTYPES[0], (tuple(PROJECTIONS[project].items()),), measured=False)


def _unmeasured() -> list[Case]:
    """What is measured takes other ways: sums of all kinds, and no unit that is longer than a tile.

    Those of some themes are measured or not as they come: of these long rows, and some of the others. Of the rest every
    second one, and all whose norm groups are large.
    """
    measured = [case for case in ALL if case.measured]
    looking = [case for case in measured if case.theme in LOOKING]
    single = [case for case in looking if len(case.tensors) == 1 and case.tensors[0].axis != (0,)]
    long = [case for case in single if math.prod(case.tensors[0].shape[1:]) > 16000]
    chosen = [*long, *[case for case in looking if case.numel <= 16000 and len(case.tensors) < 9][::6]]
    others = [case for case in measured if case not in looking]
    large = [case for case in others if case.theme in ("long", "columns", "layout")]
    cases = [*chosen, *large, *[case for case in others if case not in large][::2]]
    return [replace(case, measured=False, tags=f"{case.tags}-unmeasured") for case in cases]


def _gate(option: str, *tensors: TensorCase, project: str = "rescale", **more: Any) -> Case:
    return Case("gates", option, tensors, DTYPES[0], (tuple(PROJECTIONS[project].items()),), measured=False, **more)


LOOKING = ("gate", "shift", "idle")
"""Themes of the cases of rules that look at whole tensors first, and of the one that updates nothing."""
TURNED = ("tr", "tr", "tr")
STRIPS = TensorCase((150, 40), "out", TURNED)
GATES = [
    # Rows in parts, several rows to a tile, none.
    _gate("adamp.open", TensorCase((3, 5000)), TensorCase((40, 9)), TensorCase((11,), None)),
    _gate("sgdp.some", TensorCase((2, 9000), None), TensorCase((30, 70), None), project="none"),
    # Rows side by side in memory, walked rows, rows inside of units; scaled gradients.
    _gate("sgdp.open", STRIPS, TensorCase((6, 5, 3, 3), "in", ("cl", "cl", "cl")), grad_scale=4.0),
    _gate("adamp.nesterov", STRIPS, TensorCase((7, 11, 13), "in", ("gap", "c", "c")), grad_scale=4.0),
    _gate(
        "sgdp.nesterov",
        TensorCase((5, 7, 11), (0,), ("odd", "odd", "odd")),
        TensorCase((9, 30), None, TURNED),
    ),
    # More channels than are looked at together; units longer than a tile; rows with NaN.
    _gate("sgdp.open", TensorCase((2050, 3)), TensorCase((2, 600, 3, 3), "in"), project="rescale2.5"),
    _gate("adamp.open", TensorCase((6, 5, 3, 3), data="nan"), TensorCase((9, 33)), project="none"),
]
"""Gates of every kind, for kernels that are broken."""
SHIFTS = [
    # Rows in parts, several rows to a tile, one; none.
    _gate("shifted.mom", TensorCase((3, 5000)), TensorCase((40, 9)), TensorCase((2, 700)), TensorCase((11,), None)),
    # Rows side by side in memory, walked rows, rows inside of units; scaled gradients.
    _gate("shifted.nesterov", STRIPS, TensorCase((6, 5, 3, 3), "in", ("cl", "cl", "cl")), grad_scale=4.0),
    _gate("shifted.all", STRIPS, TensorCase((7, 11, 13), "in", ("gap", "c", "c")), TensorCase((9, 30), None, TURNED)),
    # More channels than are looked at together; units longer than a tile; rows with NaN, and all alike.
    _gate("shifted", TensorCase((2050, 3)), TensorCase((2, 600, 3, 3), "in"), project="rescale2.5"),
    _gate("shifted.mom", TensorCase((6, 5, 3, 3), data="nan_w"), TensorCase((9, 33), data="const"), project="none"),
    _gate("shifted.all", TensorCase((8, 600), data="narrow"), TensorCase((2, 4000), data="narrow"), project="none"),
    _gate("shifted.lam0", TensorCase((9, 33), data="nan_w"), project="none"),
]
"""Shifts of every kind, for the same."""

TWO_PHASES = (TensorCase((2, 16500)), TensorCase((5, 7)), TensorCase((300, 70), (0,)), TensorCase((130, 140), "tensor"))


PHASES = [
    Case("phases", option, TWO_PHASES, DTYPES[0], (tuple(PROJECTIONS[project].items()),), measured=measured)
    for option, project, measured in (
        ("sgd", "rescale", False),
        ("sgd.mom", "shrink", False),
        ("sgd", "both2", True),
        ("sgd", "rescale", True),
        ("adamp.open", "rescale", False),
    )
]
IN_PARTS = [*PHASES, *GATES, *SHIFTS]
"""Cases whose sums are left by several programs."""


def _fewer() -> Iterator[Case]:
    """All cases in fp32, and every second one of each other triple: which says only how memory is read and written."""
    seen: Counter[tuple[str, str, str]] = Counter()
    for case in ALL:
        seen[case.dtypes] += 1
        if case.dtypes == DTYPES[0] or seen[case.dtypes] % 2:
            yield case


CASES = [
    *_fewer(),
    *_unmeasured(),
    *GATES,
    *SHIFTS,
    # Units longer than a tile, of several groups.
    *(
        _long_columns((2, 600, 3, 3), option, layout, project)
        for option, layout in (("adamw", "c"), ("adamw", "off"), ("sgd.mom", "c"), ("adam.all", "c"))
        for project in ("rescale", "every3", "shrink")
    ),
    _long_columns((2, 1821, 9), "sgd.nesterov", "c", "rescale"),
    # As many groups as are held, and one more.
    _long_columns((2, 150, 16), "sgd", "c", "rescale"),
    _long_columns((2, 150, 17), "sgd", "c", "rescale"),
    _long_columns((2, 1001, 7), "sgd", "c", "rescale2.5"),
    # Sums of several tensors share the workspace.
    *PHASES,
    # All sizes are those of vectors, one array is not.
    Case("off", "adamw", (TensorCase((8, 64), "out", ("c", "off", "c")),), DTYPES[0], RESCALED, measured=False),
]
"""All cases, and what only these kernels do in ways of their own."""


def small_gates() -> list[Case]:
    """Gates that open by channels, as a whole and not at all, of rows that lie in every way."""
    short = [case for case in CASES if case.theme == "gate" and len(case.tensors) < 9 and case.numel <= 1500]
    return [*GATES, *short[::12]]


def small_shifts() -> list[Case]:
    """The same of channels with a shifted L2 term."""
    short = [case for case in CASES if case.theme == "shift" and len(case.tensors) < 9 and case.numel <= 1500]
    return [*SHIFTS, *short[::12]]


def small_cases() -> list[Case]:
    """All kinds of tiles, axes and arguments of a call, at sizes that take no time."""
    fp32 = [case for case in CASES if case.dtypes == DTYPES[0] and case.option not in GATED | SHIFTED]
    small = [case for case in fp32 if case.numel <= 3000 and case.theme not in ("data", "fresh")]
    data = [case for case in fp32 if case.theme in ("data", "fresh") and case.numel <= 3000 and not case.measured]
    long = [case for case in fp32 if case.theme == "long" and case.numel <= 2 * 16385 and not case.measured]
    columns = [case for case in fp32 if case.theme == "columns" and case.numel <= 20000 and not case.measured]
    calls = [case for case in fp32 if case.theme == "call" and case.rule == "sgd" and case.measured]
    calls = [case for case in calls if any(tag in case.tags for tag in ("scale3", "lr.float64", "lr0.None"))]
    window = [case for case in fp32 if case.id.count("window.out") and case.numel <= 3000]
    phases = [case for case in CASES if case.theme == "phases"]
    return [CASES[-1], *small[::9], *data[::2], *long[-14::3], *long[:2], *columns[:2], *calls, *window[:2], *phases]


def check_functions() -> None:
    """Functions by themselves."""
    import triton_functions  # after `load`

    for function in triton_functions.CHECKS:
        print(function.__name__, flush=True)
        with np.errstate(all="ignore"):
            function()


def main(what: str = "") -> None:
    """The short lists of cases, and functions by themselves; ``what``: one of the lists, or "functions", alone."""
    torch.set_num_threads(1)
    load()
    chosen = small_cases() if what in ("", "cases") else []
    chosen += small_gates() if what in ("", "gates") else []
    chosen += small_shifts() if what in ("", "shifts") else []
    for number, each in enumerate(chosen):
        print(number, each.id, flush=True)
        check(each)
    if what in ("", "functions"):
        check_functions()
    print(PASSED)


if __name__ == "__main__":
    import interpreted

    interpreted.main(*sys.argv[1:])  # of the module that the functions import too
