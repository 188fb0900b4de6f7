"""The Triton kernels: the step of the CUDA kernels without a CUDA toolkit, on any GPU that Triton knows.

The extension's C++ checks a step and lays out its table of tensors on the host, as for the other backends; here the
table is brought to the device when it has changed, and the kernels are launched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastwrs.backends.projecting import norms_by, rescale_by
from fastwrs.backends.triton_available import interpreted
from fastwrs.backends.triton_available import why_not_here as _why_not_here
from fastwrs.backends.workspace import allocate, is_captured, keep_for_this_stream
from fastwrs.plan import StepCall, name_of
from fastwrs.spec import DTYPE_TRIPLES, RULES

NAME = "triton"
SPARES, TABLES = 4, 64
THREADS_OF_HIP, MOST_THREADS_OF_HIP = 512, 2**32 - 1
TICKET_BYTES = 16  # of a workspace, 0 between launches


def why_not(device_type: str | None = None, dtypes: tuple[str, str, str] | None = None) -> str | None:
    """It needs Triton, a C compiler, the extension, a GPU with its tensors on it, and known dtypes."""
    if interpreted():
        if device_type not in (None, "cpu"):
            return f"its kernels are interpreted (TRITON_INTERPRET), for tensors on the CPU, not on {device_type}"
    elif device_type not in (None, "cuda"):
        return f"its tensors must be on a GPU, not on {device_type}"
    reason = _why_not_here()
    if reason is None and dtypes is not None and dtypes not in DTYPE_TRIPLES:
        reason = f"it has no kernel for (param, grad, state) dtypes {dtypes}"
    return reason


@dataclass(eq=False)
class _Table:
    """One bundle's table on the host, which remembers what the device has, and on the device."""

    host: Tensor
    device: Tensor
    pinned: bool = False
    behind: int = 0
    """Words from the first to the last that the device does not have yet."""
    staging: Tensor | None = None
    """Pinned memory for the next copy, where the table itself is not pinned."""
    spares: list[_Table] = field(default_factory=list)
    """Tables of the same size for graphs: memory of both kinds cannot be allocated while one is captured."""


@dataclass(eq=False)
class _Memory:
    """What belongs to a workspace, hence to an optimizer on one device, and is kept as long as it."""

    tables: dict[Any, _Table] = field(default_factory=dict)
    """By stream, parameters and kind; the last one used is the last."""
    reserved: dict[Any, _Table] = field(default_factory=dict)
    """By parameters and kind: taken from the spares by a dry run, for the step that is captured next."""
    captured: list[_Table] = field(default_factory=list)
    """Those that graphs copy and read again whenever they are replayed."""
    hyper: list[float] = field(default_factory=list)
    constants: list[float] = field(default_factory=list)

    @property
    def spares(self) -> list[_Table]:
        """All that are laid in: SPARES for each of at most TABLES tables."""
        return [spare for table in self.tables.values() for spare in table.spares]


