"""Complex parameters, which kernels see as real ones with a last dimension of two: as in torch.optim."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from tolerances import ulp
from torch import Tensor, nn

import fastwrs

pytestmark = pytest.mark.cpu

RULES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1, "weight_decay": 0.02}),
    ("SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": True, "maximize": True}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.01, "amsgrad": True, "betas": (0.8, 0.95)}),
]
by_rule = pytest.mark.parametrize(("name", "options"), RULES, ids=str)
KINDS = [torch.complex64, torch.complex128]
SHAPES = [(5, 3), (7,), (), (2, 3, 4), (0, 2)]


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """Complex ones of several shapes and layouts, and a real one among them."""
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    params.append(nn.Parameter(torch.randn(4, 6, dtype=dtype).t()))
    params.append(nn.Parameter(torch.randn(3, 3, dtype=dtype.to_real())))
    return params


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, dtype=param.dtype, generator=generator)


def values(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [optimizer.state[param][key] for param in params for key in sorted(optimizer.state[param])]
    return [*(param.detach() for param in params), *(state for state in states if isinstance(state, Tensor))]


def compare(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, dtype: torch.dtype) -> None:
    """Weights and all states that torch's optimizer has, after ten steps at most."""
    bound = 30 * float(ulp(torch.ones(()), dtype.to_real()))
    params, others = (one.param_groups[0]["params"] for one in (ours, theirs))
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=bound, atol=bound)
        for key, state in theirs.state.get(other, {}).items():
            if isinstance(state, Tensor) and key != "step":
                assert ours.state[param][key].dtype == state.dtype
                torch.testing.assert_close(ours.state[param][key], state, rtol=bound, atol=bound)


