"""Lane `fuzz`: lives of an optimizer against the oracle, as many as FUZZ_CASES says, from the seed FUZZ_SEED on.

What fails is shrunk and printed as ``live(life=Life(...))``. That is a test once its names are imported, from ``fuzz``,
``life``, ``fastwrs`` and ``math``. To run the part again that said "seed 9":
``FUZZ_SEED=9 FUZZ_CASES=500 pytest -m fuzz -k lives``.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from typing import Any

import life as parts_of_lives
import pytest
import torch
from fuzz import live
from hypothesis import HealthCheck, Phase, given, seed, settings
from life import Change, Grad, Group, Life, Scalar, Step, Weight
from lives import lives

import fastwrs
from fastwrs import dispatch, library
from fastwrs.optim import checkpoint
from fastwrs.optim.records import Records
from fastwrs.plan import StepCall
from fastwrs.spec import RULES

pytestmark = pytest.mark.fuzz
CASES, SEED = int(os.environ.get("FUZZ_CASES", "2000")), int(os.environ.get("FUZZ_SEED", "8"))
PART = 500
"""The cases of one seed. The parts of a run have consecutive ones."""


@pytest.fixture(scope="module", autouse=True)
def _extension() -> None:
    library.load()


def hunt(cases: int, first: int, check: Callable[[Life], None] = live, shrink: bool = True) -> None:
    """Raises what the first failing life of so many raises, of a shrunk one with a note that shows it."""
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)

    def live(life: Life) -> None:  # the name that is printed
        check(life)

    every = settings(
        max_examples=cases,
        phases=phases,
        deadline=None,
        database=None,
        derandomize=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        report_multiple_bugs=False,
    )
    seed(first)(every(given(lives())(live)))()


@pytest.mark.parametrize("part", range(math.ceil(CASES / PART)))
def test_lives(part: int, capfd: pytest.CaptureFixture[str]) -> None:
    first, cases = SEED + part, min(PART, CASES - part * PART)
    lived: list[Life] = []

    def check(life: Life) -> None:
        lived.append(life)
        live(life)

    with capfd.disabled():  # the stream that a worker of pytest-xdist has from the start
        print(f"\nfuzz: {cases} cases with seed {first}", file=sys.stderr, flush=True)
    hunt(cases, first, check)
    assert len(lived) >= cases


# ---- what it can find -----------------------------------------------------------------------------------------------


def _with_calls(patch: pytest.MonkeyPatch, change: Callable[[StepCall], Any], after: bool = False) -> None:
    """Changes what the kernels get, or what they have left."""
    cpu = dispatch.choose("cpu")
    step = cpu.step

    def wrong(call: StepCall, dry_run: bool = False) -> None:
        if not after:
            change(call)
        step(call, dry_run)
        if after and not dry_run and not (call.found_inf is not None and bool(call.found_inf)):
            change(call)

    patch.setattr(cpu, "step", wrong)


def _hyper(name: str, factor: float) -> Callable[[StepCall], None]:
    def change(call: StepCall) -> None:
        names = [hyper.name for hyper in RULES[call.rule].record]
        if name in names:
            call.hyper = [
                value * factor if names[k % len(names)] == name else value for k, value in enumerate(call.hyper)
            ]

    return change


def _other_axes(call: StepCall) -> None:
    """Dimensions 0 and 1 take each other's places."""
    call.axes = [
        mask & ~3 | (mask & 1) << 1 | (mask & 2) >> 1 if mask > 0 and param.ndim >= 2 else mask
        for mask, param in zip(call.axes, call.params, strict=True)
    ]


def _one_group(call: StepCall) -> None:
    call.groups = [0] * len(call.groups)


def _not_skipped(call: StepCall) -> None:
    call.found_inf = None


def _not_counted(call: StepCall) -> None:
    call.steps[-1].sub_(1)


def _one_element(call: StepCall) -> None:
    if call.params[-1].numel():
        call.params[-1].view(-1)[-1:].mul_(1 + 4 * torch.finfo(call.params[-1].dtype).eps)


def _halved_in_files(patch: pytest.MonkeyPatch) -> None:
    moment = checkpoint._moment
    patch.setattr(checkpoint, "_moment", lambda *given: moment(*given).mul_(0.5))


def _options_read_once(patch: pytest.MonkeyPatch) -> None:
    refresh = Records.refresh
    patch.setattr(Records, "refresh", lambda self, *given: None if self.flat else refresh(self, *given))


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "beta2 a little off": lambda patch: _with_calls(patch, _hyper("beta2", 1 - 1e-4)),
    "twice the decay behind a gate": lambda patch: _with_calls(patch, _hyper("wd_ratio", 2)),
    "no weight decay": lambda patch: _with_calls(patch, _hyper("weight_decay", 0)),
    "the record of another group": lambda patch: _with_calls(patch, _one_group),
    "norms along another dimension": lambda patch: _with_calls(patch, _other_axes),
    "a step that is to be skipped is taken": lambda patch: _with_calls(patch, _not_skipped),
    "a step that is not counted": lambda patch: _with_calls(patch, _not_counted, after=True),
    "one element 4 ulps off": lambda patch: _with_calls(patch, _one_element, after=True),
    "options that changed are not seen": _options_read_once,
    "states halved by a checkpoint": _halved_in_files,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_finds(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[fault](monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)) as found:
        hunt(400, 1, shrink=False)
    if not isinstance(found.value, AssertionError):  # the op refuses what some faults make of a call
        assert str(found.value).startswith("fastwrs: ")


# ---- what is said of it ---------------------------------------------------------------------------------------------


