"""Norm groups in Triton: the schedule, the factors of rescale and shrink, sums over the groups of a tile, measuring."""

# Triton reads these functions as a language of its own, with other types than Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from fastwrs.triton_kernels import table as words
from fastwrs.triton_kernels.numeric import float_of, is_finite, quotient, raise_to

MEASURED = tl.constexpr(8)  # figures of a group, in the order of fastwrs.spec.MEASURED


@triton.jit
def _learning_rate(entry, control):
    """The learning rate of a tensor: a number of its record, or a scalar in device memory of fp32 or fp64."""
    lr = tl.load(control + words.LR)
    at = tl.load(entry + words.LR_AT)
    if at != 0:
        if (tl.load(entry + words.FLAG_BITS) & words.LR_IS_DOUBLE) != 0:
            if lr.dtype == tl.float64:
                lr = tl.load(at.to(tl.pointer_type(tl.float64)))
            else:
                lr = float_of(tl.load(at.to(tl.pointer_type(tl.int64))))
        else:
            lr = tl.load(at.to(tl.pointer_type(tl.float32))).to(lr.dtype)
    return lr


@triton.jit
def moment(entry, control):
    """The learning rate of a tensor, the step that it is in, and whether that rescales or shrinks."""
    lr = _learning_rate(entry, control)
    t = tl.load(tl.load(entry + words.STEP).to(tl.pointer_type(tl.float32))).to(lr.dtype) + 1
    rescale, shrink = _due(entry, control, lr, t)
    return lr, t, rescale, shrink


@triton.jit
def _due(entry, control, lr, t):
    """Whether step t rescales, and whether it shrinks. With lr = 0 neither; a step that rescales skips the shrink."""
    every, start = tl.load(control + words.EVERY), tl.load(control + words.START)
    grouped = (tl.load(entry + words.FLAG_BITS) & words.GROUPED) != 0
    multiple = every * tl.floor(quotient(t, every)) == t
    rescale = grouped & (lr != 0) & (every > 0) & (start <= t) & (t < tl.load(control + words.STOP)) & multiple
    shrink = grouped & (lr != 0) & (tl.load(control + words.RATE) != 0) & (rescale == 0)
    return rescale, shrink


@triton.jit
def projection_factor(control, lr, rescale, shrink, before, updated):
    """What a group is multiplied by, from its norms before the step and after the update.

    Rescale: target / norm, or 1 where the norm is 0 or not finite. Shrink: max(0, 1 - lr * rate * norm**power), or 1
    where the norm is not finite, or 0 with any power but 0.
    """
    factor = tl.zeros_like(updated) + 1
    if rescale:
        whole = (updated > 0) & is_finite(updated)
        factor = tl.where(whole, quotient(tl.load(control + words.TARGET), tl.where(whole, updated, 1)), 1)
    if shrink:
        power = tl.load(control + words.POWER)
        raised = before
        if power == 0:
            raised = tl.zeros_like(before) + 1
        elif power != 1:
            raised = raise_to(before, power)
        factor = 1 - lr * tl.load(control + words.RATE) * raised
        without_direction = tl.where(power != 0, before == 0, before != before)
        left_alone = (is_finite(before) == 0) | without_direction
        factor = tl.where(left_alone, 1, tl.where(factor > 0, factor, 0))
    return factor


@triton.jit
def divided(x, inverse, divisor):
    """``x // divisor`` and the remainder for 0 <= x < 2**15, from ``inverse`` = 1 / divisor.

    Half a unit away from whole numbers: more than the rounding of the quotient, whatever the divisor.
    """
    whole = ((x.to(tl.float32) + 0.5) * inverse).to(tl.int32)
    return whole, x - whole * divisor