@by_rule
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_ten_steps_as_in_torch(name: str, options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    ours = getattr(fastwrs, name)(parameters(dtype), backend=backend, **options)
    theirs = getattr(torch.optim, name)(parameters(dtype), foreach=False, **options)
    for step in range(10):
        for one in (ours, theirs):
            params = one.param_groups[0]["params"]
            give_gradients(params, step)
            if step == 4:
                params[2].grad = None
            one.step()
    compare(ours, theirs, dtype)


@by_rule
def test_checkpoints_both_ways(name: str, options: dict[str, Any]) -> None:
    """Through a file, from torch to us and back; memory is that of nobody else."""
    dtype = torch.complex64
    theirs = getattr(torch.optim, name)(parameters(dtype), foreach=False, **options)
    ours = getattr(fastwrs, name)(parameters(dtype), **options)
    for loader, saver in ((ours, theirs), (theirs, ours)):
        give_gradients(saver.param_groups[0]["params"], 5)
        saver.step()
        file = io.BytesIO()
        torch.save(saver.state_dict(), file)
        file.seek(0)
        loader.load_state_dict(torch.load(file, weights_only=True))
        for mine, other in zip(*(one.param_groups[0]["params"] for one in (loader, saver)), strict=True):
            mine.data.copy_(other.data)
        for one in (ours, theirs):
            give_gradients(one.param_groups[0]["params"], 6)
            one.step()
        compare(ours, theirs, dtype)


def test_gradients_are_unscaled_and_overflows_skip() -> None:
    plain: Any
    scaled: Any
    plain, scaled = (fastwrs.AdamW(parameters(torch.complex64), lr=0.1) for _ in range(2))
    for step in range(4):
        for one, scale in ((plain, 1.0), (scaled, 8.0)):
            params = one.param_groups[0]["params"]
            give_gradients(params, step)
            for param in params:
                param.grad.mul_(scale)
            one.grad_scale, one.found_inf = torch.tensor(scale), torch.tensor(float(step == 2))
            one.step()
    for one, other in zip(values(plain), values(scaled), strict=True):
        assert torch.equal(one, other)
    grads = [[param.grad for param in one.param_groups[0]["params"]] for one in (plain, scaled)]
    assert all(map(torch.equal, *grads))
    assert plain.state[plain.param_groups[0]["params"][0]]["step"] == 3


def test_what_a_monitor_sees() -> None:
    """Norms of channels of complex numbers; one dimension is one group."""
    params = parameters(torch.complex64)
    optimizer = fastwrs.SGD(params, lr=0.5)
    monitor = fastwrs.Monitor(optimizer, every=1)
    give_gradients(params, 0)
    before = [param.detach().clone() for param in params]
    optimizer.step()
    latest = monitor.latest()
    for k, (old, param) in enumerate(zip(before, params, strict=True)):
        if old.numel():
            dims = tuple(range(1, old.ndim)) if old.ndim >= 2 else tuple(range(old.ndim))
            norms = torch.linalg.vector_norm(old, dim=dims) if old.ndim else old.abs()
            found = latest[f"params[0][{k}]"]["norm_before"]
            torch.testing.assert_close(found.flatten(), norms.flatten(), rtol=1e-5, atol=0)
        assert param._version > 0


def test_a_layer_of_complex_weights() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 4, dtype=torch.complex64)
    ours, theirs = layer, nn.Linear(3, 4, dtype=torch.complex64)
    theirs.load_state_dict(layer.state_dict())
    optimizers = fastwrs.Adam(ours.parameters(), lr=0.1), torch.optim.Adam(theirs.parameters(), lr=0.1, foreach=False)
    x = torch.randn(5, 3, dtype=torch.complex64)
    for _ in range(5):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).abs().square().mean().backward()
            optimizer.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_what_is_refused() -> None:
    """Before anything has changed: rules that look at channels, kinds that do not go together, conjugate views."""
    weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
    before = weight.detach().clone()
    optimizer: Any
    for optimizer in (
        fastwrs.AdamP([weight]),
        fastwrs.SGDP([weight], lr=0.1),
        fastwrs.SGD([weight], shifted_l2=(0.1, 0.1)),
    ):
        weight.grad = torch.ones_like(weight)
        with pytest.raises(RuntimeError, match=r"params\[0\]\[0\].* complex \(torch.complex64\), the rule .* is not"):
            optimizer.step()
    optimizer = fastwrs.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not torch.equal(weight, before)
    before = weight.detach().clone()
    weight.grad = torch.ones(4, 3, dtype=torch.complex64).mH
    assert weight.grad.is_conj()
    optimizer.grad_scale = torch.tensor(2.0)
    with pytest.raises(RuntimeError, match="its gradient is to be unscaled, and is a view with the conjugate bit set"):
        optimizer.step()
    del optimizer.grad_scale
    optimizer.state[weight]["exp_avg"] = torch.zeros(3, 4)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match=r"its state 'exp_avg' is torch.float32, the parameter torch.complex64"):
        optimizer.step()
    assert torch.equal(weight, before)
    with pytest.raises(ValueError, match="state_dtype"):
        fastwrs.AdamW([weight], state_dtype=torch.bfloat16)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_halves_are_refused_by_their_own_name() -> None:
    half = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex32))
    half.grad = torch.zeros_like(half)
    says = r"are \(complex32, complex32, complex32\); the parts of complex numbers may be"
    with pytest.raises(ValueError, match=says):
        fastwrs.SGD([half], lr=0.1, momentum=0.9).step()


def test_gradients_that_are_conjugate_views() -> None:
    """As autograd leaves them behind a product with a conjugate."""
    params = []
    kind: Any
    options: dict[str, Any]
    for kind, options in ((fastwrs.SGD, {}), (torch.optim.SGD, {"foreach": False})):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))
        optimizer: Any = kind([weight], lr=0.1, momentum=0.9, **options)
        for _ in range(3):
            optimizer.zero_grad()
            (torch.randn(5, 4, dtype=torch.complex64) @ weight.mH).abs().square().sum().backward()
            assert weight.grad is not None
            assert weight.grad.is_conj()
            optimizer.step()
        params.append(weight)
    torch.testing.assert_close(*params)


def test_a_model_that_becomes_complex() -> None:
    """After a step: the plan is another one at once."""
    layer = nn.Linear(3, 4)
    optimizer = fastwrs.SGD(layer.parameters(), lr=0.1)
    for dtype in (torch.float32, torch.complex64):
        for param in layer.parameters():
            param.data, param.grad = param.detach().to(dtype), None
            param.grad = torch.ones_like(param)
        before = layer.weight.detach().clone()
        optimizer.step()
        torch.testing.assert_close(layer.weight.detach(), before - 0.1)
