"""The one list of cases that every lane runs: shapes, layouts, dtypes, options and hyperparameters of a step.

``CASES`` is a covering selection, not a product: every option meets every dtype triple, every shape meets every axis
that it has, every layout of the parameter meets every layout of the gradient. What is not swept in a part is dealt
from shuffled decks, so that combinations differ from case to case, and the values depend on the case's id alone.
``select(max_elements)`` gives slow lanes (emulation, interpreters) the small ones.

``Case.build()`` makes the tensors. Each lies in a buffer of its own that is poisoned with NaN around it and in its
gaps; a state that the step has to write before it reads (momentum in a first step) is poisoned too.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from calls import LAYOUTS, Call, group_count, one_thread, place
from rule_options import ALL_OPTIONS, GATED, OPTIONS, PROJECTED, SHIFTED
from torch import Tensor

from fastwrs.spec import MEASURED, NO_STOP, RULES

Axis = str | tuple[int, ...] | None
Dims = tuple[int, ...]
Card = TypeVar("Card")


@dataclass(frozen=True)
class TensorCase:
    """One parameter of a list."""

    shape: tuple[int, ...]
    axis: Axis = "out"
    layouts: tuple[str, str, str] = ("c", "c", "c")
    """How param, grad and states lie in memory, keys of ``LAYOUTS``."""
    t: int = 3
    fresh: bool = False
    data: str = "plain"
    """A key of ``DATA``, or of ``NARROW``."""
    row: int = 0
    """Which of the case's hyperparameter records."""

    @property
    def dims(self) -> Dims | None:
        """The reduced dimensions, None without norm groups."""
        return dims_of(self.axis, len(self.shape))

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "0d"
        axis = "".join(map(str, self.axis)) if isinstance(self.axis, tuple) else self.axis or "none"
        extras = [f"t{self.t}"] * (self.t != 3) + ["fresh"] * self.fresh + [self.data] * (self.data != "plain")
        return "-".join([shape, "/".join(self.layouts), axis, *extras])


@dataclass(frozen=True)
class Case:
    """One call of the step op."""

    theme: str
    option: str
    """A key of ``OPTIONS``."""
    tensors: tuple[TensorCase, ...]
    dtypes: tuple[str, str, str] = ("float32", "float32", "float32")
    records: tuple[tuple[tuple[str, float], ...], ...] = ((),)
    """What the records have beyond the option, one entry per record."""
    grad_scale: float | None = None
    found_inf: float | None = None
    lr_tensor: str | None = None
    measured: bool = True
    tags: str = field(default="", compare=False)
    """What the id has to say beyond option, dtypes and first tensor."""

    @property
    def id(self) -> str:
        more = f"+{len(self.tensors) - 1}" if len(self.tensors) > 1 else ""
        first = str(self.tensors[0]) if self.tensors else "nothing"
        parts = [self.theme, self.option, "".join(SHORT[d] for d in self.dtypes), first + more, self.tags]
        return "-".join(part for part in parts if part)

    @property
    def rule(self) -> str:
        return ALL_OPTIONS[self.option].rule

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of the states, in the order of the op."""
        return ALL_OPTIONS[self.option].slots

    @property
    def numel(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    def hyper(self, row: int) -> dict[str, float]:
        """Record number ``row`` by name."""
        common = {"lr_tensor": -1, "every": 0, "start": 0, "stop": NO_STOP, "target": 1, "rate": 0, "power": 1}
        values = common | ALL_OPTIONS[self.option].hyper | dict(self.records[row])
        return {hyper.name: float(values.get(hyper.name, 0)) for hyper in RULES[self.rule].record}

    def build(self, device: str = "cpu") -> Call:
        """Makes the tensors of this case; the same ones every time."""
        with one_thread():
            return _build(self, device)


DTYPES = (
    ("float32", "float32", "float32"),
    ("float64", "float64", "float64"),
    ("bfloat16", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("float16", "float16", "float32"),
    ("float32", "bfloat16", "float32"),
)
SHORT = {"float32": "s", "float64": "d", "bfloat16": "b", "float16": "h"}

DATA = {
    "plain": "magnitudes within a few binades, so that a difference in rounding stays of the size of rounding",
    "sparse": "a third of the elements zero in param, grad and states",
    "const": "all elements of the parameter equal: the worst case for running sums",
    "zero_row": "the first group zero throughout",
    "zero_before": "weights and momentum of the first group zero, its gradient not",
    "nan": "one NaN in the gradient of the first group",
    "inf": "one infinity in the gradient of the first group",
    "nan_w": "one NaN in the weights of the first group",
    "tiny": "norms near 1e-15",
    "huge": "norms near 1e15",
}
NARROW = {"narrow": "the weights of a group within 1 part in 1,000 of each other, for what looks at their variance"}


def dims_of(axis: Axis, ndim: int) -> Dims | None:
    """The dimensions that an axis reduces."""
    if axis is None:
        return None
    if isinstance(axis, tuple):
        return tuple(sorted(dim % ndim for dim in axis))
    return {"out": tuple(range(1, ndim)), "in": (1,), "tensor": tuple(range(ndim))}[axis]


def mask_of(axis: Axis, ndim: int) -> int:
    """The op's bitmask for an axis."""
    if axis is None:
        return 0
    return -1 if axis == "tensor" else sum(1 << dim for dim in dims_of(axis, ndim) or ())