_memories: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By workspace. One that was exchanged for a larger one shares its memory with it."""


def step(call: StepCall, dry_run: bool = False) -> None:
    """One step of every tensor in the call: all of them, or on an error none."""
    if torch.compiler.is_compiling():
        torch.ops.fastwrs.triton_step(*call.arguments(), dry_run)
    else:
        _step(call, dry_run)


def rescale_(tensors: list[Tensor], axes: list[int], target: float) -> None:
    """Sets the norm of every group to the target."""
    rescale_by(step, tensors, axes, target)


def channel_norms(tensors: list[Tensor], axes: list[int], out: list[Tensor]) -> None:
    """Writes the norm of every group into ``out``."""
    norms_by(step, tensors, axes, out)


def _step(call: StepCall, dry_run: bool) -> None:
    """Everything that can fail comes first, for all launches: checks, compilation, memory."""
    from fastwrs.triton_kernels import launch

    if not call.params:
        return
    if call.workspace is None:
        call.workspace = allocate(call, TICKET_BYTES)
    workspace = None
    prepared: list[_Launches] = []
    while workspace is not call.workspace:  # one that had to grow is in the tables of both
        workspace = call.workspace
        prepared = [_prepare(call, False)]
        if prepared[0].tensors < len(call.params):
            prepared.append(_prepare(call, True))
    prepared = [launches for launches in prepared if launches.tensors]
    captured = is_captured(call)
    for launches in prepared:
        launch.compile_once(launches.variant, launches.table.device, launches.tiles)
        _stage(launches.table)
        if not captured:
            _lay_in_spares(launches.table, call.params[0].device)
    if dry_run:
        return
    assert workspace is not None
    keep_for_this_stream(workspace)
    if captured:
        _give_to_graph(_memories[workspace], [launches.table for launches in prepared])
    for launches in prepared:
        _bring_to_device(launches.table)
    for launches in prepared:
        launch.launch(launches.variant, launches.table.device, launches.tiles)


def _on_gpu(device: torch.device) -> bool:
    """Not in the interpreter, where the table on the host is read."""
    return device.type == "cuda"


def _stream_of(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if _on_gpu(device) else 0


class _Launches(NamedTuple):
    """What is launched with one table. ``tiles``: a ``Programs`` of the launches."""

    variant: Any
    table: _Table
    tiles: Any
    tensors: int


def _prepare(call: StepCall, walk: bool) -> _Launches:
    """The table of the tensors that have to be walked by strides, or of the others, on the host."""
    from fastwrs.triton_kernels import launch

    assert call.workspace is not None
    slots = len(call.states) // len(call.params)
    param = name_of(call.params[0].dtype)
    grad = name_of(call.grads[0].dtype) if call.grads else param  # whether there may be none is looked at in C++
    without = "float64" if param == "float64" else "float32"
    dtypes = param, grad, name_of(call.states[0].dtype) if slots else without
    variant = launch.Variant(call.rule, slots, dtypes, call.measured is not None, walk)
    sizes = list(variant.blocks)

    memory: _Memory = _memories.setdefault(call.workspace, _Memory())  # type: ignore[assignment]
    if memory.hyper != call.hyper:
        memory.constants = _constants(call)
        memory.hyper = list(call.hyper)
    tables, key = _tables_for(call, memory, walk)
    table = tables.get(key) or _new_table(0, call.params[0].device)
    while True:
        arguments = *call.arguments(), False, memory.constants, sizes, walk, table.host
        words, changed, size, *tiles, tensors, _others, walked_gates = torch.ops.fastwrs.triton_table(*arguments)
        # At once: the table on the host has been written, and the next round will find nothing changed.
        table.behind = max(table.behind, changed)
        if not tensors:
            break
        if size > 4 * call.workspace.numel():
            _enlarge_workspace(call, memory, size)
        elif words > table.host.numel():
            _enlarge(call, memory, table, words)
        else:
            _keep_as_last(memory, tables, key, table)
            break
    _check_grid(tiles)
    return _Launches(variant._replace(gate_walk=walked_gates > 0), table, launch.Programs(*tiles), tensors)


def _check_grid(tiles: list[int]) -> None:
    """Before anything is launched: HIP counts the threads of a launch in 32 bits."""
    if torch.version.hip is not None and max(tiles) * THREADS_OF_HIP > MOST_THREADS_OF_HIP:
        raise RuntimeError(f"fastwrs: the tensors are too large for one launch on AMD's GPUs: {max(tiles)} programs")


def _constants(call: StepCall) -> list[float]:
    from fastwrs.triton_kernels import launch

    names = [hyper.name for hyper in RULES[call.rule].record]
    rows = range(0, len(call.hyper), len(names))
    records = (dict(zip(names, call.hyper[row : row + len(names)], strict=True)) for row in rows)
    try:
        return [number for record in records for number in launch.constants_of(call.rule, record)]
    except (ArithmeticError, ValueError) as error:  # of a call past the bounds of the options
        raise RuntimeError(f"fastwrs: hyper has a record that {call.rule!r} has no constants for: {error}") from error


# ---- memory: the table on the host and on the device, the workspace -------------------------------------------------


def _tables_for(call: StepCall, memory: _Memory, walk: bool) -> tuple[dict[Any, _Table], Any]:
    """Where the table of a call is kept, and under what key.

    Another list of parameters under the same key costs time only: what has changed in a table is always found.
    """
    key = len(call.params), id(call.params[0]), id(call.params[-1]), walk, call.measured is not None
    if is_captured(call):
        return memory.reserved, key
    return memory.tables, (_stream_of(call.params[0].device), *key)


def _keep_as_last(memory: _Memory, tables: dict[Any, _Table], key: Any, table: _Table) -> None:
    tables.pop(key, None)
    tables[key] = table
    if len(memory.tables) > TABLES:  # what is reserved goes to a graph, or to the next one
        del memory.tables[next(iter(memory.tables))]


def _page_locked(words: int, device: torch.device) -> Tensor:
    """Memory on the host that is copied to a GPU without waiting."""
    return torch.empty(words, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")


def _new_table(words: int, device: torch.device, pinned: bool = False) -> _Table:
    host = (_page_locked(words, device) if pinned else torch.empty(words, dtype=torch.int64, device="cpu")).zero_()
    return _Table(host, torch.empty(words, dtype=torch.int64, device=device) if _on_gpu(device) else host, pinned)


def _enlarge_workspace(call: StepCall, memory: _Memory, size: int) -> None:
    call.workspace = allocate(call, size)
    _memories[call.workspace] = memory
    for table in memory.tables.values():  # their next step will find another address: no allocation between launches
        _stage(table, table.host.numel())


def _enlarge(call: StepCall, memory: _Memory, table: _Table, words: int) -> None:
    """Gives a table room for so many words: new memory, or that of a spare table while a graph is captured."""
    new = _take_spare(memory, words) if is_captured(call) else _new_table(words + words // 4, call.params[0].device)
    table.host, table.device, table.pinned, table.behind = new.host, new.device, new.pinned, 0
    table.staging, table.spares = None, []


def _take_spare(memory: _Memory, words: int) -> _Table:
    """The smallest spare table that is large enough."""
    fitting = [
        (spare.host.numel(), k, owner)
        for owner in memory.tables.values()
        for k, spare in enumerate(owner.spares)
        if spare.host.numel() >= words
    ]
    if not fitting:
        raise RuntimeError(
            "fastwrs: this step needs pinned memory for its table, and none can be made while a graph is captured: "
            f"take a step before (each lays in memory for {SPARES} captures)"
        )
    _, k, owner = min(fitting, key=lambda found: found[0])
    return owner.spares.pop(k)


def _lay_in_spares(table: _Table, device: torch.device) -> None:
    while _on_gpu(device) and len(table.spares) < SPARES:
        table.spares.append(_new_table(table.host.numel(), device, pinned=True))


def _give_to_graph(memory: _Memory, tables: list[_Table]) -> None:
    """From here on nobody else may have these."""
    memory.captured += tables
    memory.reserved = {key: table for key, table in memory.reserved.items() if table not in tables}


def _stage(table: _Table, words: int = 0) -> None:
    """Allocates what the next copy of so many words, or of what is known to have changed, will need."""
    if table.device is table.host or table.pinned or table.staging is not None or not (words or table.behind):
        return
    # As large as the table, so that PyTorch finds the same memory again once a copy has happened, and not before.
    table.staging = _page_locked(table.host.numel(), table.device.device)


def _bring_to_device(table: _Table) -> None:
    """Copies what the device does not have yet, in the order of the stream and without waiting for it."""
    if table.device is not table.host and table.behind:
        source = table.host
        if table.staging is not None:
            source, table.staging = table.staging, None
            source[: table.behind].copy_(table.host[: table.behind])
        table.device[: table.behind].copy_(source[: table.behind], non_blocking=True)
    table.behind = 0


# ---- torch.library --------------------------------------------------------------------------------------------------

_library = torch.library.Library("fastwrs", "FRAGMENT")
_library.define(
    "triton_step(str rule, Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] states, Tensor(d!)[] steps, "
    "float[] hyper, int[] groups, int[] axes, int[] fresh, Tensor[] lrs, Tensor? grad_scale, Tensor? found_inf, "
    "Tensor(e!)? measured, Tensor(f!)? workspace, bool dry_run=False) -> ()"
)


_workspaces: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Of traced steps, by the first step count: a workspace that an op makes cannot be handed back to the optimizer."""


# For views with the negative bit and zeros without memory torch would hand over copies: here they are refused.
@torch.library.impl(_library, "triton_step", "Negative")
@torch.library.impl(_library, "triton_step", "ZeroTensor")
def _check_arguments(*arguments: Any) -> None:
    """What the other op checks before it fills a table; one without room is not written."""
    no_room = torch.empty(0, dtype=torch.int64, device="cpu")
    torch.ops.fastwrs.triton_table(*arguments[:14], True, [], [1, 1, 1, 1], False, no_room)


@torch.library.impl(_library, "triton_step", "CompositeExplicitAutograd")
def _step_op(*arguments: Any) -> None:
    """The step as an op, for tracing alone: dispatching it costs more than all else that happens on the host."""
    _check_arguments(*arguments)
    call = StepCall(*arguments[:14])
    if call.params and call.workspace is None:
        call.workspace = _workspaces.get(call.steps[0])
    _step(call, dry_run=len(arguments) > 14 and arguments[14])
    if call.params:
        _workspaces[call.steps[0]] = call.workspace


@torch.library.register_fake("fastwrs::triton_step")
def _step_fake(*arguments: Any) -> None:
    """It writes in place and returns nothing."""
    from fastwrs.ops import check_devices

    check_devices(*arguments)
