"""The kernels. A program takes one tile of one tensor: it updates the tile, and where norms are to be set and the tile
holds whole norm groups it keeps the new weights in registers until their norms are known, so that every array is read
and written once. Where a group does not fit, ``step_kernel`` writes the weights and leaves sums of squares in the
workspace, of which the last program of a group to come makes its factor, and ``project_kernel`` scales. A rule with a
gate has ``gate_kernel`` before these, one with a shifted L2 term ``shift_kernel``.

Whether this step counts (found_inf), rescales or shrinks is decided here, from numbers in device memory.
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
    entry_of,
    is_last,
    is_skipped,
    leave_sum,
    piece_of,
    places,
    strip_of,
    unscaled,
    work_of,
)
from fastwrs.triton_kernels.gate import update_behind_gate
from fastwrs.triton_kernels.look import GATE, IDLE, SHIFT
from fastwrs.triton_kernels.norms import (
    divided,
    group_totals,
    moment,
    projection_factor,
    write_measured,
    write_measured_of_nothing,
)
from fastwrs.triton_kernels.numeric import compensated, quotient, square_root
from fastwrs.triton_kernels.shift import with_shift


@triton.jit
def _update(table, entry, control, scalars, start, within, mask, UPDATE: tl.constexpr, SLOTS: tl.constexpr,
            TYPES: tl.constexpr, LOOK: tl.constexpr, MEASURE: tl.constexpr, ALIGNED: tl.constexpr,
            WALK: tl.constexpr):  # fmt: skip
    """Updates some elements and writes their states. Returns weights before and after, gradient and step.

    The gradient is that which the user sees: unscaled, not negated.
    """
    if LOOK == GATE:
        return update_behind_gate(
            table, entry, control, scalars, start, within, mask, UPDATE, SLOTS, TYPES, MEASURE, ALIGNED, WALK
        )
    elif LOOK == IDLE:
        p = places(table, entry, words.PARAM, TYPES[0], start, within, ALIGNED, WALK, 2 + SLOTS)
        before = tl.load(p, mask, other=0).to(TYPES[3])
        nothing = tl.zeros_like(before)
        return p, before, before, nothing, nothing
    else:
        return _update_at_once(
            table, entry, control, scalars, start, within, mask, UPDATE, SLOTS, TYPES, LOOK, ALIGNED, WALK
        )


@triton.jit
def _update_at_once(table, entry, control, scalars, start, within, mask, UPDATE: tl.constexpr, SLOTS: tl.constexpr,
                    TYPES: tl.constexpr, LOOK: tl.constexpr, ALIGNED: tl.constexpr,
                    WALK: tl.constexpr):  # fmt: skip
    # All of a step, in one pass over memory.
    ARRAYS: tl.constexpr = 2 + SLOTS
    COMPUTE: tl.constexpr = TYPES[3]
    p = places(table, entry, words.PARAM, TYPES[0], start, within, ALIGNED, WALK, ARRAYS)
    g = places(table, entry, words.GRAD, TYPES[1], start, within, ALIGNED, WALK, ARRAYS)
    before = tl.load(p, mask, other=0).to(COMPUTE)
    grad = tl.load(g, mask, other=0).to(COMPUTE)
    s0, s1, s2 = before, before, before
    if SLOTS > 0:
        a0 = places(table, entry, words.STATE0, TYPES[2], start, within, ALIGNED, WALK, ARRAYS)
        s0 = tl.load(a0, mask, other=0).to(COMPUTE)
    if SLOTS > 1:
        a1 = places(table, entry, words.STATE1, TYPES[2], start, within, ALIGNED, WALK, ARRAYS)
        s1 = tl.load(a1, mask, other=0).to(COMPUTE)
    if SLOTS > 2:
        a2 = places(table, entry, words.STATE2, TYPES[2], start, within, ALIGNED, WALK, ARRAYS)
        s2 = tl.load(a2, mask, other=0).to(COMPUTE)
    grad = unscaled(table, g, grad, mask, True, TYPES[1])
    signed = tl.where(tl.load(control + words.MAXIMIZE) != 0, -grad, grad)
    if LOOK == SHIFT:
        signed = with_shift(table, entry, control, start, within, mask, before, signed, COMPUTE)
    after, step, s0, s1, s2 = UPDATE(before, signed, s0, s1, s2, scalars, SLOTS)
    if SLOTS > 0:
        tl.store(a0, s0.to(TYPES[2]), mask)
    if SLOTS > 1:
        tl.store(a1, s1.to(TYPES[2]), mask)
    if SLOTS > 2:
        tl.store(a2, s2.to(TYPES[2]), mask)
    return p, before, after, grad, step


@triton.jit
def _flat_tile(table, entry, control, scalars, lr, rescale, shrink, start, count, tile, UPDATE: tl.constexpr,
               SLOTS: tl.constexpr, TYPES: tl.constexpr, LOOK: tl.constexpr, MEASURE: tl.constexpr,
               ALIGNED: tl.constexpr, WALK: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """A tile of consecutive elements: whole units, or a part of one unit with one norm group."""
    COMPUTE: tl.constexpr = TYPES[3]
    within = tl.arange(0, TILE)
    count = count.to(tl.int32)
    if ALIGNED:
        count = count // VECTOR * VECTOR
    mask = within < count
    p, before, after, grad, step = _update(
        table, entry, control, scalars, start, within, mask, UPDATE, SLOTS, TYPES, LOOK, MEASURE, ALIGNED, WALK
    )
    kind = tl.load(entry + words.KIND)
    measured = MEASURE and tl.load(entry + words.MEASURE_AT) >= 0
    new = after.to(TYPES[0])
    if kind == words.PARTIAL:
        stored = tl.where(mask, new.to(COMPUTE), 0)
        if MEASURE:
            if measured:
                always = tile >= 0
                leave_sum(table, entry, 0, tile, tl.sum(before * before), always, COMPUTE)
                leave_sum(table, entry, 1, tile, tl.sum(stored * stored), always, COMPUTE)
                leave_sum(table, entry, 2, tile, tl.sum(tl.where(mask, grad * grad, 0)), always, COMPUTE)
                leave_sum(table, entry, 3, tile, tl.sum(tl.where(mask, step * step, 0)), always, COMPUTE)
        else:
            if rescale | shrink:
                x = tl.where(shrink, before, stored)
                leave_sum(table, entry, 0, tile, tl.sum(x * x), tile >= 0, COMPUTE)
    elif rescale | shrink | measured:
        rows, cols = tl.load(entry + words.ROWS).to(tl.int32), tl.load(entry + words.COLS).to(tl.int32)
        unit = tl.load(entry + words.UNIT).to(tl.int32)
        groups = count // unit * cols
        after = tl.where(mask, after, 0)
        if MEASURE:
            norm = square_root(group_totals(before, count, rows, cols, unit, TILE))
            updated = square_root(group_totals(after, count, rows, cols, unit, TILE))
            factor = projection_factor(control, lr, rescale, shrink, norm, updated)
            if measured:
                grad_norm = square_root(group_totals(grad, count, rows, cols, unit, TILE))
                step_norm = square_root(group_totals(step, count, rows, cols, unit, TILE))
                inverse_unit = quotient(1.0, unit.to(tl.float32))
                of_unit, place = divided(within, inverse_unit, unit)
                group = tile * tl.load(entry + words.UNITS_PER_TILE) * cols + of_unit * cols + place
                write_measured(table, entry, group, mask & (place < cols), factor, rescale, shrink, norm, updated,
                               grad_norm, step_norm)  # fmt: skip
            new = (after * factor).to(TYPES[0])
        else:
            x = tl.where(shrink, before, after)
            if groups == 1:
                one = square_root(tl.sum(x * x))
                new = (after * projection_factor(control, lr, rescale, shrink, one, one)).to(TYPES[0])
            else:
                each = square_root(group_totals(x, count, rows, cols, unit, TILE))
                new = (after * projection_factor(control, lr, rescale, shrink, each, each)).to(TYPES[0])
    if LOOK == IDLE:
        mask &= (kind != words.PARTIAL) & (rescale | shrink)
    tl.store(p, new, mask)


@triton.jit
def _long_tile(table, entry, control, scalars, lr, rescale, shrink, start, UPDATE: tl.constexpr, SLOTS: tl.constexpr,
               TYPES: tl.constexpr, LOOK: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
               HELD: tl.constexpr):  # fmt: skip
    """One unit of up to HELD tiles, held in registers: of one norm group, or of several that are only rescaled."""
    unit = tl.load(entry + words.UNIT).to(tl.int32)
    if ALIGNED:
        unit = unit // VECTOR * VECTOR
    cols = tl.load(entry + words.COLS).to(tl.int32)
    within = tl.arange(0, TILE)
    nothing = tl.zeros([TILE], TYPES[3])
    held = (nothing,) * HELD
    total = tl.sum(nothing)
    k = 0
    while k * TILE < unit:
        mask = within < unit - k * TILE
        _p, before, after, _g, _u = _update(table, entry, control, scalars, start + k * TILE, within, mask, UPDATE,
                                            SLOTS, TYPES, LOOK, False, ALIGNED, False)  # fmt: skip
        after = tl.where(mask, after, 0)
        x = tl.where(shrink, before, after)
        total += tl.sum(x * x)
        held = _with(held, k, after, HELD)
        k += 1
    factor = tl.zeros_like(total) + 1
    if cols == 1:
        if rescale | shrink:
            norm = square_root(total)
            factor = projection_factor(control, lr, rescale, shrink, norm, norm)
    elif rescale:
        inverse = quotient(1.0, cols.to(tl.float32))
        col = 0
        while col < cols:
            norm = square_root(tl.sum(_squares_of_col(held, within, inverse, cols, col, TILE, HELD)))
            of_col = projection_factor(control, lr, rescale, shrink, norm, norm)
            held = _with_scaled_col(held, of_col, within, inverse, cols, col, TILE, HELD)
            col += 1
    k = 0
    while k * TILE < unit:
        p = places(table, entry, words.PARAM, TYPES[0], start + k * TILE, within, ALIGNED, False, 2 + SLOTS)
        tl.store(p, (_of(held, k, HELD) * factor).to(TYPES[0]), within < unit - k * TILE)
        k += 1


@triton.jit
def _with(held, k, x, HELD: tl.constexpr):
    # Registers have no numbers that are known only at run time.
    new = ()
    for j in tl.static_range(HELD):
        new = new + (tl.where(k == j, x, held[j]),)
    return new


@triton.jit
def _of(held, k, HELD: tl.constexpr):
    x = held[0]
    for j in tl.static_range(1, HELD):
        x = tl.where(k == j, held[j], x)
    return x


@triton.jit
def _is_col(place, inverse, cols, col):
    _row, mine = divided(place, inverse, cols)
    return mine == col


@triton.jit
def _squares_of_col(held, within, inverse, cols, col, TILE: tl.constexpr, HELD: tl.constexpr):
    squares = tl.zeros_like(held[0])
    for j in tl.static_range(HELD):
        squares += tl.where(_is_col(within + j * TILE, inverse, cols, col), held[j] * held[j], 0)
    return squares


@triton.jit
def _with_scaled_col(held, factor, within, inverse, cols, col, TILE: tl.constexpr, HELD: tl.constexpr):
    new = ()
    for j in tl.static_range(HELD):
        of_col = _is_col(within + j * TILE, inverse, cols, col)
        new = new + (tl.where(of_col, held[j] * factor, held[j]),)
    return new


@triton.jit
def _strip_tile(table, entry, control, scalars, rescale, shrink, tile, UPDATE: tl.constexpr, SLOTS: tl.constexpr,
                TYPES: tl.constexpr, LOOK: tl.constexpr, MEASURE: tl.constexpr, HEIGHT: tl.constexpr,
                WIDTH: tl.constexpr):  # fmt: skip
    """Some rows of some columns of one unit: the weights are written at once, sums are left for each column."""
    COMPUTE: tl.constexpr = TYPES[3]
    _unit, start, within, mask, place, col = strip_of(entry, tile, HEIGHT, WIDTH)
    p, before, after, grad, step = _update(
        table, entry, control, scalars, start, within, mask, UPDATE, SLOTS, TYPES, LOOK, MEASURE, False, False
    )
    new = after.to(TYPES[0])
    stored = tl.where(mask, new.to(COMPUTE), 0)
    there = col < tl.load(entry + words.COLS)
    if MEASURE:
        if tl.load(entry + words.MEASURE_AT) >= 0:
            grad, step = tl.where(mask, grad, 0), tl.where(mask, step, 0)
            leave_sum(table, entry, 0, place, tl.sum(before * before, axis=0), there, COMPUTE)
            leave_sum(table, entry, 1, place, tl.sum(stored * stored, axis=0), there, COMPUTE)
            leave_sum(table, entry, 2, place, tl.sum(grad * grad, axis=0), there, COMPUTE)
            leave_sum(table, entry, 3, place, tl.sum(step * step, axis=0), there, COMPUTE)
    else:
        if rescale | shrink:
            x = tl.where(shrink, before, stored)
            leave_sum(table, entry, 0, place, tl.sum(x * x, axis=0), there, COMPUTE)
    if LOOK != IDLE:
        tl.store(p, new, mask)


@triton.jit
def _compensated_sum(table, entry, kind, unit, col, there, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
                     COMPUTE: tl.constexpr):  # fmt: skip
    # The partial sums of some columns of a unit, in a fixed order, with what rounding loses kept. Of a single column
    # every lane has a part.
    cols, row_tiles = tl.load(entry + words.COLS), tl.load(entry + words.ROW_TILES)
    sums = tl.load(table + words.WORKSPACE).to(tl.pointer_type(COMPUTE)) + tl.load(entry + words.PARTIAL_AT)
    sums += kind * tl.load(entry + words.PER_SUM) + unit * row_tiles * cols
    one = cols == 1
    lanes = tl.where(one, WIDTH, 1)
    lane = tl.where(one, tl.arange(0, WIDTH), 0)[None, :]
    col, there = tl.where(one, 0, col)[None, :], (there | one)[None, :]
    total = tl.zeros([HEIGHT, WIDTH], COMPUTE)
    lost = tl.zeros([HEIGHT, WIDTH], COMPUTE)
    first = tl.zeros_like(row_tiles)
    while first < row_tiles:
        row = first + tl.arange(0, HEIGHT)[:, None] * lanes + lane
        total, lost = compensated(total, lost, tl.load(sums + row * cols + col, (row < row_tiles) & there, other=0))
        first += HEIGHT * lanes
    of_lanes = tl.sum(total, axis=0)
    return tl.where(one, tl.zeros_like(of_lanes) + tl.sum(of_lanes), of_lanes)


@triton.jit
def _finish_if_last(table, MEASURE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, COMPUTE: tl.constexpr):
    """Makes factors of the sums of some columns of a unit in parts, if all programs of these have left theirs.

    What the program has known before is read again here: to keep it meanwhile takes registers from the update.
    """
    entry, tile = work_of(table, words.STEP_MAP, words.FIRST_TILE)
    kind = tl.load(entry + words.KIND)
    if (kind == words.PARTIAL) | (kind == words.STRIP):
        control = control_of(table, entry, COMPUTE)
        lr, _t, rescale, shrink = moment(entry, control)
        if rescale | shrink | MEASURE:
            cols, row_tiles = tl.load(entry + words.COLS), tl.load(entry + words.ROW_TILES)
            strips = tl.cdiv(cols, WIDTH)
            strip, unit = tile % strips, tile // strips // row_tiles
            if is_last(table, entry, unit * strips + strip, row_tiles):
                col = strip * WIDTH + tl.arange(0, WIDTH)
                there = col < cols
                kinds: tl.constexpr = 4 if MEASURE else 1
                norms = ()
                for k in tl.static_range(kinds):
                    sums = _compensated_sum(table, entry, k, unit, col, there, HEIGHT, WIDTH, COMPUTE)
                    norms = norms + (square_root(sums),)
                factor = projection_factor(control, lr, rescale, shrink, norms[0], norms[1 if MEASURE else 0])
                leave_sum(table, entry, kinds, unit * cols + col, factor, there, COMPUTE)
                if MEASURE:
                    write_measured(table, entry, unit * cols + col, there, factor, rescale, shrink, norms[0], norms[1],
                                   norms[2], norms[3])  # fmt: skip


@triton.jit
def _advance_steps(table, BLOCK: tl.constexpr):
    """The last program to come advances the steps of all tensors: by then every other has read them."""
    tl.debug_barrier()  # all threads of this program have read their step
    ticket = tl.load(table + words.TICKET).to(tl.pointer_type(tl.int32))
    if tl.atomic_add(ticket, 1) == tl.num_programs(0) - 1:
        tl.store(ticket, 0)
        tensors = tl.load(table + words.TENSORS)
        first = tl.zeros_like(tensors)
        while first < tensors:
            tensor = first + tl.arange(0, BLOCK)
            mask = tensor < tensors
            step = tl.load(entry_of(table, tensor) + words.STEP, mask, other=0).to(tl.pointer_type(tl.float32))
            tl.store(step, tl.load(step, mask, other=0) + 1, mask)
            first += BLOCK


@triton.jit
def step_kernel(table, PREPARE: tl.constexpr, UPDATE: tl.constexpr, SLOTS: tl.constexpr, TYPES: tl.constexpr,
                LOOK: tl.constexpr, MEASURE: tl.constexpr, WALK: tl.constexpr, TILE: tl.constexpr,
                HELD: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """One step of all tensors of a table. TYPES: of parameter, gradient, states, and the compute type.

    LOOK: what has been looked at. GATE: the states have been advanced, and gates have decided, see ``gate_kernel``;
    SHIFT: slopes and means of all channels are known, see ``shift_kernel``.
    """
    table = tl.multiple_of(table, 16)
    COMPUTE: tl.constexpr = TYPES[3]
    if not is_skipped(table):
        if tl.program_id(0) < tl.load(table + words.TILES):
            entry, tile = work_of(table, words.STEP_MAP, words.FIRST_TILE)
            control = control_of(table, entry, COMPUTE)
            lr, t, rescale, shrink = moment(entry, control)
            flags, kind, unit = (
                tl.load(entry + words.FLAG_BITS),
                tl.load(entry + words.KIND),
                tl.load(entry + words.UNIT),
            )
            scalars = PREPARE(control + words.CONTROL_NUMBERS, lr, t, (t == 1) | ((flags & words.FRESH) != 0))
            if LOOK == IDLE:  # noqa: SIM102  (the compiler's if, then one of the kernel)
                if not (rescale | shrink | MEASURE):
                    kind = tl.zeros_like(kind) + words.NOTHING  # of which all that is done is to measure
            if kind == words.STRIP:
                if not WALK:
                    _strip_tile(table, entry, control, scalars, rescale, shrink, tile, UPDATE, SLOTS, TYPES, LOOK,
                                MEASURE, HEIGHT, WIDTH)  # fmt: skip
            elif kind == words.LONG:
                if not (WALK or MEASURE):
                    if ((flags & words.ALIGNED) != 0) & (unit % VECTOR == 0):
                        _long_tile(table, entry, control, scalars, lr, rescale, shrink, tile * unit, UPDATE, SLOTS,
                                   TYPES, LOOK, True, TILE, HELD)  # fmt: skip
                    else:
                        _long_tile(table, entry, control, scalars, lr, rescale, shrink, tile * unit, UPDATE, SLOTS,
                                   TYPES, LOOK, False, TILE, HELD)  # fmt: skip
            elif kind == words.NOTHING:
                if MEASURE:
                    write_measured_of_nothing(table, entry, tile, TILE)
            else:
                start, count = piece_of(entry, kind, tile, TILE)
                whole = (start % VECTOR == 0) & (count % VECTOR == 0)
                if WALK:
                    _flat_tile(table, entry, control, scalars, lr, rescale, shrink, start, count, tile, UPDATE, SLOTS,
                               TYPES, LOOK, MEASURE, False, True, TILE)  # fmt: skip
                else:
                    if ((flags & words.ALIGNED) != 0) & whole:
                        _flat_tile(table, entry, control, scalars, lr, rescale, shrink, start, count, tile, UPDATE,
                                   SLOTS, TYPES, LOOK, MEASURE, True, False, TILE)  # fmt: skip
                    else:
                        _flat_tile(table, entry, control, scalars, lr, rescale, shrink, start, count, tile, UPDATE,
                                   SLOTS, TYPES, LOOK, MEASURE, False, False, TILE)  # fmt: skip
            _finish_if_last(table, MEASURE, HEIGHT, WIDTH, COMPUTE)
        if tl.load(table + words.PROJECT_TILES) == 0:
            _advance_steps(table, TILE)


@triton.jit
def _scale_strip(table, entry, factors, tile, PARAM: tl.constexpr, SLOTS: tl.constexpr, HEIGHT: tl.constexpr,
                 WIDTH: tl.constexpr):  # fmt: skip
    unit, start, within, mask, _place, col = strip_of(entry, tile, HEIGHT, WIDTH)
    cols = tl.load(entry + words.COLS)
    factor = tl.load(factors + unit * cols + col, col < cols, other=0)
    p = places(table, entry, words.PARAM, PARAM, start, within, False, False, 2 + SLOTS)
    tl.store(p, (tl.load(p, mask, other=0).to(factor.dtype) * factor[None, :]).to(PARAM), mask)


@triton.jit
def _scale_flat(table, entry, factor, start, count, PARAM: tl.constexpr, SLOTS: tl.constexpr, ALIGNED: tl.constexpr,
                WALK: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    within = tl.arange(0, TILE)
    if ALIGNED:
        count = count // VECTOR * VECTOR
    mask = within < count
    p = places(table, entry, words.PARAM, PARAM, start, within, ALIGNED, WALK, 2 + SLOTS)
    tl.store(p, (tl.load(p, mask, other=0).to(factor.dtype) * factor).to(PARAM), mask)


@triton.jit
def project_kernel(table, PARAM: tl.constexpr, COMPUTE: tl.constexpr, SLOTS: tl.constexpr, MEASURE: tl.constexpr,
                   WALK: tl.constexpr, TILE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Multiplies the weights that fit no tile by the factors of their groups."""
    table = tl.multiple_of(table, 16)
    if not is_skipped(table):
        entry, tile = work_of(table, words.PROJECT_MAP, words.FIRST_PROJECT)
        _lr, _t, rescale, shrink = moment(entry, control_of(table, entry, COMPUTE))
        if rescale | shrink:
            kinds: tl.constexpr = 4 if MEASURE else 1
            factors = tl.load(table + words.WORKSPACE).to(tl.pointer_type(COMPUTE)) + tl.load(entry + words.PARTIAL_AT)
            factors += kinds * tl.load(entry + words.PER_SUM)
            if tl.load(entry + words.KIND) == words.STRIP:
                if not WALK:
                    _scale_strip(table, entry, factors, tile, PARAM, SLOTS, HEIGHT, WIDTH)
            else:
                unit, row_tiles = tl.load(entry + words.UNIT), tl.load(entry + words.ROW_TILES)
                start = tile // row_tiles * unit + tile % row_tiles * TILE
                count = tl.minimum(unit - tile % row_tiles * TILE, TILE).to(tl.int32)
                factor = tl.load(factors + tile // row_tiles)
                whole = (start % VECTOR == 0) & (count % VECTOR == 0)
                if WALK:
                    _scale_flat(table, entry, factor, start, count, PARAM, SLOTS, False, True, TILE)
                else:
                    if ((tl.load(entry + words.FLAG_BITS) & words.ALIGNED) != 0) & whole:
                        _scale_flat(table, entry, factor, start, count, PARAM, SLOTS, True, False, TILE)
                    else:
                        _scale_flat(table, entry, factor, start, count, PARAM, SLOTS, False, False, TILE)
        _advance_steps(table, TILE)
