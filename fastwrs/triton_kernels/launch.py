"""Which kernels a table is launched with, and in blocks of what size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastwrs.triton_kernels import kernels
from fastwrs.triton_kernels.rules import RULES

_TYPES = {"float32": tl.float32, "float64": tl.float64, "bfloat16": tl.bfloat16, "float16": tl.float16}
FINISH_HEIGHT, FINISH_WIDTH = 128, 16
"""Partial sums that a program of ``finish_kernel`` reads at a time."""


class Blocks(NamedTuple):
    """How many elements a program works on, and with how many warps."""

    tile: int
    held: int
    """Tiles of one unit that a program holds at most."""
    height: int
    width: int
    """Rows and columns of a strip."""
    warps: int


class Variant(NamedTuple):
    """What is compiled once: a rule with so many states, types, and what changes how much a program holds."""

    rule: str
    slots: int
    dtypes: tuple[str, str, str]
    measure: bool
    walk: bool

    @property
    def blocks(self) -> Blocks:
        """Chosen so that nothing spills, with 16 bytes for each thread where registers allow it.

        What a thread holds decides: 16 elements; 8 where there are three states, four sums, or an address for each
        element; half of these in fp64. Some kernels that walk have more warps, for ptxas would rather spill a little
        than be above the 128 registers with which two blocks of 8 warps fit a multiprocessor.
        """
        double = self.dtypes[0] == "float64"
        warps = 16 if self.walk and (double if self.slots > 1 else self.measure) else 8
        if self.slots == 3 or self.measure or self.walk:
            return Blocks(1024, 4, 16, 32, warps) if double else Blocks(2048, 4, 32, 32, warps)
        return Blocks(2048, 2, 32, 32, warps) if double else Blocks(4096, 4, 64, 32, warps)

    def step(self) -> tuple[Any, dict[str, Any], int]:
        """The kernel of the step, its constants and its warps."""
        rule, blocks = RULES[self.rule], self.blocks
        constants = {
            "PREPARE": rule.prepare,
            "UPDATE": rule.update,
            "SLOTS": self.slots,
            "TYPES": (*(_TYPES[name] for name in self.dtypes), self._compute),
            "MEASURE": self.measure,
            "WALK": self.walk,
            "TILE": blocks.tile,
            "HELD": blocks.held,
            "HEIGHT": blocks.height,
            "WIDTH": blocks.width,
        }
        return kernels.step_kernel, constants, blocks.warps

    def finish(self) -> tuple[Any, dict[str, Any], int]:
        """The kernel that makes factors of partial sums."""
        constants = {"COMPUTE": self._compute, "MEASURE": self.measure}
        return kernels.finish_kernel, constants | {"HEIGHT": FINISH_HEIGHT, "WIDTH": FINISH_WIDTH}, 8

    def project(self) -> tuple[Any, dict[str, Any], int]:
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
        return kernels.project_kernel, constants, blocks.warps

    @property
    def _compute(self) -> tl.dtype:
        return tl.float64 if self.dtypes[0] == "float64" else tl.float32


def constants_of(rule: str, record: Mapping[str, float]) -> list[float]:
    """The rule's own numbers of a record, formed in double."""
    return RULES[rule].constants(record)


_compiled: set[tuple[Variant, bool, torch.device]] = set()


def compile_once(variant: Variant, table: Tensor, tiles: tuple[int, int, int]) -> None:
    """Compiles what a table is launched with. Failures then come before the first launch."""
    known = variant, tiles[2] > 0, table.device
    if known in _compiled:
        return
    with _current(table.device):
        for kernel, _, constants, warps in _launches(variant, tiles):
            kernel.warmup(table, **constants, num_warps=warps, enable_fp_fusion=False, grid=(1,))
    _compiled.add(known)


def launch(variant: Variant, table: Tensor, tiles: tuple[int, int, int]) -> None:
    """The launches of one table, in its device's current stream."""
    with _current(table.device):
        for kernel, programs, constants, warps in _launches(variant, tiles):
            run(kernel, programs, table, constants, warps)


def run(kernel: Any, programs: int, table: Tensor, constants: dict[str, Any], warps: int) -> None:
    """One launch: the seam where a test puts a stub to look at the host side alone.

    Contraction is off, so that the interpreter computes what the GPU does.
    """
    kernel[(programs,)](table, **constants, num_warps=warps, enable_fp_fusion=False)


def _launches(variant: Variant, tiles: tuple[int, int, int]) -> Iterator[tuple[Any, int, dict[str, Any], int]]:
    """Kernels, programs, constants and warps. The step is launched without tiles too: it advances the step counts."""
    kernel, constants, warps = variant.step()
    yield kernel, max(1, tiles[0]), constants, warps
    if tiles[2]:
        kernel, constants, warps = variant.finish()
        yield kernel, tiles[1], constants, warps
        kernel, constants, warps = variant.project()
        yield kernel, tiles[2], constants, warps


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        return torch.cuda.device(device)
    return nullcontext()
