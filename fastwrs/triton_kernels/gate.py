"""Rules with a gate (AdamP, SGDP): what comes before and behind it. ``csrc/norms/gate.h`` is the same in C++.

Whether a step loses its part along the weights is decided for a tensor as a whole, so that a step has two passes:
``gate_kernel`` advances the states and leaves four sums of each row of dimension 0 (a channel), and the last program of
each tensor opens its gate or not; then the kernel of the step changes the weights, with ``update_behind_gate``.
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
    unscaled,
    work_of,
)
from fastwrs.triton_kernels.look import channel_of, found_of, look_of, row_totals
from fastwrs.triton_kernels.norms import divided, group_sums, moment
from fastwrs.triton_kernels.numeric import compensated, quotient, square_root

# The sums of a row, in the order of the workspace: step * weight, gradient * weight, gradient^2, weight^2.
SUMS = tl.constexpr(4)
# What a gate decides.
CLOSED, BY_CHANNEL, WHOLE = (tl.constexpr(k) for k in range(3))
# Where its decision is behind the sums, what is taken out of the whole tensor, and what of the first channel.
DECISION, ALONG, ALONG_EACH = (tl.constexpr(k) for k in range(3))


@triton.jit
def _is_there(gate):
    # A tensor of less than two dimensions has no gate: its states are advanced, and that is all.
    return (tl.load(gate + words.FLAG_BITS) & words.GROUPED) != 0


@triton.jit
def _states(table, entry, start, within, mask, SLOTS: tl.constexpr, TYPES: tl.constexpr, ALIGNED: tl.constexpr,
            WALK: tl.constexpr):  # fmt: skip
    # Addresses and values.
    addresses, values = (), ()
    for k in tl.static_range(SLOTS):
        at = places(table, entry, words.STATE0 + k, TYPES[2], start, within, ALIGNED, WALK, 2 + SLOTS)
        addresses = addresses + (at,)
        values = values + (tl.load(at, mask, other=0).to(TYPES[3]),)
    return addresses, values


# ---- behind the gate -------------------------------------------------------------------------------------------------


@triton.jit
def _along_weights(table, entry, start, within, mask, COMPUTE: tl.constexpr):
    # What each element's step loses is this times its weight; and whether the gate is open.
    gate = look_of(table, entry)
    decision = tl.full([], 0, COMPUTE)
    along = tl.zeros(within.shape, COMPUTE)
    if _is_there(gate):
        decided = found_of(table, gate, COMPUTE) + SUMS * tl.load(gate + words.PER_SUM)
        decision = tl.load(decided + DECISION)
        along += tl.load(decided + ALONG)
        if decision == BY_CHANNEL:
            along = tl.load(decided + ALONG_EACH + channel_of(gate, start, within), mask, other=0)
    return along, decision != CLOSED


@triton.jit
def update_behind_gate(table, entry, control, scalars, start, within, mask, UPDATE: tl.constexpr, SLOTS: tl.constexpr,
                       TYPES: tl.constexpr, MEASURE: tl.constexpr, ALIGNED: tl.constexpr,
                       WALK: tl.constexpr):  # fmt: skip
    """The second pass over some elements. Returns what an update returns: weights before and after, gradient, step.

    The gradient is read again with Nesterov's step, and is unscaled only then, or where it is measured.
    """
    ARRAYS: tl.constexpr = 2 + SLOTS
    COMPUTE: tl.constexpr = TYPES[3]
    p = places(table, entry, words.PARAM, TYPES[0], start, within, ALIGNED, WALK, ARRAYS)
    before = tl.load(p, mask, other=0).to(COMPUTE)
    addresses, states = _states(table, entry, start, within, mask, SLOTS, TYPES, ALIGNED, WALK)
    nesterov = tl.load(control + words.NESTEROV) != 0
    reads = nesterov
    if MEASURE:
        reads = nesterov | (tl.load(entry + words.MEASURE_AT) >= 0)
    grad = tl.zeros_like(before)
    if reads:
        g = places(table, entry, words.GRAD, TYPES[1], start, within, ALIGNED, WALK, ARRAYS)
        grad = tl.load(g, mask, other=0).to(COMPUTE)
        if nesterov:
            grad = unscaled(table, g, grad, mask, True, TYPES[1])
    signed = tl.where(tl.load(control + words.MAXIMIZE) != 0, -grad, grad)
    along, is_open = _along_weights(table, entry, start, within, mask, COMPUTE)
    after, step, changed = UPDATE(before, signed, states, along, is_open, scalars)
    if is_open & (tl.load(control + words.PROJECT_MOMENTUM) != 0):
        tl.store(addresses[0], changed.to(TYPES[2]), mask)
    return p, before, after, grad, step


# ---- before the gate -------------------------------------------------------------------------------------------------


@triton.jit
def _advance_states(table, gate, control, scalars, start, within, mask, ADVANCE: tl.constexpr, DIRECTION: tl.constexpr,
                    SLOTS: tl.constexpr, TYPES: tl.constexpr, ALIGNED: tl.constexpr, WALK: tl.constexpr):  # fmt: skip
    # Returns the products that a gate sums. The second pass reads what is stored: the gate judges the step that it will
    # make of that.
    ARRAYS: tl.constexpr = 2 + SLOTS
    COMPUTE: tl.constexpr = TYPES[3]
    p = places(table, gate, words.PARAM, TYPES[0], start, within, ALIGNED, WALK, ARRAYS)
    g = places(table, gate, words.GRAD, TYPES[1], start, within, ALIGNED, WALK, ARRAYS)
    weight = tl.load(p, mask, other=0).to(COMPUTE)
    grad = tl.load(g, mask, other=0).to(COMPUTE)
    addresses, states = _states(table, gate, start, within, mask, SLOTS, TYPES, ALIGNED, WALK)
    grad = unscaled(table, g, grad, mask, tl.load(control + words.NESTEROV) == 0, TYPES[1])
    grad = tl.where(tl.load(control + words.MAXIMIZE) != 0, -grad, grad)
    states = ADVANCE(grad, states, scalars)
    stored = ()
    for k in tl.static_range(SLOTS):
        narrow = states[k].to(TYPES[2])
        tl.store(addresses[k], narrow, mask)
        stored = stored + (narrow.to(COMPUTE),)
    step = tl.where(mask, DIRECTION(grad, stored, scalars), 0)
    return step * weight, grad * weight, grad * grad, weight * weight


@triton.jit
def _flat_tile(table, gate, control, scalars, start, count, tile, ADVANCE: tl.constexpr, DIRECTION: tl.constexpr,
               SLOTS: tl.constexpr, TYPES: tl.constexpr, ALIGNED: tl.constexpr, WALK: tl.constexpr,
               TILE: tl.constexpr):  # fmt: skip
    # Consecutive elements: whole rows, or a part of one.
    COMPUTE: tl.constexpr = TYPES[3]
    within = tl.arange(0, TILE)
    count = count.to(tl.int32)
    if ALIGNED:
        count = count // VECTOR * VECTOR
    mask = within < count
    products = _advance_states(
        table, gate, control, scalars, start, within, mask, ADVANCE, DIRECTION, SLOTS, TYPES, ALIGNED, WALK
    )
    if _is_there(gate):
        rows, cols = tl.load(gate + words.ROWS).to(tl.int32), tl.load(gate + words.COLS).to(tl.int32)
        unit = tl.load(gate + words.UNIT).to(tl.int32)
        first = tile * tl.load(gate + words.UNITS_PER_TILE) * cols
        if (tl.load(gate + words.KIND) == words.PARTIAL) | (count <= rows):
            for k in tl.static_range(SUMS):
                leave_sum(table, gate, k, first, tl.sum(products[k]), tile >= 0, COMPUTE)
        else:
            of_unit, place = divided(within, quotient(1.0, unit.to(tl.float32)), unit)
            is_first = mask & (place < cols)
            k = 0
            while k < SUMS:  # not unrolled: this is most of what there is to compile
                x = tl.where(k < 2, tl.where(k == 0, products[0], products[1]),
                             tl.where(k == 2, products[2], products[3]))  # fmt: skip
                sums = group_sums(x, count, rows, cols, unit, TILE)
                leave_sum(table, gate, k, first + of_unit * cols + place, sums, is_first, COMPUTE)
                k += 1


@triton.jit
def _strip_tile(table, gate, control, scalars, tile, ADVANCE: tl.constexpr, DIRECTION: tl.constexpr,
                SLOTS: tl.constexpr, TYPES: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    # Parts of some rows that lie beside each other in memory.
    _unit, start, within, mask, place, col = strip_of(gate, tile, HEIGHT, WIDTH)
    products = _advance_states(
        table, gate, control, scalars, start, within, mask, ADVANCE, DIRECTION, SLOTS, TYPES, False, False
    )
    there = col < tl.load(gate + words.COLS)
    for k in tl.static_range(SUMS):
        leave_sum(table, gate, k, place, tl.sum(products[k], axis=0), there, TYPES[3])


@triton.jit
def _at_least(x, least):
    return tl.where(x < least, least, x)


@triton.jit
def _cosine(totals, eps):
    # Of the angle between gradient and weights, without its sign. NaN, which opens no gate, if a sum is, and for 0 / 0.
    grad, weight = _at_least(square_root(totals[2]), eps), _at_least(square_root(totals[3]), eps)
    return tl.abs(quotient(quotient(totals[1], weight), grad))


@triton.jit
def _along(totals, eps):
    norm = square_root(totals[3]) + eps
    return quotient(quotient(totals[0], norm), norm)


@triton.jit
def _decide(table, gate, control, COMPUTE: tl.constexpr, SIZE: tl.constexpr):
    # Opens the gate by channels if all of these are nearly orthogonal to their gradient, or else if the whole is.
    delta, eps = tl.load(control + words.DELTA), tl.load(control + words.EPS)
    channels, per_sum = tl.load(gate + words.GROUPS), tl.load(gate + words.PER_SUM)
    parts, cols = tl.load(gate + words.ROW_TILES), tl.load(gate + words.COLS)
    sums = found_of(table, gate, COMPUTE)
    decided = sums + SUMS * per_sum
    lanes = tl.load(gate + words.LANES).to(tl.int32)
    of_chunk, lane = divided(tl.arange(0, SIZE), quotient(1.0, lanes.to(tl.float32)), lanes)
    limit = quotient(delta, square_root(tl.load(gate + words.ROWS).to(COMPUTE)))
    closed = tl.zeros([SIZE], tl.int32)
    nothing = tl.zeros([SIZE], COMPUTE)
    whole, lost = (nothing,) * SUMS, (nothing,) * SUMS
    first = tl.zeros_like(channels)
    while first < channels:
        row = first + of_chunk
        there = row < channels
        totals = ()
        for k in tl.static_range(SUMS):
            total = row_totals(sums + k * per_sum, parts, cols, lanes, lane, row, there, COMPUTE, SIZE)
            totals = totals + (total,)
        there = there & (lane == 0)
        closed += (there & ((_cosine(totals, eps) < limit) == 0)).to(tl.int32)
        tl.store(decided + ALONG_EACH + row, _along(totals, eps), there)
        more, less = (), ()
        for k in tl.static_range(SUMS):
            total, rest = compensated(whole[k], lost[k], tl.where(there, totals[k], 0))
            more, less = more + (total,), less + (rest,)
        whole, lost = more, less
        first += SIZE // lanes
    of_all = ()
    for k in tl.static_range(SUMS):
        of_all = of_all + (tl.sum(whole[k]),)
    opens = _cosine(of_all, eps) < quotient(delta, square_root(tl.load(gate + words.NUMEL).to(COMPUTE)))
    by_channel = tl.sum(closed) == 0
    tl.store(decided + DECISION, tl.where(by_channel, BY_CHANNEL, tl.where(opens, WHOLE, CLOSED)).to(COMPUTE))
    tl.store(decided + ALONG, tl.where(opens & (by_channel == 0), _along(of_all, eps), 0))


@triton.jit
def _decide_if_last(table, gate, control, COMPUTE: tl.constexpr, SIZE: tl.constexpr):
    # The last program of a tensor to come finds the sums of all others in the workspace.
    if is_last(table, gate, 0, tl.load(gate + words.PROGRAMS)):
        _decide(table, gate, control, COMPUTE, SIZE)


@triton.jit
def gate_kernel(table, PREPARE: tl.constexpr, ADVANCE: tl.constexpr, DIRECTION: tl.constexpr, SLOTS: tl.constexpr,
                TYPES: tl.constexpr, WALK: tl.constexpr, TILE: tl.constexpr, HEIGHT: tl.constexpr,
                WIDTH: tl.constexpr):  # fmt: skip
    """The first pass of a step. WALK: some of the tensors may have to be walked by strides."""
    table = tl.multiple_of(table, 16)
    COMPUTE: tl.constexpr = TYPES[3]
    if not is_skipped(table):
        entry, tile = work_of(table, words.GATE_MAP, words.FIRST_GATE)
        gate = look_of(table, entry)
        control = control_of(table, gate, COMPUTE)
        lr, t, _rescale, _shrink = moment(gate, control)
        flags, kind = tl.load(gate + words.FLAG_BITS), tl.load(gate + words.KIND)
        scalars = PREPARE(control + words.CONTROL_NUMBERS, lr, t, (t == 1) | ((flags & words.FRESH) != 0))
        if kind == words.STRIP:
            _strip_tile(table, gate, control, scalars, tile, ADVANCE, DIRECTION, SLOTS, TYPES, HEIGHT, WIDTH)
        else:
            start, count = piece_of(gate, kind, tile, TILE)
            whole = (start % VECTOR == 0) & (count % VECTOR == 0)
            if ((flags & words.ALIGNED) != 0) & whole:
                _flat_tile(table, gate, control, scalars, start, count, tile, ADVANCE, DIRECTION, SLOTS, TYPES, True,
                           False, TILE)  # fmt: skip
            elif WALK:
                _any_tile(table, gate, control, scalars, start, count, tile, ADVANCE, DIRECTION, SLOTS, TYPES, TILE)
            else:
                _flat_tile(table, gate, control, scalars, start, count, tile, ADVANCE, DIRECTION, SLOTS, TYPES, False,
                           False, TILE)  # fmt: skip
        if _is_there(gate):
            _decide_if_last(table, gate, control, COMPUTE, TILE // 2)


@triton.jit
def _any_tile(table, gate, control, scalars, start, count, tile, ADVANCE: tl.constexpr, DIRECTION: tl.constexpr,
              SLOTS: tl.constexpr, TYPES: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    # Walked by strides or not.
    if tl.load(gate + words.WALK_AT) >= 0:
        _flat_tile(
            table, gate, control, scalars, start, count, tile, ADVANCE, DIRECTION, SLOTS, TYPES, False, True, TILE
        )
    else:
        _flat_tile(
            table, gate, control, scalars, start, count, tile, ADVANCE, DIRECTION, SLOTS, TYPES, False, False, TILE
        )
