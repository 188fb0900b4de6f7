"""What hypothesis draws the lives of ``life.py`` from: all rules, options, dtypes, layouts and shapes."""

from __future__ import annotations

import functools
import math
from typing import Any

from calls import LAYOUTS
from cases import DTYPES, axes_for
from hypothesis import strategies as st
from life import (
    SIZES,
    Action,
    Add,
    Bad,
    Change,
    Copy,
    Grad,
    Group,
    Life,
    Options,
    Rebind,
    Reload,
    Scalar,
    Step,
    Watch,
    Weight,
    ZeroGrad,
)  # fmt: skip

from fastwrs import Rescale, Shrink

FAR = "SGD far from 1"
"""SGD with weights and gradients near 1e-9, for a step that scales with them: not with a shift by an eps."""
KINDS = ("SGD", "Adam", "AdamW", "AdamP", FAR, "SGDP")
SHAPES = [(), (1,), (2,), (17,), (0,), (1, 1), (1, 31), (31, 1), (13, 29), (3, 0), (0, 3), (9, 17), (5, 7, 3, 3)]
SHAPES += [(12, 10, 1, 1), (16, 1, 3, 3), (7, 11, 13), (3, 1, 9), (2, 0, 4), (37, 41)]
LARGE = [(2, 16385), (950, 20), (3, 2, 950)]
"""Rows and columns that no tile holds."""
MOST = 2000  # elements of other tensors
OUT_OF_PLACE = Rescale(axis=9)

layouts = st.sampled_from(list(LAYOUTS))
flags = st.booleans()


def near(low: float, high: float, *named: float) -> st.SearchStrategy[float]:
    """One of the numbers, or one between, of which none is all but 0."""
    between = st.floats(low or 1e-3, high).map(lambda value: float(f"{value:.4g}"))
    return st.sampled_from(named) | between if named else between


