"""Lane 1: the oracle against torch.optim in fp64, numbers worked out by hand, and what the papers say must hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from cases import DTYPES, OPTIONS, PROJECTIONS, Case, TensorCase
from torch import Tensor
from torch.nn import functional as F

from fastwrs import reference
from fastwrs.spec import MEASURED, NO_STOP, RULES

pytestmark = pytest.mark.oracle


def record(rule: str, **values: float) -> dict[str, float]:
    """A record with nothing switched on, and these values."""
    common = {"lr_tensor": -1, "stop": NO_STOP, "target": 1, "power": 1}
    return {h.name: float((common | values).get(h.name, 0)) for h in RULES[rule].record}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def descend(
    rule: str, w: Tensor, gradients: Iterable[Tensor], hyper: dict[str, float], slots: tuple[str, ...], **more: Any
):
    """Steps of the oracle, with states from zero; yields each result."""
    states = {slot: torch.zeros_like(w) for slot in slots}
    more.setdefault("dims", None)
    for t, g in enumerate(gradients, start=1):
        result = reference.step(rule, w, g, states, t=t, hyper=hyper, **more)
        w, states = result.param, result.states
        yield result


def column(result: reference.Result, name: str) -> Tensor:
    assert result.measured is not None
    return result.measured[:, MEASURED.index(name)]


# ---- torch.optim ----------------------------------------------------------------------------------------------------

SGD = [
    {"momentum": m, "dampening": d, "nesterov": n, "weight_decay": w, "maximize": x}
    for m, d, n, w, x in itertools.product((0, 0.9), (0, 0.3), (False, True), (0, 0.05), (False, True))
    if not (n and (not m or d)) and not (d and not m)
]
ADAM = [
    {"amsgrad": a, "weight_decay": w, "maximize": x, "betas": b, "eps": e}
    for a, w, x, (b, e) in itertools.product(
        (False, True), (0, 0.05), (False, True), (((0.9, 0.999), 1e-8), ((0.5, 0.8), 1e-2), ((0.0, 0.0), 1e-8))
    )
]


@pytest.mark.parametrize(
    ("kind", "options"),
    [(torch.optim.SGD, o) for o in SGD] + [(k, o) for k in (torch.optim.Adam, torch.optim.AdamW) for o in ADAM],
    ids=lambda v: v.__name__ if isinstance(v, type) else "-".join(f"{name}={value}" for name, value in v.items()),
)
def test_agrees_with_torch_over_20_steps(kind: Any, options: dict[str, Any]) -> None:
    start, gradients = randn(5, 7), [randn(5, 7, seed=k) for k in range(1, 21)]
    theirs = start.clone().requires_grad_()
    optimizer = kind([theirs], lr=0.05, foreach=False, **options)
    numbers = {name: float(value) for name, value in options.items() if name != "betas"} | {"lr": 0.05}
    if kind is torch.optim.SGD:
        rule, slots = "sgd", RULES["sgd"].slots_for(options)
    else:
        rule, slots = "adam", RULES["adam"].slots_for(options)
        numbers |= {"beta1": options["betas"][0], "beta2": options["betas"][1]}
        numbers["decoupled_weight_decay"] = kind is torch.optim.AdamW
    ours = descend(rule, start, gradients, record(rule, **numbers), slots)
    for g, result in zip(gradients, ours, strict=True):
        theirs.grad = g.clone()
        optimizer.step()
        # 20 steps, each a few roundings of numbers of the size of w or lr * u
        torch.testing.assert_close(result.param, theirs.detach(), rtol=1e-14, atol=1e-14)
        for slot in slots:
            torch.testing.assert_close(result.states[slot], optimizer.state[theirs][slot], rtol=1e-14, atol=1e-14)
    assert (result.param - start).abs().max() > 0.1


def test_without_slots_there_is_no_momentum_and_no_amsgrad() -> None:
    assert RULES["sgd"].slots_for({"momentum": 0}) == ()
    w, g = randn(3), randn(3, seed=1)
    step = reference.step("sgd", w, g, {}, t=2, hyper=record("sgd", lr=0.1, momentum=0.9), dims=None)
    assert step.states == {}
    assert torch.equal(step.param, w - 0.1 * g)


# ---- numbers worked out by hand -------------------------------------------------------------------------------------


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def approx(tensor: Tensor, *values: float) -> bool:
    return tensor.flatten().tolist() == pytest.approx(list(values), rel=1e-14)


def test_sgd_by_hand() -> None:
    hyper = record("sgd", lr=0.1, momentum=0.5, dampening=0.25, weight_decay=0.5)
    step = reference.step("sgd", one(4), one(1), {"momentum_buffer": one(8)}, t=3, hyper=hyper, dims=None)
    # g = 1 + 0.5 * 4 = 3; buf = 0.5 * 8 + 0.75 * 3 = 6.25; w = 4 - 0.625
    assert approx(step.states["momentum_buffer"], 6.25)
    assert approx(step.param, 3.375)
    first = reference.step("sgd", one(4), one(1), {"momentum_buffer": one(math.nan)}, t=1, hyper=hyper, dims=None)
    assert approx(first.states["momentum_buffer"], 3)  # no dampening, and the buffer is not read
    assert approx(first.param, 3.7)
    fresh = reference.step("sgd", one(4), one(1), {"momentum_buffer": one(9)}, t=9, first=True, hyper=hyper, dims=None)
    assert approx(fresh.param, 3.7)
    hyper = record("sgd", lr=0.1, momentum=0.5, nesterov=1, maximize=1)
    step = reference.step("sgd", one(4), one(-3), {"momentum_buffer": one(8)}, t=2, hyper=hyper, dims=None)
    # g = 3; buf = 4 + 3 = 7; u = 3 + 3.5 = 6.5
    assert approx(step.update, 6.5)
    assert approx(step.grad, -3)
    assert approx(step.param, 3.35)


def test_adam_by_hand() -> None:
    hyper = record("adam", lr=0.5, beta1=0.5, beta2=0.75, eps=1, weight_decay=0.25)
    states = {"exp_avg": one(2), "exp_avg_sq": one(5)}
    step = reference.step("adam", one(8), one(1), states, t=2, hyper=hyper, dims=None)
    # g = 1 + 2 = 3; m = 1 + 1.5 = 2.5; v = 3.75 + 2.25 = 6; m^ = 2.5 / 0.75; v^ = 6 / 0.4375
    assert approx(step.states["exp_avg"], 2.5)
    assert approx(step.states["exp_avg_sq"], 6)
    u = (2.5 / 0.75) / (math.sqrt(6 / 0.4375) + 1)
    assert approx(step.update, u)
    assert approx(step.param, 8 - 0.5 * u)
    decoupled = {**hyper, "decoupled_weight_decay": 1.0}
    step = reference.step("adam", one(8), one(1), states, t=2, hyper=decoupled, dims=None)
    u = (1.5 / 0.75) / (math.sqrt(4 / 0.4375) + 1)  # m = 1.5, v = 3.75 + 0.25
    assert approx(step.param, 8 * (1 - 0.125) - 0.5 * u)
    states["max_exp_avg_sq"] = one(9)
    step = reference.step("adam", one(8), one(1), states, t=2, hyper=decoupled, dims=None)
    assert approx(step.states["max_exp_avg_sq"], 9)
    assert approx(step.states["exp_avg_sq"], 4)
    assert approx(step.update, (1.5 / 0.75) / (math.sqrt(9 / 0.4375) + 1))


def test_first_step_of_adam_has_the_size_of_the_learning_rate() -> None:
    """At t = 1 the corrected moments are g and g squared, so u is the sign of g (Kingma and Ba, section 2.1)."""
    g = randn(50)
    hyper = record("adam", lr=0.1, beta1=0.9, beta2=0.999)
    (step,) = descend("adam", randn(50, seed=1), [g], hyper, ("exp_avg", "exp_avg_sq"))
    torch.testing.assert_close(step.update, g.sign(), rtol=1e-12, atol=0)


def test_grad_scale() -> None:
    w, g = randn(4, 3), randn(4, 3, seed=1)
    hyper = record("sgd", lr=0.1, maximize=1, momentum=0.9)
    plain, scaled = (
        reference.step("sgd", w, g * scale, {"momentum_buffer": w}, t=2, hyper=hyper, dims=(1,), grad_scale=given)
        for scale, given in ((1, None), (64, 64.0))
    )
    assert torch.equal(scaled.grad, g)
    assert torch.equal(scaled.param, plain.param)
    assert torch.equal(column(scaled, "grad_norm"), g.norm(dim=1))


def test_rescale_and_shrink_by_hand() -> None:
    w = torch.tensor([[3.0, 4.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
    assert reference.rescale(w, (1,), 2.0)[:2].tolist() == [[1.2000000476837158, 1.600000023841858], [0, 0]]
    assert reference.rescale(w, (1,))[2:, 1].tolist() == [1, 1]
    assert reference.group_norms(w, (0,)).isfinite().tolist() == [False, True]
    assert approx(reference.group_norms(w[:1], (0, 1)), 5)
    norms = torch.tensor([0.0, 1.0, 4.0, 100.0, math.inf, math.nan], dtype=torch.float64)
    options: dict[str, Any] = {"lr": 0.5, "rate": 0.25}
    assert reference.shrink_factor(norms, power=1, **options).tolist() == [1, 0.875, 0.5, 0, 1, 1]
    assert reference.shrink_factor(norms, power=0.5, **options).tolist() == [1, 0.875, 0.75, 0, 1, 1]
    assert reference.shrink_factor(norms, power=2, **options).tolist() == [1, 0.875, 0, 0, 1, 1]
    assert reference.shrink_factor(norms, power=0, **options).tolist() == [0.875, 0.875, 0.875, 0.875, 1, 1]
    assert reference.shrink_factor(norms, power=-1, **options).tolist() == [1, 0.875, 0.96875, 0.99875, 1, 1]


@pytest.mark.parametrize(
    ("numbers", "steps"),
    [
        ({"every": 1}, [1, 2, 3, 4, 5, 6, 7]),
        ({"every": 3}, [3, 6]),
        ({"every": 2, "start": 3}, [4, 6]),
        ({"every": 2, "start": 4, "stop": 6}, [4]),
        ({"every": 1, "stop": 3}, [1, 2]),
        ({"every": 0}, []),
        ({"every": 1, "lr": 0.0}, []),
    ],
)
def test_when_it_rescales(numbers: dict[str, float], steps: list[int]) -> None:
    hyper = record("sgd", **({"lr": 0.1, "rate": 0.5} | numbers))
    w = randn(3, 4)
    results = {t: reference.step("sgd", w, w, {}, t=t, hyper=hyper, dims=(1,)) for t in range(1, 8)}
    assert [
        t for t, r in results.items() if not torch.equal(column(r, "rescale_factor"), torch.ones(3).double())
    ] == steps
    for t, result in results.items():
        shrinks = t not in steps and hyper["lr"] != 0
        assert bool((column(result, "shrink_factor") < 1).all()) == shrinks


# ---- norm groups ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (4, 3), (3, 1, 2), (0, 3), (3, 0), (2, 3, 0)])
def test_groups_are_those_of_vector_norm(shape: tuple[int, ...]) -> None:
    w = randn(*shape)
    for count in range(1, len(shape) + 1):
        for dims in itertools.combinations(range(len(shape)), count):
            norms = reference.group_norms(w, dims)
            torch.testing.assert_close(norms, torch.linalg.vector_norm(w, dim=dims), rtol=1e-15, atol=0)
            again = torch.linalg.vector_norm(reference.rescale(w, dims, 3.0), dim=dims)
            torch.testing.assert_close(again, 3.0 * (norms > 0).double(), rtol=1e-14, atol=0)


def test_measured_rows_are_row_major_and_mean_what_they_say() -> None:
    w, g = randn(4, 3, 5), randn(4, 3, 5, seed=1)
    hyper = record("sgd", lr=0.1, every=1, target=2)
    step = reference.step("sgd", w, g, {}, t=1, hyper=hyper, dims=(1,))
    updated = w - 0.1 * g
    expected = {
        "norm_before": w.norm(dim=1),
        "norm_updated": updated.norm(dim=1),
        "norm_after": torch.full((4, 5), 2.0).double(),
        "grad_norm": g.norm(dim=1),
        "update_norm": g.norm(dim=1),
        "effective_grad_norm": g.norm(dim=1) / w.norm(dim=1),
        "rescale_factor": 2 / updated.norm(dim=1),
        "shrink_factor": torch.ones(4, 5).double(),
    }
    for name in MEASURED:
        torch.testing.assert_close(column(step, name), expected[name].flatten(), rtol=1e-14, atol=0)


def test_norms_do_not_overflow_in_fp16_nor_drift_in_fp32() -> None:
    assert float(reference.group_norms(torch.full((1, 4096), 8.0, dtype=torch.float16), (1,))) == 512
    ones = torch.full((2**24,), 0.1)
    assert float(reference.group_norms(ones, (0,))) == pytest.approx(0.1 * 4096, rel=1e-7)


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
def test_follows_the_dtype_and_leaves_its_inputs_alone(dtypes: tuple[str, str, str]) -> None:
    for option, layout in itertools.product(("sgd.all", "adam.all"), ("c", "tr", "gap")):
        tensor = TensorCase((5, 6), layouts=(layout, layout, layout))
        call = Case("one", option, (tensor,), dtypes, (tuple(PROJECTIONS["rescale"].items()),)).build()
        before = [buffer.clone() for buffer, _ in call.buffers]
        for dtype in (None, torch.float32, torch.float64):
            inputs = (call.rule, call.params[0], call.grads[0], call.states_of(0))
            step = reference.step(*inputs, t=3, hyper=call.case.hyper(0), dims=(1,), dtype=dtype)
            found = [step.param, step.grad, step.update, column(step, "norm_after"), *step.states.values()]
            assert {tensor.dtype for tensor in found} == {dtype or reference.compute_dtype(call.params[0].dtype)}
        for old, (buffer, _) in zip(before, call.buffers, strict=True):
            assert torch.equal(old.nan_to_num(nan=9.0), buffer.nan_to_num(nan=9.0))


@pytest.mark.parametrize("option", OPTIONS)
def test_a_nan_stays_in_its_group(option: str) -> None:
    tensor = TensorCase((6, 5, 3), "out")
    call = Case("one", option, (tensor,), DTYPES[1], (tuple(PROJECTIONS["rescale"].items()),)).build()
    run = {"t": 3, "hyper": call.case.hyper(0), "dims": (1, 2)}
    clean = reference.step(call.rule, call.params[0], call.grads[0], call.states_of(0), **run)
    call.grads[0][2, 1, 1] = math.nan
    dirty = reference.step(call.rule, call.params[0], call.grads[0], call.states_of(0), **run)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(dirty.param[others], clean.param[others])
    assert int(dirty.param.isnan().sum()) == 1
    assert float(column(dirty, "rescale_factor")[2]) == 1


# ---- the papers -----------------------------------------------------------------------------------------------------


def loss(w: Tensor) -> Tensor:
    """A scale-invariant loss, as of a layer before BatchNorm: only the directions of the rows matter."""
    hidden = randn(64, w.shape[1], seed=7) @ w.T
    normalized = (hidden - hidden.mean(0)) / hidden.std(0, correction=0)
    return (normalized - randn(64, w.shape[0], seed=8)).square().mean()


def gradient(w: Tensor) -> Tensor:
    w = w.detach().clone().requires_grad_()
    return torch.autograd.grad(loss(w), w)[0]


def test_algorithm_1_sets_unit_norms_every_tau_steps() -> None:
    """Liu et al., Algorithm 1: rows have norm 1 after the steps with t % tau == 0."""
    w, hyper = 3 * randn(5, 9), record("adam", lr=0.05, beta1=0.9, beta2=0.999, eps=1e-8, every=4)
    states = {slot: torch.zeros_like(w) for slot in ("exp_avg", "exp_avg_sq")}
    for t in range(1, 13):
        step = reference.step("adam", w, gradient(w), states, t=t, hyper=hyper, dims=(1,))
        w, states = step.param, step.states
        assert bool(torch.allclose(w.norm(dim=1), torch.ones(5).double(), rtol=1e-14, atol=0)) == (t % 4 == 0)


def test_rescaling_keeps_directions_and_so_the_loss() -> None:
    w, hyper = randn(5, 9), record("sgd", lr=0.3, every=1, target=0.25)
    plain = reference.step("sgd", w, gradient(w), {}, t=1, hyper={**hyper, "every": 0}, dims=(1,))
    scaled = reference.step("sgd", w, gradient(w), {}, t=1, hyper=hyper, dims=(1,))
    torch.testing.assert_close(F.normalize(plain.param), F.normalize(scaled.param), rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(loss(plain.param), loss(scaled.param), rtol=1e-13, atol=0)


def test_wrs_ic_normalizes_every_kernel_position() -> None:
    """Liu et al., section VI: W[i, j, :, s] has norm 1, in PyTorch's order weight[s, :, i, j]."""
    w = reference.rescale(randn(4, 3, 2, 2), (1,))
    for s, i, j in itertools.product(range(4), range(2), range(2)):
        assert float(w[s, :, i, j].norm()) == pytest.approx(1, rel=1e-15)


