"""Weight standardization and bounded weight normalization against their formulas in fp64, and through training."""

from __future__ import annotations

import copy
import io
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import fastwrs
import fastwrs.nn

pytestmark = pytest.mark.cpu

standardize: Any = fastwrs.nn.weight_standardization
bound: Any = fastwrs.nn.bounded_weight_norm

LAYERS: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(7, 5),
    "conv1d": lambda: nn.Conv1d(3, 4, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "channels_last": lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    "transposed": lambda: nn.ConvTranspose2d(4, 6, (3, 2)),
    "fp64": lambda: nn.Conv2d(4, 6, 3).double(),
    "bf16": lambda: nn.Linear(64, 5).bfloat16(),
}
WRAPS: dict[str, Callable[[Any], Any]] = {
    "official": lambda m: standardize(m),
    "timm": lambda m: standardize(m, form="timm"),
    "fixed": lambda m: bound(m),
    "learned": lambda m: bound(m, form="learned"),
}
by_layer = pytest.mark.parametrize("layer", LAYERS)
by_wrap = pytest.mark.parametrize("wrap", WRAPS)
EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8}
"""Half the distance from 1 to the next number: the error of one rounding."""


def made(layer: str) -> Any:
    torch.manual_seed(5)
    return LAYERS[layer]()


def rows(weight: Tensor, module: Any) -> Tensor:
    """One row per output channel, in fp64."""
    wide = weight.detach().double()
    return (wide.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else wide).flatten(1)


def by_hand(wrap: str, v: Tensor, gains: Tensor | None, start: Tensor) -> Tensor:
    """The formulas, with numbers instead of tensor operations where that is possible."""
    out = []
    norms = [math.sqrt(math.fsum(x * x for x in row)) for row in start.tolist()]
    length = math.sqrt(math.fsum(x * x for x in gains.tolist())) if gains is not None else 0.0
    for i, row in enumerate(v.tolist()):
        n, mean = len(row), math.fsum(row) / len(row)
        squares = math.fsum((x - mean) ** 2 for x in row)
        norm = math.sqrt(math.fsum(x * x for x in row))
        if wrap == "official":
            out.append([(x - mean) / (math.sqrt(squares / (n - 1)) + 1e-5) for x in row])
        elif wrap == "timm":
            out.append([(x - mean) / math.sqrt(squares / n + 1e-6) for x in row])
        elif wrap == "fixed":
            out.append([x * (math.fsum(norms) / len(norms)) / norm for x in row])
        else:
            assert gains is not None
            total = math.sqrt(math.fsum(x * x for x in norms))
            out.append([x * total * float(gains[i]) / length / norm for x in row])
    return torch.tensor(out, dtype=torch.float64)


@by_layer
@by_wrap
def test_equals_its_formula(wrap: str, layer: str) -> None:
    module = made(layer)
    start = module.weight.detach().clone()
    assert WRAPS[wrap](module) is module
    inside = module.parametrizations.weight
    torch.manual_seed(6)
    with torch.no_grad():  # another weight than that of the start
        for tensor in inside.parameters():
            tensor += 0.3 * torch.randn_like(tensor) * tensor.std()
    v, g = (inside.original1, inside.original0) if wrap == "learned" else (inside.original, None)
    expected = by_hand(wrap, rows(v, module), None if g is None else g.detach().double().flatten(), rows(start, module))
    weight = module.weight
    assert (weight.dtype, weight.shape, weight.stride()) == (start.dtype, start.shape, start.stride())
    # Sums of n terms in fp32, of magnitudes that the largest element of the result bounds; then the final rounding.
    n, compute = expected.shape[1], torch.float64 if start.dtype == torch.float64 else torch.float32
    allowed = (2 * n * EPS[compute] + EPS[start.dtype]) * expected.abs().max()
    assert (rows(weight, module) - expected).abs().max() <= allowed


@pytest.mark.parametrize("form", ["fixed", "learned"])
def test_starts_as_the_weight_itself_up_to_the_norms(form: str) -> None:
    layer = made("conv2d")
    start = rows(layer.weight, layer)
    weight = rows(bound(layer, form=form).weight, layer)
    norms = start.norm(dim=1, keepdim=True)
    expected = start if form == "learned" else start / norms * norms.mean()
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0)


