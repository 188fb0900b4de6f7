"""``WeightRescaler``: the projection after each step of optimizers that are not ours."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import NORM_BOUND, norm_deviation
from torch import Tensor, nn
from torch.optim import Optimizer

import fastwrs
from fastwrs import Rescale, WeightRescaler

pytestmark = pytest.mark.cpu


class SignSgd(Optimizer):
    """An optimizer as users write them: no learning rate in its groups, states of its own."""

    def __init__(self, params: Any, size: float = 0.01) -> None:
        super().__init__(params, {"size": size})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param -= group["size"] * param.grad.sign()
                    self.state[param]["seen"] = self.state[param].get("seen", 0) + 1


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.ndim == 2]


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "sgd.fused": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True),
    "muon": lambda model: torch.optim.Muon(matrices(model), lr=0.02),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=0.05),
    "own": lambda model: SignSgd(model.parameters()),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 9), nn.Linear(9, 3))


def weights(optimizer: Optimizer) -> list[Tensor]:
    return [p.detach() for group in optimizer.param_groups for p in group["params"] if p.ndim >= 2]


def held(optimizer: Optimizer, target: float) -> bool:
    bound = NORM_BOUND[torch.float32]
    return all(norm_deviation(w, tuple(range(1, w.ndim)), target) <= bound for w in weights(optimizer))


def train(model: nn.Module, optimizer: Optimizer, steps: range, scaler: Any = None, *, infinite: bool = False) -> None:
    for step in steps:
        torch.manual_seed(100 + step)
        loss = model(torch.randn(5, 6)).square().mean() * (float("inf") if infinite else 1.0)
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()


@every_optimizer
def test_the_step_of_another_optimizer_then_the_projection(make: Callable[[nn.Module], Optimizer]) -> None:
    """As by hand: the same step, and ``rescale_`` after every third one, to the last bit."""
    model, other = network(), network()
    optimizer, by_hand = make(model), make(other)
    WeightRescaler(optimizer, Rescale(every=3, target=1.25))
    for step in range(7):
        train(model, optimizer, range(step, step + 1))
        train(other, by_hand, range(step, step + 1))
        if step % 3 == 2:
            fastwrs.rescale_(weights(by_hand), target=1.25)
            assert held(optimizer, 1.25)
        for ours, expected in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(ours, expected)
    assert not held(optimizer, 1.25)


@every_optimizer
def test_steps_that_a_grad_scaler_skips(make: Callable[[nn.Module], Optimizer]) -> None:
    """Neither projected nor counted, whether the optimizer is not called at all or skips by itself."""
    model = network()
    optimizer = make(model)
    rescaler = WeightRescaler(optimizer, Rescale(every=2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step, skipped in enumerate((False, True, False, True, False, False)):
        before = [w.clone() for w in weights(optimizer)]
        train(model, optimizer, range(step, step + 1), scaler, infinite=skipped)
        assert all(map(torch.equal, before, weights(optimizer))) == skipped
    assert [s["step"].item() for s in rescaler.state_dict()["state"].values()] == [4.0] * len(weights(optimizer))
    assert held(optimizer, 1.0)


@every_optimizer
def test_an_interrupted_training(make: Callable[[nn.Module], Optimizer]) -> None:
    """Saved through a file that ``torch.load`` reads with ``weights_only``, in the middle of an interval."""
    runs = []
    for interrupted in (False, True):
        model = network()
        optimizer = make(model)
        rescaler = WeightRescaler(optimizer, Rescale(every=3, axis="in", target=0.5, start=2))
        train(model, optimizer, range(4))
        if interrupted:
            file = io.BytesIO()
            torch.save([model.state_dict(), optimizer.state_dict(), rescaler.state_dict()], file)
            file.seek(0)
            of_model, of_optimizer, of_rescaler = torch.load(file, weights_only=True)
            model = network(seed=9)
            optimizer = make(model)
            rescaler = WeightRescaler(optimizer, Rescale())  # what was saved wins
            model.load_state_dict(of_model)
            optimizer.load_state_dict(of_optimizer)
            rescaler.load_state_dict(of_rescaler)
        train(model, optimizer, range(4, 6))
        assert held(optimizer, 0.5)
        train(model, optimizer, range(6, 8))
        runs.append(list(model.parameters()))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda rescaler: pickle.loads(pickle.dumps(rescaler))])
def test_copies_are_complete(how: Callable[[Any], Any]) -> None:
    """A copy brings its optimizer along and follows that one, whether parameters were named or not."""
    for named in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rescaler = WeightRescaler(optimizer, Rescale(every=2), matrices(model)[:2] if named else None)
        train(model, optimizer, range(1))
        other = how(rescaler)
        assert other.optimizer is not optimizer
        (group,), (theirs,) = optimizer.param_groups, other.optimizer.param_groups
        for step in range(3):
            for p, q in zip(group["params"], theirs["params"], strict=True):
                torch.manual_seed(step)
                p.grad = torch.randn(p.shape)
                q.grad = p.grad.clone()
            optimizer.step()
            other.optimizer.step()
        assert all(map(torch.equal, group["params"], theirs["params"]))
        assert [norm_deviation(w, (1,), 1.0) < 1e-6 for w in weights(other.optimizer)] == [True, True, not named]


def test_groups_that_come_and_change() -> None:
    """They are followed: new ones are rescaled too, unless parameters were named; what cannot be is refused first."""
    model, more = network(), nn.Parameter(torch.randn(4, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rescaler = WeightRescaler(optimizer, Rescale(axis=1))
    chosen = torch.optim.SGD(network().parameters(), lr=0.1)
    only = WeightRescaler(chosen, Rescale(), chosen.param_groups[0]["params"][0])
    for one in (optimizer, chosen):
        one.add_param_group({"params": [nn.Parameter(more.detach().clone())]})
        for group in one.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape)
        one.step()
    assert held(optimizer, 1.0)
    assert [norm_deviation(w, (1,), 1.0) < 1e-6 for w in weights(chosen)] == [True, False, False, False]
    assert len(rescaler.state_dict()["param_groups"]) == len(only.state_dict()["param_groups"]) == 2

    before = [p.detach().clone() for p in model.parameters()]
    lazy = nn.LazyLinear(3)
    optimizer.add_param_group({"params": [lazy.weight]})
    with pytest.raises(ValueError, match=r"WeightRescaler: parameter params\[2\]\[0\] .* has no shape yet"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.param_groups.pop()
    optimizer.step()
    del optimizer.param_groups[1]
    optimizer.step()
    assert set(map(id, rescaler._projector.state)) <= set(map(id, model.parameters()))


def test_the_learning_rate_decides_whether_at_all() -> None:
    """As in the optimizers: none at 0, as a number and as a tensor. Such a step does not count, either."""
    for lr in (0.0, torch.tensor(0.0), torch.tensor(0.0, dtype=torch.float64)):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=0.1, foreach=not isinstance(lr, float))
        rescaler = WeightRescaler(optimizer, Rescale())
        before = [w.clone() for w in weights(optimizer)]
        train(model, optimizer, range(2))
        assert all(map(torch.equal, before, weights(optimizer)))
        assert not rescaler.state_dict()["state"]
        if isinstance(lr, Tensor):
            lr.fill_(0.1)
        else:
            optimizer.param_groups[0]["lr"] = 0.1
        train(model, optimizer, range(2))
        assert held(optimizer, 1.0)


def test_what_takes_no_step_is_not_projected() -> None:
    """Parameters without a gradient, and those that are complex or have one dimension; sparse gradients are fine."""
    embedding, idle = nn.Embedding(7, 5, sparse=True), nn.Parameter(torch.randn(3, 4))
    turns = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
    optimizer = torch.optim.SGD([embedding.weight, idle, turns, nn.Parameter(torch.ones(3))], lr=0.1)
    rescaler = WeightRescaler(optimizer, Rescale())
    before = idle.detach().clone(), turns.detach().clone()
    for _ in range(2):
        (embedding(torch.tensor([1, 2])).sum() + turns.abs().sum()).backward()
        optimizer.step()
    assert torch.equal(idle, before[0])
    assert not torch.equal(turns, before[1])
    assert norm_deviation(embedding.weight.detach(), (1,), 1.0) < 1e-6
    assert list(rescaler.state_dict()["state"]) == [0]
    version = idle._version
    optimizer.step()
    assert idle._version == version


def test_remove_and_several() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, second, third = matrices(model)
    one = WeightRescaler(optimizer, Rescale(target=2.0), [first, second])
    two = WeightRescaler(optimizer, Rescale(axis="tensor"), third)
    train(model, optimizer, range(2))
    assert norm_deviation(first.detach(), (1,), 2.0) < 1e-6 > norm_deviation(third.detach(), (0, 1), 1.0)
    one.remove()
    one.remove()
    train(model, optimizer, range(2))
    assert norm_deviation(first.detach(), (1,), 2.0) > 1e-3
    assert norm_deviation(third.detach(), (0, 1), 1.0) < 1e-6
    assert "SGD" in repr(two)
    assert "axis='tensor'" in repr(two)


class Loud(torch.optim.SGD):
    """Its step is that of its base, whose hooks PyTorch runs as well; and it may fail."""

    fails = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        if self.fails:
            raise RuntimeError("no step")
        return super().step(closure)


def test_a_step_that_is_that_of_its_base_is_one_step() -> None:
    torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)  # from here on PyTorch wraps the base's step too
    model = network()
    optimizer = Loud(model.parameters(), lr=0.1)
    rescaler = WeightRescaler(optimizer, Rescale(every=2))
    train(model, optimizer, range(1))
    assert not held(optimizer, 1.0)
    optimizer.fails = True
    with pytest.raises(RuntimeError, match="no step"):
        train(model, optimizer, range(1))
    optimizer.fails = False
    train(model, optimizer, range(1, 2))
    assert held(optimizer, 1.0)
    assert {state["step"].item() for state in rescaler.state_dict()["state"].values()} == {2.0}


def test_gradients_that_hooks_free_and_schedulers_around() -> None:
    """What others put around the step or behind it changes nothing, before the rescaler and after it."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: rescaled.append(all(p.grad is not None for p in model.parameters())))
    rescaled: list[bool] = []
    schedules: list[Any] = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]
    rescaler = WeightRescaler(optimizer, Rescale())
    schedules.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
    train(model, optimizer, range(2))
    for schedule in schedules:
        schedule.step()
    assert held(optimizer, 1.0)
    assert rescaled == [True, True]
    rescaler.remove()
    train(model, optimizer, range(2, 4))
    assert not held(optimizer, 1.0)


