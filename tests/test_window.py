"""Windows in time: rescaling and weight decay in some steps only, in one run and in one that was resumed."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from parity import assert_close_to_torch, parameters, run
from tolerances import NORM_BOUND, norm_deviation
from torch import nn
from torch.optim import lr_scheduler

import fastwrs
from fastwrs import WeightDecayWindow
from fastwrs.optim import base

pytestmark = pytest.mark.cpu
on_every_backend = pytest.mark.usefixtures("backend")

STEPS = 9
WINDOWS = [(0, None), (1, None), (3, 7), (0, 4), (5, None), (4, 5), (50, None), (0, 1)]
by_window = pytest.mark.parametrize(("start", "stop"), WINDOWS)


def inside(start: int, stop: int | None) -> list[int]:
    """The steps of a window, counted from 1."""
    return [t for t in range(1, STEPS + 1) if start <= t and (stop is None or t < stop)]


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- Rescale(start, stop) -------------------------------------------------------------------------------------------


@on_every_backend
@by_window
def test_rescale_opens_and_closes(start: int, stop: int | None) -> None:
    """In every step, whether the norms are the target's; a parameter whose gradient comes late counts its own steps."""
    params = parameters(shapes=((4, 6), (3, 5)))
    optimizer = fastwrs.SGD(params, lr=0.1, rescale=fastwrs.Rescale(start=start, stop=stop, target=1.7))
    late, hits = 4, ([], [])
    for step in range(STEPS):
        run(optimizer, params, range(step, step + 1), late=late)
        for k, param in enumerate(params):
            if norm_deviation(param.detach(), (1,), 1.7) <= NORM_BOUND[torch.float32]:
                hits[k].append(step + 1)
    assert hits[0] == inside(start, stop)
    assert hits[1] == [t + late for t in inside(start, stop) if t + late <= STEPS]


@on_every_backend
@pytest.mark.parametrize("name", ["SGD", "AdamW", "AdamP"])
@pytest.mark.parametrize("at", range(STEPS))
def test_rescale_windows_outlive_a_checkpoint_wherever_it_falls(name: str, at: int) -> None:
    rescale = fastwrs.Rescale(every=2, start=3, stop=7)
    whole, first = (parameters(shapes=((4, 3, 2, 2), (5, 6))) for _ in range(2))
    optimizers = [getattr(fastwrs, name)(params, lr=0.05, rescale=rescale) for params in (whole, first)]
    run(optimizers[0], whole, range(STEPS))
    run(optimizers[1], first, range(at))
    resumed = [nn.Parameter(param.detach().clone()) for param in first]
    other = getattr(fastwrs, name)(resumed, rescale=fastwrs.Rescale(every=1, target=3.0))
    other.load_state_dict(through_file(optimizers[1].state_dict()))
    assert other.param_groups[0]["rescale"] == rescale
    run(other, resumed, range(at, STEPS))
    assert all(map(torch.equal, whole, resumed))


# ---- WeightDecayWindow ----------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Any] = {
    "fastwrs.SGD": lambda p: fastwrs.SGD(p, lr=0.1, momentum=0.9),
    "fastwrs.AdamW": lambda p: fastwrs.AdamW(p, lr=0.05),
    "fastwrs.SGDP": lambda p: fastwrs.SGDP(p, lr=0.1, momentum=0.9),
    "torch.SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "torch.AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "torch.RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
}
by_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    decays = (0.3, 0.0, 0.1)
    return [{"params": params[k : k + 2], "weight_decay": decay} for k, decay in zip((0, 2, 4), decays, strict=True)]


def decays(optimizer: Any) -> list[float]:
    return [group["weight_decay"] for group in optimizer.param_groups]


def train(optimizer: Any, window: WeightDecayWindow, params: list[nn.Parameter], steps: range) -> list[list[float]]:
    """The weight decays that the steps were taken with."""
    taken = []
    handle = optimizer.register_step_post_hook(lambda *_: taken.append(decays(optimizer)))
    for step in steps:
        run(optimizer, params, range(step, step + 1))
        window.step()
    handle.remove()
    return taken


@on_every_backend
@by_optimizer
@by_window
def test_decays_in_the_window_only(name: str, start: int, stop: int | None) -> None:
    """The same weights as where the option is set by hand before every step."""
    params, expected = parameters(), parameters()
    optimizer, plain = OPTIMIZERS[name](groups(params)), OPTIMIZERS[name](groups(expected))
    window = WeightDecayWindow(optimizer, start, stop)
    own, opened = [0.3, 0.0, 0.1], inside(start, stop)
    taken = train(optimizer, window, params, range(STEPS))
    assert taken == [own if t in opened else [0.0] * 3 for t in range(1, STEPS + 1)]
    for step in range(STEPS):
        for group, decay in zip(plain.param_groups, own, strict=True):
            group["weight_decay"] = decay if step + 1 in opened else 0.0
        run(plain, expected, range(step, step + 1))
    assert all(map(torch.equal, params, expected))
    if opened:
        still = parameters()
        run(OPTIMIZERS[name]([{**group, "weight_decay": 0.0} for group in groups(still)]), still, range(STEPS))
        assert not all(map(torch.equal, params, still))


