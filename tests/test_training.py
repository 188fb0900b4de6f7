"""The tools that a training script puts around an optimizer, and a long run with everything that goes wrong in one."""

from __future__ import annotations

import copy
import io
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import tolerances
import torch
from parity import assert_close_to_torch, parameters, run
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

import fastwrs
from fastwrs import reference
from fastwrs.spec import NO_STOP, RULES

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("backend")]

# ---- schedulers -----------------------------------------------------------------------------------------------------

Make = Callable[[torch.optim.Optimizer], Any]
SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.93),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.3, total_iters=6),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=12, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, factor=0.4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.05, step_size_up=4, cycle_momentum=True),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=16),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.002, anneal_epochs=4),
}


def test_no_scheduler_of_torch_is_missing() -> None:
    there = {
        name
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert there - {"LRScheduler"} == set(SCHEDULERS) - {"SWALR"}


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler: str, name: str, kind: str) -> None:
    """The same learning rates (and momentum, where it is scheduled too) and the same weights as in torch."""
    rates, results = [], []
    for module, options in ((fastwrs, {}), (torch.optim, {"foreach": False})):
        params = parameters()
        lr = torch.tensor(0.02, dtype=torch.float64) if kind == "tensor" else 0.02
        momentum = {"momentum": 0.8} if name == "SGD" else {}
        optimizer = getattr(module, name)(params, lr=lr, **momentum, **options)
        driver = SCHEDULERS[scheduler](optimizer)
        history, seen = [], []
        for step in range(15):
            history += run(optimizer, params, range(step, step + 1))
            driver.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            seen.append(float(optimizer.param_groups[0]["lr"]))
        assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == (kind == "tensor")
        rates.append(seen)
        results.append(history)
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1
    assert_close_to_torch(*results)


# ---- averages, clipping, autocast -----------------------------------------------------------------------------------


def small_model() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(16, 6, generator=generator) for _ in range(count)]


def close(ours: nn.Module, theirs: nn.Module) -> None:
    """Gradients of a model amplify the last bits of its weights, so this is no place for ulps.

    The model has no bias in front of its BatchNorm, whose gradient would be nothing but such bits.
    """
    torch.testing.assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averaged_models(kind: str) -> None:
    averages = []
    for module in (fastwrs, torch.optim):
        model = small_model()
        optimizer = module.SGD(model.parameters(), lr=0.1, momentum=0.9)
        multi = swa_utils.get_ema_multi_avg_fn(0.8) if kind == "ema" else None
        average = swa_utils.AveragedModel(model, multi_avg_fn=multi)
        for batch in batches(6):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
        swa_utils.update_bn(batches(2), average)
        averages.append(average)
    close(*averages)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize("foreach", [False, True])
def test_clipped_gradients(name: str, foreach: bool) -> None:
    models = []
    for module in (fastwrs, torch.optim):
        model = small_model()
        optimizer = getattr(module, name)(model.parameters(), lr=0.05)
        for batch in batches(6):
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.02, foreach=foreach)
            assert norm > 0.02
            optimizer.step()
        models.append(model)
    close(*models)


def test_clipping_after_unscale_is_not_unscaled_twice() -> None:
    models = []
    for scaled in (True, False):
        model = small_model()
        optimizer = fastwrs.AdamW(fastwrs.param_groups(model), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)  # type: ignore[attr-defined]
        for batch in batches(6):
            optimizer.zero_grad()
            scaler.scale(model(batch).square().mean()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.02)
            scaler.step(optimizer)
            scaler.update()
        models.append(model)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_bf16_training(weights: torch.dtype) -> None:
    """Autocast over fp32 weights, and a model in bf16 throughout: the loss falls, and rows keep their norm."""
    model = small_model().to(weights)
    groups = fastwrs.param_groups(model, head="skip")
    optimizer = fastwrs.AdamW(groups, lr=0.02)
    losses = []
    for batch in batches(1) * 12:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=weights == torch.float32):
            loss = (model(batch.to(weights)).float() - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    first: Any = model[0]
    assert losses[-1] < 0.7 * losses[0]
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}
    assert tolerances.norm_deviation(first.weight.detach(), (1,), 1.0) <= tolerances.NORM_BOUND[weights]


def test_frozen_parameters_and_zero_grad() -> None:
    model = small_model()
    frozen: Any = model[0]
    frozen.weight.requires_grad_(False)
    before = frozen.weight.clone()
    optimizer = fastwrs.AdamW(fastwrs.param_groups(model), lr=0.1, weight_decay=0.5)
    model(batches(1)[0]).sum().backward()
    optimizer.step()
    assert torch.equal(frozen.weight, before)
    assert frozen.weight not in optimizer.state
    optimizer.zero_grad(set_to_none=False)
    assert all(param.grad is None or not param.grad.any() for param in model.parameters())
    steps = [state["step"].item() for state in optimizer.state.values()]
    optimizer.step()  # a gradient of zeros is a gradient
    assert [state["step"].item() for state in optimizer.state.values()] == [step + 1 for step in steps]
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


# ---- 200 steps of everything ----------------------------------------------------------------------------------------

STEPS, RESUME_AT = 200, 97
SHAPES = ((6, 5, 3, 3), (9, 14), (21,))


