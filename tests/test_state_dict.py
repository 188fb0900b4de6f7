"""Checkpoints: saving and loading ours, crossing to and from torch.optim, copying and pickling."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from tolerances import ulp
from torch import Tensor, nn

import fastwrs
from fastwrs import Rescale, Shrink

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("backend")]
RULES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.05, "weight_decay": 0.02}),
    ("SGD", {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02}),
    ("SGD", {"lr": 0.05, "momentum": 0.8, "dampening": 0.4}),
    ("Adam", {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.02, "amsgrad": True}),
    ("AdamW", {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.02}),
]
by_rule = pytest.mark.parametrize(("name", "options"), RULES, ids=str)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(3)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((5, 4), (4, 3, 2, 2), (6, 7))]


def groups(params: list[nn.Parameter], **options: Any) -> list[dict[str, Any]]:
    return [{"params": params[:1], **options}, {"params": params[1:]}]


def steps(optimizer: Any, params: list[nn.Parameter], numbers: range) -> None:
    for number in numbers:
        torch.manual_seed(100 + number)
        for param in params:
            param.grad = torch.randn(param.shape).to(param.dtype)
        optimizer.step()


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


def assert_within(ours: list[nn.Parameter], theirs: list[nn.Parameter], ulps: int = 16) -> None:
    for a, b in zip(ours, theirs, strict=True):
        unit = ulp(b.detach().abs().max().double(), b.dtype).item()
        assert (a - b).abs().max().item() <= ulps * unit


@by_rule
@pytest.mark.parametrize("axis", ["in", (0, -1)])
def test_resuming_through_a_file_continues_bit_for_bit(name: str, options: dict[str, Any], axis: Any) -> None:
    rescale, shrink = Rescale(every=3, axis=axis, target=1.5, start=2, stop=40), Shrink(0.2, axis=axis, power=0.5)
    params = parameters()
    optimizer = getattr(fastwrs, name)(groups(params, rescale=rescale, shrink=shrink), **options)
    steps(optimizer, params, range(4))
    resumed = copies(params)
    saved = through_file(optimizer.state_dict())
    other = getattr(fastwrs, name)(groups(resumed), lr=0.7)
    other.load_state_dict(saved)
    assert other.param_groups[0]["rescale"] == rescale
    assert other.param_groups[0]["shrink"] == shrink
    assert other.param_groups[0]["lr"] == options["lr"]
    steps(optimizer, params, range(4, 10))
    steps(other, resumed, range(4, 10))
    assert all(map(torch.equal, params, resumed))


def test_what_a_state_dict_holds() -> None:
    params = parameters()
    rescale = Rescale(every=2, axis=(1, -1))
    with_names = [{"params": [("conv", params[1])], "rescale": rescale}]
    optimizer = fastwrs.AdamW(with_names, shrink=Shrink(0.1, axis=(1, -1)), backend="reference")
    steps(optimizer, [params[1]], range(1))
    state_dict = optimizer.state_dict()
    (group,) = state_dict["param_groups"]
    assert group["rescale"] == {"every": 2, "axis": [1, -1], "target": 1.0, "start": 0, "stop": None}
    assert group["shrink"] == {"rate": 0.1, "axis": [1, -1], "power": 1.0}
    torchs = torch.optim.AdamW(parameters()).state_dict()["param_groups"][0]
    assert set(group) == set(torchs) | {"rescale", "shrink", "param_names"}
    assert set(state_dict["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.param_groups[0]["rescale"] == rescale  # saving does not touch the optimizer


@by_rule
def test_from_torch_to_ours(name: str, options: dict[str, Any]) -> None:
    """SGD's state has no step there: a momentum buffer then counts as one step taken."""
    theirs = parameters()
    optimizer = getattr(torch.optim, name)(groups(theirs), **options, foreach=False)
    steps(optimizer, theirs, range(5))
    ours = copies(theirs)
    other = getattr(fastwrs, name)(groups(ours, rescale=None), shrink=None)
    other.load_state_dict(through_file(optimizer.state_dict()))
    if name == "SGD":
        expected = [1.0] * 3 if "momentum" in options else []
        assert [state["step"].item() for state in other.state.values()] == expected
    steps(optimizer, theirs, range(5, 15))
    steps(other, ours, range(5, 15))
    assert_within(ours, theirs)


