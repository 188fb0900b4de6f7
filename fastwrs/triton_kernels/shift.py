"""Rules with a shifted L2 term: where the weights of each channel lie. ``csrc/norms/shift.h`` is the same in C++.

``shift_kernel`` reads the weights alone, and leaves slope and mean of each channel; then the kernel of the step adds to
the gradient what they say.
"""

# Triton reads these functions as a language of its own, with other types than Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from fastwrs.triton_kernels import table as words
from fastwrs.triton_kernels.access import (
    VECTOR,
    control_of,
    is_last,
    is_skipped,
    leave_sum,
    piece_of,
    places,
    strip_of,
    work_of,
)
from fastwrs.triton_kernels.look import channel_of, found_of, look_of, row_totals
from fastwrs.triton_kernels.norms import divided, group_sums
from fastwrs.triton_kernels.numeric import quotient, square_root
from fastwrs.triton_kernels.rules import shifted

# What is summed over a channel: how far each weight is from the channel's origin, and the square of that.
SUMS = tl.constexpr(2)
# Of so many weights at most the origin is the average.
FIRST = tl.constexpr(16)


@triton.jit
def with_shift(table, entry, control, start, within, mask, weight, grad, COMPUTE: tl.constexpr):
    """The gradient with the term of its weight, if the tensor was looked at."""
    if tl.load(entry + words.GATE_AT) >= 0:
        look = look_of(table, entry)
        slopes = _slopes_of(table, look, COMPUTE)
        channel = channel_of(look, start, within)
        slope = tl.load(slopes + channel, mask, other=0)
        mean = tl.load(slopes + tl.load(look + words.GROUPS) + channel, mask, other=0)
        grad = shifted(weight, grad, slope, mean, tl.load(control + words.LAM))
    return grad


@triton.jit
def _slopes_of(table, look, COMPUTE: tl.constexpr):
    # Behind the sums the slopes of all channels, then their means.
    return found_of(table, look, COMPUTE) + SUMS * tl.load(look + words.PER_SUM)


@triton.jit
def _count_of(look, like):
    # Weights that make an origin, as a number like another.
    return tl.minimum(tl.load(look + words.ROWS), FIRST).to(like.dtype) + tl.zeros_like(like)


@triton.jit
def _conclude(table, look, control, channel, there, distance, squared, origin, COMPUTE: tl.constexpr):
    # lam * (1 - eps / s) and mu of some channels. Where s is 0 or there is only one weight the slope is 0; if a weight
    # is not finite, neither is.
    length = tl.load(look + words.ROWS).to(COMPUTE) + tl.zeros_like(distance)
    average = quotient(distance, length)
    squares = squared - average * distance
    deviation = square_root(quotient(squares, length - 1))
    lam, eps = tl.load(control + words.LAM), tl.load(control + words.SHIFT_EPS)
    slope = tl.where(squares <= 0, 0, lam * (1 - quotient(eps + tl.zeros_like(deviation), deviation)))
    slopes = _slopes_of(table, look, COMPUTE)
    tl.store(slopes + channel, slope, there)
    tl.store(slopes + tl.load(look + words.GROUPS) + channel, origin + average, there)


@triton.jit
def _leave_origin(table, look, channel, origin, there, COMPUTE: tl.constexpr):
    # For the program that concludes; in the place of the mean.
    tl.store(_slopes_of(table, look, COMPUTE) + tl.load(look + words.GROUPS) + channel, origin, there)


@triton.jit
def _origin(weights, is_first, there, count):
    # A number near the weights of a channel: the average of its first ones, and exactly the first one where all are
    # equal. What is not there has no say.
    first = tl.sum(tl.where(is_first, weights, 0), axis=0)
    beyond = weights - tl.sum(tl.where(is_first, weights, 0), axis=0, keep_dims=True)
    return first + quotient(tl.sum(tl.where(there, beyond, 0), axis=0), count + tl.zeros_like(first))