def test_checkpoints_of_torch_distributed_take_no_step_of_it() -> None:
    """They take one of the optimizer, with a learning rate of 0, wherever it has no state."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    runs = []
    for saves in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rescaler = WeightRescaler(optimizer, Rescale(every=4))
        for step in range(6):
            train(model, optimizer, range(step, step + 1))
            if saves:
                optimizer.zero_grad()
                get_optimizer_state_dict(model, optimizer)
        assert {state["step"].item() for state in rescaler.state_dict()["state"].values()} == {6.0}
        runs.append(list(model.parameters()))
    assert all(map(torch.equal, *runs))


def test_groups_that_come_after_a_checkpoint() -> None:
    """They have the options that were loaded; and a state dict is that of the groups as they are now."""
    saved = WeightRescaler(torch.optim.SGD(network().parameters(), lr=0.1), Rescale(target=3.0)).state_dict()
    optimizer = torch.optim.SGD(network().parameters(), lr=0.1)
    rescaler = WeightRescaler(optimizer, Rescale())
    rescaler.load_state_dict(saved)
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(4, 5))]})
    assert [group["rescale"]["target"] for group in rescaler.state_dict()["param_groups"]] == [3.0, 3.0]
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape)
    optimizer.step()
    assert held(optimizer, 3.0)


class Lookahead(Optimizer):
    """Holds another optimizer, and goes half way back after each of its steps."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        before = [p.clone() for p in self.param_groups[0]["params"]]
        self.optimizer.step()
        for param, old in zip(self.param_groups[0]["params"], before, strict=True):
            param.lerp_(old, 0.5)


