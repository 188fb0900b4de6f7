"""The Triton kernels: the step of the CUDA kernels without a CUDA toolkit, on any GPU that Triton knows.

The extension's C++ checks a step and lays out its table of tensors on the host, as for the other backends; here the
table is brought to the device when it has changed, and the kernels are launched.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastwrs import library

# The projection alone has no kernels of its own yet; on a GPU it is PyTorch's.
from fastwrs.backends.reference import channel_norms as channel_norms
from fastwrs.backends.reference import rescale_ as rescale_
from fastwrs.plan import StepCall, name_of
from fastwrs.spec import DTYPE_TRIPLES, RULES

NAME = "triton"
OLDEST = (3, 6)
LEAST_CAPABILITY = (8, 0)
SPARES, TABLES = 4, 16


def why_not(device_type: str | None = None, dtypes: tuple[str, str, str] | None = None) -> str | None:
    """It needs Triton, a C compiler, the extension, a GPU with its tensors on it, and known dtypes."""
    allowed = ("cuda", "cpu") if _interpreted() else ("cuda",)
    if device_type not in (None, *allowed):
        return f"its tensors must be on a GPU, not on {device_type}"
    reason = _why_not_here()
    if reason is None and dtypes is not None and dtypes not in DTYPE_TRIPLES:
        reason = f"it has no kernel for (param, grad, state) dtypes {dtypes}"
    return reason


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _why_not_here() -> str | None:
    """Why it cannot run in this process. Asks the driver, which must not happen before it is wanted: see dispatch."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'fastwrs[triton]')"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"triton {triton.__version__} is too old; {'.'.join(map(str, OLDEST))} is the first that will do"
    if reason := library.why_not():
        return reason
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    if torch.version.hip is None:
        found = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
        if max(found) < LEAST_CAPABILITY:
            return f"the GPU's compute capability is {max(found)}; Triton's kernels are for {LEAST_CAPABILITY} and newer"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton compiles its launcher with a C compiler, and there is none (install gcc, or set CC)"
    return None


@dataclass
class _Table:
    """One bundle's table on the host, which remembers what the device has, and on the device."""

    host: Tensor
    device: Tensor


@dataclass
class _Memory:
    """What belongs to a workspace, hence to an optimizer on one device, and is kept as long as it."""

    tables: dict[Any, _Table] = field(default_factory=dict)
    """By stream, parameters and kind; the last one used is the last."""
    spares: list[_Table] = field(default_factory=list)
    """For graphs: memory of both kinds cannot be allocated while one is captured."""
    captured: list[_Table] = field(default_factory=list)
    """Those that graphs copy and read again whenever they are replayed."""
    owed: list[int] = field(default_factory=list)
    """Words of the spares to be made in the next step that is not captured."""
    hyper: list[float] = field(default_factory=list)
    constants: list[float] = field(default_factory=list)