@triton.jit
def _part_of_row(table, look, tile, x, mask, PARAM: tl.constexpr, COMPUTE: tl.constexpr,
                 WALK: tl.constexpr):  # fmt: skip
    row_tiles, rows = tl.load(look + words.ROW_TILES), tl.load(look + words.ROWS)
    channel, at = tile // row_tiles, tl.arange(0, FIRST)
    there = at < rows
    p = places(table, look, words.PARAM, PARAM, channel * tl.load(look + words.UNIT), at, False, WALK, 1)
    weights = tl.load(p, there, other=0).to(COMPUTE)
    origin = _origin(weights, at == 0, there, tl.minimum(rows, FIRST).to(COMPUTE))
    _leave_origin(table, look, channel, origin, tile % row_tiles == 0, COMPUTE)
    distance = tl.where(mask, x - origin, 0)
    leave_sum(table, look, 0, tile, tl.sum(distance), tile >= 0, COMPUTE)
    leave_sum(table, look, 1, tile, tl.sum(distance * distance), tile >= 0, COMPUTE)


@triton.jit
def _one_row(table, look, control, channel, x, mask, COMPUTE: tl.constexpr, TILE: tl.constexpr):
    within, count = tl.arange(0, TILE), tl.minimum(tl.load(look + words.ROWS), FIRST)
    origin = _origin(x, within == 0, within < count, count.to(COMPUTE))
    distance = tl.where(mask, x - origin, 0)
    distances, squares = tl.sum(distance), tl.sum(distance * distance)
    _conclude(table, look, control, channel, channel >= 0, distances, squares, origin, COMPUTE)


@triton.jit
def _some_rows(table, look, control, channel, x, mask, count, COMPUTE: tl.constexpr, TILE: tl.constexpr):
    rows, cols = tl.load(look + words.ROWS).to(tl.int32), tl.load(look + words.COLS).to(tl.int32)
    unit, within = tl.load(look + words.UNIT).to(tl.int32), tl.arange(0, TILE)
    of_unit, place = divided(within, quotient(1.0, unit.to(tl.float32)), unit)
    row, _ = divided(place, quotient(1.0, cols.to(tl.float32)), cols)
    early = mask & (row < FIRST)
    first = tl.gather(x, within - row * cols, 0)
    origin, distances, total = first, tl.zeros_like(x), tl.zeros_like(x)
    k = 0
    while k < 3:  # not unrolled: this is most of what there is to compile
        distance = tl.where(mask, x - origin, 0)
        each = tl.where(k == 1, distance, distance * distance)
        each = tl.where(k == 0, tl.where(early, distance, 0), each)
        total = group_sums(each, count, rows, cols, unit, TILE)
        origin = tl.where(k == 0, first + quotient(total, _count_of(look, total)), origin)
        distances = tl.where(k == 1, total, distances)
        k += 1
    is_first = mask & (place < cols)
    _conclude(table, look, control, channel + of_unit * cols + place, is_first, distances, total, origin, COMPUTE)


