"""Rules that look at whole tensors first: what the kernels of both kinds of looks, ``gate.py`` and ``shift.py``, share.

What such a rule does before the kernel of the step is an entry of its own in the pool, whose units hold whole rows of
dimension 0 (channels), and sums of these in the workspace; behind them is what was found out.
"""

# Triton reads these functions as a language of its own, with other types than Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from fastwrs.triton_kernels import table as words
from fastwrs.triton_kernels.norms import add_up, divided
from fastwrs.triton_kernels.numeric import compensated, quotient

LOOKS = {None: 0, "gate": 1, "shift": 2, "idle": 3}
"""What a rule looks at, as the kernel of the step knows it; of one that updates nothing, that the step is idle."""
GATE, SHIFT, IDLE = (tl.constexpr(LOOKS[kind]) for kind in ("gate", "shift", "idle"))


@triton.jit
def look_of(table, entry):
    """The words of the look at a tensor."""
    return table + tl.load(table + words.POOL) + tl.load(entry + words.GATE_AT)


@triton.jit
def found_of(table, look, COMPUTE: tl.constexpr):
    """Its sums in the workspace, and what comes behind them."""
    return tl.load(table + words.WORKSPACE).to(tl.pointer_type(COMPUTE)) + tl.load(look + words.PARTIAL_AT)


@triton.jit
def _advance_by(first, within, size, MOST: tl.constexpr):
    # Quotient and remainder of first + within by size, where first < size and within < MOST.
    over = (first + within >= size).to(tl.int32)
    rest = first + within - over * size
    if size <= 4 * MOST:
        over, short = divided((first + within).to(tl.int32), quotient(1.0, size.to(tl.float32)), size.to(tl.int32))
        rest = short.to(tl.int64)
    return over, rest


@triton.jit
def channel_of(look, start, within):
    """The index of dimension 0 of elements ``start + within``, one behind the other without a division of 64 bits."""
    channels, inner = tl.load(look + words.CHANNELS), tl.load(look + words.CHANNEL_INNER)
    if len(within.shape) == 2:
        return (start + within) // inner % channels
    else:
        more, _ = _advance_by(start % inner, within, inner, within.shape[0])
        _, channel = _advance_by(start // inner % channels, more, channels, within.shape[0])
        return channel


@triton.jit
def row_totals(sums, parts, cols, lanes, lane, row, there, COMPUTE: tl.constexpr, SIZE: tl.constexpr):
    """The sums of some rows, in lane 0 of each, from those of their parts in a fixed order.

    Either the parts of a row lie together, or rows do (then there is one unit, and they are its columns).
    """
    stride = tl.where(cols == 1, parts, 1)
    nothing = tl.zeros([SIZE], COMPUTE)
    total, lost = nothing, nothing
    first = tl.zeros_like(parts)
    while first < parts:
        part = first + lane
        x = tl.load(sums + row * stride + part * cols, there & (part < parts), other=0)
        total, lost = compensated(total, lost, x)
        first += lanes
    return add_up(total, lane, lanes, 1, SIZE)
