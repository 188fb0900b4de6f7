"""AdamP and SGDP against the authors' package, however their gates decide, and where that package cannot follow."""

from __future__ import annotations

import inspect
import io
from typing import Any

import adamp
import pytest
import torch
from authors import CHANNEL, CLOSED, CONV, FP64, LAYER, LINEAR, VECTOR, WAYS, Run, authors, gradient, run, start
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastwrs
from fastwrs import Rescale, Shrink, dispatch

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("backend")]

NAMES = ("AdamP", "SGDP")
DTYPES = (torch.float64, torch.float32)
MATRICES = (CONV, LINEAR)
by_name = pytest.mark.parametrize("name", NAMES)
by_way = pytest.mark.parametrize("way", WAYS)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def options(name: str, **more: Any) -> dict[str, Any]:
    usual = {"lr": 0.01, "betas": (0.8, 0.97)} if name == "AdamP" else {"lr": 0.03, "momentum": 0.8, "dampening": 0.3}
    return usual | {"weight_decay": 0.2, "wd_ratio": 0.3} | more


# ------------------------------------------------------------------------------------------------ the authors' package


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("nesterov", [False, True])
@by_dtype
@by_way
@by_name
def test_the_authors_package_over_20_steps(
    name: str, way: str, dtype: torch.dtype, nesterov: bool, decay: float
) -> None:
    run(name, way, options(name, weight_decay=decay, nesterov=nesterov), dtype=dtype).assert_equal()


@pytest.mark.parametrize("name", ["AdamP", "SGDP"])
def test_the_authors_defaults(name: str) -> None:
    only = {} if name == "AdamP" else {"lr": 0.03}
    for way in WAYS:
        run(name, way, only).assert_equal()


@pytest.mark.parametrize("way", [CHANNEL, LAYER])
@by_name
def test_what_a_gate_takes_away_is_not_small(name: str, way: str) -> None:
    """Else agreement with the authors would say nothing of the projection."""
    found = run(name, way, options(name, weight_decay=0.0))
    without = run(name, CLOSED, options(name, weight_decay=0.0, delta=0.0), steps=0)
    for step in range(20):
        for k, param in enumerate(without.ours):
            param.grad = gradient(param, way, 100 * step + k)
        without.optimizer.step()
    for mine, other in zip(found.ours[:2], without.ours[:2], strict=True):
        assert (mine - other).abs().max() > 1e-3