def test_weight_norms_grow_by_the_squared_step() -> None:
    """Corollary 3.3: on a scale-invariant loss g is orthogonal to w, so SGD adds lr ** 2 * |g| ** 2 to |w| ** 2."""
    w = randn(5, 9)
    for t in range(1, 6):
        g = gradient(w)
        assert float((g * w).sum(1).abs().max()) < 1e-14
        step = reference.step("sgd", w, g, {}, t=t, hyper=record("sgd", lr=0.3), dims=(1,))
        growth = column(step, "norm_after") ** 2 - column(step, "norm_before") ** 2
        torch.testing.assert_close(growth, 0.09 * column(step, "grad_norm") ** 2, rtol=1e-10, atol=1e-14)
        w = step.param


def test_the_gradient_is_inverse_to_the_norm() -> None:
    """Equation 5; so the effective gradient norm |g| / |w| falls with the square of the norm."""
    w = randn(5, 9)
    small, large = (
        reference.step("sgd", k * w, gradient(k * w), {}, t=1, hyper=record("sgd", lr=0.1), dims=(1,)) for k in (1, 10)
    )
    torch.testing.assert_close(column(small, "grad_norm"), 10 * column(large, "grad_norm"), rtol=1e-12, atol=0)
    ratio = column(small, "effective_grad_norm") / column(large, "effective_grad_norm")
    torch.testing.assert_close(ratio, torch.full((5,), 100.0).double(), rtol=1e-12, atol=0)


