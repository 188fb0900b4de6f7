"""The arguments of one call of the step op, and tensors in every layout, each in a poisoned buffer of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from cases import Case, TensorCase

GUARD = 64  # poisoned elements on both sides of a tensor, a multiple of 16 bytes in every dtype

LAYOUTS = {
    "c": "contiguous",
    "cl": "channels_last (4-D, 5-D)",
    "tr": "dimensions stored in reverse order",
    "gap": "a slice of a tensor with 3 more elements in the last dimension",
    "two": "every second element",
    "off": "contiguous, 1 element off a 16-byte boundary",
    "odd": "contiguous, dimensions of size 1 with odd strides",
}


@dataclass
class Call:
    """The arguments of the step op, in order, and what a test needs beside them."""

    rule: str
    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor]
    steps: list[Tensor]
    hyper: list[float]
    groups: list[int]
    axes: list[int]
    fresh: list[int]
    lrs: list[Tensor]
    grad_scale: Tensor | None
    found_inf: Tensor | None
    measured: Tensor | None
    workspace: Tensor | None = None
    case: Case = field(kw_only=True)
    buffers: list[tuple[Tensor, Tensor]] = field(kw_only=True)
    """(storage as a 1-D tensor, the tensor in it) for all of params, grads and states."""

    def args(self) -> tuple[object, ...]:
        """What ``torch.ops.fastwrs.step`` takes."""
        names = ("rule", "params", "grads", "states", "steps", "hyper", "groups", "axes", "fresh", "lrs", "grad_scale")
        return tuple(getattr(self, name) for name in (*names, "found_inf", "measured", "workspace"))

    def states_of(self, i: int) -> dict[str, Tensor]:
        """The states of tensor i by name."""
        return {slot: self.states[s * len(self.params) + i] for s, slot in enumerate(self.case.slots)}

    def measured_of(self, i: int) -> Tensor | None:
        """The rows of tensor i."""
        if self.measured is None or self.case.tensors[i].dims is None:
            return None
        counts = [group_count(tensor) for tensor in self.case.tensors]
        return self.measured[sum(counts[:i]) : sum(counts[: i + 1])]

    def written(self) -> list[Tensor]:
        """Copies of all that a step may write, with the memory around it, as bytes."""
        measured = [] if self.measured is None else [self.measured]
        return [bits(tensor) for tensor in [*(buffer for buffer, _ in self.buffers), *self.steps, *measured]]

    def around(self) -> list[Tensor]:
        """Copies of the memory around and between the elements, as bytes."""
        found = []
        for buffer, tensor in self.buffers:
            copy = buffer.clone()
            copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).zero_()
            found.append(bits(copy))
        return found

    def run_part(self, ks: Sequence[int], op: Callable[..., None]) -> None:
        """The step of tensors ``ks``, in this order, as a call of its own."""
        n, rows = len(self.params), [row for row in map(self.measured_of, ks) if row is not None]
        part = replace(
            self,
            **{name: [getattr(self, name)[k] for k in ks] for name in ("params", "grads", "steps", "groups", "axes")},
            states=[self.states[s * n + k] for s in range(len(self.case.slots)) for k in ks],
            fresh=[i for i, k in enumerate(ks) if k in self.fresh],
            measured=None if self.measured is None else self.measured.new_full((sum(map(len, rows)), 8), math.nan),
        )
        op(*part.args())
        if part.measured is not None:
            for row, values in zip(rows, part.measured.split([len(row) for row in rows]), strict=True):
                row.copy_(values)


def bits(tensor: Tensor) -> Tensor:
    """A copy of the bytes of a tensor, whatever its strides; a NaN equals the same NaN."""
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two lists of tensors are equal."""
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def group_count(tensor: TensorCase) -> int:
    """How many norm groups, hence rows of ``measured``, a tensor has."""
    if tensor.dims is None:
        return 0
    return math.prod(size for dim, size in enumerate(tensor.shape) if dim not in tensor.dims)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch's own arithmetic on one thread.

    How it cuts a tensor for threads decides which elements get vector code, and so the last bits of ``2 ** x``. Small
    tensors gain nothing from threads anyway, and on a busy machine they lose ten times the time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def place(values: Tensor, layout: str, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """A poisoned buffer and a tensor in it, in the layout, that has the values."""
    shape = values.shape
    order = list(range(values.ndim))  # dimensions from the outermost stored to the innermost
    padded = list(shape)
    step = 1
    if layout == "cl":
        assert values.ndim in (4, 5), f"no channels_last for {tuple(shape)}"
        order = [0, *order[2:], 1]
    elif layout == "tr":
        order.reverse()
    elif layout == "gap" and padded:
        padded[-1] += 3
    elif layout == "two":
        step = 2
    strides = [0] * values.ndim
    size = step
    for dim in reversed(order):
        strides[dim] = size
        size *= padded[dim]
    if layout == "odd":
        strides = [7 if length == 1 else stride for stride, length in zip(strides, shape, strict=True)]
    buffer = torch.full((size + 2 * GUARD,), math.nan, dtype=dtype, device=device)
    tensor = buffer.as_strided(shape, strides, GUARD + (layout == "off"))
    return buffer, tensor.copy_(values)
