"""The epsilon-shifted L2 term of SGD, against its formula worked out here once more, in fp64 and channel by channel."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from copy import deepcopy
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from parity import assert_close_to_torch, gradients, run
from tolerances import Inputs, check, check_path
from torch import Tensor, nn

import fastwrs
from fastwrs import Rescale, Shrink, reference
from fastwrs.spec import NO_STOP, RULES

oracle = pytest.mark.oracle
everywhere = [pytest.mark.cpu, pytest.mark.usefixtures("backend")]


def on_backends(test: Callable[..., None]) -> Callable[..., None]:
    for mark in everywhere:
        test = mark(test)
    return test


LAM, EPS = 0.3, 0.2
SHAPES = ((7, 5), (4, 3, 3, 3), (3, 1), (6,), (), (0, 4), (4, 0))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def term_by_hand(w: Tensor, lam: float, eps: float) -> Tensor:
    """Channel by channel, with Python's numbers."""
    term = torch.zeros_like(w)
    for channel, out in zip(w, term, strict=True) if w.ndim > 1 and w.numel() else ():
        x = channel.flatten().tolist()
        mu = math.fsum(x) / len(x)
        squares = math.fsum((v - mu) ** 2 for v in x)
        factor = 1 - eps / math.sqrt(squares / (len(x) - 1)) if len(x) > 1 and len(set(x)) > 1 else 0.0
        out.copy_(torch.tensor([lam * (factor * (v - mu) + mu) for v in x], dtype=w.dtype).reshape(out.shape))
    return term


# -------------------------------------------------------------------------------------------------------- the oracle


def record(**values: float) -> dict[str, float]:
    usual = {"lr_tensor": -1, "stop": NO_STOP, "target": 1, "power": 1, "shifted_l2_lam": LAM, "shifted_l2_eps": EPS}
    return {h.name: float((usual | values).get(h.name, 0)) for h in RULES["sgd_shifted"].record}


def stepped(w: Tensor, g: Tensor, states: dict[str, Tensor] | None = None, t: int = 1, **values: float) -> Any:
    return reference.step("sgd_shifted", w, g, states or {}, t=t, hyper=record(**values), dims=None)


@oracle
def test_by_hand() -> None:
    w, g = torch.tensor([[1.0, 3.0], [5.0, 5.0]], dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    # mu = 2 and s = sqrt(((-1) ** 2 + 1 ** 2) / 1); the second channel has no s
    factor = 1 - 0.5 / math.sqrt(2)
    result = stepped(w, g, shifted_l2_lam=0.1, shifted_l2_eps=0.5, lr=0.5)
    expected = [0.1 * (2 - factor), 0.1 * (2 + factor), 0.5, 0.5]
    assert result.update.flatten().tolist() == pytest.approx(expected, rel=1e-14)
    assert result.param.flatten().tolist() == pytest.approx([1 - expected[0] / 2, 3 - expected[1] / 2, 4.75, 4.75])
    assert result.added.flatten().tolist() == pytest.approx([0.2, 0.2, 0.5, 0.5])


@oracle
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov", "decay", "maximize"),
    [o for o in itertools.product((0, 0.9), (0, 0.3), (0, 1), (0, 0.05), (0, 1)) if not (o[2] and (not o[0] or o[1]))],
)
def test_the_oracle_is_torchs_sgd_with_the_term_in_its_gradient(
    shape: tuple[int, ...], momentum: float, dampening: float, nesterov: int, decay: float, maximize: int
) -> None:
    theirs = nn.Parameter(randn(*shape))
    options: dict[str, Any] = {"momentum": momentum, "dampening": dampening, "weight_decay": decay}
    optimizer = torch.optim.SGD([theirs], lr=0.1, nesterov=bool(nesterov), maximize=bool(maximize), **options)
    w, states = theirs.detach().clone(), {"momentum_buffer": torch.zeros(shape).double()} if momentum else {}
    for t in range(1, 6):
        g = randn(*shape, seed=t)
        theirs.grad = g + (-1 if maximize else 1) * term_by_hand(theirs.detach(), LAM, EPS)
        optimizer.step()
        result = stepped(w, g, states, t, lr=0.1, nesterov=nesterov, maximize=maximize, **options)
        w, states = result.param, result.states
        assert torch.allclose(w, theirs, rtol=1e-13, atol=1e-14)