def test_weight_decay_shrinks_norms_exponentially() -> None:
    """Corollary 3.2: |w|^2 falls as exp(-2 lambda t), where time is the sum of small learning rates."""
    w, hyper = randn(5, 9), record("sgd", lr=1e-4, weight_decay=0.5)
    *_, last = descend("sgd", w, [torch.zeros_like(w)] * 1000, hyper, (), dims=(1,))
    expected = w.norm(dim=1) ** 2 * math.exp(-2 * 0.5 * 0.1)
    torch.testing.assert_close(column(last, "norm_after") ** 2, expected, rtol=1e-5, atol=0)


def test_effective_gradient_of_adam_is_its_step_before_the_learning_rate() -> None:
    """Fig. 2a: the normalized gradient is m-hat / (sqrt(v-hat) + eps)."""
    w, gradients = randn(4, 6), [randn(4, 6, seed=k) for k in range(1, 4)]
    hyper = record("adam", lr=0.1, beta1=0.9, beta2=0.99, eps=1e-3)
    results = list(descend("adam", w, gradients, hyper, ("exp_avg", "exp_avg_sq"), dims=(1,)))
    u = (results[1].param - results[2].param) / 0.1
    torch.testing.assert_close(column(results[2], "update_norm"), u.norm(dim=1), rtol=1e-13, atol=0)
    effective = u.norm(dim=1) / results[1].param.norm(dim=1)
    torch.testing.assert_close(column(results[2], "effective_grad_norm"), effective, rtol=1e-13, atol=0)