@by_name
def test_the_signature_is_the_authors_with_keyword_only_options_behind_it(name: str) -> None:
    ours = list(inspect.signature(getattr(fastwrs, name)).parameters.values())
    theirs = list(inspect.signature(getattr(adamp, name)).parameters.values())
    assert [(p.name, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.kind) for p in theirs]
    required = inspect.Parameter.empty
    there = [required if "required" in repr(p.default) else p.default for p in theirs]
    assert [p.default for p in ours[: len(theirs)]] == there
    assert {p.kind for p in ours[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}
    assert [p.name for p in ours[-4:]] == ["rescale", "shrink", "state_dtype", "backend"]


@pytest.mark.parametrize("nesterov", [False, True])
@by_dtype
@by_way
def test_project_momentum_chooses_what_becomes_of_the_buffer(way: str, dtype: torch.dtype, nesterov: bool) -> None:
    """True is the authors' code, where without nesterov step and buffer are one tensor; False has two."""
    usual = options("SGDP", nesterov=nesterov)
    together = run("SGDP", way, usual, dtype=dtype, ours={"project_momentum": True})
    apart = run("SGDP", way, usual, dtype=dtype, ours={"project_momentum": False}, kind=authors("SGDP", clones=True))
    together.assert_equal()
    apart.assert_equal()
    same = [torch.equal(a, b) for a, b in zip(together.ours, apart.ours, strict=True)]
    assert same == [nesterov or way == CLOSED] * 2 + [True]


def turned(tensor: Tensor) -> Tensor:
    """The same values with the last two dimensions the other way round in memory."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


LAYOUTS: dict[str, Any] = {
    "channels_last": lambda w: w.to(memory_format=torch.channels_last),
    "turned": turned,
    "gaps": lambda w: torch.stack([w, w], dim=-1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@by_way
@by_name
def test_layouts_in_which_the_authors_code_raises(name: str, way: str, layout: str) -> None:
    lie, shapes = LAYOUTS[layout], (CONV,) if layout == "channels_last" else MATRICES
    for shape in shapes:
        param = nn.Parameter(lie(torch.ones(shape)))
        param.grad = torch.ones(shape)
        if layout == "gaps":  # a gradient without gaps is what they can take; one with gaps is not
            param.grad = torch.ones(*shape, 2)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            authors(name)([param], lr=0.1).step()
    found = run(name, way, options(name), weights=start(shapes), lie=lie)
    assert not any(param.is_contiguous() for param in found.ours)
    found.assert_equal()


PROJECTIONS = {
    "rescale": Rescale(target=1.5),
    "rescale in": Rescale(axis="in"),
    "rescale tensor": Rescale(axis="tensor", target=2.0),
    "shrink": Shrink(0.4),
    "shrink in": Shrink(0.4, axis="in", power=2.0),
}


@pytest.mark.parametrize("projection", PROJECTIONS)
@by_way
@by_name
def test_with_rescale_or_shrink_the_step_is_theirs_and_then_the_projection(
    name: str, way: str, projection: str
) -> None:
    option = PROJECTIONS[projection]

    def after(before: Tensor, updated: Tensor) -> Tensor:
        dims = {"out": tuple(range(1, before.ndim)), "in": (1,), "tensor": tuple(range(before.ndim))}[str(option.axis)]
        if isinstance(option, Rescale):
            return updated * option.target / torch.linalg.vector_norm(updated, dim=dims, keepdim=True)
        norm = torch.linalg.vector_norm(before, dim=dims, keepdim=True)
        return updated * (1 - usual["lr"] * option.rate * norm**option.power).clamp(min=0)

    usual = options(name)
    ours = {"rescale" if isinstance(option, Rescale) else "shrink": option}
    run(name, way, usual, weights=start(MATRICES), ours=ours, after=after).assert_equal()


# ----------------------------------------------------------------------------------------- what training loops ask for


@by_way
@by_name
def test_gradients_that_come_late_or_never(name: str, way: str) -> None:
    found = run(name, way, options(name), late={1: 7, 2: 99})
    found.assert_equal()
    assert found.ours[2] not in found.optimizer.state
    assert [float(found.optimizer.state[p]["step"]) for p in found.ours[:2]] == [20, 13]


@by_way
@by_name
def test_maximize_takes_the_gradient_the_other_way_round(name: str, way: str) -> None:
    down, up = ([nn.Parameter(w) for w in start()] for _ in range(2))
    optimizers = [
        getattr(fastwrs, name)(params, **options(name), maximize=maximize)
        for params, maximize in ((down, False), (up, True))
    ]
    for step in range(5):
        for k, (a, b) in enumerate(zip(down, up, strict=True)):
            a.grad = gradient(a, way, 100 * step + k)
            b.grad = -a.grad
        for optimizer in optimizers:
            optimizer.step()
    assert all(map(torch.equal, down, up))


@by_way
@by_name
def test_a_tensor_lr_and_a_scheduler(name: str, way: str) -> None:
    usual, schedulers = options(name), []

    def halve(found: Run) -> None:
        if not schedulers:
            schedulers.extend(torch.optim.lr_scheduler.StepLR(o, 5, 0.5) for o in (found.optimizer, found.other))
            return
        for scheduler in schedulers:
            scheduler.step()

    run(name, way, usual, before=halve).assert_equal()
    assert [scheduler.get_last_lr() for scheduler in schedulers] == [[usual["lr"] / 8]] * 2
    lr = torch.tensor(usual["lr"], dtype=torch.float64)
    run(name, way, usual, before=lambda found: found.optimizer.param_groups[0].update(lr=lr)).assert_equal()


@pytest.mark.parametrize("nesterov", [False, True])
@by_way
@by_name
def test_gradients_are_unscaled_once(name: str, way: str, nesterov: bool) -> None:
    """The rules take two passes, and with nesterov both read the gradient."""
    plain, scaled = ([nn.Parameter(w) for w in start()] for _ in range(2))
    optimizers: list[Any] = [
        getattr(fastwrs, name)(params, **options(name, nesterov=nesterov)) for params in (plain, scaled)
    ]
    for step in range(4):
        for k, (a, b) in enumerate(zip(plain, scaled, strict=True)):
            a.grad = gradient(a, way, 100 * step + k)
            b.grad = 1024 * a.grad
        optimizers[1].grad_scale = torch.tensor(1024.0)
        for optimizer in optimizers:
            optimizer.step()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain, scaled, strict=True))  # type: ignore[arg-type]
    assert all(map(torch.equal, plain, scaled))


@by_way
@by_name
def test_a_step_with_found_inf_changes_nothing(name: str, way: str) -> None:
    found = run(name, way, options(name), steps=3)
    held = [*found.ours, *(t for state in found.optimizer.state.values() for t in state.values())]
    before = [tensor.detach().clone() for tensor in held]
    found.optimizer.found_inf, found.optimizer.grad_scale = torch.tensor(1.0), torch.tensor(2.0)
    for k, param in enumerate(found.ours):
        param.grad = gradient(param, way, k)
    gradients = [gradient(param, way, k) for k, param in enumerate(found.ours)]
    found.optimizer.step()
    assert all(map(torch.equal, held, before))
    assert all(torch.equal(p.grad, g) for p, g in zip(found.ours, gradients, strict=True))  # type: ignore[arg-type]


def test_f8_one_launch_whatever_the_gates_decide(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' code asks the host what to do next, once or twice for each tensor."""
    launches, operations = [], []
    launch = dispatch.launch
    monkeypatch.setattr(dispatch, "launch", lambda *a, **o: (launches.append(a), launch(*a, **o)))

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operations.append(str(func))
            return func(*args, **(kwargs or {}))

    for name in NAMES:
        params = [nn.Parameter(w) for w in start((CONV, CONV, LINEAR, VECTOR))]
        optimizer = getattr(fastwrs, name)(params, **options(name))
        for step in range(3):
            for k, (param, way) in enumerate(zip(params, (*WAYS, CLOSED), strict=True)):
                param.grad = gradient(param, way, 10 * step + k)
            launches.clear()
            operations.clear()
            with Seen():
                optimizer.step()
            assert len(launches) == 1
        if backend != "reference":
            assert [name for name in operations if "profiler" not in name] == ["fastwrs.step.default"]


# --------------------------------------------------------------------------------------------------------- checkpoints


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def step_all(optimizers: list[Any], way: str, steps: range) -> None:
    """The same gradients for all, made from the weights of the first."""
    for step in steps:
        sides = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
        for k, twins in enumerate(zip(*sides, strict=True)):
            grad = gradient(twins[0], way, 100 * step + k)
            for param in twins:
                param.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


@by_way
@by_name
def test_resuming_through_a_file_continues_bit_for_bit(name: str, way: str) -> None:
    params = [nn.Parameter(w) for w in start()]
    optimizer = getattr(fastwrs, name)(params, **options(name))
    step_all([optimizer], way, range(4))
    twins = copies(params)
    other = getattr(fastwrs, name)(twins, lr=0.9)
    other.load_state_dict(through_file(optimizer.state_dict()))
    step_all([optimizer, other], way, range(4, 9))
    assert all(map(torch.equal, params, twins))
    assert float(other.state[twins[0]]["step"]) == 9


@by_way
@by_name
def test_the_authors_state_dict_loads(name: str, way: str) -> None:
    """AdamP's steps are Python numbers there. SGDP has none, and calls its buffer ``momentum``."""
    theirs = [nn.Parameter(w) for w in start()]
    other = authors(name)(theirs, **options(name))
    step_all([other], way, range(5))
    ours = copies(theirs)
    optimizer = getattr(fastwrs, name)(ours, lr=0.9)
    saved = through_file(other.state_dict())
    optimizer.load_state_dict(saved)
    assert {float(state["step"]) for state in optimizer.state.values()} == {5.0 if name == "AdamP" else 1.0}
    assert "momentum" not in optimizer.state[ours[0]]
    step_all([other, optimizer], way, range(5, 12))
    assert set(other.ways) == {way}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=FP64, atol=FP64)