@triton.jit
def _flat_tile(table, look, control, start, count, tile, PARAM: tl.constexpr, COMPUTE: tl.constexpr,
               ALIGNED: tl.constexpr, WALK: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    # Consecutive elements: whole rows, or a part of one.
    within = tl.arange(0, TILE)
    count = count.to(tl.int32)
    if ALIGNED:
        count = count // VECTOR * VECTOR
    mask = within < count
    p = places(table, look, words.PARAM, PARAM, start, within, ALIGNED, WALK, 1)
    x = tl.load(p, mask, other=0).to(COMPUTE)
    if tl.load(look + words.KIND) == words.PARTIAL:
        _part_of_row(table, look, tile, x, mask, PARAM, COMPUTE, WALK)
    else:
        channel = tile * tl.load(look + words.UNITS_PER_TILE) * tl.load(look + words.COLS)
        if count <= tl.load(look + words.ROWS):
            _one_row(table, look, control, channel, x, mask, COMPUTE, TILE)
        else:
            _some_rows(table, look, control, channel, x, mask, count, COMPUTE, TILE)


@triton.jit
def _strip_tile(table, look, tile, PARAM: tl.constexpr, COMPUTE: tl.constexpr, HEIGHT: tl.constexpr,
                WIDTH: tl.constexpr):  # fmt: skip
    # Parts of some rows that lie beside each other in memory.
    unit, start, within, mask, place, col = strip_of(look, tile, HEIGHT, WIDTH)
    p = places(table, look, words.PARAM, PARAM, start, within, False, False, 1)
    x = tl.load(p, mask, other=0).to(COMPUTE)
    rows, cols = tl.load(look + words.ROWS), tl.load(look + words.COLS)
    row = tl.arange(0, FIRST)[:, None]
    there = (row < rows) & (col[None, :] < cols)
    first = places(table, look, words.PARAM, PARAM, start, row * cols + col[None, :], False, False, 1)
    weights = tl.load(first, there, other=0).to(COMPUTE)
    origin = _origin(weights, (row == 0) & there, there, tl.minimum(rows, FIRST).to(COMPUTE))
    is_top = tile // tl.cdiv(cols, WIDTH) % tl.load(look + words.ROW_TILES) == 0
    _leave_origin(table, look, unit * cols + col, origin, is_top & (col < cols), COMPUTE)
    distance = tl.where(mask, x - origin[None, :], 0)
    leave_sum(table, look, 0, place, tl.sum(distance, axis=0), col < cols, COMPUTE)
    leave_sum(table, look, 1, place, tl.sum(distance * distance, axis=0), col < cols, COMPUTE)


@triton.jit
def _settle(table, look, control, COMPUTE: tl.constexpr, SIZE: tl.constexpr):
    # Slope and mean of all channels of a tensor, whose rows came in parts.
    channels, per_sum = tl.load(look + words.GROUPS), tl.load(look + words.PER_SUM)
    parts, cols = tl.load(look + words.ROW_TILES), tl.load(look + words.COLS)
    sums = found_of(table, look, COMPUTE)
    origins = _slopes_of(table, look, COMPUTE) + channels
    lanes = tl.load(look + words.LANES).to(tl.int32)
    of_chunk, lane = divided(tl.arange(0, SIZE), quotient(1.0, lanes.to(tl.float32)), lanes)
    first = tl.zeros_like(channels)
    while first < channels:
        row = first + of_chunk
        there = row < channels
        distance = row_totals(sums, parts, cols, lanes, lane, row, there, COMPUTE, SIZE)
        squared = row_totals(sums + per_sum, parts, cols, lanes, lane, row, there, COMPUTE, SIZE)
        there = there & (lane == 0)
        origin = tl.load(origins + row, there, other=0)
        _conclude(table, look, control, row, there, distance, squared, origin, COMPUTE)
        first += SIZE // lanes


@triton.jit
def _settle_if_last(table, look, control, COMPUTE: tl.constexpr, SIZE: tl.constexpr):
    # The last program of a tensor to come finds the sums of all others in the workspace.
    if is_last(table, look, 0, tl.load(look + words.PROGRAMS)):
        _settle(table, look, control, COMPUTE, SIZE)


@triton.jit
def shift_kernel(table, PARAM: tl.constexpr, COMPUTE: tl.constexpr, WALK: tl.constexpr, TILE: tl.constexpr,
                 HEIGHT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The first pass of a step. WALK: some of the tensors may have to be walked by strides."""
    table = tl.multiple_of(table, 16)
    if not is_skipped(table):
        entry, tile = work_of(table, words.GATE_MAP, words.FIRST_GATE)
        look = look_of(table, entry)
        control = control_of(table, look, COMPUTE)
        flags, kind = tl.load(look + words.FLAG_BITS), tl.load(look + words.KIND)
        if kind == words.STRIP:
            _strip_tile(table, look, tile, PARAM, COMPUTE, HEIGHT, WIDTH)
        else:
            start, count = piece_of(look, kind, tile, TILE)
            whole = (start % VECTOR == 0) & (count % VECTOR == 0)
            if ((flags & words.ALIGNED) != 0) & whole:
                _flat_tile(table, look, control, start, count, tile, PARAM, COMPUTE, True, False, TILE)
            elif WALK:
                _any_tile(table, look, control, start, count, tile, PARAM, COMPUTE, TILE)
            else:
                _flat_tile(table, look, control, start, count, tile, PARAM, COMPUTE, False, False, TILE)
        if kind != words.UNITS:
            _settle_if_last(table, look, control, COMPUTE, TILE // 2)


@triton.jit
def _any_tile(table, look, control, start, count, tile, PARAM: tl.constexpr, COMPUTE: tl.constexpr,
              TILE: tl.constexpr):  # fmt: skip
    # Walked by strides or not.
    if tl.load(look + words.WALK_AT) >= 0:
        _flat_tile(table, look, control, start, count, tile, PARAM, COMPUTE, False, True, TILE)
    else:
        _flat_tile(table, look, control, start, count, tile, PARAM, COMPUTE, False, False, TILE)