@oracle
def test_with_eps_0_it_is_weight_decay_and_with_lam_0_nothing() -> None:
    w, g = randn(4, 3, 2), randn(4, 3, 2, seed=1)
    decayed = reference.step("sgd", w, g, {}, t=1, hyper=record(weight_decay=LAM, lr=0.1), dims=None)
    assert torch.allclose(stepped(w, g, shifted_l2_eps=0, lr=0.1).param, decayed.param, rtol=1e-14)
    w[1, 1, 1] = math.nan  # weights are not looked at then
    assert torch.equal(stepped(w, g, shifted_l2_lam=0).update, g)


@oracle
def test_the_term_pulls_the_standard_deviation_to_eps() -> None:
    """What is left without a gradient: mu goes to 0, and s, by steps of lr * lam * (s - eps), to eps."""
    w = randn(3, 50) * torch.tensor([[1e-3], [0.2], [3.0]], dtype=torch.float64) + 1
    for t in range(1, 400):
        w = stepped(w, torch.zeros_like(w), t=t, lr=0.1).param
    assert w.std(dim=1).tolist() == pytest.approx([EPS] * 3, rel=1e-4)
    assert w.mean(dim=1).abs().max() < 1e-4


# ------------------------------------------------------------------------------------------------------ the optimizer


def weights(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*shape, seed=k).to(dtype)) for k, shape in enumerate(SHAPES)]


class ByHand(torch.optim.SGD):
    """torch's SGD with the term in its gradients."""

    def __init__(self, params: Any, pair: tuple[float, float] = (LAM, EPS), **options: Any) -> None:
        super().__init__(params, foreach=False, **options)
        self.pair = pair

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    sign = -1 if group["maximize"] else 1
                    param.grad = param.grad + sign * term_by_hand(param.detach(), *group.get("pair", self.pair))
        return super().step(closure)


@on_backends
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
        {"momentum": 0.7, "dampening": 0.2, "maximize": True},
        {"weight_decay": 0.1, "maximize": True},
    ],
    ids=str,
)
def test_20_steps_in_fp64(options: dict[str, Any]) -> None:
    ours, theirs = weights(), weights()
    mine = run(fastwrs.SGD(ours, lr=0.05, shifted_l2=(LAM, EPS), **options), ours, range(20))
    other = run(ByHand(theirs, lr=0.05, **options), theirs, range(20))
    for a, b in zip(mine[-1], other[-1], strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


@on_backends
@pytest.mark.parametrize("nesterov", [False, True])
def test_20_steps_in_fp32(nesterov: bool) -> None:
    """Within what the oracle's own formula loses in fp32 on the way."""
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.02}
    ours = weights(torch.float32)
    start = [w.detach().clone() for w in ours]
    end = run(fastwrs.SGD(ours, shifted_l2=(LAM, EPS), **options), ours, range(20), late=0)[-1]
    for k, (got, first) in enumerate(zip(end, start, strict=True)):
        paths = []
        for dtype in (torch.float32, torch.float64):
            w, states = first.to(dtype), {"momentum_buffer": torch.zeros_like(first, dtype=dtype)}
            for t in range(1, 21):
                g = list(gradients(ours, t - 1))[k].to(dtype)
                result = stepped(w, g, states, t, **options)
                w, states = result.param, result.states
            paths.append(w)
        if first.numel():
            check_path(got, *paths, start=first, where=f"tensor {k}")


def left_of(channel: Tensor, lam: float, eps: float) -> list[float]:
    """``w`` without its term, exactly."""
    with localcontext() as context:
        context.prec = 60
        x = [Decimal(v) for v in channel.double().tolist()]
        mu = sum(x, Decimal()) / len(x)
        s = (sum(((v - mu) ** 2 for v in x), Decimal()) / (len(x) - 1)).sqrt()
        return [float(v - Decimal(lam) * ((1 - Decimal(eps) / s) * (v - mu) + mu)) for v in x]


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("first", [1.0, 1.001])
def test_a_mean_far_above_the_deviation_costs_nothing(first: float, dtype: torch.dtype) -> None:
    """The deviation is 1e-4, of which sums of weights and of their squares would leave no digit in fp32.

    Two numbers below 1 are rounded, mu and w - mu, by half an ulp of 1 each, and multiplied by |1 - eps / s| = 9; and
    as much again for the sums, the other factors, and the deviation as fp64 and fp32 see it.
    """
    param = nn.Parameter((1 + 1e-4 * randn(4, 3000)).to(dtype))
    param.data[:, 0] = first
    expected = torch.tensor([left_of(channel, 1.0, 1e-3) for channel in param.detach()], dtype=torch.float64)
    param.grad = torch.zeros_like(param)
    fastwrs.SGD([param], lr=1.0, shifted_l2=(1.0, 1e-3)).step()
    bound = 2 * 10 * torch.finfo(dtype).eps
    assert float((param.detach() - expected).abs().max()) < bound < 0.01 * float(expected.abs().max())


