"""The CUDA kernels in an emulator on the CPU: how tests call them. Needs an extension that was built for that.

``python tests/emulated.py THREADS`` runs the cases that are meant for ThreadSanitizer, and for kernels that were broken
on purpose: all kernels and axes at sizes that take no time, in blocks of so many threads, of two triples of dtypes.
Without arguments it is a server that does that for other builds, and for the triples that it is told (forked.py).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import forked
import tolerances
import torch
from calls import Call, same
from cases import DTYPES, PROJECTIONS, Case, TensorCase, select
from mutants import by_turns

from fastwrs import dispatch, library

CUDA: Any = dispatch._MODULES["cuda"]
TICKETS = CUDA.TICKET_BYTES // 4


class Counts(NamedTuple):
    """Bytes of global memory and launches since the last time."""

    read: int
    written: int
    launches: int


def load() -> None:
    """Loads the extension; RuntimeError if it is not an emulated one."""
    library.load()
    counts()


def counts() -> Counts:
    """What the kernels have moved since the last call."""
    extension = ctypes.CDLL(sys.modules["fastwrs._C"].__file__)
    if not hasattr(extension, "fastwrs_emulation_counts"):
        raise RuntimeError("this extension was not built with FASTWRS_EMULATED=1")
    values = (ctypes.c_uint64 * 3)()
    extension.fastwrs_emulation_counts(values)
    return Counts(*values)


def run(call: Call) -> Call:
    """One step with a workspace that is just large enough, poisoned; afterwards its tickets have to be 0 again."""
    size, _ = torch.ops.fastwrs.step_plan(*call.args())
    call.workspace = workspace = torch.full(((size + 3) // 4,), float("nan"))
    workspace[:TICKETS] = 0
    torch.ops.fastwrs.step(*call.args())
    assert not workspace[:TICKETS].view(torch.int32).any(), "a ticket is not back at 0"
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


def small_cases(triples: Sequence[int] = (0, 2)) -> list[Case]:
    """One triple of 32 bits and one of 16, or others, over all kernels and axes."""
    rescale = (tuple(PROJECTIONS["rescale"].items()),)
    full = Case("full", "sgd", (TensorCase((2, 3)),) * 510, DTYPES[triples[0]], rescale, measured=False)
    return [full, *by_turns([case for case in select(70000) if case.dtypes in [DTYPES[k] for k in triples]])]


def norm_error(length: int) -> float:
    """How far norms are from their target after a rescale of equal elements, the worst case for a running sum."""
    tensor = TensorCase((2, length), "out", data="const")
    case = Case("norms", "sgd.mom", (tensor,), DTYPES[0], (tuple(PROJECTIONS["rescale"].items()),), measured=False)
    call = case.build()
    for values in (*call.grads, *call.states):
        values.zero_()  # so that elements stay equal
    run(call)
    return tolerances.norm_deviation(call.params[0], (1,), 1.0)


def main(threads: str, *triples: str) -> None:
    os.environ["EMULATED_THREADS"] = threads
    torch.set_num_threads(1)
    load()
    cases = small_cases([int(k) for k in triples] or (0, 2))
    for case in cases:
        print(case.id, flush=True)
        check(case, every=1 + len(case.tensors) // 50)
    for length in (28672, 100001):
        assert norm_error(length) <= tolerances.NORM_BOUND[torch.float32], f"norms of {length} equal elements"
    print(f"{len(cases)} cases passed")


if __name__ == "__main__":
    main(*sys.argv[1:]) if sys.argv[1:] else forked.serve(main)