def test_a_life_is_printed_as_the_code_that_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _with_calls(monkeypatch, _not_counted, after=True)
    with pytest.raises(AssertionError) as found:
        hunt(50, 1)
    (note,) = (note for note in getattr(found.value, "__notes__", ()) if "Life(" in note)
    code = note[note.index("live(") :]
    assert code.count("Weight(") == 1 and code.count("Grad(") <= 3, "it was not shrunk"
    names = {"live": live, **vars(parts_of_lives), **vars(fastwrs), "nan": math.nan, "inf": math.inf}
    with pytest.raises(AssertionError, match="steps were counted"):
        eval(code, names)
    monkeypatch.undo()
    eval(code, names)


def test_a_step_across_equal_weights_cancels_in_what_a_gate_removes() -> None:
    """Found by 20,000 lives from seed 8171002: 22 ulps of fp64, where the terms of the sum were not counted."""
    weight = Weight((32, 2, 2, 8), "float64", None, "tr", "const", 1.0)
    small = Weight((), "float32", None, "c", "plain", 1.0)
    steps = tuple(Step((Grad(data, "c"),), 0, None, None, False) for data in ("sparse", "plain", "plain"))
    rescaled: dict[str, Any] = {"rescale": fastwrs.Rescale(), "shrink": None}
    groups = Group((small, small), {}), Group((weight,), rescaled)
    live(Life("SGDP", {"eps": 0.001, "lr": 0.05}, groups, steps, named=False, state_dtype=None))


def test_weights_that_cancel_are_scaled_with_what_rounding_has_left() -> None:
    """Found by 20,000 lives from seed 12061101: 2,149 ulps, where terms counted as before the scaling."""
    weight = Weight((3, 3, 5, 32), "float32", None, "c", "plain", 1e-9)
    steps = tuple(
        Step((Grad(data, "c"),), k, None, None, False) for data, k in (("plain", 0), ("large", 1), ("plain", 0))
    )
    options = {"weight_decay": 0.0, "momentum": 0.9, "lr": Scalar(0.04063, "float32", ())}
    rescaled: dict[str, Any] = {"rescale": fastwrs.Rescale(start=2), "shrink": None}
    live(Life("SGD", {}, (Group((weight,), options | rescaled),), steps, named=False, state_dtype=None))


def test_powers_of_two_are_luck() -> None:
    """Found by the same: 2.4 ulps, where the formula loses nothing with betas of 1/2."""
    weight = Weight((37, 41), "float32", None, "c", "plain", 1.0)
    options = {"weight_decay": 0.0, "decoupled_weight_decay": False, "lr": 0.09375, "betas": (Scalar(0.5), Scalar(0.5))}
    steps = (Step((Grad("large", "c"),), 0, None, None, False),)
    live(Life("Adam", {}, (Group((weight,), options),), steps, named=False, state_dtype=None))


def test_a_gradient_that_cancels_the_decay_counts_as_it_is() -> None:
    """Found by the same: 2.9 ulps, which the formula loses on these numbers, and not on others near them."""
    weight = Weight((16, 3, 5), "float32", "bfloat16", "c", "const", 1.0)
    steps = (Step((Grad("plain", "c"),), 0, None, None, False),) * 3
    live(Life("Adam", {"weight_decay": 0.191}, (Group((weight,), {}),), steps, named=False, state_dtype=None))


def test_what_all_but_vanishes_in_a_shrink_is_a_difference() -> None:
    """Found by 20,000 lives from seed 22112026: 110 ulps, where the terms were shrunk with the weights."""
    weight, small = (Weight(shape, "float32", None, "c", "plain", 1.0) for shape in ((31, 3, 5), (3,)))
    step = Step((Grad("plain", "c"),), 0, None, None, False)
    shrunk = Change(0, {"rescale": None, "shrink": fastwrs.Shrink(rate=0.6289, axis="tensor", power=2.0)})
    group = Group((small, weight), {"lr": 0.05, "momentum": 0.9})
    live(Life("SGD", {}, (group,), (step, shrunk, step, step), named=False, state_dtype=None))


def test_norms_in_fp64_are_rounded_by_the_truth_too() -> None:
    """Found by 20,000 lives from seed 23112026: 4 ulps of fp64, where 3.1 were allowed after a rescale."""
    weight = Weight((2, 16385), "float64", None, "tr", "plain", 1.0)
    small = Weight((3, 3), "float32", None, "c", "plain", 1.0)
    steps = Step((Grad("plain", "c"),), 0, None, 1.0, False), Step((Grad("zero", "c"),), 0, None, None, False)
    rescaled: dict[str, Any] = {"rescale": fastwrs.Rescale(target=5.781), "shrink": None}
    live(Life("SGD", {}, (Group((weight, small), rescaled),), steps, named=False, state_dtype=None))


def test_factors_of_few_digits_are_luck() -> None:
    """Found by 20,000 lives from seed 24112026: 2.3 ulps, where a bf16 gradient times such a factor loses nothing."""
    sparse = Weight((3, 3), "float32", "bfloat16", "c", "sparse", 1.0)
    small = Weight((3,), "float32", None, "c", "plain", 1.0)
    options = {"betas": (Scalar(0.5), Scalar(0.5)), "eps": 1e-8, "lr": 0.05, "weight_decay": 0.0}
    steps = tuple(Step((Grad(data, "c"),), 0, None, None, False) for data in ("large", "plain", "plain"))
    live(Life("AdamW", options, (Group((sparse, small), {}),), steps, named=False, state_dtype=None))
