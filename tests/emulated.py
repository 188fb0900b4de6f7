"""The CUDA kernels in an emulator on the CPU: how the tests of lane 3 call them. Needs an extension that was built so."""

from __future__ import annotations

import ctypes
import sys
from typing import NamedTuple

import torch
from cases import Call

from fastwrs import library


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
    library_ = ctypes.CDLL(sys.modules["fastwrs._C"].__file__)
    if not hasattr(library_, "fastwrs_emulation_counts"):
        raise RuntimeError("this extension was not built with FASTWRS_EMULATED=1")
    values = (ctypes.c_uint64 * 3)()
    library_.fastwrs_emulation_counts(values)
    return Counts(*values)


def run(call: Call, poison: bool = True) -> Call:
    """One step with a workspace that is just large enough, its sums poisoned; afterwards its ticket has to be 0."""
    size = torch.ops.fastwrs.step_workspace(*call.args())
    workspace = torch.full(((size + 3) // 4,), float("nan") if poison else 0.0)
    workspace[:4] = 0
    call.workspace = workspace
    torch.ops.fastwrs.step(*call.args())
    assert not workspace[:4].view(torch.int32).any(), "the ticket is not back at 0"
    return call