@on_backends
def test_channels_without_a_deviation_get_lam_times_their_mean() -> None:
    constant, single = nn.Parameter(torch.full((2, 3, 3), 0.1)), nn.Parameter(torch.tensor([[2.0], [-3.0], [0.0]]))
    vector, nothing = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.zeros(2, 5))
    params = [constant, single, vector, nothing]
    for param in params:
        param.grad = torch.zeros_like(param)
    fastwrs.SGD(params, lr=1.0, shifted_l2=(0.25, 1e-3)).step()
    assert torch.equal(constant, torch.full((2, 3, 3), 0.1) - 0.25 * torch.full((2, 3, 3), 0.1))
    assert single.flatten().tolist() == [1.5, -2.25, 0.0]
    assert vector.tolist() == [1.0, 2.0]
    assert torch.equal(nothing, torch.zeros(2, 5))


@on_backends
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_what_is_not_finite_stays_in_its_channel(bad: float, place: int) -> None:
    (param, other) = (nn.Parameter(torch.arange(24.0).reshape(4, 2, 3) / 24) for _ in range(2))
    param.data[1].view(-1)[place] = bad
    for p in (param, other):
        p.grad = torch.ones_like(p)
        fastwrs.SGD([p], lr=0.1, momentum=0.9, shifted_l2=(LAM, EPS)).step()
    assert param[1].isnan().all()
    rest = [0, 2, 3]
    assert torch.equal(param[rest], other[rest])
    assert torch.isfinite(other).all()


@on_backends
def test_layouts() -> None:
    w, g = randn(5, 4, 3, 3).float(), randn(5, 4, 3, 3, seed=1).float()
    lies: list[Callable[[Tensor], Tensor]] = [
        torch.clone,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        lambda x: torch.stack([x, x + 1], dim=-1)[..., 0],
    ]
    inputs = Inputs("sgd_shifted", w, g, {}, 1, True, 0.1, record(lr=0.1), None)
    for of_param, of_grad in itertools.product(lies, lies):
        param = nn.Parameter(of_param(w))
        param.grad = of_grad(g)
        fastwrs.SGD([param], lr=0.1, shifted_l2=(LAM, EPS)).step()
        check(inputs, {"param": param.detach(), "grad": param.grad})


PROJECTIONS = {
    "rescale": {"rescale": Rescale(target=1.5)},
    "rescale in": {"rescale": Rescale(axis="in")},
    "rescale tensor": {"rescale": Rescale(axis="tensor", target=2.0)},
    "shrink": {"shrink": Shrink(0.4)},
    "every second": {"rescale": Rescale(every=2), "shrink": Shrink(0.2)},
}


