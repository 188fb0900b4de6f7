"""The checker is checked: it takes every correct step, and sees every fault that a kernel could have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tolerances
import torch
from authors import authors
from calls import LAYOUTS
from cases import (
    ALL_OPTIONS,
    CASES,
    DATA,
    DTYPES,
    GATED,
    NARROW,
    OPTIONS,
    PROJECTIONS,
    SHIFTED,
    Case,
    TensorCase,
    select,
)
from tolerances import Inputs, check, check_soon, snapshot, ulp
from torch import Tensor

pytestmark = pytest.mark.oracle

Outputs = dict[str, Tensor]
FULL = DTYPES[:2]  # a fault smaller than the rounding of a short type is no fault there


def formula(inputs: Inputs, source: Inputs | None = None) -> Outputs:
    """What the oracle's formula leaves, run in the compute type from ``source``, in the stored types of ``inputs``."""
    source = source or inputs
    result = source.run(torch.float64 if inputs.param.dtype == torch.float64 else torch.float32)
    found = {"param": result.param.to(inputs.param.dtype), "grad": result.grad.to(inputs.grad.dtype)}
    found |= {name: state.to(inputs.states[name].dtype) for name, state in result.states.items()}
    return found if result.measured is None else found | {"measured": result.measured.float()}


def one(option: str, dtypes: tuple[str, str, str] = DTYPES[0], project: str = "none", **tensor: Any) -> Inputs:
    """A step of one matrix."""
    shape = tensor.pop("shape", (13, 29))
    case = Case("one", option, (TensorCase(shape, **tensor),), dtypes, (tuple(PROJECTIONS[project].items()),))
    return snapshot(case.build())[0]


def rejects(inputs: Inputs, got: Outputs, what: str) -> None:
    for either in (check, check_soon):
        with pytest.raises(AssertionError, match=what):
            either(inputs, got)


@pytest.mark.parametrize("case", select(every=5), ids=lambda case: case.id)
def test_takes_the_formula(case: Case) -> None:
    for inputs in snapshot(case.build()):
        assert check(inputs, formula(inputs)) <= 1
        check_soon(inputs, formula(inputs))


@pytest.mark.parametrize("option", ["adamp", "sgdp"])
def test_takes_the_step_of_states_in_bf16_as_they_are_stored(option: str) -> None:
    """And knows by how much it differs from that of states in fp32, where steps are large and rows are enlarged."""
    inputs = one(option, DTYPES[3], "rescale2.5", t=1)
    inputs = replace(inputs, lr=50 * inputs.lr)
    result = inputs.run(torch.float32, stored=torch.bfloat16)
    got = {"param": result.param, **result.states}
    got = {name: tensor.bfloat16() for name, tensor in got.items()} | {"grad": inputs.grad}
    assert not torch.equal(got["param"], inputs.run(torch.float32).param.bfloat16())
    assert check(inputs, got) <= 1
    check_soon(inputs, got)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtypes", FULL, ids="-".join)
def test_takes_another_correct_order_of_operations(option: str, dtypes: tuple[str, str, str]) -> None:
    """The step of torch.optim uses lerp, folds the bias correction into the step size, and rounds elsewhere."""
    inputs = one(option, dtypes, axis=None)
    got = {"param": inputs.param.clone(), "grad": inputs.grad}
    got |= {name: state.clone() for name, state in inputs.states.items()}
    h, g = inputs.hyper, -inputs.grad if inputs.hyper["maximize"] else inputs.grad
    if not h.get("decoupled_weight_decay"):
        g = g.add(inputs.param, alpha=h["weight_decay"])
    if inputs.rule == "sgd":
        if "momentum_buffer" in got:
            buf = got["momentum_buffer"].mul_(h["momentum"]).add_(g, alpha=1 - h["dampening"])
            g = g.add(buf, alpha=h["momentum"]) if h["nesterov"] else buf
        got["param"].add_(g, alpha=-h["lr"])
    else:
        if h["decoupled_weight_decay"]:
            got["param"].mul_(1 - h["lr"] * h["weight_decay"])
        got["exp_avg"].lerp_(g, 1 - h["beta1"])
        v = got["exp_avg_sq"].mul_(h["beta2"]).addcmul_(g, g, value=1 - h["beta2"])
        if "max_exp_avg_sq" in got:
            v = torch.maximum(got["max_exp_avg_sq"], v, out=got["max_exp_avg_sq"])
        denominator = (v.sqrt() / math.sqrt(1 - h["beta2"] ** inputs.t)).add_(h["eps"])
        got["param"].addcdiv_(got["exp_avg"], denominator, value=-h["lr"] / (1 - h["beta1"] ** inputs.t))
    assert 0 < check(inputs, got) <= 1


