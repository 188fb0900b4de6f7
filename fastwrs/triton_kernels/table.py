"""How the table in device memory is laid out: 64-bit words, written by ``csrc/triton/table.cpp``, read by the kernels.

First a header, then an entry for each tensor, then a record of numbers for each param group (in the compute type), then
the pool (dimensions of what is walked by strides, and where measured rows go), then for each launch the tensor that
each program works on (int32). Both sides name the words in the same order; a test compares.
"""

from __future__ import annotations

from triton.language import constexpr

HEADER = (
    "tensors",
    "tiles",  # programs of the step
    "finish_tiles",
    "project_tiles",
    "records",  # where these begin, in words
    "record_numbers",  # numbers per record
    "pool",
    "step_map",
    "finish_map",
    "project_map",
    "grad_scale",  # addresses; 0: none
    "found_inf",
    "measured",
    "ticket",  # int32, 0 between launches
    "workspace",  # partial sums, in the compute type
    "spare",
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
    "first_finish",
    "first_project",
    "record",
    "partial",  # where its partial sums begin
    "per_sum",  # partial sums of one kind
    "row_tiles",  # tiles one below the other
    "measure",  # where in the pool; -1: not measured
    "walk",  # where in the pool
    "groups",
)
CONTROL = ("lr", "maximize", "every", "start", "stop", "target", "rate", "power")
"""The numbers of a record that every rule has; the rule's constants follow."""
KINDS = ("units", "long", "partial", "strip", "nothing")
FLAGS = ("fresh", "lr_is_double", "aligned", "grouped")

(
    TENSORS,
    TILES,
    FINISH_TILES,
    PROJECT_TILES,
    RECORDS,
    RECORD_NUMBERS,
    POOL,
    STEP_MAP,
    FINISH_MAP,
    PROJECT_MAP,
    GRAD_SCALE,
    FOUND_INF,
    MEASURED_ROWS,
    TICKET,
    WORKSPACE,
    _,
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
    FIRST_FINISH,
    FIRST_PROJECT,
    RECORD,
    PARTIAL_AT,
    PER_SUM,
    ROW_TILES,
    MEASURE_AT,
    WALK_AT,
    GROUPS,
) = map(constexpr, range(len(ENTRY)))
HEADER_WORDS, ENTRY_WORDS = constexpr(len(HEADER)), constexpr(len(ENTRY))
LR, MAXIMIZE, EVERY, START, STOP, TARGET, RATE, POWER = map(constexpr, range(len(CONTROL)))
CONTROL_NUMBERS = constexpr(len(CONTROL))
UNITS, LONG, PARTIAL, STRIP, NOTHING = map(constexpr, range(len(KINDS)))
FRESH, LR_IS_DOUBLE, ALIGNED, GROUPED = (constexpr(1 << bit) for bit in range(len(FLAGS)))