@on_backends
@pytest.mark.parametrize("name", PROJECTIONS)
def test_with_rescale_or_shrink_it_is_that_step_and_then_the_projection(name: str) -> None:
    option = PROJECTIONS[name]
    dims = {"in": (1,), "tensor": (0, 1)}.get((option.get("rescale") or option["shrink"]).axis, (1,))
    param, other = (nn.Parameter(randn(6, 5)) for _ in range(2))
    optimizer = fastwrs.SGD([param], lr=0.05, momentum=0.9, shifted_l2=(LAM, EPS), **option)
    plain = ByHand([other], lr=0.05, momentum=0.9)
    for t in range(1, 7):
        param.grad, other.grad = randn(6, 5, seed=t), randn(6, 5, seed=t)
        before = reference.group_norms(other.detach(), dims)
        optimizer.step()
        plain.step()
        rescale, shrink = option.get("rescale"), option.get("shrink")
        if rescale is not None and t % rescale.every == 0:
            other.data.copy_(reference.rescale(other.detach(), dims, rescale.target))
        elif shrink is not None:
            factor = reference.shrink_factor(before, lr=0.05, rate=shrink.rate, power=shrink.power)
            other.data.mul_(factor.unsqueeze(-1) if dims == (1,) else factor)
        assert torch.allclose(param, other, rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------------------------------------ options, state dicts


@on_backends
def test_settable_per_group_and_at_any_time() -> None:
    """Groups without it take the very steps that they take in an optimizer without it."""
    params, others, alone = weights(torch.float32), weights(torch.float32), weights(torch.float32)
    with_it = [{"params": params[:1], "shifted_l2": (LAM, EPS)}, {"params": params[1:]}]
    mixed = fastwrs.SGD(with_it, lr=0.1, momentum=0.9)
    plain = fastwrs.SGD(others, lr=0.1, momentum=0.9)
    everything = fastwrs.SGD(alone, lr=0.1, momentum=0.9, shifted_l2=(LAM, EPS))
    histories = [run(o, p, range(3), late=0) for o, p in ((mixed, params), (plain, others), (everything, alone))]
    for ours, theirs, third in zip(*histories, strict=True):
        assert torch.equal(ours[0], third[0])
        assert all(map(torch.equal, ours[1:], theirs[1:]))
    assert not torch.equal(params[0], others[0])
    assert not torch.equal(params[1], alone[1])

    with torch.no_grad():
        for param, other in zip(params, others, strict=True):
            param.copy_(other)
            mixed.state[param]["momentum_buffer"].copy_(plain.state[other]["momentum_buffer"])
    mixed.param_groups[0]["shifted_l2"] = None
    assert all(map(torch.equal, run(mixed, params, range(3, 6))[-1], run(plain, others, range(3, 6))[-1]))
    mixed.param_groups[1]["shifted_l2"] = [LAM, EPS]
    after, before = (run(o, p, range(6, 8), late=0)[-1] for o, p in ((mixed, params), (plain, others)))
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


@on_backends
def test_a_list_or_tensors_that_change_are_read_in_each_step() -> None:
    params, others = weights(torch.float32), weights(torch.float32)
    lam = torch.tensor(LAM)
    first = fastwrs.SGD(params, lr=0.1, shifted_l2=(lam, EPS))  # type: ignore[arg-type]
    second = fastwrs.SGD(others, lr=0.1, shifted_l2=[LAM, EPS])  # type: ignore[arg-type]
    run(first, params, range(2))
    run(second, others, range(2))
    lam.fill_(0.5)
    second.param_groups[0]["shifted_l2"][0] = 0.5
    assert all(map(torch.equal, run(first, params, range(2, 4))[-1], run(second, others, range(2, 4))[-1]))


@on_backends
def test_weights_whose_squares_are_too_small_for_the_type() -> None:
    """Their deviation counts as 0, as that of equal weights: nothing becomes infinite."""
    param = nn.Parameter(1e-25 * (1 + randn(2, 64)).float())
    start = param.detach().double()
    param.grad = torch.zeros_like(param)
    fastwrs.SGD([param], lr=0.5, shifted_l2=(0.5, EPS)).step()
    expected = start - 0.5 * 0.5 * start.mean(1, keepdim=True)
    largest = float(start.abs().max())
    assert float((param.detach().double() - expected).abs().max()) < 1e-6 * largest


@on_backends
def test_without_it_nothing_changes() -> None:
    ours, zero, theirs = weights(torch.float32), weights(torch.float32), weights(torch.float32)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    mine = run(fastwrs.SGD(ours, **options), ours, range(5))
    assert_close_to_torch(mine, run(torch.optim.SGD(theirs, **options), theirs, range(5)))
    with_zero = run(fastwrs.SGD(zero, shifted_l2=(0.0, EPS), **options), zero, range(5))
    assert all(map(torch.equal, mine[-1], with_zero[-1]))


BAD: list[tuple[Any, str]] = [
    ((-0.1, 1e-3), r"lam of shifted_l2: -0.1: .*finite and >= 0, got -0.1"),
    ((math.inf, 1e-3), "lam of shifted_l2: inf: .*finite and >= 0"),
    ((1e-4, -1e-3), r"eps of shifted_l2: -0.001: .*finite and >= 0"),
    ((1e-4, math.nan), "eps of shifted_l2: nan: .*finite and >= 0"),
    ((1e-4, "much"), "eps of shifted_l2: 'much': it must be a number"),
    ((True, 0), r"Invalid shifted_l2: \(True, 0\): it must be None or two numbers"),
    ((1e-4,), r"Invalid shifted_l2: \(0.0001,\): it must be None or two numbers"),
    (1e-4, "Invalid shifted_l2: 0.0001: it must be None or two numbers"),
    ("12", "Invalid shifted_l2: '12': it must be None or two numbers"),
]


@on_backends
@pytest.mark.parametrize(("value", "message"), BAD, ids=str)
def test_bad_values_are_refused_by_name(value: Any, message: str) -> None:
    params = weights(torch.float32)
    with pytest.raises((ValueError, TypeError), match=message):
        fastwrs.SGD(params, lr=0.1, shifted_l2=value)
    with pytest.raises((ValueError, TypeError), match=message):
        fastwrs.SGD([{"params": params[:1]}, {"params": params[1:], "shifted_l2": value}], lr=0.1)
    optimizer = fastwrs.SGD(params, lr=0.1)
    optimizer.param_groups[0]["shifted_l2"] = value
    before = [param.detach().clone() for param in params]
    with pytest.raises((ValueError, TypeError), match=message):
        run(optimizer, params, range(1))
    assert all(map(torch.equal, before, params))
    saved = fastwrs.SGD(weights(torch.float32), lr=0.1).state_dict()
    saved["param_groups"][0]["shifted_l2"] = value
    optimizer = fastwrs.SGD(params, lr=0.1)
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["shifted_l2"] is None


def test_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        fastwrs.SGD([nn.Parameter(torch.ones(2))], 0.1, 0, 0, 0, False, (LAM, EPS))  # type: ignore[misc]


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@on_backends
def test_state_dict() -> None:
    params = weights(torch.float32)
    groups = [{"params": params[:2], "shifted_l2": (LAM, EPS)}, {"params": params[2:]}]
    optimizer = fastwrs.SGD(groups, lr=0.1, momentum=0.9)
    run(optimizer, params, range(4))
    saved = through_file(optimizer.state_dict())
    assert [group["shifted_l2"] for group in saved["param_groups"]] == [[LAM, EPS], None]
    assert optimizer.param_groups[0]["shifted_l2"] == (LAM, EPS)  # saving does not touch the optimizer

    resumed = [nn.Parameter(param.detach().clone()) for param in params]
    other = fastwrs.SGD([{"params": resumed[:2]}, {"params": resumed[2:], "shifted_l2": (1.0, 1.0)}], lr=0.7)
    other.load_state_dict(saved)  # the saved option wins
    assert [group["shifted_l2"] for group in other.param_groups] == [(LAM, EPS), None]
    assert all(map(torch.equal, run(optimizer, params, range(4, 8))[-1], run(other, resumed, range(4, 8))[-1]))

    for group in saved["param_groups"]:  # as an older version saved it
        del group["shifted_l2"]
    kept = fastwrs.SGD([{"params": resumed[:2]}, {"params": resumed[2:], "shifted_l2": (0.5, 0.25)}], lr=0.7)
    kept.load_state_dict(saved)
    assert [group["shifted_l2"] for group in kept.param_groups] == [None, (0.5, 0.25)]


@on_backends
def test_torchs_state_dicts_both_ways() -> None:
    ours, theirs = weights(), weights()
    mine, other = fastwrs.SGD(ours, lr=0.1, momentum=0.9, shifted_l2=(LAM, EPS)), ByHand(theirs, lr=0.1, momentum=0.9)
    run(mine, ours, range(3), late=0)
    run(other, theirs, range(3), late=0)
    back = ByHand([nn.Parameter(w.detach().clone()) for w in ours], lr=0.7)
    back.load_state_dict(deepcopy(mine.state_dict()))  # torch would share the buffers
    there = fastwrs.SGD([nn.Parameter(w.detach().clone()) for w in theirs], lr=0.7, shifted_l2=(LAM, EPS))
    there.load_state_dict(other.state_dict())
    assert there.param_groups[0]["shifted_l2"] == (LAM, EPS)
    expected = run(other, theirs, range(3, 6), late=0)[-1]
    for optimizer in (mine, back, there):
        found = run(optimizer, optimizer.param_groups[0]["params"], range(3, 6), late=0)[-1]
        assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-13) for a, b in zip(found, expected, strict=True))


@on_backends
@pytest.mark.parametrize("nesterov", [False, True])
def test_gradients_are_unscaled_once(nesterov: bool) -> None:
    params, others = ([w for w in weights(torch.float32) if w.numel()] for _ in range(2))
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": nesterov, "shifted_l2": (LAM, EPS)}
    optimizer, plain = fastwrs.SGD(params, **options), fastwrs.SGD(others, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # type: ignore[attr-defined]
    for step in range(4):
        overflow = step in (0, 2)
        optimizer.zero_grad()
        loss = sum((p * g).sum() for p, g in zip(params, gradients(params, step), strict=True))
        scaler.scale(loss * float("inf") if overflow else loss).backward()  # type: ignore[union-attr]
        scaler.step(optimizer)
        scaler.update()
        if not overflow:
            for param, other, grad in zip(params, others, gradients(params, step), strict=True):
                assert param.grad is not None
                assert torch.equal(param.grad, grad)
                other.grad = grad.clone()
            plain.step()
        assert all(map(torch.equal, params, others))