def with_caution(state_dict: dict[str, Any], caution: bool, **more: Any) -> dict[str, Any]:
    """As timm has it since 1.0.26: the authors' form, and one option more."""
    groups = [{**group, "caution": caution, **more} for group in state_dict["param_groups"]]
    return {**through_file(state_dict), "param_groups": groups}


@by_way
@by_name
def test_timms_state_dict_loads(name: str, way: str) -> None:
    """Its SGDP projects a copy, so that the buffer stays what it was."""
    theirs = [nn.Parameter(w) for w in start()]
    other = authors(name, clones=True)(theirs, **options(name))
    step_all([other], way, range(5))
    ours = copies(theirs)
    optimizer = getattr(fastwrs, name)(ours, lr=0.9)
    optimizer.load_state_dict(with_caution(other.state_dict(), caution=False))
    step_all([other, optimizer], way, range(5, 12))
    assert set(other.ways) == {way}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=FP64, atol=FP64)
    assert optimizer.param_groups[0].get("project_momentum") is (False if name == "SGDP" else None)


def test_project_momentum_of_the_dict_wins_over_what_caution_says() -> None:
    saved = authors("SGDP")([nn.Parameter(w) for w in start()], lr=0.1).state_dict()
    optimizer = fastwrs.SGDP([nn.Parameter(w) for w in start()], lr=0.1)
    optimizer.load_state_dict(with_caution(saved, caution=False, project_momentum=True))
    assert optimizer.param_groups[0]["project_momentum"] is True
    optimizer.param_groups[0]["caution"] = True  # a user's key, of no meaning to us: what we save we load
    optimizer.load_state_dict(through_file(optimizer.state_dict()))
    assert optimizer.param_groups[0]["project_momentum"] is True


