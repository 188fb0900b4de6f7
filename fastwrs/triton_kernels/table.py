"""How the table in device memory is laid out: 64-bit words, written by ``csrc/triton/table.cpp``, read by the kernels.

First a header, then an entry for each tensor, then a record of numbers for each param group (in the compute type), then
the pool (dimensions of what is walked by strides, and where measured rows go), then tickets (int32), then for each
launch the tensor that each program works on (int32). Both sides name the words in the same order; a test compares.
"""

from __future__ import annotations

from triton.language import constexpr

HEADER = (
    "tensors",
    "tiles",  # programs of the step
    "project_tiles",
    "gate_tiles",
    "records",  # where these begin, in words
    "record_numbers",  # numbers per record
    "pool",
    "tickets",  # int32, 0 between launches
    "step_map",
    "project_map",
    "gate_map",
    "grad_scale",  # addresses; 0: none
    "found_inf",
    "measured",
    "ticket",  # of the launch: int32, 0 between launches
    "workspace",  # partial sums, in the compute type
)
ENTRY = (
    "param",  # addresses
    "grad",
    "state0",
    "state1",
    "state2",
    "step",
    "lr",  # address; 0: it is in the record
    "flags",
    "kind",
    "numel",
    "unit",  # elements of a unit: what lies together and holds whole norm groups
    "rows",  # of a unit; norms are summed over these
    "cols",  # of a unit: its norm groups
    "units_per_tile",
    "first_tile",  # of each launch
    "first_project",
    "first_gate",
    "first_ticket",
    "record",
    "partial",  # where its partial sums begin
    "per_sum",  # partial sums of one kind
    "row_tiles",  # tiles one below the other
    "measure",  # where in the pool; -1: not measured
    "walk",  # where in the pool
    "groups",
    "gate",  # where in the pool; -1: the rule has none
)
GATE = (
    "channels",  # of the entry that this gate is for: an element of its walk has the index
    "channel_inner",  # element // channel_inner % channels in dimension 0
    "programs",  # of this tensor
    "lanes",  # that add up the sums of a row, a power of 2
)
"""What a gate, or another look at a tensor, has in the pool behind an entry of its own, whose units hold whole rows of
dimension 0.

In the workspace it has its sums of every part of a row (its entry's ``partial`` and ``per_sum``), then what was found
out: a gate's decision, what is taken out of the whole tensor, and what of each row; or the slopes and the means of all.
"""
CONTROL = ("lr", "maximize", "every", "start", "stop", "target", "rate", "power")
"""The numbers of a record that every rule has; the rule's constants follow."""
GATE_CONTROL = ("delta", "eps", "nesterov", "project_momentum")
"""The first of a rule's constants, if it has a gate."""
SHIFT_CONTROL = ("lam", "eps")
"""The first of a rule's constants, if it has a shifted L2 term."""
KINDS = ("units", "long", "partial", "strip", "nothing")
FLAGS = ("fresh", "lr_is_double", "aligned", "grouped")

(
    TENSORS,
    TILES,
    PROJECT_TILES,
    GATE_TILES,
    RECORDS,
    RECORD_NUMBERS,
    POOL,
    TICKETS,
    STEP_MAP,
    PROJECT_MAP,
    GATE_MAP,
    GRAD_SCALE,
    FOUND_INF,
    MEASURED_ROWS,
    TICKET,
    WORKSPACE,
) = map(constexpr, range(len(HEADER)))
(
    PARAM,
    GRAD,
    STATE0,
    STATE1,
    STATE2,
    STEP,
    LR_AT,
    FLAG_BITS,
    KIND,
    NUMEL,
    UNIT,
    ROWS,
    COLS,
    UNITS_PER_TILE,
    FIRST_TILE,
    FIRST_PROJECT,
    FIRST_GATE,
    FIRST_TICKET,
    RECORD,
    PARTIAL_AT,
    PER_SUM,
    ROW_TILES,
    MEASURE_AT,
    WALK_AT,
    GROUPS,
    GATE_AT,
) = map(constexpr, range(len(ENTRY)))
CHANNELS, CHANNEL_INNER, PROGRAMS, LANES = map(constexpr, range(len(ENTRY), len(ENTRY) + len(GATE)))
HEADER_WORDS, ENTRY_WORDS = constexpr(len(HEADER)), constexpr(len(ENTRY))
LR, MAXIMIZE, EVERY, START, STOP, TARGET, RATE, POWER = map(constexpr, range(len(CONTROL)))
CONTROL_NUMBERS = constexpr(len(CONTROL))
DELTA, EPS, NESTEROV, PROJECT_MOMENTUM = map(constexpr, range(len(CONTROL), len(CONTROL) + len(GATE_CONTROL)))
LAM, SHIFT_EPS = map(constexpr, range(len(CONTROL), len(CONTROL) + len(SHIFT_CONTROL)))
UNITS, LONG, PARTIAL, STRIP, NOTHING = map(constexpr, range(len(KINDS)))
FRESH, LR_IS_DOUBLE, ALIGNED, GROUPED = (constexpr(1 << bit) for bit in range(len(FLAGS)))