@pytest.mark.parametrize("option", GATED)
@pytest.mark.parametrize("dtypes", FULL, ids="-".join)
def test_takes_the_step_of_the_authors(option: str, dtypes: tuple[str, str, str]) -> None:
    """Their AdamP and SGDP take means where we take sums, and divide weights by their norm before they multiply."""
    inputs = one(option, dtypes, axis=None)
    h, param = inputs.hyper, torch.nn.Parameter(inputs.param.clone())
    param.grad = -inputs.grad if h["maximize"] else inputs.grad.clone()
    names = ("lr", "eps", "weight_decay", "delta", "wd_ratio", "nesterov")
    options: dict[str, Any] = {name: h[name] for name in names}
    states = {name: state.clone() for name, state in inputs.states.items()}
    if inputs.rule == "adamp":
        optimizer = authors("AdamP")([param], **options, betas=(h["beta1"], h["beta2"]))
        optimizer.state[param] = {**states, "step": inputs.t - 1}
    else:
        kind = authors("SGDP", clones=not h["project_momentum"])
        optimizer = kind([param], **options, momentum=h["momentum"], dampening=h["dampening"])
        optimizer.state[param] = {"momentum": states["momentum_buffer"]}
    optimizer.step()
    assert 0 < check(inputs, {"param": param.detach(), "grad": inputs.grad, **states}) <= 1


@pytest.mark.parametrize("option", [name for name in SHIFTED if name != "shifted.lam0"])
@pytest.mark.parametrize("dtypes", FULL, ids="-".join)
def test_takes_another_shift(option: str, dtypes: tuple[str, str, str]) -> None:
    """With torch's deviation, and lam * mu taken out of the bracket."""
    inputs = one(option, dtypes, axis=None)
    h, w = inputs.hyper, inputs.param
    slope = h["shifted_l2_lam"] - h["shifted_l2_lam"] * h["shifted_l2_eps"] / w.std(dim=1, keepdim=True)
    term = slope * (w - w.mean(dim=1, keepdim=True)) + h["shifted_l2_lam"] * w.mean(dim=1, keepdim=True)
    param = torch.nn.Parameter(w.clone())
    param.grad = inputs.grad + (-term if h["maximize"] else term)
    names = ("lr", "momentum", "dampening", "weight_decay")
    flags = {"nesterov": bool(h["nesterov"]), "maximize": bool(h["maximize"])}
    optimizer = torch.optim.SGD([param], **{name: h[name] for name in names}, **flags, foreach=False)
    states = {name: state.clone() for name, state in inputs.states.items()}
    optimizer.state[param] = dict(states)
    optimizer.step()
    assert 0 < check(inputs, {"param": param.detach(), "grad": inputs.grad, **optimizer.state[param]}) <= 1


# What a wrong kernel would compute: the formula from these inputs instead of the right ones.
def _hyper(**values: float) -> Callable[[Inputs], Inputs]:
    return lambda inputs: replace(inputs, hyper={**inputs.hyper, **values})


def _first_buffer(inputs: Inputs) -> dict[str, Tensor]:
    """The buffer after which a step makes the gradient the buffer, as SGD's first step does."""
    return {"momentum_buffer": inputs.grad * (inputs.hyper["dampening"] / inputs.hyper["momentum"])}


