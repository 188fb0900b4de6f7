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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastwrs import library

# The projection alone has no kernels of its own yet; on a GPU it is PyTorch's.
from fastwrs.backends.reference import channel_norms as channel_norms
from fastwrs.backends.reference import rescale_ as rescale_
from fastwrs.backends.workspace import allocate, is_captured, keep_for_this_stream
from fastwrs.plan import StepCall, name_of
from fastwrs.spec import DTYPE_TRIPLES, RULES

NAME = "triton"
OLDEST = (3, 6)
LEAST_CAPABILITY = (8, 0)
SPARES, TABLES = 4, 16
WORKSPACE_BYTES = 16  # of the ticket


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
            newest, least = (f"{major}.{minor}" for major, minor in (max(found), LEAST_CAPABILITY))
            return f"the GPU's compute capability is {newest}; Triton's kernels are for {least} and newer"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton compiles its launcher with a C compiler, and there is none (install gcc, or set CC)"
    return None


@dataclass(eq=False)
class _Table:
    """One bundle's table on the host, which remembers what the device has, and on the device."""

    host: Tensor
    device: Tensor
    pinned: bool = False
    behind: int = 0
    """Words from the first to the last that the device does not have yet."""


@dataclass(eq=False)
class _Memory:
    """What belongs to a workspace, hence to an optimizer on one device, and is kept as long as it."""

    tables: dict[Any, _Table] = field(default_factory=dict)
    """By stream, parameters and kind; the last one used is the last."""
    spares: list[_Table] = field(default_factory=list)
    """For graphs: memory of both kinds cannot be allocated while one is captured."""
    captured: list[_Table] = field(default_factory=list)
    """Those that graphs copy and read again whenever they are replayed."""
    owed: list[int] = field(default_factory=list)
    """Words of the spares to be made at the end of the next step that is not captured."""
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
    """Everything that can fail comes first, for all launches: checks, memory, compilation."""
    from fastwrs.triton_kernels import launch

    if not call.params:
        return
    if call.workspace is None:
        call.workspace = allocate(call, WORKSPACE_BYTES)
    workspace = None
    prepared: list[_Launches] = []
    while workspace is not call.workspace:  # one that had to grow is in the tables of both
        workspace = call.workspace
        prepared = [_prepare(call, False, dry_run)]
        if prepared[0].tensors < len(call.params):
            prepared.append(_prepare(call, True, dry_run))
    prepared = [launches for launches in prepared if launches.tensors]
    for launches in prepared:
        launch.compile_once(launches.variant, launches.table.device, launches.tiles)
    if dry_run:
        return
    assert workspace is not None
    keep_for_this_stream(workspace)
    for launches in prepared:
        _bring_to_device(launches.table)
    for launches in prepared:
        launch.launch(launches.variant, launches.table.device, launches.tiles)
    if not is_captured(call):
        _lay_in_spares(call)


def _on_gpu(device: torch.device) -> bool:
    """Not in the interpreter, where the table on the host is read."""
    return device.type == "cuda"


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if _on_gpu(device) else 0


class _Launches(NamedTuple):
    """What is launched with one table: ``tiles``: programs of the step, of what finishes sums, of what scales."""

    variant: Any
    table: _Table
    tiles: tuple[int, int, int]
    tensors: int


