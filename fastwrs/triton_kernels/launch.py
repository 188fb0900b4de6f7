"""Which kernels a table is launched with, and in blocks of what size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastwrs.triton_kernels import gate, kernels, shift
from fastwrs.triton_kernels.look import LOOKS
from fastwrs.triton_kernels.rules import RULES

_TYPES = {"float32": tl.float32, "float64": tl.float64, "bfloat16": tl.bfloat16, "float16": tl.float16}


def options_for(backend: str) -> dict[str, Any]:
    """How all kernels are compiled. Contraction is off, so that the interpreter computes what the GPU does.

    Without a number of registers that is allowed ptxas would rather spill a little than be above the 128 with which two
    programs fit a multiprocessor.
    """
    options = {"num_warps": 8, "enable_fp_fusion": False}
    return options | {"maxnreg": 255} if backend == "cuda" else options


OPTIONS = options_for("hip" if torch.version.hip else "cuda")


class Blocks(NamedTuple):
    """How many elements a program works on."""

    tile: int
    held: int
    """Tiles of one unit that a program holds at most."""
    height: int
    width: int
    """Rows and columns of a strip. So many partial sums are read at a time."""


class Variant(NamedTuple):
    """What is compiled once: a rule with so many states, types, and what changes how much a program holds."""

    rule: str
    slots: int
    dtypes: tuple[str, str, str]
    measure: bool
    walk: bool
    gate_walk: bool = False
    """Whether some tensor has to be walked by strides in the first pass."""

    @property
    def blocks(self) -> Blocks:
        """16 bytes of the shortest type for each of 256 threads; of fp64 half as many elements."""
        return Blocks(1024, 4, 32, 32) if self.dtypes[0] == "float64" else Blocks(2048, 8, 64, 32)

    def step(self) -> tuple[Any, dict[str, Any]]:
        """The kernel of the step and its constants."""
        rule, blocks = RULES[self.rule], self.blocks
        constants = {
            "PREPARE": rule.prepare,
            "UPDATE": rule.update,
            "SLOTS": self.slots,
            "TYPES": self._types,
            "LOOK": LOOKS[rule.look if rule.updates else "idle"],
            "MEASURE": self.measure,
            "WALK": self.walk,
            "TILE": blocks.tile,
            "HELD": blocks.held,
            "HEIGHT": blocks.height,
            "WIDTH": blocks.width,
        }
        return kernels.step_kernel, constants

    def look(self) -> tuple[Any, dict[str, Any]]:
        """The kernel of the first pass of a rule that looks."""
        return self.gate() if RULES[self.rule].gated else self.shift()

    def shift(self) -> tuple[Any, dict[str, Any]]:
        """The kernel of the first pass, if the rule has a shifted L2 term."""
        blocks = self.blocks
        constants = {
            "PARAM": _TYPES[self.dtypes[0]],
            "COMPUTE": self._compute,
            "WALK": self.gate_walk,
            "TILE": blocks.tile,
            "HEIGHT": blocks.height,
            "WIDTH": blocks.width,
        }
        return shift.shift_kernel, constants

    def gate(self) -> tuple[Any, dict[str, Any]]:
        """The kernel of the first pass, if the rule has a gate."""
        rule, blocks = RULES[self.rule], self.blocks
        constants = {
            "PREPARE": rule.prepare,
            "ADVANCE": rule.advance,
            "DIRECTION": rule.direction,
            "SLOTS": self.slots,
            "TYPES": self._types,
            "WALK": self.gate_walk,
            "TILE": blocks.tile,
            "HEIGHT": blocks.height,
            "WIDTH": blocks.width,
        }
        return gate.gate_kernel, constants

    def project(self) -> tuple[Any, dict[str, Any]]:
        """The kernel that scales what fitted no tile."""
        blocks = self.blocks
        constants = {
            "PARAM": _TYPES[self.dtypes[0]],
            "COMPUTE": self._compute,
            "SLOTS": self.slots,
            "MEASURE": self.measure,
            "WALK": self.walk,
            "TILE": blocks.tile,
            "HEIGHT": blocks.height,
            "WIDTH": blocks.width,
        }
        return kernels.project_kernel, constants

    @property
    def _types(self) -> tuple[tl.dtype, ...]:
        return (*(_TYPES[name] for name in self.dtypes), self._compute)

    @property
    def _compute(self) -> tl.dtype:
        return tl.float64 if self.dtypes[0] == "float64" else tl.float32


def constants_of(rule: str, record: Mapping[str, float]) -> list[float]:
    """The rule's own numbers of a record, formed in double."""
    return RULES[rule].constants(record)


class Programs(NamedTuple):
    """How many programs each launch of a table has: the step, what scales behind it; a gate before them."""

    step: int
    project: int
    gate: int = 0


_compiled: set[tuple[Variant, bool, bool, torch.device]] = set()


def compile_once(variant: Variant, table: Tensor, tiles: Programs) -> None:
    """Compiles what a table is launched with, and loads it. Failures then come before the first launch."""
    known = variant, tiles.project > 0, tiles.gate > 0, table.device
    if known in _compiled:
        return
    with _current(table.device):
        for kernel, _, constants in _launches(variant, tiles):
            compiled = kernel.warmup(table, **constants, **OPTIONS, grid=(1,))
            if table.device.type == "cuda" and hasattr(compiled, "_init_handles"):
                compiled._init_handles()  # else Triton would load it when it is launched
    _compiled.add(known)


def launch(variant: Variant, table: Tensor, tiles: Programs) -> None:
    """The launches of one table, in its device's current stream."""
    with _current(table.device):
        for kernel, programs, constants in _launches(variant, tiles):
            run(kernel, programs, table, constants)


def run(kernel: Any, programs: int, table: Tensor, constants: dict[str, Any]) -> None:
    """One launch: the seam where a test puts a stub to look at the host side alone."""
    kernel[(programs,)](table, **constants, **OPTIONS)


def _launches(variant: Variant, tiles: Programs) -> Iterator[tuple[Any, int, dict[str, Any]]]:
    """Kernels, programs and constants. The step is launched without tiles too: it advances the step counts."""
    if tiles.gate:
        kernel, constants = variant.look()
        yield kernel, tiles.gate, constants
    kernel, constants = variant.step()
    yield kernel, max(1, tiles.step), constants
    if tiles.project:
        kernel, constants = variant.project()
        yield kernel, tiles.project, constants


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        return torch.cuda.device(device)
    return nullcontext()
