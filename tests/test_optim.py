"""The optimizers as users see them: against torch.optim's for-loop, and the behaviour that torch.optim promises."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from parity import assert_close_to_torch, gradients, parameters, run
from tolerances import NORM_BOUND, norm_deviation
from torch import Tensor, nn

import fastwrs

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("backend")]

SGD_OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.03},
    {"lr": 0.03, "weight_decay": 0.07},
    {"lr": 0.02, "momentum": 0.8},
    {"lr": 0.02, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.04},
    {"lr": 0.02, "momentum": 0.8, "nesterov": True, "weight_decay": 0.04},
    {"lr": 0.02, "momentum": 0.8, "maximize": True, "weight_decay": 0.04},
    {"lr": 0.02, "momentum": 0.8, "foreach": False},
]
ADAM_OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.02},
    {"lr": 0.02, "betas": (0.8, 0.97), "eps": 1e-5, "weight_decay": 0.06},
    {"lr": 0.02, "betas": (0.8, 0.97), "amsgrad": True, "weight_decay": 0.06},
    {"lr": 0.02, "betas": (0.8, 0.97), "maximize": True, "weight_decay": 0.06},
    {"lr": 0.02, "betas": (0.0, 0.9), "weight_decay": 0.06, "foreach": False},
]
RUNS = [
    *(("SGD", options) for options in SGD_OPTIONS),
    *(("Adam", options) for options in ADAM_OPTIONS),
    ("Adam", {"lr": 0.02, "betas": (0.8, 0.97), "weight_decay": 0.06, "decoupled_weight_decay": True}),
    *(("AdamW", options) for options in ADAM_OPTIONS),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "options"), RUNS, ids=lambda value: str(value))
def test_agrees_with_torch_for_loop(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    a = run(getattr(fastwrs, name)(ours, **options), ours, range(20))
    b = run(getattr(torch.optim, name)(theirs, **{**options, "foreach": False}), theirs, range(20))
    assert_close_to_torch(a, b)
    assert not torch.equal(a[-1][1], a[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tensor_hyperparameters_are_read_in_each_step(dtype: torch.dtype) -> None:
    results = []
    for module, options in ((fastwrs, {}), (torch.optim, {"foreach": False})):
        params = parameters(dtype)
        lr = torch.tensor([0.02], dtype=dtype)
        betas = (torch.tensor(0.8, dtype=dtype), torch.tensor(0.97, dtype=dtype))
        optimizer = module.Adam(params, lr=lr, betas=betas, weight_decay=0.05, **options)
        first = run(optimizer, params, range(7))
        lr.mul_(0.5)
        betas[1].fill_(0.9)
        results.append(first + run(optimizer, params, range(7, 20)))
    assert_close_to_torch(*results)


def test_every_group_has_its_own_tensor_lr() -> None:
    results = []
    for module, options in ((fastwrs, {}), (torch.optim, {"foreach": False})):
        params = parameters()
        groups = [{"params": params[:2], "lr": torch.tensor(0.3)}, {"params": params[2:], "lr": torch.tensor(0.01)}]
        results.append(run(module.AdamW([*groups], **options), params, range(5)))
    assert_close_to_torch(*results)


def test_nesterov_with_momentum_taken_to_zero_is_plain_sgd() -> None:
    results = []
    for module, options in ((fastwrs, {}), (torch.optim, {"foreach": False})):
        params = parameters()
        optimizer = module.SGD(params, lr=0.1, momentum=0.9, nesterov=True, **options)
        history = run(optimizer, params, range(4))
        optimizer.param_groups[0]["momentum"] = 0.0
        results.append(history + run(optimizer, params, range(4, 8)))
    assert_close_to_torch(*results)


def test_a_momentum_buffer_put_in_by_hand_has_had_its_first_step() -> None:
    (param,) = parameters(shapes=((3, 4),))
    optimizer = fastwrs.SGD([param], lr=0.1, momentum=0.5, dampening=0.5)
    optimizer.state[param]["momentum_buffer"] = torch.full((3, 4), 2.0)
    param.grad = torch.full((3, 4), 4.0)
    optimizer.step()
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.full((3, 4), 3.0))
    assert optimizer.state[param]["step"].item() == 2


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_signature_is_torchs_with_keyword_only_options_behind_it(name: str) -> None:
    ours = list(inspect.signature(getattr(fastwrs, name)).parameters.values())
    theirs = list(inspect.signature(getattr(torch.optim, name)).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[: len(theirs)]] == [(p.name, p.kind, p.default) for p in theirs]
    shifted = ["shifted_l2"] if name == "SGD" else []
    assert [p.name for p in ours[len(theirs) :]] == ["rescale", "shrink", *shifted, "state_dtype", "backend"]
    assert {p.kind for p in ours[len(theirs) :]} == {inspect.Parameter.KEYWORD_ONLY}


def test_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    param = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = fastwrs.SGD([param], lr=0.25)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 25.0
    assert param.tolist() == [1.5, 2.0]


def test_hooks_and_profiler_see_the_step() -> None:
    params = parameters()
    optimizer = fastwrs.AdamW(params)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(optimizer, params, range(1))
    assert calls == ["before", "after"]
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("axis", ["out", "in", "tensor", 0, (1, -1)])
def test_rescale_runs_in_its_window(axis: Any) -> None:
    (param,) = params = parameters(shapes=((4, 3, 3, 3),))
    dims = {"out": (1, 2, 3), "in": (1,), "tensor": (0, 1, 2, 3), 0: (0,), (1, -1): (1, 3)}[axis]
    rescale = fastwrs.Rescale(every=2, axis=axis, target=1.7, start=3, stop=7)
    optimizer = fastwrs.AdamW(params, lr=0.03, rescale=rescale)
    projected = []
    for step in range(9):
        run(optimizer, params, range(step, step + 1))
        projected.append(norm_deviation(param.detach(), dims, 1.7) <= NORM_BOUND[torch.float32])
    assert [t for t, hit in enumerate(projected, 1) if hit] == [4, 6]


def test_shrink_follows_its_formula() -> None:
    (param,) = params = parameters(shapes=((6, 5),))
    optimizer = fastwrs.SGD(params, lr=0.1, shrink=fastwrs.Shrink(0.5, power=2.0))
    before = param.detach().clone()
    after = run(optimizer, params, range(1))[-1][0]
    factor = (1 - 0.1 * 0.5 * before.double().norm(dim=1) ** 2).clamp(min=0)
    (grad,) = gradients(params, 0)
    torch.testing.assert_close(after.double(), factor[:, None] * (before - 0.1 * grad).double(), rtol=1e-6, atol=1e-7)


def test_options_per_group() -> None:
    params = parameters(shapes=((4, 6), (4, 6), (4, 6)))
    groups = [
        {"params": params[0], "rescale": fastwrs.Rescale(target=2.0)},
        {"params": params[1], "rescale": fastwrs.Rescale(axis="tensor"), "lr": 0.5},
    ]
    optimizer = fastwrs.Adam(groups)
    optimizer.add_param_group({"params": [params[2]]})
    run(optimizer, params, range(3), late=0)
    assert norm_deviation(params[0].detach(), (1,), 2.0) <= NORM_BOUND[torch.float32]
    assert norm_deviation(params[1].detach(), (0, 1), 1.0) <= NORM_BOUND[torch.float32]
    assert optimizer.param_groups[2]["rescale"] is None
    assert "rescale: Rescale(every=1, axis='out', target=2.0" in repr(optimizer)


def test_every_parameter_counts_its_own_steps() -> None:
    params = parameters()
    for optimizer in (fastwrs.SGD(params, momentum=0.5), fastwrs.SGD(params), fastwrs.AdamW(params)):
        run(optimizer, params, range(5), late=3)
        steps = [optimizer.state[param]["step"] for param in params]
        assert [step.item() for step in steps] == [5, 2, 5, 5, 5]
        assert {(step.dtype, step.shape, step.device.type) for step in steps} == {(torch.float32, (), "cpu")}
        assert len({step.data_ptr() for step in steps}) == len(params)


def test_momentum_switched_on_later_starts_as_the_gradient() -> None:
    results = []
    for module, options in ((fastwrs, {}), (torch.optim, {"foreach": False})):
        params = parameters()
        optimizer = module.SGD(params, lr=0.1, dampening=0.5, **options)
        history = run(optimizer, params, range(4))
        optimizer.param_groups[0]["momentum"] = 0.9
        results.append(history + run(optimizer, params, range(4, 20)))
    assert_close_to_torch(*results)


def test_late_momentum_stays_fresh_over_a_skipped_step() -> None:
    results = []
    for skip in (True, False):
        params = parameters()
        optimizer = fastwrs.SGD(params, lr=0.1, dampening=0.5)
        run(optimizer, params, range(3))
        optimizer.param_groups[0]["momentum"] = 0.9
        if skip:
            optimizer.found_inf = torch.tensor(2.0)  # type: ignore[attr-defined]
            run(optimizer, params, range(50, 51))
            assert "momentum_buffer" not in optimizer.state[params[0]]
            del optimizer.found_inf  # type: ignore[attr-defined]
        run(optimizer, params, range(3, 6))
        results.append(params)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", ["SGD", "AdamW", "AdamP", "SGDP"])
def test_grad_scaler(name: str) -> None:
    """As without a scaler, with an overflow in the very first step and in a later one; gradients end up unscaled."""
    options = {"lr": 0.1, "momentum": 0.9} if name.startswith("SGD") else {"lr": 0.1}
    params, expected = parameters(shapes=((4, 3), (5,))), parameters(shapes=((4, 3), (5,)))
    optimizer = getattr(fastwrs, name)(params, **options)
    plain = getattr(fastwrs, name)(expected, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # type: ignore[attr-defined]
    for step in range(6):
        overflow = step in (0, 3)
        optimizer.zero_grad()
        loss = sum((p * g).sum() for p, g in zip(params, gradients(params, step), strict=True))
        scaler.scale(loss * float("inf") if overflow else loss).backward()  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
        if not overflow:
            for param, other, grad in zip(params, expected, gradients(params, step), strict=True):
                assert param.grad is not None
                assert torch.equal(param.grad, grad)
                other.grad = grad.clone()
            plain.step()
    assert all(map(torch.equal, params, expected))
    assert optimizer.state[params[0]]["step"].item() == 4


def test_a_skipped_step_does_not_disturb_autograd() -> None:
    w = nn.Parameter(torch.full((3,), 2.0))
    optimizer = fastwrs.AdamW([w], lr=0.1)
    w.grad = torch.ones(3)
    optimizer.step()
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(2.0)  # type: ignore[attr-defined]
    loss = (w * w).sum()
    written = [w, w.grad, *optimizer.state[w].values()]
    versions = [tensor._version for tensor in written]
    optimizer.step()
    assert [tensor._version for tensor in written] == versions
    optimizer.zero_grad()
    loss.backward()
    assert torch.equal(w.grad, 2 * w.detach())  # type: ignore[arg-type]


def test_state_dtype() -> None:
    params = [nn.Parameter(torch.randn(6, 5).to(dtype)) for dtype in (torch.bfloat16, torch.bfloat16)]
    for wanted, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        optimizer = fastwrs.AdamW(params, state_dtype=wanted, rescale=fastwrs.Rescale())
        run(optimizer, params, range(2), late=0)
        assert {optimizer.state[p][key].dtype for p in params for key in ("exp_avg", "exp_avg_sq")} == {expected}
        assert norm_deviation(params[0].detach(), (1,), 1.0) <= NORM_BOUND[torch.bfloat16]


def test_several_dtypes_layouts_and_empty_tensors_in_one_group() -> None:
    params = [
        nn.Parameter(torch.randn(4, 3, 2, 2)),
        nn.Parameter(torch.randn(0, 3)),
        nn.Parameter(torch.randn(4, 3, 2, 2, dtype=torch.float64).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(3, 4).t()),
        nn.Parameter(torch.randn(5).half()),
        nn.Parameter(torch.randn(0)),
    ]
    before = [param.detach().clone() for param in params]
    optimizer = fastwrs.AdamW(params, lr=0.01)
    run(optimizer, params, range(3), late=0)
    for param, old in zip(params, before, strict=True):
        assert param.stride() == old.stride()
        assert not param.numel() or not torch.equal(param, old)
        assert torch.isfinite(param).all()


def test_lr_zero_creates_states_and_changes_nothing() -> None:
    params = parameters(shapes=((4, 3), (5, 2)))
    optimizer = fastwrs.AdamW(params, lr=0.0, rescale=fastwrs.Rescale(), shrink=fastwrs.Shrink(0.3))
    before, after = run(optimizer, params, range(1), late=0)
    assert all(map(torch.equal, before, after))
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_nan_stays_in_its_channel() -> None:
    (param,) = params = parameters(shapes=((4, 6),))
    optimizer = fastwrs.AdamW(params, rescale=fastwrs.Rescale())
    param.grad = torch.ones(4, 6)
    param.grad[2, 3] = float("nan")
    optimizer.step()
    assert param[2].isnan().any()
    others = param.detach()[[0, 1, 3]]
    assert norm_deviation(others, (1,), 1.0) <= NORM_BOUND[torch.float32]