@by_rule
def test_from_ours_to_torch(name: str, options: dict[str, Any]) -> None:
    ours = parameters()
    optimizer = getattr(fastwrs, name)(groups(ours), **options)
    steps(optimizer, ours, range(5))
    theirs = copies(ours)
    other = getattr(torch.optim, name)(groups(theirs), foreach=False)
    other.load_state_dict(through_file(optimizer.state_dict()))
    steps(optimizer, ours, range(5, 15))
    steps(other, theirs, range(5, 15))
    assert_within(ours, theirs)


def test_steps_as_python_numbers_load() -> None:
    params = parameters()
    optimizer = fastwrs.Adam(params)
    steps(optimizer, params, range(3))
    saved = optimizer.state_dict()
    saved["state"] = {key: {**state, "step": int(state["step"])} for key, state in saved["state"].items()}
    other = fastwrs.Adam(parameters())
    other.load_state_dict(saved)
    assert [state["step"].item() for state in other.state.values()] == [3.0] * 3
    assert {(state["step"].dtype, state["step"].shape) for state in other.state.values()} == {(torch.float32, ())}


def test_f7_states_of_bf16_parameters_keep_their_fp32_bits() -> None:
    params = parameters(torch.bfloat16)
    optimizer = fastwrs.AdamW(params, lr=0.1)
    steps(optimizer, params, range(3))
    resumed = copies(params)
    other = fastwrs.AdamW(resumed, lr=0.1)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert theirs["exp_avg"].dtype == torch.float32
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    steps(optimizer, params, range(3, 6))
    steps(other, resumed, range(3, 6))
    assert all(map(torch.equal, params, resumed))
    short = fastwrs.AdamW(copies(params), state_dtype=torch.bfloat16)
    short.load_state_dict(optimizer.state_dict())
    assert {state["exp_avg_sq"].dtype for state in short.state.values()} == {torch.bfloat16}
    back = fastwrs.AdamW(copies(params))
    back.load_state_dict(short.state_dict())
    assert {state["exp_avg_sq"].dtype for state in back.state.values()} == {torch.float32}


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_bf16_states_of_a_bf16_model_of_torch(name: str) -> None:
    """Their bits are kept, widened to fp32, and the run goes on from there as torch's does, to bf16's precision."""
    options: dict[str, Any] = {"lr": 0.05, "momentum": 0.8} if name == "SGD" else {"lr": 0.02}
    theirs = parameters(torch.bfloat16)
    optimizer = getattr(torch.optim, name)(groups(theirs), **options, foreach=False)
    steps(optimizer, theirs, range(5))
    ours = copies(theirs)
    other = getattr(fastwrs, name)(groups(ours))
    other.load_state_dict(through_file(optimizer.state_dict()))
    for param, twin in zip(theirs, ours, strict=True):
        for key in ("momentum_buffer",) if name == "SGD" else ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[param][key].dtype == torch.bfloat16
            assert other.state[twin][key].dtype == torch.float32
            assert torch.equal(other.state[twin][key], optimizer.state[param][key].float())
    steps(optimizer, theirs, range(5, 15))
    steps(other, ours, range(5, 15))
    assert_within(ours, theirs)
    # And back: torch takes our fp32 states and rounds them to bf16, as it does with its own.
    returned = copies(ours)
    back = getattr(torch.optim, name)(groups(returned), foreach=False)
    back.load_state_dict(through_file(other.state_dict()))
    steps(back, returned, range(15, 18))
    steps(other, ours, range(15, 18))
    assert_within(returned, ours)