FAULTS: dict[str, tuple[str, str, Callable[[Inputs], Inputs]]] = {
    "bias correction of the step before": ("adam", "none", lambda i: replace(i, t=i.t - 1)),
    "bias correction of the step after": ("adam.betas.eps", "rescale", lambda i: replace(i, t=i.t + 1)),
    "no coupled weight decay in Adam": ("adam.wd", "none", _hyper(weight_decay=0)),
    "no coupled weight decay in SGD": ("sgd.nesterov.wd", "rescale", _hyper(weight_decay=0)),
    "no decoupled weight decay": ("adamw", "none", _hyper(weight_decay=0)),
    "coupled instead of decoupled": ("adamw.ams", "shrink", _hyper(decoupled_weight_decay=0)),
    "no dampening": ("sgd.mom.damp", "none", _hyper(dampening=0)),
    "no nesterov": ("sgd.nesterov", "none", _hyper(nesterov=0)),
    "not maximized": ("adam.all", "none", _hyper(maximize=0)),
    "no eps": ("adamw.max", "none", _hyper(eps=0)),
    "no momentum": ("sgd.mom", "none", _hyper(momentum=0)),
    "beta2 of AMSGrad off by 1e-5": ("adam.ams.max", "none", _hyper(beta2=0.95001)),
    "lr off by 1e-5": ("sgd", "none", lambda i: replace(i, lr=i.lr * (1 + 1e-5))),
    "first step though it is not": ("sgd.mom", "none", lambda i: replace(i, first=True)),
    "not rescaled": ("adamw", "rescale", _hyper(every=0)),
    "target off by 3e-6": ("sgd.mom", "rescale", _hyper(target=1 + 3e-6)),
    "rescaled outside of the window": ("adam", "window.out", _hyper(stop=4)),
    "rescaled too often": ("adam", "window.early", _hyper(start=0)),
    "shrunk though it rescales": ("sgd", "rescale", lambda i: replace(i, hyper={**i.hyper, "every": 0, "rate": 0.4})),
    "not shrunk": ("adamw", "shrink", _hyper(rate=0)),
    "wrong power": ("adamw", "shrink.5", _hyper(power=1)),
    "norms of the wrong axis": ("adam", "rescale", lambda i: replace(i, dims=(0,))),
    "norm of the whole tensor": ("sgd", "rescale", lambda i: replace(i, dims=(0, 1))),
    "a gate that is never open": ("adamp.open", "none", _hyper(delta=0)),
    "a gate that is always open": ("adamp", "none", _hyper(delta=1e9)),
    "no gate in SGDP": ("sgdp.open", "shrink", _hyper(delta=0)),
    "no ratio of weight decay": ("adamp.open", "none", _hyper(wd_ratio=1)),
    "no nesterov in AdamP": ("adamp.nesterov", "none", _hyper(nesterov=0)),
    "no nesterov in SGDP": ("sgdp.nesterov", "rescale", _hyper(nesterov=0)),
    "decay not divided by 1 - momentum": ("sgdp.open", "none", lambda i: _hyper(weight_decay=0.05 * 0.1)(i)),
    "buffer not projected": ("sgdp.open", "none", _hyper(project_momentum=0)),
    "buffer projected": ("sgdp.apart", "none", _hyper(project_momentum=1)),
    "the first gradient is the buffer": ("sgdp", "none", lambda i: replace(i, states=_first_buffer(i))),
    "no shifted L2": ("shifted.mom", "none", _hyper(shifted_l2_lam=0)),
    "shifted by nothing": ("shifted", "rescale", _hyper(shifted_l2_eps=0)),
    "a deviation of n, not n - 1": ("shifted.nesterov", "none", _hyper(shifted_l2_eps=0.3 * math.sqrt(29 / 28))),
    "weight decay or shifted L2": ("shifted.nesterov", "none", _hyper(weight_decay=0)),
    "lam off by 1e-5": ("shifted.eps0", "none", _hyper(shifted_l2_lam=0.4 * (1 + 1e-5))),
    "gradient not unscaled": ("sgd", "none", lambda i: replace(i, grad_scale=None)),
}


@pytest.mark.parametrize("dtypes", FULL, ids="-".join)
@pytest.mark.parametrize("fault", FAULTS)
def test_sees_a_wrong_formula(fault: str, dtypes: tuple[str, str, str]) -> None:
    option, project, change = FAULTS[fault]
    inputs = one(option, dtypes, project)
    if "unscaled" in fault:
        inputs = replace(inputs, grad_scale=4.0)
    wrong = formula(inputs, change(inputs))
    wrong.pop("measured")  # seen by the weights and states themselves
    assert check(inputs, formula(inputs)) <= 1
    rejects(inputs, wrong, "ulps off")