def test_an_optimizer_that_holds_another_one() -> None:
    """The projection comes after all that its step does, not in between."""
    model = network()
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1))
    WeightRescaler(optimizer, Rescale())
    train(model, optimizer, range(2))
    assert held(optimizer, 1.0)


def test_a_parameter_that_was_asked_for_and_is_replaced() -> None:
    """As by code that puts its own in the place of a model's."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    WeightRescaler(optimizer, Rescale(), matrices(model))
    mine = optimizer.param_groups[0]["params"]
    place = next(i for i, param in enumerate(mine) if param is matrices(model)[0])
    mine[place] = nn.Parameter(mine[place].detach().clone())
    with pytest.warns(UserWarning, match=r"params\[0\] \(shape \(12, 6\)\) is none of the optimizer's any more"):
        optimizer.step()


def test_targets_beyond_the_range_of_a_dtype() -> None:
    weight = nn.Parameter(torch.ones(2, 3, dtype=torch.float16))
    says = r"\(shape \(2, 3\)\): a target of 1e\+06 is beyond torch.float16, whose largest number is 65504"
    with pytest.raises(ValueError, match=says):
        WeightRescaler(torch.optim.SGD([weight], lr=0.1), Rescale(target=1e6))
    with pytest.raises(ValueError, match=says):
        fastwrs.SGD([weight], lr=0.1, rescale=Rescale(target=1e6))
    with pytest.raises(ValueError, match=r"tensors\[0\] of shape \(2, 3\): a target of 1e\+06 is beyond"):
        fastwrs.rescale_(weight, target=1e6)
    assert bool((weight == 1).all())


def test_bad_arguments() -> None:
    model = network()
    with pytest.raises(ValueError, match=r"WeightRescaler: param_groups\[0\] is differentiable"):
        WeightRescaler(torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True), Rescale())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bad: Any
    with pytest.raises(TypeError, match="optimizer must be an Optimizer, got Sequential"):
        WeightRescaler(model, Rescale())  # type: ignore[arg-type]
    for bad in (None, 1.0, "out", {"axis": "out"}):
        with pytest.raises(TypeError, match=r"rescale must be a fastwrs\.Rescale, got"):
            WeightRescaler(optimizer, bad)
    with pytest.raises(TypeError, match=r"params\[0\] must be a tensor, got str"):
        WeightRescaler(optimizer, Rescale(), ["0.weight"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"params\[1\] \(shape \(2, 2\)\) is none of the optimizer's"):
        WeightRescaler(optimizer, Rescale(), [matrices(model)[0], nn.Parameter(torch.ones(2, 2))])
    bias = next(p for p in model.parameters() if p.ndim == 1)
    with pytest.raises(ValueError, match=r"WeightRescaler: parameter params\[0\]\[0\] \(shape \(12,\)\): axis 'out'"):
        WeightRescaler(optimizer, Rescale(), [bias])
    named = torch.optim.SGD(model.named_parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"WeightRescaler: parameter '0\.weight' \(shape \(12, 6\)\): axis 2 has"):
        WeightRescaler(named, Rescale(axis=2))
    with pytest.raises(ValueError, match="there is nothing to rescale"):
        WeightRescaler(torch.optim.SGD([bias], lr=0.1), Rescale())
    with pytest.raises(ValueError, match="no such backend"):
        WeightRescaler(optimizer, Rescale(), backend="fast")
    assert "step" not in vars(optimizer)
    rescaler = WeightRescaler(optimizer, Rescale())
    none = rescaler.state_dict()
    none["param_groups"][0]["rescale"] = None
    wrong: Any
    for wrong in (optimizer.state_dict(), fastwrs.SGD(model.parameters(), lr=0.1).state_dict(), {"state": {}}, none, 3):
        with pytest.raises((ValueError, KeyError, TypeError), match="state"):
            rescaler.load_state_dict(wrong)
    with pytest.raises(ValueError, match="it is not that of WeightRescaler"):
        rescaler.load_state_dict(fastwrs.AdamP(matrices(model), rescale=Rescale()).state_dict())
    with pytest.raises(TypeError, match="shallow copy would rescale the same optimizer once more"):
        copy.copy(rescaler)
    rescaler.remove()
    for bad, message in ((3, "params must be tensors, got int"), ([], "params is empty")):
        with pytest.raises((TypeError, ValueError), match=message):
            WeightRescaler(optimizer, Rescale(), bad)
    base = torch.randn(8, 3)
    views = [nn.Parameter(base[:5]), nn.Parameter(base[3:])]
    with pytest.raises(ValueError, match=r"params\[0\]\[0\] .* and parameter params\[0\]\[1\] .* share memory"):
        WeightRescaler(torch.optim.SGD(views, lr=0.1), Rescale())
    flat = nn.Parameter(torch.randn(12))
    flat._is_flat_param = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"params\[0\]\[1\] .*flat parameter of FSDP1"):
        WeightRescaler(torch.optim.SGD([matrices(model)[0], flat], lr=0.1), Rescale())
    with pytest.raises(ValueError, match=r"dtype torch.float8_e4m3fn is not supported"):
        WeightRescaler(torch.optim.SGD([nn.Parameter(torch.ones(2, 2).to(torch.float8_e4m3fn))]), Rescale())


@pytest.mark.parametrize("call", [fastwrs.rescale_, fastwrs.channel_norms])
def test_what_is_no_tensor_or_has_no_shape_yet(call: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r": tensors must be a tensor or several, got NoneType"):
        call(None)
    with pytest.raises(ValueError, match=r": tensors\[1\] has no shape yet: run the model once before"):
        call([torch.ones(2, 2), nn.LazyLinear(3).weight])