@on_every_backend
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_agrees_with_torch_under_the_same_window(name: str) -> None:
    histories = []
    for module, options in ((fastwrs, {}), (torch.optim, {"foreach": False})):
        params = parameters()
        optimizer = getattr(module, name)(groups(params), lr=0.05, **options)
        window = WeightDecayWindow(optimizer, 3, 7)
        history = [[param.detach().clone() for param in params]]
        for step in range(20):
            history += run(optimizer, params, range(step, step + 1))[1:]
            window.step()
        histories.append(history)
    assert_close_to_torch(*histories)


@on_every_backend
@by_optimizer
@pytest.mark.parametrize("order", ["window first", "optimizer first", "window made last"])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 6, 7])
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, at: int, order: str) -> None:
    """With a learning rate schedule beside it; own values come from the file, the new optimizer has others."""

    def made(params: list[nn.Parameter]) -> tuple[Any, Any]:
        optimizer = OPTIMIZERS[name](groups(params))
        return optimizer, lr_scheduler.ExponentialLR(optimizer, 0.8)

    def go_on(optimizer: Any, scheduler: Any, window: Any, params: list[nn.Parameter], steps: range) -> None:
        for step in steps:
            run(optimizer, params, range(step, step + 1))
            scheduler.step()
            window.step()

    whole, first = parameters(), parameters()
    optimizer, scheduler = made(whole)
    go_on(optimizer, scheduler, WeightDecayWindow(optimizer, 3, 7), whole, range(STEPS))
    assert optimizer.param_groups[0]["lr"] < 0.02

    optimizer, scheduler = made(first)
    window = WeightDecayWindow(optimizer, 3, 7)
    go_on(optimizer, scheduler, window, first, range(at))
    saved = through_file([optimizer.state_dict(), scheduler.state_dict(), window.state_dict()])
    resumed = [nn.Parameter(param.detach().clone()) for param in first]
    optimizer, scheduler = made(resumed)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.77
    if order == "window made last":
        optimizer.load_state_dict(saved[0])
    window = WeightDecayWindow(optimizer, stop=2)
    if order == "window first":
        window.load_state_dict(saved[2])
    if order != "window made last":
        optimizer.load_state_dict(saved[0])
    window.load_state_dict(saved[2])
    scheduler.load_state_dict(saved[1])
    assert (window.start, window.stop, window.steps) == (3, 7, at)
    go_on(optimizer, scheduler, window, resumed, range(at, STEPS))
    assert all(map(torch.equal, whole, resumed))


@on_every_backend
@by_optimizer
def test_a_checkpoint_from_before_the_window_brings_its_own_values(name: str) -> None:
    params = parameters()
    saved = OPTIMIZERS[name](groups(params)).state_dict()
    optimizer = OPTIMIZERS[name]([{**group, "weight_decay": 0.77} for group in groups(params)])
    window = WeightDecayWindow(optimizer, 2)
    optimizer.load_state_dict(through_file(saved))
    assert train(optimizer, window, params, range(2)) == [[0.0] * 3, [0.3, 0.0, 0.1]]


@on_every_backend
@by_optimizer
def test_groups_that_come_later(name: str) -> None:
    """Nothing of a closed window is decayed, not even in the first step of a new group."""
    params, late = parameters(), nn.Parameter(torch.ones(3, 2))
    optimizer = OPTIMIZERS[name](groups(params))
    window = WeightDecayWindow(optimizer, 3, 5)
    train(optimizer, window, params, range(1))
    optimizer.add_param_group({"params": [late], "weight_decay": 0.6})
    own = [0.3, 0.0, 0.1, 0.6]
    assert train(optimizer, window, params, range(1, 5)) == [[0.0] * 4, own, own, [0.0] * 4]
    again = nn.Parameter(torch.ones(3, 2))
    optimizer.add_param_group({"params": [again]})  # with the default, which SGD has at 0 and AdamW at 0.01
    assert train(optimizer, window, params, range(5, 6)) == [[0.0] * 5]
    window.remove()
    assert decays(optimizer) == [*own, optimizer.defaults["weight_decay"]]


@on_every_backend
def test_no_new_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    build = base.build
    monkeypatch.setattr(base, "build", lambda *args: made.append(build(*args)) or made[-1])
    params = parameters(shapes=((4, 3), (5, 2)))
    optimizer = fastwrs.AdamW(params, weight_decay=0.1, rescale=fastwrs.Rescale(start=2, stop=4))
    window = WeightDecayWindow(optimizer, 3, 5)
    for step in range(7):
        run(optimizer, params, range(step, step + 1), late=0)
        window.step()
    assert len(made) == 1