@by_name
def test_cautious_updates_are_refused(name: str) -> None:
    saved = authors(name)([nn.Parameter(w) for w in start()], lr=0.1).state_dict()
    optimizer = getattr(fastwrs, name)([nn.Parameter(w) for w in start()], lr=0.2)
    with pytest.raises(ValueError, match=f"param group 0 .* caution=True: {name} has no cautious updates"):
        optimizer.load_state_dict(with_caution(saved, caution=True))
    assert optimizer.param_groups[0]["lr"] == 0.2 and "caution" not in optimizer.param_groups[0]


@pytest.mark.parametrize("counts", [float, int])
@by_way
def test_our_state_dict_loads_into_the_authors_adamp(way: str, counts: type) -> None:
    """As it is; their step size is then as exact as our count, a tensor in fp32. As numbers, counts are as theirs."""
    ours = [nn.Parameter(w) for w in start()]
    exact: dict[str, Any] = {"lr": 2.0**-7, "betas": (0.0, 0.75)}  # fp32 holds these powers and what becomes of them
    usual: dict[str, Any] = exact if counts is float else {"lr": 0.01}
    optimizer = fastwrs.AdamP(ours, weight_decay=0.1, **usual)
    step_all([optimizer], way, range(4))
    theirs = copies(ours)
    other = authors("AdamP")(theirs)
    saved = through_file(optimizer.state_dict())
    if counts is int:
        saved["state"] = {k: {**state, "step": int(state["step"])} for k, state in saved["state"].items()}
    other.load_state_dict(saved)
    step_all([other, optimizer], way, range(4, 9))
    assert set(other.ways) == {way}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=FP64, atol=FP64)


def test_both_names_of_a_buffer_are_refused() -> None:
    params = [nn.Parameter(w) for w in start()]
    optimizer = fastwrs.SGDP(params, lr=0.1)
    step_all([optimizer], CLOSED, range(1))
    saved = optimizer.state_dict()
    saved["state"] = {k: {**state, "momentum": state["momentum_buffer"]} for k, state in saved["state"].items()}
    with pytest.raises(ValueError, match=r"params\[0\]\[0\].*'momentum' and 'momentum_buffer', which are the same"):
        optimizer.load_state_dict(saved)


def test_what_a_saved_state_may_lack() -> None:
    params = [nn.Parameter(w) for w in start()]
    for name, lacking in (("AdamP", "step"), ("AdamP", "exp_avg_sq"), ("SGDP", "step")):
        optimizer = getattr(fastwrs, name)(params, lr=0.1)
        step_all([optimizer], CLOSED, range(3))
        saved = optimizer.state_dict()
        saved["state"] = {
            k: {key: value for key, value in state.items() if key != lacking} for k, state in saved["state"].items()
        }
        if name == "SGDP":
            optimizer.load_state_dict(saved)
            assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
        else:
            with pytest.raises(ValueError, match=f"its saved state lacks {lacking}"):
                optimizer.load_state_dict(saved)