@dataclass
class Plan:
    """What happens in the run: the gradients of every step (None: late or missing), and where they overflow."""

    grads: list[list[Tensor | None]]
    overflows: list[bool]
    rates: list[float] = field(default_factory=list)

    @staticmethod
    def of(dtype: torch.dtype) -> Plan:
        dice, generator = random.Random(5), torch.Generator().manual_seed(5)
        grads: list[list[Tensor | None]] = []
        for step in range(STEPS):
            made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3 for shape in SHAPES]
            # The matrix comes late; everything is missing now and then.
            grads.append([None if (k == 1 and step < 40) or dice.random() < 0.1 else g for k, g in enumerate(made)])
        overflows = [step == 0 or dice.random() < 0.08 for step in range(STEPS)]
        rates = [0.02 * 0.5 * (1 + math.cos(math.pi * (step % 60) / 60)) for step in range(STEPS)]
        return Plan(grads, overflows, rates)


@dataclass
class Script:
    """A training script: all that it keeps, and how it saves and resumes."""

    name: str
    options: dict[str, Any]
    rescale: fastwrs.Rescale | None
    params: list[nn.Parameter]

    def __post_init__(self) -> None:
        groups = [{"params": self.params[:2], "rescale": self.rescale}, {"params": self.params[2:]}]
        self.optimizer = getattr(fastwrs, self.name)(groups, lr=0.02, **self.options)
        self.scheduler = lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * (step % 60) / 60))
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=30)  # type: ignore[attr-defined]

    def train(self, plan: Plan, steps: range) -> None:
        for step in steps:
            self.optimizer.zero_grad()
            pairs = [(p, g) for p, g in zip(self.params, plan.grads[step], strict=True) if g is not None]
            if pairs:
                loss = sum((p * g).sum() for p, g in pairs)
                self.scaler.scale(loss * math.inf if plan.overflows[step] else loss).backward()  # type: ignore[arg-type]
                self.scaler.step(self.optimizer)
                self.scaler.update()
            self.scheduler.step()

    def resumed(self) -> Script:
        """A new process, as far as it can tell: everything anew, loaded from a file."""
        parts = ("optimizer", "scheduler", "scaler")
        file = io.BytesIO()
        saved = {"params": [p.detach() for p in self.params], **{n: getattr(self, n).state_dict() for n in parts}}
        torch.save(saved, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        fresh = Script(self.name, {}, None, [nn.Parameter(p.clone()) for p in loaded["params"]])
        for name in parts:
            getattr(fresh, name).load_state_dict(loaded[name])
        return fresh


def oracle_run(plan: Plan, script: Script, start: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights after the whole run by the oracle alone, every tensor kept in ``dtype``. No optimizer, no scaler."""
    rule = RULES[script.optimizer.rule.name]
    record = [hyper.name for hyper in rule.record]
    off = dict.fromkeys(record, 0.0) | {"stop": NO_STOP, "target": 1.0, "power": 1.0}
    numbers = {**script.optimizer.defaults, **script.optimizer.numbers(script.optimizer.defaults)}
    hyper = off | {name: float(numbers[name]) for name in record if name in numbers}
    slots = rule.slots_for(script.optimizer.defaults)
    weights = [tensor.to(dtype) for tensor in start]
    states = [{slot: torch.zeros_like(w) for slot in slots} for w in weights]
    counts = [0] * len(weights)
    for step in range(STEPS):
        for k, grad in enumerate(plan.grads[step]):
            if grad is None or plan.overflows[step]:
                continue
            counts[k] += 1
            rescale = script.rescale if k < 2 else None
            control = {} if rescale is None else {"every": rescale.every, "target": rescale.target}
            dims = None if rescale is None else tuple(range(1, weights[k].ndim))
            done = reference.step(
                rule.name, weights[k], grad.to(dtype), states[k],
                t=counts[k], hyper=hyper | control, dims=dims, lr=plan.rates[step], dtype=dtype,
            )  # fmt: skip
            weights[k], states[k] = done.param, done.states
    return weights


@pytest.mark.parametrize("rescale", [None, fastwrs.Rescale(every=3, target=1.5)], ids=["plain", "every3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}),
        ("SGD", {"momentum": 0.8, "nesterov": True}),
        ("Adam", {"betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.02, "amsgrad": True}),
        ("AdamW", {"betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.1}),
    ],
    ids=str,
)
def test_200_steps_equal_the_oracle(name: str, options: dict[str, Any], dtype: torch.dtype, rescale: Any) -> None:
    plan = Plan.of(dtype)
    assert sum(plan.overflows) > 8 and plan.overflows[0]
    start = [param.detach().clone() for param in parameters(dtype, SHAPES)]
    whole = Script(name, options, rescale, [nn.Parameter(tensor.clone()) for tensor in start])
    first_half = Script(name, options, rescale, [nn.Parameter(tensor.clone()) for tensor in start])
    whole.train(plan, range(STEPS))
    first_half.train(plan, range(RESUME_AT))
    second_half = first_half.resumed()
    second_half.train(plan, range(RESUME_AT, STEPS))
    for one, other in zip(whole.params, second_half.params, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(whole.optimizer.state.values(), second_half.optimizer.state.values(), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    truth = oracle_run(plan, whole, start, torch.float64)
    formula = oracle_run(plan, whole, start, torch.float32)
    for k, param in enumerate(whole.params):
        assert not torch.equal(param, start[k])
        tolerances.check_path(param.detach(), formula[k], truth[k], start[k], f"tensor {k}")


def test_copies_of_a_scheduled_optimizer_stay_apart() -> None:
    params = parameters()
    optimizer = fastwrs.AdamW(params, lr=torch.tensor(0.02), rescale=None)
    run(optimizer, params, range(3))
    twin = copy.deepcopy(optimizer)
    before = [param.detach().clone() for param in twin.param_groups[0]["params"]]
    run(optimizer, params, range(3, 6))
    optimizer.param_groups[0]["lr"].fill_(0.5)
    assert all(map(torch.equal, before, twin.param_groups[0]["params"]))
    assert twin.param_groups[0]["lr"].item() == pytest.approx(0.02)