@on_every_backend
def test_skipped_steps_and_schedulers_leave_the_count_to_its_caller() -> None:
    params = parameters(shapes=((4, 3), (5, 2)))
    optimizer = fastwrs.SGD(params, lr=0.1, weight_decay=0.2)
    window = WeightDecayWindow(optimizer, 2, 3)
    run(optimizer, params, range(3), late=0)  # nobody has said that a step is over
    assert (window.steps, window.open, decays(optimizer)) == (0, False, [0.0])
    window.step()
    assert (window.steps, window.open, decays(optimizer)) == (1, True, [0.2])
    window.step()
    assert (window.steps, window.open, decays(optimizer)) == (2, False, [0.0])
    assert repr(window) == "WeightDecayWindow(start=2, stop=3, steps=2)"


def test_an_option_changed_by_hand_is_set_anew() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.1, weight_decay=0.2)
    window = WeightDecayWindow(optimizer, stop=3)
    optimizer.param_groups[0]["weight_decay"] = 0.9
    assert train(optimizer, window, optimizer.param_groups[0]["params"], range(1)) == [[0.2]]
    optimizer.param_groups[0]["initial_weight_decay"] = 0.9
    assert train(optimizer, window, optimizer.param_groups[0]["params"], range(1, 4)) == [[0.9], [0.0], [0.0]]


@on_every_backend
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@by_optimizer
def test_copies_go_on_by_themselves(name: str, how: Any) -> None:
    params = parameters()
    optimizer = OPTIMIZERS[name](groups(params))
    window = WeightDecayWindow(optimizer, 2, 4)
    train(optimizer, window, params, range(1))
    twin, twins = how((optimizer, window))
    others = [param for group in twin.param_groups for param in group["params"]]
    assert twins.optimizer is twin
    assert train(twin, twins, others, range(1, 5)) == [[0.3, 0.0, 0.1]] * 2 + [[0.0] * 3] * 2
    assert (window.steps, decays(optimizer)) == (1, [0.3, 0.0, 0.1])
    train(optimizer, window, params, range(1, 5))
    assert all(map(torch.equal, params, others))


def test_removed() -> None:
    optimizer = torch.optim.SGD(groups(parameters()), lr=0.1)
    before = [{**group} for group in optimizer.param_groups]
    window = WeightDecayWindow(optimizer, stop=1)
    assert "initial_weight_decay" in optimizer.param_groups[0]
    assert decays(optimizer) == [0.0] * 3
    window.remove()
    window.remove()
    window.step()
    assert optimizer.param_groups == before
    assert WeightDecayWindow(copy.deepcopy(optimizer)).open
    copied = copy.deepcopy(window)
    copied.step()
    assert decays(copied.optimizer) == [0.3, 0.0, 0.1]
    WeightDecayWindow(optimizer, 5)
    assert decays(optimizer) == [0.0] * 3


def test_a_window_keeps_no_optimizer_alive() -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    WeightDecayWindow(optimizer)
    seen = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert seen() is None


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"start": -1}, ValueError, "WeightDecayWindow: start must be >= 0, got -1"),
        ({"start": 1.5}, TypeError, "start must be an int, got 1.5"),
        ({"start": True}, TypeError, "start must be an int, got True"),
        ({"start": None}, TypeError, "start must be an int, got None"),
        ({"stop": -2}, ValueError, "stop must be >= 0, got -2"),
        ({"stop": "3"}, TypeError, "stop must be an int, got '3'"),
        ({"start": 7, "stop": 7}, ValueError, "stop must be > start = 7, or None, got 7"),  # would never open
        ({"start": 0, "stop": 0}, ValueError, "stop must be > start = 0, or None, got 0"),
    ],
)
def test_bad_windows_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    optimizer = torch.optim.SGD(parameters(), lr=0.1, weight_decay=0.2)
    before = optimizer.state_dict()
    with pytest.raises(kind, match=message):
        WeightDecayWindow(optimizer, **options)
    assert optimizer.state_dict() == before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    window = WeightDecayWindow(optimizer, 1, 4)
    saved = window.state_dict()
    with pytest.raises(kind, match=message):
        window.load_state_dict({**saved, **options})
    assert window.state_dict() == saved


@pytest.mark.bad_input
def test_what_has_no_window_is_refused() -> None:
    not_one: Any = parameters()
    with pytest.raises(TypeError, match="must be an Optimizer, got list"):
        WeightDecayWindow(not_one)
    with pytest.raises(ValueError, match="LBFGS has no weight_decay"):
        WeightDecayWindow(torch.optim.LBFGS(parameters()))
    optimizer = torch.optim.SGD(parameters(), lr=0.1)
    window = WeightDecayWindow(optimizer)
    for wrong in ({"state": {}}, {"state": {}, "param_groups": 5}, {"state": {}, "param_groups": [5]}):
        with pytest.raises((KeyError, TypeError, AttributeError, ValueError)):
            optimizer.load_state_dict(wrong)
    with pytest.raises(ValueError, match="has a window already"):
        WeightDecayWindow(optimizer, 3)
    with pytest.raises(ValueError, match="the state dict lacks 'steps'"):
        window.load_state_dict({"start": 0, "stop": None})
    with pytest.raises(ValueError, match="steps must be >= 0, got -1"):
        window.load_state_dict({"start": 0, "stop": None, "steps": -1})