@triton.jit
def add_up(x, row, rows, stride, SIZE: tl.constexpr):
    """Adds up rows of groups in pairs, then pairs of pairs, and so on; the total ends up in each group's row 0."""
    at = tl.arange(0, SIZE)
    step = 1
    while step < rows:
        partner = (row % (2 * step) == 0) & (row + step < rows) & (at + step * stride < SIZE)
        x += tl.where(partner, tl.gather(x, tl.where(partner, at + step * stride, 0), 0), 0)
        step *= 2
    return x


@triton.jit
def _totals_of_eighths(x, rows, TILE: tl.constexpr):
    # Groups of whole eighths, one behind the other: neighbours are added up first, then an eighth of the work is left.
    at = tl.arange(0, TILE // 8)
    _, row = divided(at, quotient(1.0, (rows // 8).to(tl.float32)), rows // 8)
    sums = add_up(tl.sum(tl.reshape(x, [TILE // 8, 8]), axis=1), row, rows // 8, 1, TILE // 8)
    return tl.reshape(tl.broadcast_to(tl.gather(sums, at - row, 0)[:, None], [TILE // 8, 8]), [TILE])


@triton.jit
def group_totals(x, count, rows, cols, unit, TILE: tl.constexpr):
    """For each element of a tile of whole units the sum of squares of its norm group; 0 behind ``count``."""
    return group_sums(x * x, count, rows, cols, unit, TILE)


@triton.jit
def group_sums(x, count, rows, cols, unit, TILE: tl.constexpr):
    """The same of numbers as they are."""
    at = tl.arange(0, TILE)
    x = tl.where(at < count, x, 0)
    if (cols == 1) & (rows % 8 == 0):
        x = _totals_of_eighths(x, rows, TILE)
    else:
        _, within = divided(at, quotient(1.0, unit.to(tl.float32)), unit)
        row, _ = divided(within, quotient(1.0, cols.to(tl.float32)), cols)
        x = tl.gather(add_up(x, row, rows, cols, TILE), at - row * cols, 0)
    return x


@triton.jit
def measured_row(table, about, group):
    """Where the figures of a group go. ``about`` is the tensor's part of the pool, ``group`` counts in walk order."""
    row = tl.load(about) + tl.zeros_like(group)
    dims = tl.load(about + 2)
    if dims == 0:
        row += group
    d = dims - 1
    while d >= 0:
        size = tl.load(about + 3 + 2 * d)
        row += group % size * tl.load(about + 4 + 2 * d)
        group = group // size
        d -= 1
    return tl.load(table + words.MEASURED_ROWS).to(tl.pointer_type(tl.float32)) + MEASURED * row


@triton.jit
def write_measured(table, entry, group, mask, factor, rescale, shrink, before, updated, grad, update):
    """Writes the figures of some groups, from their norms."""
    about = table + tl.load(table + words.POOL) + tl.load(entry + words.MEASURE_AT)
    row = measured_row(table, about, group)
    tl.store(row, before.to(tl.float32), mask)
    tl.store(row + 1, updated.to(tl.float32), mask)
    tl.store(row + 2, (updated * factor).to(tl.float32), mask)
    tl.store(row + 3, grad.to(tl.float32), mask)
    tl.store(row + 4, update.to(tl.float32), mask)
    tl.store(row + 5, quotient(update, before).to(tl.float32), mask)
    tl.store(row + 6, tl.where(rescale, factor, 1).to(tl.float32), mask)
    tl.store(row + 7, tl.where(shrink, factor, 1).to(tl.float32), mask)


@triton.jit
def write_measured_of_nothing(table, entry, tile, TILE: tl.constexpr):
    """A tensor without elements has groups all the same, of norm 0."""
    about = table + tl.load(table + words.POOL) + tl.load(entry + words.MEASURE_AT)
    group = tile * TILE + tl.arange(0, TILE)
    row = measured_row(table, about, group)
    mask = group < tl.load(entry + words.GROUPS)
    for k in tl.static_range(6):
        tl.store(row + k, 0.0, mask)
    tl.store(row + 6, 1.0, mask)
    tl.store(row + 7, 1.0, mask)