@pytest.mark.parametrize("dtypes", FULL, ids="-".join)
@pytest.mark.parametrize("option", ["adamp.open", "sgdp.open", "sgdp.apart"])
def test_sees_a_wrong_projection(option: str, dtypes: tuple[str, str, str]) -> None:
    """What belongs to the row before, what one row for all would give, and a projection along half of the weights."""
    inputs = one(option, dtypes)
    right, got = inputs.run(torch.float64), formula(inputs)
    assert right.removed is not None
    step, w = right.update + right.removed, inputs.param.double()
    whole = w * (w * step).sum() / w.square().sum()
    for wrong in (right.removed.roll(1, dims=0), whole, 0.5 * right.removed):
        move = inputs.lr * (right.removed - wrong)
        rejects(inputs, {**got, "param": (got["param"].double() + move).to(got["param"].dtype)}, "ulps off")


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@pytest.mark.parametrize("name", ["param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_sees_one_wrong_element(name: str, dtypes: tuple[str, str, str]) -> None:
    inputs = one("adamw.ams", dtypes, "rescale")
    index = (12, 28)
    got = formula(inputs)
    before = inputs.param if name == "param" else inputs.states[name]
    unwritten = got[name].clone()
    got[name][index] += 8 * float(ulp(torch.maximum(before.abs(), got[name].abs())[index], got[name].dtype))
    rejects(inputs, got, rf"{name}\[12, 28\] is .* 1 of 377 are wrong")
    if dtypes in FULL or name != "param":  # the last element of a row left as it was
        unwritten[index] = before[index]
        if name != "max_exp_avg_sq":  # where the maximum may be the old one
            rejects(inputs, {**got, name: unwritten}, "ulps off")


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_sees_nan_and_infinity(dtypes: tuple[str, str, str]) -> None:
    inputs = one("sgd.mom", dtypes, "rescale")
    for bad in (math.nan, math.inf, -math.inf):
        for name in ("param", "momentum_buffer", "measured"):
            got = formula(inputs)
            got[name][3, 4] = bad
            rejects(inputs, got, rf"{name}\[3, 4\].* is inf ulps off")
    wrong = one("sgd.mom", dtypes, "rescale", data="nan")
    spread = formula(wrong)
    assert spread["param"].isnan().sum() == 1
    spread["param"][0] = math.nan  # to the whole group
    rejects(wrong, spread, "28 of 377 are wrong")
    repaired = formula(wrong)
    repaired["param"].nan_to_num_()
    rejects(wrong, repaired, "the truth is nan")
    infinite = formula(wrong)
    infinite["momentum_buffer"].nan_to_num_(nan=math.inf)
    rejects(wrong, infinite, "the truth is nan")


def test_infinities_have_signs() -> None:
    inputs = one("sgd", project="rescale", data="inf")
    got = formula(inputs)
    assert check(inputs, got) <= 1
    assert int(got["param"].isinf().sum()) == 1
    got["param"].copy_(torch.where(got["param"].isinf(), -got["param"], got["param"]))
    rejects(inputs, got, "inf ulps off")


def test_sees_what_was_forgotten() -> None:
    inputs = one("sgd.mom")
    got = formula(inputs)
    rejects(inputs, {"param": got["param"], "grad": got["grad"]}, "nothing to check for .*momentum_buffer")
    rejects(inputs, {**got, "param": got["param"][:, :-1]}, "has shape")
    touched = got["grad"].clone()
    touched[0, 0] = torch.nextafter(touched[0, 0], torch.tensor(9.0))
    rejects(inputs, {**got, "grad": touched}, "no grad_scale")


@pytest.mark.parametrize("column", range(8))
def test_sees_a_wrong_measurement(column: int) -> None:
    inputs = one("adamw", project="rescale")
    got = formula(inputs)
    got["measured"][5, column] *= 1 + 2e-6
    rejects(inputs, got, r"measured\[5, ")


@pytest.mark.parametrize("dtypes", FULL, ids="-".join)
def test_sees_a_running_sum(dtypes: tuple[str, str, str]) -> None:
    """64 plain accumulators lose 3e-6 on a constant row of 28,672: that is a wrong norm in fp32, and a wrong weight."""
    inputs = one("sgd", dtypes, "rescale", shape=(1, 28672), data="const")
    inputs = replace(inputs, grad=torch.zeros_like(inputs.grad))
    updated = inputs.param.float()
    squares = updated.square().reshape(-1, 64)
    total = torch.zeros(64)
    for row in squares:
        total += row
    norm = total.sum().sqrt()
    got = {**formula(inputs), "param": (updated / norm).to(inputs.param.dtype)}
    rejects(inputs, got, "ulps off")


def test_fp64_is_held_to_fp64() -> None:
    inputs = one("adam", DTYPES[1])
    got = {name: tensor.float().to(tensor.dtype) for name, tensor in formula(inputs).items()}
    rejects(inputs, {**got, "grad": inputs.grad}, "ulps off")


def test_no_budget_is_large() -> None:
    """The policy would be worthless if some case allowed anything."""
    for case in select(5000, every=3):
        for inputs in snapshot(case.build()):
            for name, budget in tolerances._budgets(inputs).items():
                assert 1 <= budget <= 20, f"{case.id}: {name} may lose {budget} ulps"


def test_copies_of_a_number_have_norms_of_their_own() -> None:
    inputs = one("sgd", project="rescale2.5", shape=(), axis="tensor")
    crowd, *_ = tolerances._crowds(inputs)
    assert len(crowd.param) == tolerances.MOST_COPIES
    assert crowd.run(torch.float64).param.abs() == pytest.approx(2.5, rel=1e-14)


def test_ulp() -> None:
    values = torch.tensor([1.0, 1.999, 2.0, 0.75, 0.0, 1e-45, 3e38])

    def at(dtype: torch.dtype) -> list[float]:
        return ulp(values, dtype).tolist()

    assert at(torch.float32) == [2**-23, 2**-23, 2**-22, 2**-24, 2**-149, 2**-149, 2.0**104]
    assert at(torch.bfloat16)[:4] == [2**-7, 2**-7, 2**-6, 2**-8]
    assert at(torch.float16)[:5] == [2**-10, 2**-10, 2**-9, 2**-11, 2**-24]
    assert at(torch.float64)[:5] == [2**-52, 2**-52, 2**-51, 2**-53, 2**-1074]


def test_norm_deviation() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.6, 0.8]])
    assert tolerances.norm_deviation(rows, (1,), 1.0) == pytest.approx(4.0)
    assert tolerances.norm_deviation(rows, (1,), 5.0) == pytest.approx(0.8)
    assert tolerances.norm_deviation(torch.ones(0, 3), (1,), 1.0) == 0