def test_older_dicts_of_torch_load() -> None:
    """Without the options that torch added over the years, and with steps as Python numbers, as before torch 1.12."""
    theirs = parameters()
    optimizer = torch.optim.Adam(theirs, lr=0.02, amsgrad=True, weight_decay=0.1, foreach=False)
    steps(optimizer, theirs, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for key in ("foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay"):
            del group[key]
    for state in saved["state"].values():
        state["step"] = int(state["step"])
    ours = copies(theirs)
    other = fastwrs.Adam(ours)
    other.load_state_dict(through_file(saved))
    assert {state["step"].item() for state in other.state.values()} == {4.0}
    steps(optimizer, theirs, range(4, 14))
    steps(other, ours, range(4, 14))
    assert_within(ours, theirs)


def test_loaded_states_share_no_memory_and_take_their_parameters_layout() -> None:
    params = parameters()
    optimizer = fastwrs.AdamW(params)
    steps(optimizer, params, range(2))
    resumed = copies(params)
    resumed[1].data = resumed[1].data.to(memory_format=torch.channels_last)
    other = fastwrs.AdamW(resumed)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[resumed[1]]["exp_avg"].stride() == resumed[1].stride()
    pointers = [t.data_ptr() for o in (optimizer, other) for state in o.state.values() for t in state.values()]
    assert len(set(pointers)) == len(pointers) == 18


def test_a_key_that_the_dict_lacks_keeps_the_current_option() -> None:
    params = parameters()
    saved = fastwrs.AdamW(params, rescale=Rescale(every=5), lr=0.3).state_dict()
    for group in saved["param_groups"]:
        del group["rescale"], group["shrink"], group["amsgrad"]
    rescale, shrink = Rescale(every=7), Shrink(0.3)
    other = fastwrs.AdamW(parameters(), rescale=rescale, shrink=shrink, amsgrad=True, lr=0.1, backend="reference")
    other.load_state_dict(saved)
    (group,) = other.param_groups
    assert (group["rescale"], group["shrink"], group["amsgrad"], group["lr"]) == (rescale, shrink, True, 0.3)
    assert other.backend == "reference"


def test_adamw_stays_decoupled_whatever_it_loads() -> None:
    other = fastwrs.AdamW(parameters())
    other.load_state_dict(torch.optim.Adam(parameters(), lr=0.2).state_dict())
    assert other.param_groups[0]["decoupled_weight_decay"] is True
    assert other.param_groups[0]["lr"] == 0.2


def test_muon_is_not_sgd() -> None:
    weights = [nn.Parameter(torch.randn(5, 4))]
    saved = torch.optim.Muon(weights).state_dict()
    optimizer = fastwrs.SGD(weights, lr=0.3, momentum=0.2)
    with pytest.raises(ValueError, match="has the options of Muon: it is not that of SGD"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["momentum"] == 0.2


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_states_of_lazy_parameters_load() -> None:
    def lazy() -> nn.Module:
        torch.manual_seed(4)
        return nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))

    batch = torch.ones(2, 5)
    model = lazy()
    model(batch)
    optimizer = fastwrs.AdamW(model.parameters(), lr=0.1)
    model(batch).sum().backward()
    optimizer.step()
    other = lazy()
    resumed = fastwrs.AdamW(other.parameters(), lr=0.1)
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(model.state_dict())
    for network, each in ((model, optimizer), (other, resumed)):
        each.zero_grad()
        network(batch).square().sum().backward()
        each.step()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_loaded_dict_stays_apart_from_the_optimizer() -> None:
    params = parameters()
    optimizer = fastwrs.AdamW(params, lr=torch.tensor(0.1))
    steps(optimizer, params, range(1))
    saved = optimizer.state_dict()
    other = fastwrs.AdamW(copies(params), lr=torch.tensor(0.5))
    other.load_state_dict(saved)
    saved["param_groups"][0]["lr"].fill_(7.0)
    assert other.param_groups[0]["lr"].item() == pytest.approx(0.1)


def test_states_of_a_subclass_are_plain() -> None:
    class Named(torch.Tensor):
        pass

    param = torch.ones(3, 4).as_subclass(Named).requires_grad_()
    param.grad = torch.ones(3, 4)
    optimizer = fastwrs.SGD([param], lr=0.1, momentum=0.9)
    optimizer.step()
    assert type(optimizer.state[param]["momentum_buffer"]) is torch.Tensor
    assert through_file(optimizer.state_dict())["state"][0]["step"].item() == 1


def test_momentum_buffers_that_are_none_count_as_missing() -> None:
    params = parameters()
    optimizer = fastwrs.SGD(params, momentum=0.5)
    saved = optimizer.state_dict()
    saved["state"] = {k: {"momentum_buffer": None} for k in range(3)}
    optimizer.load_state_dict(saved)
    steps(optimizer, params, range(1))
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], params[0].grad)  # type: ignore[arg-type]


def test_a_buffer_whose_every_step_was_skipped_is_not_saved() -> None:
    params = parameters()
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    optimizer: Any = fastwrs.SGD(params, **options)
    optimizer.found_inf = torch.tensor(1.0)
    steps(optimizer, params, range(1))
    del optimizer.found_inf
    saved = through_file(optimizer.state_dict())
    assert [set(values) for values in saved["state"].values()] == [{"step"}] * 3
    assert "momentum_buffer" in optimizer.state[params[0]]  # saving does not touch the optimizer
    theirs, ours = copies(params), copies(params)
    torchs = torch.optim.SGD(theirs, **options, foreach=False)
    torchs.load_state_dict(saved)
    other = fastwrs.SGD(ours, **options)
    other.load_state_dict(saved)
    for each, group in ((optimizer, params), (torchs, theirs), (other, ours)):
        steps(each, group, range(1, 4))
    assert all(map(torch.equal, params, ours))
    assert_within(ours, theirs)