def _prepare(call: StepCall, walk: bool, dry_run: bool) -> _Launches:
    """The table of the tensors that have to be walked by strides, or of the others, on the host."""
    from fastwrs.triton_kernels import launch

    assert call.workspace is not None
    slots = len(call.states) // len(call.params)
    param, grad = name_of(call.params[0].dtype), name_of(call.grads[0].dtype)
    without = "float64" if param == "float64" else "float32"
    dtypes = param, grad, name_of(call.states[0].dtype) if slots else without
    variant = launch.Variant(call.rule, slots, dtypes, call.measured is not None, walk)
    blocks = variant.blocks
    sizes = [blocks.tile, blocks.held, blocks.height, blocks.width, launch.FINISH_WIDTH]

    memory: _Memory = _memories.setdefault(call.workspace, _Memory())  # type: ignore[assignment]
    if memory.hyper != call.hyper:
        memory.constants = _constants(call)
        memory.hyper = list(call.hyper)
    table = _table_for(call, memory, walk)
    while True:
        arguments = *call.arguments(), False, memory.constants, sizes, walk, table.host
        words, changed, size, *tiles, tensors, _others = torch.ops.fastwrs.triton_table(*arguments)
        if size > 4 * call.workspace.numel():
            call.workspace = allocate(call, size)
            _memories[call.workspace] = memory
        elif words > table.host.numel() and not (dry_run and is_captured(call)):
            _enlarge(call, memory, table, words)
        else:
            break
    table.behind = max(table.behind, changed)
    return _Launches(variant, table, tuple(tiles), tensors)


def _constants(call: StepCall) -> list[float]:
    from fastwrs.triton_kernels import launch

    names = [hyper.name for hyper in RULES[call.rule].record]
    rows = range(0, len(call.hyper), len(names))
    records = (dict(zip(names, call.hyper[row : row + len(names)], strict=True)) for row in rows)
    return [number for record in records for number in launch.constants_of(call.rule, record)]


# ---- the table, on the host and on the device -----------------------------------------------------------------------


def _table_for(call: StepCall, memory: _Memory, walk: bool) -> _Table:
    device = call.params[0].device
    if is_captured(call):
        return _new_table(0, device)  # exchanged for a spare one as soon as its size is known
    key = _stream_of(device), id(call.params), walk
    table = memory.tables.pop(key, None) or _new_table(0, device)
    memory.tables[key] = table
    if len(memory.tables) > TABLES:
        del memory.tables[next(iter(memory.tables))]
    return table


def _new_table(words: int, device: torch.device, pinned: bool = False) -> _Table:
    host = torch.zeros(words, dtype=torch.int64, device="cpu", pin_memory=pinned)
    return _Table(host, torch.empty(words, dtype=torch.int64, device=device) if _on_gpu(device) else host, pinned)


def _lay_in_spares(call: StepCall) -> None:
    memory: _Memory = _memories[call.workspace]
    while memory.owed:
        memory.spares.append(_new_table(memory.owed.pop(), call.params[0].device, pinned=True))


def _enlarge(call: StepCall, memory: _Memory, table: _Table, words: int) -> None:
    """Gives a table room for so many words."""
    device = call.params[0].device
    if is_captured(call):
        fitting = [spare for spare in memory.spares if spare.host.numel() >= words]
        if not fitting:
            raise RuntimeError(
                "fastwrs: this step needs pinned memory for its table, and none can be made while a graph is captured: "
                f"take a step before (each lays in memory for {SPARES} captures)"
            )
        spare = min(fitting, key=lambda known: known.host.numel())
        memory.spares = [known for known in memory.spares if known is not spare]
        memory.owed.append(spare.host.numel())
        table.host, table.device, table.pinned, table.behind = spare.host, spare.device, spare.pinned, 0
        memory.captured.append(table)
        return
    new = _new_table(words + words // 4, device)
    table.host, table.device, table.behind = new.host, new.device, 0
    if _on_gpu(device):
        memory.owed += [table.host.numel()] * SPARES


def _bring_to_device(table: _Table) -> None:
    """Copies what the device does not have yet, in the order of the stream and without waiting for it."""
    if table.device is not table.host and table.behind:
        source = table.host[: table.behind]
        if not table.pinned:
            # PyTorch keeps pinned memory from being reused before the copy has happened.
            source = torch.empty(table.behind, dtype=torch.int64, device="cpu", pin_memory=True).copy_(source)
        table.device[: table.behind].copy_(source, non_blocking=True)
    table.behind = 0


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