@functools.cache
def many(strategy: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(strategy, min_size=1, max_size=most)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    kind = draw(st.integers(0, 39))
    if kind == 39:
        return draw(st.sampled_from(LARGE))
    if kind >= 20:
        return draw(st.sampled_from(SHAPES))
    shape = list(draw(sizes_of_lists))
    while math.prod(shape) > MOST:
        shape[shape.index(max(shape))] //= 2
    return tuple(shape)


some_shapes = shapes()
sizes_of_lists = st.lists(st.sampled_from([3, 1, 2, 5, 8, 13, 16, 31, 64, 128, 129]), min_size=1, max_size=4)


@functools.cache  # here and below: a strategy is checked once
@st.composite
def weights(draw: st.DrawFn, kind: str, short: bool) -> Weight:
    """A parameter; ``short`` if its states are to be in bf16."""
    triples = [(param, grad) for param, grad, state in DTYPES if not short or state == "bfloat16"]
    shape = draw(some_shapes)
    if math.prod(shape) > MOST:
        # In two phases the norm is that of the stored value: in 16 bits one more rounding, of which no tolerance knows.
        triples = [(param, grad) for param, grad in triples if param in ("float32", "float64")]
        triples, shape = (triples, shape) if triples else ([("bfloat16", "bfloat16")], (37, 41))
    dtype, grad = draw(st.sampled_from(triples))
    sizes = [1.0] if kind != FAR or dtype == "float16" else [1.0, 1e-9]
    return Weight(
        shape,
        dtype,
        None if grad == dtype else grad,
        draw(layouts),
        draw(st.sampled_from(["plain", "plain", "sparse", "const", "zero_row"])),
        draw(st.sampled_from(sizes)),
    )


def axes_of(many: list[tuple[int, ...]]) -> tuple[Any, ...]:
    """The axes that all of these shapes have."""
    common = [axis for axis in axes_for(many[0]) if axis is not None]
    for shape in many[1:]:
        common = [axis for axis in common if axis in axes_for(shape)]
    return tuple(common)


windows = st.sampled_from([(0, None), (0, None), (0, 3), (2, None), (2, 3), (3, 6)])
rhythms, targets, shares = st.sampled_from([1, 1, 2, 3]), near(0.1, 10, 1.0), near(0, 2, 0.0, 1e6)
powers = st.sampled_from([1.0, 0.0, 0.5, 2.0, -1.0])
chosen = st.sampled_from(["rescale", "shrink", "rescale", "both", "neither"])


@functools.cache
@st.composite
def controls(draw: st.DrawFn, axes: tuple[Any, ...]) -> Options:
    """``rescale`` and ``shrink``, with one axis."""
    axis = draw(st.sampled_from(axes))
    start, stop = draw(windows)
    rescale = Rescale(draw(rhythms), axis, draw(targets), start, stop)
    shrink = Shrink(draw(shares), axis, draw(powers))
    which = draw(chosen)
    return {
        "rescale": rescale if which in ("rescale", "both") else None,
        "shrink": shrink if which in ("shrink", "both") else None,
    }


rates = near(1e-5, 0.1, 0.05, 0.0) | st.builds(
    Scalar, near(1e-5, 0.1, 0.0), st.sampled_from(["float32", "float64", "bfloat16"]), st.sampled_from([(), (1,)])
)
betas = st.tuples(near(0, 0.99, 0.9, 0.0), near(0, 0.9999, 0.999, 0.5)) | st.builds(
    lambda first, second: (Scalar(first), Scalar(second)), near(0, 0.99), near(0, 0.999)
)
ANY: dict[str, Any] = {
    "lr": rates,
    "weight_decay": near(0, 0.3, 0.0),
    "maximize": flags,
    "foreach": st.none() | flags,
    "fused": st.none() | flags,
}
GATE: dict[str, Any] = {
    "eps": near(1e-8, 1e-3),
    "delta": near(0, 8, 0.1, 6.0, 0.9, -1.0),
    "wd_ratio": near(0, 1, 0.1),
    "nesterov": flags,
}
ADAM: dict[str, Any] = {"betas": betas, "eps": near(1e-8, 1e-3, 1e-8), "amsgrad": flags, "capturable": flags}
MOMENTUM: dict[str, Any] = {"momentum": near(0, 0.99, 0.9, 0.0), "dampening": near(0, 0.9, 0.0)}
nothing = st.none()
pairs = st.one_of(nothing, nothing, nothing, st.tuples(near(0, 1, 0.3, 0.0), near(0, 1, 0.1, 0.0)))
OWN: dict[str, dict[str, Any]] = {
    "SGD": {**MOMENTUM, "nesterov": flags, "shifted_l2": pairs},
    FAR: {**MOMENTUM, "nesterov": flags},
    "Adam": {**ADAM, "decoupled_weight_decay": flags},
    "AdamW": ADAM,
    "AdamP": {**GATE, "betas": betas},
    "SGDP": {**GATE, **MOMENTUM, "project_momentum": flags},
}
OPTIONS = {kind: st.fixed_dictionaries({}, optional=ANY | own) for kind, own in OWN.items()}

WRONG: dict[str, Any] = {
    "lr": [-0.1, math.nan, math.inf, "0.1", Scalar(-0.5), Scalar(0.1, shape=(2,))],
    "weight_decay": [-0.5, math.nan, "no", None],
    "maximize": [2],
    "differentiable": [True],
    "rescale": [True, Shrink(0.1), OUT_OF_PLACE],
    "shrink": [0.1, Shrink(0.1, axis=(0, 9))],
    "momentum": [-0.5, math.inf],
    "dampening": [math.nan],
    "nesterov": [2],
    "eps": [-1e-8],
    "betas": [(1.0, 0.9), (0.9,), 0.9, (0.9, Scalar(0.99)), (0.9, -0.1)],
    "delta": [math.nan],
    "wd_ratio": [-0.1],
    "project_momentum": [0.5],
    "shifted_l2": [0.1, (0.1,), (-0.1, 0.1), (0.1, math.nan)],
}


def wrong_for(kind: str) -> list[Options]:
    """Options that an optimizer of this kind has, with values that it refuses."""
    has = {*ANY, *OWN[kind], "rescale", "shrink", "differentiable"}
    return [{name: value} for name in sorted(has & WRONG.keys()) for value in WRONG[name]]


gradients = st.builds(
    Grad,
    st.sampled_from(["plain", "plain", "plain", "missing", "zero", "sparse", "kept", *SIZES]),
    st.sampled_from([*LAYOUTS, "expanded"]),
)
steps = st.builds(
    Step,
    st.lists(gradients, min_size=1, max_size=4).map(tuple),
    st.integers(0, 9999),
    st.sampled_from([None, None, 1024.0, 3.0, 0.5]),
    st.sampled_from([None, None, None, None, 0.0, 1.0, 2.0]),
    flags,
)


@functools.cache
@st.composite
def groups(draw: st.DrawFn, kind: str, short: bool) -> Group:
    inside = tuple(draw(many(weights(kind, short), 3)))
    options = draw(OPTIONS[kind])
    if draw(st.integers(0, 3)):
        options |= draw(controls(axes_of([weight.shape for weight in inside])))
    return Group(inside, options)


@functools.cache
def actions(kind: str, short: bool) -> st.SearchStrategy[Action]:
    return st.one_of(
        st.builds(Change, st.integers(0, 3), OPTIONS[kind]),
        st.builds(Change, st.integers(0, 3), controls(("out", "in", "tensor", (0,), (-1,), 1))),
        st.builds(Reload, flags, layouts, st.sampled_from([0, 0, 1, 1000])),
        st.builds(Copy, flags),
        st.builds(Add, groups(kind, short)),
        st.builds(ZeroGrad, flags),
        st.builds(Watch, st.sampled_from([1, 2, 3, None])),
        st.builds(Rebind, st.integers(0, 9), layouts),
        st.builds(Bad, st.sampled_from(["new", "add", "change", "load", "gradient"]), st.sampled_from(wrong_for(kind))),
    )


@functools.cache
def turns(kind: str, short: bool) -> st.SearchStrategy[list[tuple[Action | None, Step]]]:
    return st.lists(st.tuples(st.none() | actions(kind, short), steps), min_size=3, max_size=8)


kinds, shorts, names = st.sampled_from(KINDS), st.sampled_from([False] * 7 + [True]), st.booleans()


@st.composite
def lives(draw: st.DrawFn) -> Life:
    kind, short = draw(kinds), draw(shorts)
    first = tuple(draw(many(groups(kind, short), 2)))
    options = draw(OPTIONS[kind])
    if kind == "SGDP":
        options.setdefault("lr", 0.05)
    if kind in ("SGD", FAR) and options.get("nesterov"):
        options |= {"momentum": options.get("momentum") or 0.9, "dampening": 0.0}
    acts = tuple(action for turn in draw(turns(kind, short)) for action in turn if action is not None)
    return Life("SGD" if kind == FAR else kind, options, first, acts, draw(names), "bfloat16" if short else None)