def test_the_list_of_cases_covers_what_it_says() -> None:
    assert len({case.id for case in CASES}) == len(CASES) > 300
    tensors = [(case, tensor) for case in CASES for tensor in case.tensors]
    assert {(case.option, case.dtypes) for case in CASES} == set(itertools.product(ALL_OPTIONS, DTYPES))
    assert {tensor.data for _, tensor in tensors} == {*DATA, *NARROW}
    layouts = {(tensor.layouts[0], tensor.layouts[1]) for _, tensor in tensors if len(tensor.shape) == 4}
    assert layouts == set(itertools.product(LAYOUTS, LAYOUTS))
    for axis, layout in itertools.product(("out", "in", "tensor", (0,)), LAYOUTS):
        assert any(tensor.axis == axis and tensor.layouts[0] == layout for _, tensor in tensors), (axis, layout)
    for projection, dtypes in itertools.product(PROJECTIONS.values(), DTYPES):
        assert any(dict(case.records[0]) == projection and case.dtypes == dtypes for case in CASES), (
            projection,
            dtypes,
        )
    assert any(case.found_inf == 2 for case in CASES)
    assert any(tensor.fresh for _, tensor in tensors)
    assert all(case.numel <= 500 for case in select(500))
    assert len(select(500)) > 100


@pytest.mark.parametrize("case", select(2000, every=40), ids=lambda case: case.id)
def test_a_case_is_the_same_every_time_and_poisoned_around(case: Case) -> None:
    call, again = case.build(), case.build()
    for (buffer, tensor), (other, _) in zip(call.buffers, again.buffers, strict=True):
        assert torch.equal(buffer.nan_to_num(nan=7.5), other.nan_to_num(nan=7.5))
        inside = int(tensor.isnan().sum())
        assert int(buffer.isnan().sum()) == buffer.numel() - tensor.numel() + inside