def test_shrink_of_power_0_is_weight_decay_after_the_update() -> None:
    """With power 0 the factor is 1 - lr * rate whatever the norm, as for AdamW's decay applied after the step."""
    w, g = randn(4, 6), randn(4, 6, seed=1)
    hyper = record("sgd", lr=0.1, rate=0.5, power=0)
    step = reference.step("sgd", w, g, {}, t=1, hyper=hyper, dims=(1,))
    torch.testing.assert_close(step.param, (w - 0.1 * g) * (1 - 0.1 * 0.5), rtol=1e-15, atol=0)
    still = reference.step("sgd", w, 0 * g, {}, t=1, hyper=hyper, dims=(1,))
    decay = record("adam", lr=0.1, weight_decay=0.5, decoupled_weight_decay=1, beta1=0.9, beta2=0.9, eps=1)
    zeros = {slot: torch.zeros_like(w) for slot in ("exp_avg", "exp_avg_sq")}
    decayed = reference.step("adam", w, 0 * g, zeros, t=1, hyper=decay, dims=None)
    torch.testing.assert_close(still.param, decayed.param, rtol=1e-15, atol=0)


def test_aws_shrinks_large_norms_more() -> None:
    """Li et al.: the coefficient is proportional to the magnitude; a group of norm n loses lr * rate * n of itself."""
    w = torch.stack([randn(6), 5 * randn(6, seed=1)])
    hyper = record("sgd", lr=0.1, rate=0.2)
    step = reference.step("sgd", w, torch.zeros_like(w), {}, t=1, hyper=hyper, dims=(1,))
    lost = 1 - column(step, "norm_after") / column(step, "norm_before")
    torch.testing.assert_close(lost, 0.02 * w.norm(dim=1), rtol=1e-13, atol=0)