_memories: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By workspace."""


def step(call: StepCall, dry_run: bool = False) -> None:
    """One step of every tensor in the call: all of them, or on an error none."""
    if torch.compiler.is_compiling():
        torch.ops.fastwrs.triton_step(*call.arguments(), dry_run)
    else:
        _step(call, dry_run)


def _step(call: StepCall, dry_run: bool) -> None:
    if not call.params:
        return
    if call.workspace is None:
        call.workspace = _workspace(call, 16)
    done = _tables_step(call, walk=False, dry_run=dry_run)
    if done < len(call.params):
        _tables_step(call, walk=True, dry_run=dry_run)


def _workspace(call: StepCall, size: int) -> Tensor:
    if _capturing(call):
        raise RuntimeError(
            "fastwrs: this step needs a workspace, and none can be made while a graph is captured: take a step before"
        )
    return torch.zeros(-(-size // 4), dtype=torch.float32, device=call.params[0].device)


def _capturing(call: StepCall) -> bool:
    return call.params[0].is_cuda and torch.cuda.is_current_stream_capturing()


def _tables_step(call: StepCall, walk: bool, dry_run: bool) -> int:
    """The launches for the tensors that have to be walked by strides, or for the others; returns how many these are."""
    from fastwrs.triton_kernels import launch

    assert call.workspace is not None
    n = len(call.params)
    slots = len(call.states) // n
    dtypes = tuple(name_of(tensor.dtype) for tensor in (call.params[0], call.grads[0], *call.states[:1]))
    dtypes = dtypes if slots else (*dtypes, "float64" if dtypes[0] == "float64" else "float32")
    variant = launch.Variant(call.rule, slots, dtypes, call.measured is not None, walk)
    blocks = variant.blocks
    sizes = [blocks.tile, blocks.held, blocks.height, blocks.width, launch.FINISH_WIDTH]

    memory: _Memory = _memories.setdefault(call.workspace, _Memory())  # type: ignore[assignment]
    if memory.hyper != call.hyper:
        memory.constants = _constants(call)
        memory.hyper = list(call.hyper)
    table = _table_for(call, memory, walk)
    while True:
        arguments = *call.arguments(), dry_run, memory.constants, sizes, walk, table.host
        words, changed, size, *tiles, tensors, _others = torch.ops.fastwrs.triton_table(*arguments)
        if size > 4 * call.workspace.numel():
            call.workspace = _workspace(call, size)
            _memories[call.workspace] = memory
        elif words > table.host.numel():
            _enlarge(call, memory, table, words)
        else:
            break
    if dry_run or not tensors:
        return tensors
    if table.device is not table.host and changed:
        _bring_to_device(table, changed)
    launch.launch(variant, table.device, *tiles)
    return tensors


def _constants(call: StepCall) -> list[float]:
    from fastwrs.triton_kernels import launch

    names = [hyper.name for hyper in RULES[call.rule].record]
    rows = range(0, len(call.hyper), len(names))
    records = (dict(zip(names, call.hyper[row : row + len(names)], strict=True)) for row in rows)
    return [number for record in records for number in launch.constants_of(call.rule, record)]


# ---- the table, on the host and on the device -----------------------------------------------------------------------


def _table_for(call: StepCall, memory: _Memory, walk: bool) -> _Table:
    device = call.params[0].device
    if _capturing(call):
        return _new_table(0, device)  # exchanged for a spare one as soon as its size is known
    while memory.owed:
        memory.spares.append(_new_table(memory.owed.pop(), device, pinned=True))
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = stream, id(call.params), walk
    table = memory.tables.pop(key, None) or _new_table(0, device)
    memory.tables[key] = table
    if len(memory.tables) > TABLES:
        del memory.tables[next(iter(memory.tables))]
    return table


def _new_table(words: int, device: torch.device, pinned: bool = False) -> _Table:
    host = torch.zeros(words, dtype=torch.int64, device="cpu", pin_memory=pinned)
    return _Table(host, host if device.type == "cpu" else torch.empty(words, dtype=torch.int64, device=device))


def _enlarge(call: StepCall, memory: _Memory, table: _Table, words: int) -> None:
    """Gives a table room for so many words."""
    device = call.params[0].device
    if _capturing(call):
        fitting = [spare for spare in memory.spares if spare.host.numel() >= words]
        if not fitting:
            raise RuntimeError(
                "fastwrs: this step needs pinned memory for its table, and none can be made while a graph is captured: "
                f"take a step before (each lays in memory for {SPARES} captures)"
            )
        spare = min(fitting, key=lambda known: known.host.numel())
        memory.spares = [known for known in memory.spares if known is not spare]
        memory.captured.append(spare)
        memory.owed.append(spare.host.numel())
        table.host, table.device = spare.host, spare.device
        return
    new = _new_table(words + words // 4, device)
    table.host, table.device = new.host, new.device
    if device.type != "cpu":
        memory.owed += [table.host.numel()] * SPARES


def _bring_to_device(table: _Table, changed: int) -> None:
    """Copies the changed part, in the order of the stream and without waiting for it."""
    source = table.host[:changed]
    if not source.is_pinned():
        # PyTorch keeps pinned memory from being reused before the copy has happened.
        source = torch.empty(changed, dtype=torch.int64, device="cpu", pin_memory=True).copy_(source)
    table.device[:changed].copy_(source, non_blocking=True)


# ---- torch.library --------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastwrs", "FRAGMENT")
_library.define(
    "triton_step(str rule, Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] states, Tensor(d!)[] steps, "
    "float[] hyper, int[] groups, int[] axes, int[] fresh, Tensor[] lrs, Tensor? grad_scale, Tensor? found_inf, "
    "Tensor(e!)? measured, Tensor(f!)? workspace, bool dry_run=False) -> ()"
)


@torch.library.impl(_library, "triton_step", "CompositeExplicitAutograd")
def _step_op(*arguments: Any) -> None:
    """The step as an op, for tracing alone: dispatching it costs more than all else that happens on the host."""
    _step(StepCall(*arguments[:14]), dry_run=len(arguments) > 14 and arguments[14])


@torch.library.register_fake("fastwrs::triton_step")
def _step_fake(*_arguments: Any) -> None:
    """It writes in place and returns nothing."""