# ---- the tensors ----------------------------------------------------------------------------------------------------


def _values(tensor: TensorCase, case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Param, grad and states in fp64, before they are rounded to their types.

    Rows have norms near 1 and gradients that move them by a few percent, as in training. Magnitudes lie within a few
    binades: an element far below its neighbours would lose many ulps to any order of operations, and hide errors.
    """
    shape, dims = tensor.shape, tensor.dims
    kept = [1 if dims is None or dim in dims else length for dim, length in enumerate(shape)]
    size = max(1, tensor.numel // max(1, math.prod(kept)))

    def magnitudes(low: float, high: float, of: tuple[int, ...] | list[int] = shape) -> Tensor:
        return 2 ** (low + (high - low) * torch.rand(of, generator=generator, dtype=torch.float64))

    def signed(low: float, high: float) -> Tensor:
        sign = torch.rand(shape, generator=generator, dtype=torch.float64) < 0.5
        return magnitudes(low, high) * (1 - 2 * sign.double())

    scale = magnitudes(-0.7, 0.7, kept) / math.sqrt(size) * {"tiny": 1e-15, "huge": 1e15}.get(tensor.data, 1.0)
    param = signed(-1, 1) * scale
    grad = signed(-2, 1) * scale * 0.5
    states = {}
    for slot in case.slots:
        if slot.endswith("_sq"):
            states[slot] = (magnitudes(-2, 1) * scale * 0.4) ** 2
        else:
            states[slot] = signed(-2, 1) * scale * 0.4
        if tensor.t == 1 or tensor.fresh:  # nothing there yet: zeros if the rule reads it, poison if it must not
            starts_as_gradient = slot == "momentum_buffer" and case.rule in ("sgd", "sgd_shifted")
            states[slot].fill_(math.nan if starts_as_gradient else 0.0)
    reduced = [dims is None or dim in dims for dim in range(len(shape))]
    group = tuple(slice(None) if all_of_it else slice(0, 1) for all_of_it in reduced)
    one = tuple(slice(n // 2 * r, n // 2 * r + 1) for n, r in zip(shape, reduced, strict=True))
    if tensor.data == "sparse":
        mask = torch.rand(shape, generator=generator) < 0.33
        for values in (param, grad, *states.values()):
            values[mask] = values[mask] * 0
    elif tensor.data == "const":
        param = torch.ones(shape, dtype=torch.float64) * scale
    elif tensor.data == "narrow":
        param = (1 + 1e-3 * signed(-2, 0)) * scale
    elif tensor.data in ("zero_row", "zero_before"):
        zeroed = [param, *(state for slot, state in states.items() if not slot.endswith("_sq"))]
        if tensor.data == "zero_row":
            zeroed = [param, grad, *states.values()]
        for values in zeroed:
            values[group] = values[group] * 0
    elif tensor.data in ("nan", "inf"):
        grad[one] = math.nan if tensor.data == "nan" else math.inf
    elif tensor.data == "nan_w":
        param[one] = math.nan
    if not RULES[case.rule].updates:
        grad.fill_(math.nan)  # nobody may read it
    return param, grad if case.grad_scale is None else grad * case.grad_scale, states


def _build(case: Case, device: str) -> Call:
    dtypes = [getattr(torch, name) for name in case.dtypes]
    generator = torch.Generator().manual_seed(zlib.crc32(case.id.encode()))
    columns: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(2 + len(case.slots))]
    for tensor in case.tensors:
        param, grad, states = _values(tensor, case, generator)
        for k, values in enumerate([param, grad, *states.values()]):
            columns[k].append(place(values, tensor.layouts[min(k, 2)], dtypes[min(k, 2)], device))
    params, grads, *states = [[tensor for _, tensor in column] for column in columns]
    rows = [case.hyper(row) for row in range(len(case.records))]
    lrs = []
    for index, row in enumerate(rows if case.lr_tensor else []):
        lrs.append(torch.tensor(row["lr"], dtype=getattr(torch, case.lr_tensor or ""), device=device))
        row.update(lr_tensor=index, lr=123.0)  # a kernel that reads the number is far off

    def scalar(value: float | None) -> Tensor | None:
        return None if value is None else torch.tensor(value, device=device)

    groups = sum(group_count(tensor) for tensor in case.tensors)
    return Call(
        rule=case.rule,
        params=params,
        grads=grads,
        states=[tensor for column in states for tensor in column],
        steps=[torch.tensor(float(tensor.t - 1), device=device) for tensor in case.tensors],
        hyper=[value for row in rows for value in row.values()],
        groups=[tensor.row for tensor in case.tensors],
        axes=[mask_of(tensor.axis, len(tensor.shape)) for tensor in case.tensors],
        fresh=[i for i, tensor in enumerate(case.tensors) if tensor.fresh],
        lrs=lrs,
        grad_scale=scalar(case.grad_scale),
        found_inf=scalar(case.found_inf),
        measured=torch.full((groups, len(MEASURED)), math.nan, device=device) if case.measured else None,
        case=case,
        buffers=[pair for column in columns for pair in column],
    )


# ---- the list -------------------------------------------------------------------------------------------------------

SHAPES_CONV = [(64, 3, 7, 7), (8, 16, 3, 3), (5, 7, 3, 3), (12, 10, 1, 1), (16, 1, 3, 3)]
SHAPES_CONV3D = [(4, 3, 2, 3, 3), (6, 5, 1, 1, 1)]
SHAPES_SMALL = [(13, 29), (3, 0), (0, 3), (1, 1), (1, 31), (31, 1)]
SHAPES_LARGE = [(300, 200), (40, 5000), (8195, 5)]
SHAPES_EDGE = [(9, 15), (9, 16), (9, 17), (5, 127), (5, 128), (5, 129), (37, 1021)]
SHAPES_LONG = [(2, 16383), (2, 16384), (2, 16385), (2, 32767), (2, 32768), (2, 32769), (2, 70001), (1, 70001)]
# Groups in columns, of matrices too tall for a tile: what is summed is far apart in memory.
COLUMNS = [
    ((950, 20), (0,)),
    ((950, 70), (0,)),
    ((2, 950, 17), (1,)),
    ((3700, 6), (0,)),
    ((3700, 65), (0,)),
    ((950, 1), (0,)),
]
SHAPES_1D = [(), (1,), (0,), (2,), (17,), (8191,)]
SHAPES_3D = [(7, 11, 13), (3, 1, 9), (2, 0, 4)]

PROJECTIONS: dict[str, dict[str, float]] = {
    "rescale": {"every": 1},
    "none": {},
    "shrink": {"rate": 0.4},
    "every3": {"every": 3, "target": 0.7},
    "rescale2.5": {"every": 1, "target": 2.5},
    "shrink.5": {"rate": 0.9, "power": 0.5},
    "both3": {"every": 3, "rate": 0.7},
    "shrink0": {"rate": 0.7, "power": 0},
    "window.in": {"every": 1, "start": 3, "stop": 4, "target": 1.3},
    "shrink2": {"rate": 0.6, "power": 2},
    "window.out": {"every": 1, "start": 1, "stop": 3},
    "window.early": {"every": 1, "start": 4},
    "both2": {"every": 2, "rate": 0.7},  # steps 1 and 3 shrink
    "shrink-1": {"rate": 0.2, "power": -1},
    "shrink.all": {"rate": 1e6},
}


def axes_for(shape: tuple[int, ...]) -> list[Axis]:
    """Every kind of axis that a shape has."""
    if len(shape) < 2:
        return [None, "tensor", *([(0,)] if shape else [])]
    axes: list[Axis] = ["out", "in", "tensor", (0,), (-1,), None]
    if len(shape) >= 3:
        axes += [(0, 2), (-1, -2)]
    if len(shape) == 4:
        axes += [(0, 2, 3), (1, 3), (0, 1, 2, 3)]
    return axes


class _Deck(Generic[Card]):
    """Deals its cards evenly: shuffled anew (from a fixed seed) whenever all have been dealt."""

    def __init__(self, cards: Iterable[Card]) -> None:
        self.cards, self.stack, self.random = list(cards), [], random.Random(2024)

    def deal(self, allowed: Callable[[Card], bool] = lambda _: True) -> Card:
        while True:
            if not self.stack:
                self.stack = self.random.sample(self.cards, len(self.cards))
            card = self.stack.pop()
            if allowed(card):
                return card


def _fits(layout: str, shape: tuple[int, ...]) -> bool:
    return layout != "cl" or len(shape) in (4, 5)


def _make_cases() -> list[Case]:
    some_dtypes, some_options, some_projections = _Deck(DTYPES), _Deck(OPTIONS), _Deck(PROJECTIONS)
    some_shapes = _Deck(SHAPES_CONV + SHAPES_CONV3D + SHAPES_EDGE + SHAPES_1D + SHAPES_3D + SHAPES_SMALL)
    some_layouts = _Deck(["c", "off", "cl", "gap", "c", "tr", "odd", "cl", "two"])
    some_axes = _Deck(range(11))
    some_steps = _Deck([3, 1, 3, 6, 2, 3, 1000])
    cases: list[Case] = []

    def layouts(shape: tuple[int, ...]) -> tuple[str, str, str]:
        first, second, third = (some_layouts.deal(lambda layout: _fits(layout, shape)) for _ in range(3))
        return first, second, third

    def tensor(shape: tuple[int, ...] | None = None, **more: Any) -> TensorCase:
        shape = some_shapes.deal() if shape is None else shape
        axes = axes_for(shape)
        axis = axes[some_axes.deal() % len(axes)]
        dealt: dict[str, Any] = {"axis": axis, "layouts": layouts(shape), "t": some_steps.deal()}
        return TensorCase(shape, **(dealt | more))

    def add(theme: str, option: str | None, tensors: list[TensorCase], project: str | None = None, **more: Any) -> None:
        project = project or some_projections.deal()
        numbers = PROJECTIONS[project] | more.pop("numbers", {})
        filled = {"dtypes": more.get("dtypes") or some_dtypes.deal(), "records": (tuple(numbers.items()),)} | more
        filled["tags"] = "-".join(filter(None, [project, more.get("tags", "")]))
        cases.append(Case(theme, option or some_options.deal(), tuple(tensors), **filled))

    # Every option with every dtype triple, on short lists of mixed tensors.
    for option in OPTIONS:
        for dtypes in DTYPES:
            add("option", option, [tensor(), tensor(), tensor()], dtypes=dtypes)

    # Every shape with every axis. Long rows come in one layout: their strides are swept below.
    for shape in SHAPES_CONV + SHAPES_CONV3D + SHAPES_EDGE + SHAPES_SMALL + SHAPES_LARGE + SHAPES_1D + SHAPES_3D:
        for axis in axes_for(shape):
            add("shape", None, [tensor(shape, axis=axis)])
    for k, shape in enumerate(SHAPES_LONG):
        for axis in ("out", ["tensor", (0,), "in"][k % 3]):
            layout = ["c", "off", "c", "gap"][k % 4]
            data = "const" if k % 3 == 1 else "plain"
            add("long", None, [tensor(shape, axis=axis, layouts=(layout, "c", layout), data=data, t=3)], "rescale")

    for shape, axis in COLUMNS:
        for project in ("rescale", "shrink", "both2"):
            for lie in (("c", "c", "c"), ("off", "c", "off")):
                add("columns", None, [tensor(shape, axis=axis, layouts=lie)], project, measured=len(cases) % 3 < 2)

    # Every layout of the parameter with every layout of the gradient.
    for shape, names in (((5, 7, 3, 3), LAYOUTS), ((13, 29), LAYOUTS), ((12, 10, 1, 1), ("c", "cl", "odd"))):
        fitting = [name for name in names if _fits(name, shape)]
        for first in fitting:
            for k, second in enumerate(fitting):
                third = fitting[(k + fitting.index(first)) % len(fitting)]
                axis = ("out", "in", "tensor")[some_axes.deal() % 3]
                add("layout", None, [tensor(shape, axis=axis, layouts=(first, second, third))])

    # Every projection in SGD and Adam, in channels_last and contiguous, in one pass and in two.
    for name in PROJECTIONS:
        for option, layout in (("sgd.nesterov.wd", "c"), ("adamw", "cl")):
            same = (layout, layout, layout)
            convs = [TensorCase((6, 8, 3, 3), axis, same) for axis in ("out", "in", "tensor")]
            add("project", option, [*convs, TensorCase((7, 9), (0,)), TensorCase((11,), None)], name)

    # Data that tests the exceptions: zeros, NaN, infinities, extreme norms, constant rows.
    for data in DATA:
        extreme = data in ("tiny", "huge")  # only a step that scales with the gradient; beyond the range of fp16
        options = [name for name in OPTIONS if not extreme or name.startswith("sgd")]
        triples = [names for names in DTYPES if not extreme or "float16" not in names]
        for k, axis in enumerate(("out", "in", "tensor", (0,))):
            for project in ("rescale", "shrink", "shrink-1")[: 3 if data == "zero_before" else 2]:
                tensors = [tensor(shape, axis=axis, data=data) for shape in ((6, 5, 3, 3), (9, 33))]
                dtypes = triples[(k + len(cases)) % len(triples)]
                add("data", options[len(cases) % len(options)], tensors, project, dtypes=dtypes)

    # The arguments of a call.
    for option, k in (("sgd.all", 0), ("adamw.ams", 1), ("adam.wd", 3), ("sgd.mom", 4)):
        variants: list[tuple[str, str, dict[str, Any]]] = [
            ("rescale", "unmeasured", {"measured": False}),
            ("rescale", "scale1024", {"grad_scale": 1024.0}),
            ("rescale", "scale3", {"grad_scale": 3.0}),
            *(("rescale", f"found{n}", {"grad_scale": 8.0, "found_inf": float(n)}) for n in range(3)),
            ("none", "found2", {"found_inf": 2.0}),
        ]
        for kind in (None, "float32", "float64"):
            variants.append(("both2", f"lr.{kind}", {"lr_tensor": kind}))
            at_rest: dict[str, Any] = {"lr_tensor": kind, "numbers": {"lr": 0.0}}
            variants += [(project, f"lr0.{kind}", at_rest) for project in ("rescale", "shrink", "shrink0")]
        for project, tags, more in variants:
            tensors = [tensor(), tensor((13, 29), axis="out"), tensor((40, 50)), TensorCase((0,), None)]
            add("call", option, tensors, project, tags=tags, dtypes=DTYPES[k], **more)
    for option in ("sgd.mom", "sgd.mom.damp", "sgd.nesterov", "sgd.nesterov.wd", "sgd.all"):
        for k in (0, 3):
            tensors = [tensor(t=1), tensor(t=5, fresh=True), tensor(t=5), tensor((13, 29), t=2, fresh=True)]
            add("fresh", option, tensors, dtypes=DTYPES[k])

    # Lists: many tensors, several records, nothing at all in places.
    nothing, some = TensorCase((0,), None), TensorCase((3, 0), "out")
    lists = {
        "empty.last": [tensor(), tensor((13, 29)), nothing],
        "empty.first": [some, nothing, tensor((8, 16, 3, 3))],
        "empty.all": [nothing, some, TensorCase((0, 4), (0,))],
        "steps": [tensor((5, 7), t=t) for t in (1, 2, 3, 4, 6, 100000)],
        "tiny100": [tensor((k % 7 + 1, k % 5 + 1)) for k in range(100)],
    }
    lrs = ((("lr", 0.01), ("every", 1)), (("lr", 0.002), ("rate", 2.0)), (("lr", 0.03), ("every", 3), ("target", 2)))
    for option, dtypes in (("sgd.mom.wd", DTYPES[0]), ("adamw", DTYPES[2]), ("adam.ams.max", DTYPES[5])):
        for name, tensors in lists.items():
            add("list", option, tensors, "both3", dtypes=dtypes, tags=name)
        mixed = [tensor(row=k % 3) for k in range(30)]
        add("list", option, [*mixed, tensor((2, 16385), row=1)], dtypes=dtypes, records=lrs, tags="records")
        add("list", option, mixed[:5], dtypes=dtypes, records=lrs, lr_tensor="float32", tags="records.lrs")

    # An infinite norm comes only from a step that scales with the gradient.
    for dtypes in (DTYPES[0], DTYPES[3]):
        tensors = [tensor((6, 5, 3, 3), axis=axis, data="inf") for axis in ("out", "in", "tensor")]
        add("data", "sgd.mom", tensors, "rescale", dtypes=dtypes)
    _add_gated(add, tensor)
    _add_shifted(add, tensor)
    _add_projected(add, tensor)
    return cases


def _add_gated(add: Callable[..., None], tensor: Callable[..., TensorCase]) -> None:
    """The rules with a gate: rows of dimension 0 are looked at, whatever the norm groups are."""
    some_gated, some_dtypes, some_measured = _Deck(GATED), _Deck(DTYPES), _Deck((True, False))

    def gated(theme: str, tensors: list[TensorCase], option: str | None = None, project: str | None = None,
              **more: Any) -> None:  # fmt: skip
        option = option or some_gated.deal()
        add(theme, option, tensors, project, **({"dtypes": some_dtypes.deal()} | more))

    for option in GATED:
        for k, dtypes in enumerate(DTYPES):
            shapes = [tensor(((8, 16, 3, 3), (13, 29))[k % 2]), tensor()]
            gated("gate", shapes, option, dtypes=dtypes, measured=some_measured.deal())
    for option in ("adamp.some", "sgdp.some"):  # gates of every kind in fp64 too
        for k in range(2):
            gated("gate", [tensor((9, 8 * k + 30)), tensor((7, 40, k + 1)), tensor((12, 50))], option, dtypes=DTYPES[1])
    for k, shape in enumerate(SHAPES_CONV + SHAPES_CONV3D + SHAPES_EDGE + SHAPES_SMALL + SHAPES_1D + SHAPES_3D):
        gated("gate", [tensor(shape)], measured=k % 2 == 0)
    for shape in SHAPES_LARGE:
        for axis in ("out", "tensor", (0,)):
            gated("gate", [tensor(shape, axis=axis)])
    for shape in ((5, 7, 3, 3), (13, 29)):
        for first in filter(lambda layout: _fits(layout, shape), LAYOUTS):
            for second, axis in (("c", "in"), ("tr", "out")):
                gated("gate", [tensor(shape, axis=axis, layouts=(first, second, first))])
    for k, shape in enumerate(SHAPES_LONG):
        long = tensor(shape, axis=("out", "tensor", None, (0,))[k % 4], layouts=(("c", "off")[k % 2],) * 3)
        gated("gate", [long], ("adamp.open", "sgdp.open")[k % 2], dtypes=DTYPES[k % 3])
    for k, (shape, axis) in enumerate(COLUMNS):
        gated("gate", [tensor(shape, axis=axis, layouts=("c",) * 3)], project="rescale", measured=False)
        gated("gate", [tensor(shape, axis=axis, layouts=("tr",) * 3)], dtypes=DTYPES[k % 3])
    for k, data in enumerate(DATA):
        extreme = data in ("tiny", "huge")  # as above; and a norm below eps has no gate of its own
        dtypes = [names for names in DTYPES if not extreme or names[0] in ("float32", "float64")]
        for option in ("sgdp.open", "sgdp.some") if extreme else ("adamp.open", "sgdp.open", "adamp.some"):
            pair = [tensor(shape, data=data) for shape in ((6, 5, 3, 3), (9, 33))]
            gated("gate", pair, option, dtypes=dtypes[(k + 1) % len(dtypes)])
    for option, k in (("adamp.open", 3), ("adamp.nesterov", 0), ("sgdp.open", 5), ("sgdp.nesterov", 4)):
        variants: list[tuple[str, str, dict[str, Any]]] = [
            ("rescale", "scale3", {"grad_scale": 3.0}),
            ("rescale", "scale1024", {"grad_scale": 1024.0, "measured": False}),
            ("rescale", "found1", {"grad_scale": 8.0, "found_inf": 1.0}),
            ("both2", "lr.float32", {"lr_tensor": "float32"}),
            ("shrink", "lr0.float64", {"lr_tensor": "float64", "numbers": {"lr": 0.0}}),
        ]
        for project, tags, more in variants:
            tensors = [tensor(), tensor((13, 29), axis="out"), tensor((40, 50)), TensorCase((0,), None)]
            gated("gate", tensors, option, project, tags=tags, dtypes=DTYPES[k], **more)
    rows = ((("delta", 6.0), ("every", 1)), (("delta", 0.0), ("rate", 2.0)), (("nesterov", 1), ("delta", 0.9)))
    for option in ("adamp", "sgdp"):
        mixed = [tensor(row=k % 3) for k in range(30)]
        gated("gate", [*mixed, tensor((2, 16385), row=0)], option, records=rows, grad_scale=2.0, tags="records")
        gated("gate", [tensor((k % 7 + 1, k % 5 + 1)) for k in range(30)], option, tags="tiny30")
        gated("gate", [TensorCase((3, 0), "out"), TensorCase((0, 4), (0,)), TensorCase((), None)], option, tags="empty")


def _add_shifted(add: Callable[..., None], tensor: Callable[..., TensorCase]) -> None:
    """SGD with a shifted L2 term: channels are looked at, whatever the norm groups are."""
    some_shifted, some_dtypes, some_measured = _Deck(SHIFTED), _Deck(DTYPES), _Deck((True, False))

    def shifted(tensors: list[TensorCase], option: str | None = None, project: str | None = None, **more: Any) -> None:
        option = option or some_shifted.deal(lambda name: name != "shifted.lam0")
        add("shift", option, tensors, project, **({"dtypes": some_dtypes.deal()} | more))

    for option in SHIFTED:
        for k, dtypes in enumerate(DTYPES):
            shapes = [tensor(((8, 16, 3, 3), (13, 29))[k % 2]), tensor()]
            shifted(shapes, option, dtypes=dtypes, measured=some_measured.deal())
    for k, shape in enumerate(SHAPES_CONV + SHAPES_CONV3D + SHAPES_EDGE + SHAPES_SMALL + SHAPES_1D + SHAPES_3D):
        shifted([tensor(shape)], measured=k % 2 == 0)
    for shape in SHAPES_LARGE:
        for axis in ("out", "tensor", (0,)):
            shifted([tensor(shape, axis=axis)])
    for shape in ((5, 7, 3, 3), (13, 29)):
        for first in filter(lambda layout: _fits(layout, shape), LAYOUTS):
            for second, axis in (("c", "in"), ("tr", "out")):
                shifted([tensor(shape, axis=axis, layouts=(first, second, first))])
    for k, shape in enumerate(SHAPES_LONG):
        long = tensor(shape, axis=("out", "tensor", None, (0,))[k % 4], layouts=(("c", "off")[k % 2],) * 3)
        shifted([long], dtypes=DTYPES[k % 3])
    for k, (shape, axis) in enumerate(COLUMNS):
        shifted([tensor(shape, axis=axis, layouts=("c",) * 3)], project="rescale", measured=False)
        shifted([tensor(shape, axis=axis, layouts=("tr",) * 3)], dtypes=DTYPES[k % 3])
    for k, data in enumerate(DATA):
        extreme = data in ("tiny", "huge")
        dtypes = [names for names in DTYPES if not extreme or names[0] in ("float32", "float64")]
        for option in ("shifted.mom", "shifted.nesterov"):
            pair = [tensor(shape, data=data) for shape in ((6, 5, 3, 3), (9, 33))]
            shifted(pair, option, dtypes=dtypes[(k + 1) % len(dtypes)])
    for k, shape in enumerate(
        ((8, 700), (8, 70, 3, 3), (700, 8), (2, 16385), (4100, 2))
    ):  # large enough to be no crowd
        for option, layout in (("shifted", "c"), ("shifted.all", "tr")):
            near = tensor(shape, axis="out", data="narrow", layouts=(layout, "c", layout))
            shifted([near], option, dtypes=DTYPES[(k, 0)[k % 2]])
    for option, k in (("shifted.mom", 3), ("shifted.all", 0), ("shifted", 5), ("shifted.nesterov", 4)):
        variants: list[tuple[str, str, dict[str, Any]]] = [
            ("rescale", "scale3", {"grad_scale": 3.0}),
            ("rescale", "scale1024", {"grad_scale": 1024.0, "measured": False}),
            ("rescale", "found1", {"grad_scale": 8.0, "found_inf": 1.0}),
            ("both2", "lr.float32", {"lr_tensor": "float32"}),
            ("shrink", "lr0.float64", {"lr_tensor": "float64", "numbers": {"lr": 0.0}}),
        ]
        for project, tags, more in variants:
            tensors = [tensor(), tensor((13, 29), axis="out"), tensor((40, 50)), TensorCase((0,), None)]
            shifted(tensors, option, project, tags=tags, dtypes=DTYPES[k], **more)
    for k in (0, 3):
        tensors = [tensor(t=1), tensor(t=5, fresh=True), tensor(t=5), tensor((13, 29), t=2, fresh=True)]
        shifted(tensors, "shifted.mom", dtypes=DTYPES[k])
    rows = (
        (("shifted_l2_eps", 0.7), ("every", 1)),
        (("shifted_l2_lam", 0.0), ("rate", 2.0)),
        (("nesterov", 1), ("dampening", 0.2)),
    )
    mixed = [tensor(row=k % 3) for k in range(30)]
    shifted([*mixed, tensor((2, 16385), row=0)], "shifted.mom", records=rows, grad_scale=2.0, tags="records")
    shifted([tensor((k % 7 + 1, k % 5 + 1)) for k in range(30)], "shifted.all", tags="tiny30")
    empty = [TensorCase((3, 0), "out"), TensorCase((0, 4), (0,)), TensorCase((), None)]
    shifted(empty, "shifted", tags="empty")
    shifted([tensor((9, 33), data="nan_w")], "shifted.lam0", dtypes=DTYPES[0])  # a shift by nothing is none


def _add_projected(add: Callable[..., None], tensor: Callable[..., TensorCase]) -> None:
    """The rule without an update: each way to project, or none, in one pass and in two."""
    some_dtypes, some_measured, some_options = _Deck(DTYPES), _Deck((True, False)), _Deck(PROJECTED)

    def projected(tensors: list[TensorCase], project: str | None = None, **more: Any) -> None:
        dealt = {"dtypes": some_dtypes.deal(), "measured": some_measured.deal()}
        add("idle", some_options.deal(), tensors, project, **(dealt | more))

    for name in PROJECTIONS:
        projected([tensor((8, 16, 3, 3)), tensor((13, 29)), tensor()], name)
    for dtypes in DTYPES:
        projected([tensor((8, 16, 3, 3)), tensor((13, 29)), tensor()], "rescale", dtypes=dtypes, measured=False)
    for shape in SHAPES_CONV + SHAPES_EDGE + SHAPES_SMALL + SHAPES_LARGE + SHAPES_1D + SHAPES_3D:
        projected([tensor(shape)])
    for k, shape in enumerate(SHAPES_LONG):
        layout = ["c", "off", "tr"][k % 3]
        long = tensor(shape, axis=("out", "tensor", (0,))[k % 3], layouts=(layout, "c", layout))
        projected([long], ("rescale", "shrink", "every3")[k % 3], dtypes=DTYPES[k % 2])
    for k, (shape, axis) in enumerate(COLUMNS):
        projected([tensor(shape, axis=axis, layouts=(("c", "off", "tr")[k % 3],) * 3)], "rescale")
    for layout in LAYOUTS:
        projected([tensor((5, 7, 3, 3), axis="in", layouts=(layout, "c", "c"))], "rescale")
    for data in ("sparse", "const", "zero_row", "nan_w"):
        projected([tensor(shape, data=data) for shape in ((6, 5, 3, 3), (9, 33))], "rescale")
    for more in ({"found_inf": 1.0}, {"lr_tensor": "float64"}, {"lr_tensor": "float32", "numbers": {"lr": 0.0}}):
        projected([tensor(), tensor((13, 29), axis="out"), tensor((40, 50)), TensorCase((0,), None)], "rescale", **more)


CASES: list[Case] = _make_cases()


def select(max_elements: int | None = None, *, every: int = 1, rules: tuple[str, ...] = tuple(RULES)) -> list[Case]:
    """The cases of at most ``max_elements`` elements (None: all), or each ``every``-th of them, for slow lanes."""
    fitting = [case for case in CASES if max_elements is None or case.numel <= max_elements]
    return [case for case in fitting if case.rule in rules][::every]