def test_states_of_the_user_are_kept_in_our_dicts() -> None:
    params = parameters()
    optimizer = fastwrs.AdamW(params)
    steps(optimizer, params, range(2))
    optimizer.state[params[0]]["average"] = torch.ones(5, 4, dtype=torch.float64)
    optimizer.state[params[1]]["note"] = ["kept"]
    resumed = copies(params)
    other = fastwrs.AdamW(resumed)
    other.load_state_dict(optimizer.state_dict())
    average = other.state[resumed[0]]["average"]
    assert torch.equal(average, torch.ones(5, 4, dtype=torch.float64))
    assert average.data_ptr() != optimizer.state[params[0]]["average"].data_ptr()
    assert other.state[resumed[1]]["note"] == ["kept"]
    steps(optimizer, params, range(2, 4))
    steps(other, resumed, range(2, 4))
    assert all(map(torch.equal, params, resumed))
    alone = optimizer.state_dict()
    alone["state"] = {0: {"note": "alone"}}
    other.load_state_dict(alone)
    assert other.state[resumed[0]] == {"note": "alone"}


def snapshot(optimizer: Any) -> Any:
    states = [(id(p), {k: (id(v), v.tolist()) for k, v in state.items()}) for p, state in optimizer.state.items()]
    return states, [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def wrong_optimizer() -> dict[str, Any]:
    return torch.optim.SGD(groups(parameters())).state_dict()


def wrong_states() -> dict[str, Any]:
    params = parameters()
    optimizer = torch.optim.NAdam(groups(params))
    steps(optimizer, params, range(1))
    return {**optimizer.state_dict(), "param_groups": torch.optim.Adam(groups(params)).state_dict()["param_groups"]}


def ours_with(change: Any) -> dict[str, Any]:
    params = parameters()
    optimizer = fastwrs.AdamW(groups(params))
    steps(optimizer, params, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved)
    return saved


REFUSED: list[tuple[str, Any, str]] = [
    (
        "RAdam",
        lambda: torch.optim.RAdam(groups(parameters())).state_dict(),
        "has the options of RAdam: .* not that of AdamW",
    ),
    (
        "a state that is no dict",
        lambda: ours_with(lambda saved: saved["state"].update({1: None})),
        r"params\[1\]\[0\].*must be a dict, got NoneType",
    ),
    (
        "no dict of states",
        lambda: ours_with(lambda saved: saved.update(state=[])),
        "'state' of the state dict must be a dict",
    ),
    ("no list of groups", lambda: ours_with(lambda saved: saved.update(param_groups=3)), "must be a list, got int"),
    (
        "a group that is none",
        lambda: ours_with(lambda saved: saved.update(param_groups=[None, None])),
        "param group 0 .* must be a dict",
    ),
    (
        "names",
        lambda: ours_with(lambda saved: saved["param_groups"][1].update(param_names=["a"])),
        "2 params and 1 param_names",
    ),
    (
        "a complex step",
        lambda: ours_with(lambda saved: saved["state"][1].update(step=torch.tensor(1j))),
        r"params\[1\]\[0\].*its saved step is a torch.complex64",
    ),
    (
        "a complex moment",
        lambda: ours_with(lambda saved: saved["state"][1].update(exp_avg=torch.ones(4, 3, 2, 2) * 1j)),
        r"must be a dense tensor of real numbers, got torch.complex64",
    ),
    (
        "a moment on meta",
        lambda: ours_with(lambda saved: saved["state"][1].update(exp_avg=torch.ones(4, 3, 2, 2, device="meta"))),
        r"params\[1\]\[0\]",
    ),
    ("another optimizer", wrong_optimizer, "none of betas, eps, amsgrad.*not that of AdamW"),
    ("states of another optimizer", wrong_states, "AdamW keeps no state 'mu_product'"),
    ("one group less", lambda: fastwrs.AdamW(parameters()).state_dict(), "number of parameter groups: 1, .* has 2"),
    (
        "one parameter less",
        lambda: fastwrs.AdamW(groups(parameters()[:2])).state_dict(),
        "group 1 has 1 parameters there and 2 here",
    ),
    ("no groups", lambda: {"state": {}}, "has no 'param_groups'"),
    (
        "another shape",
        lambda: ours_with(lambda saved: saved["state"][2].update(exp_avg=torch.ones(7, 6))),
        r"params\[1\]\[1\] \(shape \(6, 7\)\): its saved state 'exp_avg' has the shape \(7, 6\)",
    ),
    ("a state is missing", lambda: ours_with(lambda saved: saved["state"][1].pop("exp_avg_sq")), "lacks exp_avg_sq"),
    ("a step is missing", lambda: ours_with(lambda saved: saved["state"][1].pop("step")), "lacks step"),
    ("step", lambda: ours_with(lambda saved: saved["state"][1].update(step=-1)), "its saved step is -1.0"),
    ("steps", lambda: ours_with(lambda saved: saved["state"][1].update(step=torch.ones(2))), "not one element"),
    ("lr", lambda: ours_with(lambda saved: saved["param_groups"][1].update(lr=-1.0)), "Invalid learning rate"),
    (
        "rescale",
        lambda: ours_with(lambda saved: saved["param_groups"][1].update(rescale={"every": 0})),
        "every must be >= 1",
    ),
    (
        "rescale axis",
        lambda: ours_with(lambda saved: saved["param_groups"][1].update(rescale={"axis": [2, 3]})),
        r"params\[1\]\[1\] .*there are 2 dimensions",
    ),
    (
        "unknown rescale option",
        lambda: ours_with(lambda saved: saved["param_groups"][1].update(rescale={"evry": 1})),
        "Rescale has no option 'evry'",
    ),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("make", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_dict_that_does_not_fit_changes_nothing(make: Any, message: str) -> None:
    params = parameters()
    optimizer = fastwrs.AdamW(groups(params, rescale=Rescale(every=9)), lr=0.01)
    steps(optimizer, params, range(2))
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(make())
    assert snapshot(optimizer) == before
    steps(optimizer, params, range(2, 3))


def test_hooks_see_and_may_change_the_dict() -> None:
    params = parameters()
    optimizer = fastwrs.SGD(params, rescale=Rescale(), momentum=0.5)
    steps(optimizer, params, range(1))
    seen: list[str] = []

    def saving(_: Any, state_dict: dict[str, Any]) -> None:
        seen.append(type(state_dict["param_groups"][0]["rescale"]).__name__)
        state_dict["extra"] = 1

    def loading(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append("loading")
        return {key: value for key, value in state_dict.items() if key != "extra"}

    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before saving"))
    optimizer.register_state_dict_post_hook(saving)
    optimizer.register_load_state_dict_pre_hook(loading)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    saved = optimizer.state_dict()
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert seen == ["before saving", "dict", "loading", "loaded"]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@by_rule
def test_copies_continue_as_the_original(name: str, options: dict[str, Any], how: Any, backend: str) -> None:
    params = parameters()
    rescale = Rescale(every=2, axis="tensor")
    optimizer = getattr(fastwrs, name)(params, **options, rescale=rescale, backend=backend)
    steps(optimizer, params, range(3))
    other = how(optimizer)
    assert other.backend == backend
    assert other.param_groups[0]["rescale"] == rescale
    twins = other.param_groups[0]["params"]
    steps(optimizer, params, range(3, 6))
    steps(other, twins, range(3, 6))
    assert all(map(torch.equal, params, twins))
    assert isinstance(other.state_dict()["param_groups"][0]["rescale"], dict)


def test_steps_that_were_one_tensor_become_one_each() -> None:
    params = parameters()
    optimizer = fastwrs.AdamW(params)
    steps(optimizer, params, range(1))
    saved = optimizer.state_dict()
    shared: Tensor = torch.tensor(4.0)
    saved["state"] = {key: {**state, "step": shared} for key, state in saved["state"].items()}
    optimizer.load_state_dict(saved)
    steps(optimizer, params, range(1, 2))
    assert [state["step"].item() for state in optimizer.state.values()] == [5.0] * 3
    assert shared.item() == 4.0


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ((torch.optim.SGD, {"momentum": 0.9, "nesterov": True}), (fastwrs.SGDP, {})),
        ((fastwrs.SGD, {"momentum": 0.9}), (fastwrs.SGDP, {})),
        ((torch.optim.RAdam, {}), (fastwrs.Adam, {})),
        ((torch.optim.NAdam, {}), (fastwrs.AdamP, {})),
    ],
    ids=lambda pair: pair[0].__name__,
)
def test_what_a_scheduler_or_a_user_adds_hides_no_other_optimizer(theirs: Any, ours: Any) -> None:
    (kind, options), (mine, more) = theirs, ours
    optimizer = kind([{"params": parameters(), "called": "all"}], lr=0.1, **options)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    assert "initial_lr" in optimizer.param_groups[0]
    with pytest.raises(ValueError, match=f"has the options of {kind.__name__}"):
        mine(parameters(), lr=0.1, **more).load_state_dict(optimizer.state_dict())