OTHERS = [
    *(("SGDP", kind) for kind in (torch.optim.SGD, fastwrs.SGD, torch.optim.Adam, fastwrs.Adam, adamp.AdamP)),
    *(("AdamP", kind) for kind in (torch.optim.Adam, fastwrs.AdamW, torch.optim.NAdam, fastwrs.SGD, fastwrs.SGDP)),
    *(("SGD", kind) for kind in (adamp.SGDP, fastwrs.SGDP)),
    *(("Adam", kind) for kind in (adamp.AdamP, fastwrs.AdamP)),
]


@pytest.mark.parametrize(("name", "kind"), OTHERS, ids=lambda value: getattr(value, "__qualname__", value))
def test_the_state_dict_of_another_optimizer_is_refused(name: str, kind: Any) -> None:
    optimizer = getattr(fastwrs, name)([nn.Parameter(w) for w in start()], lr=0.1)
    saved = kind([nn.Parameter(w) for w in start()], lr=0.2).state_dict()
    with pytest.raises(ValueError, match=f"it is not that of {name}"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1


@by_name
def test_states_of_which_every_step_was_skipped_are_saved_as_they_are(name: str) -> None:
    params = [nn.Parameter(w) for w in start()]
    optimizer: Any = getattr(fastwrs, name)(params, **options(name))
    optimizer.found_inf = torch.tensor(1.0)
    step_all([optimizer], CHANNEL, range(2))
    del optimizer.found_inf
    twins = copies(params)
    other = getattr(fastwrs, name)(twins, lr=0.9)
    saved = through_file(optimizer.state_dict())
    other.load_state_dict(saved)
    assert {float(state["step"]) for state in saved["state"].values()} <= {0.0}
    step_all([optimizer, other], CHANNEL, range(2, 5))
    assert all(map(torch.equal, params, twins))
    assert float(other.state[twins[0]]["step"]) == 3


# ---------------------------------------------------------------------------------------------------- shapes and data


@by_way
@by_name
def test_shapes_at_the_edge(name: str, way: str) -> None:
    """Rows of one element are never orthogonal to anything; vectors and numbers have no gate."""
    found = run(name, CLOSED, options(name), weights=start((VECTOR, (), (1,), (1, 1))))
    found.assert_equal()
    kind = authors(name)
    rows = run(name, way, options(name), weights=start(((9, 1), (1, 9))), kind=lambda *a, **o: kind(*a, **o), steps=0)
    for step in range(20):
        for k, (a, b) in enumerate(zip(rows.ours, rows.theirs, strict=True)):
            a.grad = gradient(b, way, 10 * step + k)
            b.grad = a.grad.clone()
        rows.optimizer.step()
        rows.other.step()
    for a, b in zip(rows.ours, rows.theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=FP64, atol=FP64)


@by_name
def test_tensors_without_elements_take_steps(name: str) -> None:
    params = [nn.Parameter(torch.ones(shape)) for shape in ((0, 4), (3, 0), (0,), (2, 2))]
    for rescale in (None, Rescale(axis="tensor")):
        optimizer = getattr(fastwrs, name)(params, **options(name), rescale=rescale)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert [float(optimizer.state[param]["step"]) for param in params] == [1.0] * 4
    assert torch.isfinite(params[3]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@by_name
def test_a_gradient_that_is_not_finite_closes_the_gate_and_stays_where_it_is(name: str, bad: float) -> None:
    hit, gateless = ([nn.Parameter(w) for w in start(MATRICES)] for _ in range(2))
    optimizers = [
        getattr(fastwrs, name)(params, **options(name, delta=delta)) for params, delta in ((hit, 0.1), (gateless, 0.0))
    ]
    step_all([optimizers[0]], CHANNEL, range(2))
    for mine, other in zip(hit, gateless, strict=True):
        other.data.copy_(mine)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    optimizers[1].param_groups[0]["delta"] = 0.0
    for k, (a, b) in enumerate(zip(hit, gateless, strict=True)):
        a.grad = gradient(a, CHANNEL, k)
        a.grad.flatten()[2] = bad
        b.grad = a.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    for a, b in zip(hit, gateless, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
        assert int((~a.isfinite()).sum()) == 1
