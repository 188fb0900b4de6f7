"""Where the things are that a program works on: its tensor's entry, elements of arrays, sums in the workspace."""

# Triton reads these functions as a language of its own, with other types than Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl

from fastwrs.triton_kernels import table as words
from fastwrs.triton_kernels.numeric import quotient

VECTOR = tl.constexpr(8)  # elements: 16 bytes of the shortest type


@triton.jit
def is_skipped(table):
    """Any non-zero found_inf, NaN too."""
    at = tl.load(table + words.FOUND_INF)
    found = 0.0
    if at != 0:
        found = tl.load(at.to(tl.pointer_type(tl.float32)))
    return found != 0


@triton.jit
def control_of(table, entry, COMPUTE: tl.constexpr):
    """The numbers of a tensor's param group."""
    records = (table + tl.load(table + words.RECORDS)).to(tl.pointer_type(COMPUTE))
    return records + tl.load(entry + words.RECORD) * tl.load(table + words.RECORD_NUMBERS)


@triton.jit
def entry_of(table, tensor):
    """Where a tensor's words begin."""
    return table + words.HEADER_WORDS + tensor * words.ENTRY_WORDS


@triton.jit
def work_of(table, programs, first):
    """The entry of the tensor that this program works on, and which of its tiles. Two words: map and first program."""
    program = tl.program_id(0)
    tensors = (table + tl.load(table + programs)).to(tl.pointer_type(tl.int32))
    entry = entry_of(table, tl.load(tensors + program).to(tl.int64))
    return entry, program.to(tl.int64) - tl.load(entry + first)


@triton.jit
def _walked(table, entry, index, array, ARRAYS: tl.constexpr):
    # Where element `index` of the walk lies in an array.
    dims = table + tl.load(table + words.POOL) + tl.load(entry + words.WALK_AT)
    offset = tl.zeros_like(index)
    d = tl.load(dims) - 1
    while d >= 0:
        dim = dims + 1 + d * (1 + ARRAYS)
        size = tl.load(dim)
        offset += index % size * tl.load(dim + 1 + array)
        index = index // size
        d -= 1
    return offset


@triton.jit
def places(table, entry, array, KIND: tl.constexpr, start, within, ALIGNED: tl.constexpr, WALK: tl.constexpr,
            ARRAYS: tl.constexpr):  # fmt: skip
    """Addresses of elements ``start + within`` of an array."""
    at = tl.load(entry + array)
    if ALIGNED:
        at = tl.multiple_of(at, 16)
        array_start = at.to(tl.pointer_type(KIND))
        return tl.multiple_of(array_start, 16) + start // VECTOR * VECTOR + within
    elif WALK:
        return at.to(tl.pointer_type(KIND)) + _walked(table, entry, start + within, array, ARRAYS)
    else:
        return at.to(tl.pointer_type(KIND)) + start + within


@triton.jit
def piece_of(entry, kind, tile, TILE: tl.constexpr):
    """Of a tile whose elements lie behind each other the first one, and how many there are."""
    unit = tl.load(entry + words.UNIT)
    size = unit * tl.load(entry + words.UNITS_PER_TILE)
    start = tile * size
    end = tl.load(entry + words.NUMEL)
    if kind == words.PARTIAL:
        row_tiles = tl.load(entry + words.ROW_TILES)
        size = tl.zeros_like(size) + TILE
        end = tile // row_tiles * unit + unit
        start = end - unit + tile % row_tiles * TILE
    return start, tl.minimum(size, end - start)


@triton.jit
def unscaled(table, g, grad, mask, writes, GRAD: tl.constexpr):
    """A gradient without its scale, if it has one, and whether to write it so."""
    at = tl.load(table + words.GRAD_SCALE)
    if at != 0:
        grad = quotient(grad, tl.load(at.to(tl.pointer_type(tl.float32))).to(grad.dtype))
        if writes:
            tl.store(g, grad.to(GRAD), mask)
    return grad


@triton.jit
def leave_sum(table, entry, kind, place, total, mask, COMPUTE: tl.constexpr):
    """Leaves sums for the program that finishes them."""
    workspace = tl.load(table + words.WORKSPACE).to(tl.pointer_type(COMPUTE)) + tl.load(entry + words.PARTIAL_AT)
    tl.store(workspace + kind * tl.load(entry + words.PER_SUM) + place, total, mask)


@triton.jit
def is_last(table, entry, number, programs):
    """Whether the others of so many programs have left all that they leave. Each asks once, for the same ticket."""
    tl.debug_barrier()  # all threads of this program have left theirs
    ticket = (table + tl.load(table + words.TICKETS)).to(tl.pointer_type(tl.int32))
    ticket += tl.load(entry + words.FIRST_TICKET) + number
    last = tl.atomic_add(ticket, 1) == programs - 1
    tl.store(ticket, 0, last)
    return last


@triton.jit
def strip_of(entry, tile, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Some rows and columns of a unit: its number, first element, places, mask, and the first of its sums."""
    rows, cols = tl.load(entry + words.ROWS), tl.load(entry + words.COLS)
    strips, row_tiles = tl.cdiv(cols, WIDTH), tl.load(entry + words.ROW_TILES)
    strip, row_tile = tile % strips, tile // strips % row_tiles
    unit = tile // strips // row_tiles
    row = row_tile * HEIGHT + tl.arange(0, HEIGHT)
    col = strip * WIDTH + tl.arange(0, WIDTH)
    within = row[:, None] * cols + col[None, :]
    mask = (row[:, None] < rows) & (col[None, :] < cols)
    return unit, unit * rows * cols, within, mask, (unit * row_tiles + row_tile) * cols + col, col