def test_the_official_form_and_timms_differ_by_40_percent_at_small_weights() -> None:
    weights = []
    for form in ("official", "timm"):
        torch.manual_seed(1)
        layer = nn.Linear(4000, 3)
        nn.init.normal_(layer.weight, std=1e-3)
        weights.append(standardize(layer, form=form).weight.detach())
    ratio = (weights[0].norm() / weights[1].norm()).item()
    assert 1.38 < ratio < 1.42


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.usefixtures("backend")
@by_wrap
def test_norms_stay_through_20_steps(wrap: str, name: str) -> None:
    """Rho or mean 0 and deviation 1 in every step, while what is trained moves and the loss falls."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    layers: list[Any] = [WRAPS[wrap](model[0]), WRAPS[wrap](model[4])]
    started = [layer.weight.detach().clone() for layer in layers]
    targets = [rows(w, m).norm(dim=1).mean() for w, m in zip(started, layers, strict=True)]
    lengths = [rows(w, m).norm() for w, m in zip(started, layers, strict=True)]
    options = {"lr": 0.05, "momentum": 0.9} if name == "SGD" else {"lr": 0.01}
    optimizer = getattr(fastwrs, name)(fastwrs.param_groups(model, weight_decay=1e-2), **options)
    x, y = torch.randn(32, 3, 8, 8), torch.randint(4, (32,))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for layer, target, length in zip(layers, targets, lengths, strict=True):
            w = rows(layer.weight, layer)
            if wrap == "fixed":
                assert (w.norm(dim=1) / target - 1).abs().max() < 3e-7
            elif wrap == "learned":
                assert abs(w.norm() / length - 1) < 3e-7
            else:
                assert w.mean(1).abs().max() < 1e-6
                # eps takes away eps / std of the unbiased deviation, eps / (2 var) of the biased one
                v = rows(layer.parametrizations.weight.original, layer)
                lost = (1e-5 / v.std(1)) if wrap == "official" else (1e-6 / v.var(1, correction=0) / 2)
                assert lost.max() < 1e-3
                deviation = w.std(1) if wrap == "official" else w.std(1, correction=0)
                torch.testing.assert_close(deviation, 1 - lost, rtol=0, atol=2e-6)
    assert losses[-1] < 0.5 * losses[0]
    for layer, start in zip(layers, started, strict=True):
        assert (layer.weight.detach() - start).norm() > 0.05 * start.norm()
    if wrap == "learned":  # the channels' norms have moved apart, only their root mean square stays
        assert (rows(layers[0].weight, layers[0]).norm(dim=1) / targets[0] - 1).abs().max() > 0.01


@by_wrap
def test_gradients_are_those_of_the_formula(wrap: str) -> None:
    layer = WRAPS[wrap](nn.Linear(5, 4).double())
    inside = layer.parametrizations.weight
    inputs = tuple(inside.parameters())
    assert torch.autograd.gradcheck(lambda *tensors: inside[0](*tensors), inputs)


@by_wrap
@pytest.mark.parametrize("layer", ["linear", "transposed", "bf16"])
def test_zero_channels_stay_zero_and_give_no_nan(wrap: str, layer: str) -> None:
    module = made(layer)
    with torch.no_grad():
        (module.weight[:, 1] if layer == "transposed" else module.weight[1]).zero_()
    WRAPS[wrap](module)
    w = module.weight
    assert not rows(w, module)[1].any()
    assert rows(w, module)[0].any()
    (w * torch.randn_like(w)).sum().backward()
    for name, tensor in module.parametrizations.weight.named_parameters():
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name


@pytest.mark.parametrize("value", [12345.6, 1000.1, 3.3, 0.1])
def test_a_channel_of_equal_weights_becomes_zero(value: float) -> None:
    """Whatever the mean of so many equal numbers is rounded to."""
    for form, count in itertools.product(("official", "timm"), (27, 576, 1000)):
        layer = nn.Linear(count, 2)
        nn.init.constant_(layer.weight, value)
        assert bool((standardize(layer, form=form).weight == 0).all())


def test_a_large_mean_costs_no_digits() -> None:
    layer = nn.Linear(100, 3)
    with torch.no_grad():
        layer.weight.copy_(1e4 + 1e-1 * torch.randn(3, 100))
    v = layer.weight.detach().double()
    expected = (v - v.mean(1, keepdim=True)) / (v.std(1, keepdim=True) + 1e-5)
    allowed = (2 * 100 + 1) * EPS[torch.float32] * expected.abs().max()  # as in test_equals_its_formula
    assert (standardize(layer).weight.detach().double() - expected).abs().max() <= allowed


def test_a_channel_that_is_not_finite_leaves_the_others_alone() -> None:
    for wrap in ("official", "timm", "fixed"):
        layer = WRAPS[wrap](made("linear"))
        with torch.no_grad():
            layer.parametrizations.weight.original[2, 3] = float("nan")
        assert torch.equal(layer.weight.isfinite().all(1), torch.arange(5) != 2)


def test_all_gains_zero_is_a_weight_of_zeros() -> None:
    layer = WRAPS["learned"](made("linear"))
    with torch.no_grad():
        layer.parametrizations.weight.original0.zero_()
    assert not layer.weight.any()


@by_wrap
def test_copies_and_state_dicts(wrap: str) -> None:
    layer = WRAPS[wrap](made("conv2d"))
    x = torch.randn(2, 4, 6, 6)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        for tensor in other.parameters():
            tensor += 0.1 * torch.randn_like(tensor)
    assert not torch.equal(other(x), layer(x))
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    third = WRAPS[wrap](nn.Conv2d(4, 6, 3, groups=2))  # from weights, and with a rho, of its own
    third.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(third(x), other(x))


@by_wrap
def test_removing_leaves_the_effective_weight(wrap: str) -> None:
    layer = WRAPS[wrap](made("linear"))
    weight = layer.weight.detach().clone()
    parametrize.remove_parametrizations(layer, "weight")
    assert isinstance(layer.weight, nn.Parameter)
    assert torch.equal(layer.weight, weight)
    WRAPS[wrap](layer)


def test_another_name_eps_and_rho() -> None:
    attention = nn.MultiheadAttention(8, 2)
    standardize(attention, "in_proj_weight", eps=0.0)
    torch.testing.assert_close(attention.in_proj_weight.std(1), torch.ones(24), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        bound(made("linear"), rho=2.5).weight.norm(dim=1),
        torch.full((5,), 2.5),
        rtol=1e-6,
        atol=0,
    )
    learned = bound(made("linear"), form="learned", rho=2.5)
    assert learned.weight.norm().item() == pytest.approx(2.5, rel=1e-6)
    assert "rho=2.5" in repr(learned)


def test_a_frozen_weight_stays_frozen() -> None:
    for wrap in WRAPS.values():
        layer = made("linear")
        layer.weight.requires_grad_(False)
        assert not wrap(layer).weight.requires_grad


def test_autocast_computes_in_fp32() -> None:
    layer = WRAPS["fixed"](made("linear"))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.dtype == torch.float32
        assert layer(torch.randn(3, 7)).dtype == torch.bfloat16


@by_wrap
def test_param_groups_neither_rescale_nor_decay_what_is_parametrized(wrap: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    WRAPS[wrap](model[0])
    groups = fastwrs.param_groups(model, weight_decay=0.1)
    where = {name: group for group in groups for name in group["param_names"]}
    behind = [name for name in where if name.startswith("0.parametrizations.weight.original")]
    assert len(behind) == (2 if wrap == "learned" else 1)
    for name in behind:
        assert (where[name]["rescale"], where[name]["weight_decay"]) == (None, 0.0)
    assert where["2.weight"]["rescale"] == fastwrs.Rescale()
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


LAZY = nn.LazyLinear(3)
FAULTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no module": (lambda: standardize(torch.randn(3, 3)), TypeError, "must be an nn.Module, got Tensor"),
    "no such parameter": (
        lambda: standardize(nn.Linear(3, 2), "kernel"),
        ValueError,
        "it has: 'weight', 'bias'",
    ),
    "a child's": (lambda: bound(nn.Sequential(nn.Linear(3, 2)), "0.weight"), ValueError, "'0.weight'"),
    "of another type": (lambda: bound(nn.Linear(3, 2), 0), TypeError, "name must be a str, got 0"),
    "absent": (lambda: bound(nn.Linear(3, 2, bias=False), "bias"), ValueError, "no parameter 'bias'"),
    "a vector": (lambda: standardize(nn.BatchNorm1d(3)), ValueError, r"shape \(3,\)\) needs at least 2 dim"),
    "unknown form": (
        lambda: standardize(nn.Linear(3, 2), form="fixed"),
        ValueError,
        "'official' or 'timm', got 'fixed'",
    ),
    "unknown bound": (
        lambda: bound(nn.Linear(3, 2), form="timm"),
        ValueError,
        "'fixed' or 'learned', got 'timm'",
    ),
    "eps": (lambda: standardize(nn.Linear(3, 2), eps=-1e-5), ValueError, "eps must be >= 0, got -1e-05"),
    "eps nan": (
        lambda: standardize(nn.Linear(3, 2), eps=math.nan),
        ValueError,
        "eps must be finite, got nan",
    ),
    "rho": (lambda: bound(nn.Linear(3, 2), rho=0), ValueError, "rho must be > 0, got 0"),
    "rho too large": (lambda: bound(nn.Linear(3, 2), rho=1e300), ValueError, "finite in torch.float32, got 1e"),
    "rho too small": (lambda: bound(nn.Linear(3, 2), rho=1e-60), ValueError, "rho must be > 0 and finite"),
    "eps too large": (lambda: standardize(nn.Linear(3, 2), eps=1e300), ValueError, "finite in torch.float32, got 1e"),
    "rho of a string": (
        lambda: bound(nn.Linear(3, 2), rho="1"),
        TypeError,
        "rho must be a number, got '1'",
    ),
    "twice": (
        lambda: standardize(bound(nn.Linear(3, 2))),
        ValueError,
        r"already \(_Bounded\)",
    ),
    "after weight_norm": (
        lambda: bound(parametrizations.weight_norm(nn.Linear(3, 2))),
        ValueError,
        "already",
    ),
    "lazy": (lambda: standardize(LAZY), ValueError, "not initialized yet"),
    "groups": (lambda: standardize(nn.ConvTranspose2d(4, 4, 3, groups=2)), ValueError, "groups=2"),
    "complex": (lambda: standardize(nn.Linear(3, 2, dtype=torch.complex64)), ValueError, "must be real"),
    "one element": (
        lambda: standardize(nn.Conv2d(4, 4, 1, groups=4)),
        ValueError,
        "one element per channel",
    ),
    "form of a list": (lambda: standardize(nn.Linear(3, 2), form=["timm"]), ValueError, "got \\['timm'\\]"),
    "meta": (lambda: bound(nn.Linear(3, 2, device="meta"), rho=1.0), ValueError, "on the meta device"),
    "all zero": (lambda: bound(zeroed(nn.Linear(3, 2))), ValueError, "norm 0.0 to start from"),
}


def zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    return layer


@pytest.mark.bad_input
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_refused(fault: str) -> None:
    call, kind, message = FAULTS[fault]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.bad_input
def test_a_refused_layer_is_unchanged() -> None:
    layer = made("linear")
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for call in (
        lambda: standardize(layer, form="timms"),
        lambda: standardize(layer, "bias"),
        lambda: bound(layer, rho=-1),
    ):
        with pytest.raises(ValueError, match=r"weight_standardization|bounded_weight_norm"):
            call()
    assert type(layer) is nn.Linear
    assert all(torch.equal(before[name], tensor) for name, tensor in layer.state_dict().items())


def test_weights_without_elements_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own initialisation
        layer = nn.Linear(0, 3)
    with pytest.raises(ValueError, match="no elements"):
        standardize(layer)
