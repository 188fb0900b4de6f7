"""Fits of weight distributions against known shapes; the input projection against Eq. 12 written out."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import special, stats
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastwrs
import fastwrs.nn
from fastwrs import analysis
from fastwrs.analysis import GeneralizedGaussian, generalized_gaussian_fit, input_projection

pytestmark = pytest.mark.oracle

# ---- generalized_gaussian_fit ---------------------------------------------------------------------------------------


def sample(beta: float, count: int, seed: int = 0, loc: float = 0.03, scale: float = 0.01) -> Tensor:
    return torch.as_tensor(stats.gennorm.rvs(beta, loc=loc, scale=scale, size=count, random_state=seed))


def deviations(beta: float, scale: float, count: int) -> tuple[float, float]:
    """The standard deviations of the maximum-likelihood estimates of beta and scale, from the Fisher information.

    With z = |x - loc| / scale and y = z ** beta, which has the Gamma distribution with a = 1 / beta, the scores are
    ``(y - E y) * beta / scale`` and ``(E[y log y] - y log y) / beta``; loc is orthogonal to both by symmetry.
    E[y^k log^m y] comes from derivatives of the Gamma function.
    """
    a = 1 / beta
    log1, log2 = special.digamma(a + 1), special.digamma(a + 2)
    var_yy = a  # Var(y)
    mean_l = a * log1  # E[y log y]
    var_ll = a * (a + 1) * (log2**2 + special.polygamma(1, a + 2)) - mean_l**2  # Var(y log y)
    cov = a * (a + 1) * log2 - a * mean_l  # Cov(y, y log y)
    information = np.array([[var_ll / beta**2, -cov / scale], [-cov / scale, beta**2 / scale**2 * var_yy]])
    return tuple(np.sqrt(np.diag(np.linalg.inv(information)) / count))


def log_likelihood(x: Tensor, fit: GeneralizedGaussian) -> float:
    return float(stats.gennorm.logpdf(x.double().numpy().ravel(), *fit).sum())


@pytest.mark.parametrize("beta", [0.5, 1, 2, 4])
def test_known_shapes_are_found(beta: float) -> None:
    """Forty samples: each estimate within 5 standard deviations, and their squares together as chi-square has them."""
    count, squares = 4000, []
    sd_beta, sd_scale = deviations(beta, 0.01, count)
    for seed in range(40):
        fit = generalized_gaussian_fit(sample(beta, count, seed).reshape(40, 10, 10))
        assert abs(fit.beta - beta) < 5 * sd_beta
        assert abs(fit.scale - 0.01) < 5 * sd_scale
        assert abs(fit.loc - 0.03) < 0.01 * 5 * math.sqrt(2 / count)
        squares.append(((fit.beta - beta) / sd_beta) ** 2)
    low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], df=40)
    assert low < sum(squares) < high


@pytest.mark.parametrize("beta", [0.3, 0.5, 0.8, 1, 1.5, 2, 4, 10])
@pytest.mark.parametrize("count", [100, 1728, 20000])
def test_no_likelihood_is_higher_than_the_fits(beta: float, count: int) -> None:
    """Neither scipy's own fit, which starts from the truth here, nor the truth, nor any fit a little off ours.

    For beta < 1 there is a maximum at each of the middle weights. A difference of log likelihoods below half
    the number of parameters says nothing about which of them is better.
    """
    x = sample(beta, count, 1, loc=0.0, scale=1.0)
    fit = generalized_gaussian_fit(x)
    best = log_likelihood(x, fit) + (1e-6 if beta >= 1 else 1.5)
    scipys = GeneralizedGaussian(*map(float, stats.gennorm.fit(x.numpy(), beta, loc=0, scale=1)))
    others = [scipys, GeneralizedGaussian(beta, 0.0, 1.0)]
    for factor in (0.97, 1.03):
        others += [fit._replace(beta=fit.beta * factor), fit._replace(scale=fit.scale * factor)]
        others += [fit._replace(loc=fit.loc + (factor - 1) * fit.scale)]
    assert max(log_likelihood(x, other) for other in others) <= best


@pytest.mark.parametrize(("shift", "factor"), [(0.0, 1e-12), (1e3, 1.0), (0.0, -4e9), (-7.0, 3e-3)])
def test_location_and_scale_do_not_change_the_shape(shift: float, factor: float) -> None:
    x = sample(1.3, 3000, loc=0.0, scale=1.0)
    plain, moved = generalized_gaussian_fit(x), generalized_gaussian_fit(x * factor + shift)
    assert moved.beta == pytest.approx(plain.beta, rel=1e-4)
    assert moved.scale == pytest.approx(abs(factor) * plain.scale, rel=1e-4)
    assert moved.loc == pytest.approx(factor * plain.loc + shift, abs=1e-4 * abs(factor) * plain.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_weights(dtype: torch.dtype) -> None:
    x = sample(2.0, 20000, scale=0.1)
    exact, rounded = generalized_gaussian_fit(x), generalized_gaussian_fit(x.to(dtype))
    assert rounded.beta == pytest.approx(exact.beta, abs=2 * deviations(2.0, 0.1, 20000)[0])


def test_parameters_layouts_and_what_is_returned() -> None:
    x = sample(1.0, 4 * 3 * 5 * 5).reshape(4, 3, 5, 5).float()
    fit = generalized_gaussian_fit(x)
    assert {type(value) for value in fit} == {float}
    assert fit._fields == ("beta", "loc", "scale")
    weight = nn.Parameter(x.to(memory_format=torch.channels_last))
    before = weight.detach().clone()
    assert generalized_gaussian_fit(weight) == fit
    assert torch.equal(weight, before)
    assert generalized_gaussian_fit(x.flatten()[torch.randperm(300)]) == fit


def test_uniform_weights_are_at_the_upper_limit() -> None:
    torch.manual_seed(0)
    fit = generalized_gaussian_fit(nn.Conv2d(64, 64, 3).weight)
    bound = 1 / math.sqrt(64 * 9)
    assert fit.beta == pytest.approx(analysis.SHAPES[1], rel=1e-6)
    assert fit.scale == pytest.approx(bound, rel=0.01)


def test_heavy_tails_and_outliers_give_a_number() -> None:
    torch.manual_seed(0)
    x = torch.randn(5000)
    assert generalized_gaussian_fit(x**5).beta < 0.5
    assert generalized_gaussian_fit(torch.cat([x, torch.tensor([1e6])])).beta < 1
    assert 0.01 < generalized_gaussian_fit(torch.cat([x, 1e-20 * x])).beta < 0.5
    assert generalized_gaussian_fit(x[:10]).scale > 0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("weights", "kind", "message"),
    [
        ([0.1] * 20, TypeError, "weights must be a tensor, got list"),
        (torch.arange(20), TypeError, "must be real floating-point numbers, got torch.int64"),
        (torch.randn(20, dtype=torch.complex64), TypeError, "got torch.complex64"),
        (torch.randn(9), ValueError, "at least 10 weights, got 9"),
        (torch.zeros(0), ValueError, "at least 10 weights, got 0"),
        (torch.full((20,), 0.25), ValueError, "20 of 20 weights are 0.25"),
        (torch.cat([torch.randn(94), torch.zeros(6)]), ValueError, "6 of 100 weights are 0; more than 5%"),
        (torch.tensor([1.0, math.nan, math.inf] * 5), ValueError, "10 of 15 weights are not finite"),
        (torch.cat([torch.randn(99), torch.randn(901) * 1e-30]), ValueError, "no maximum"),
    ],
)
def test_weights_without_a_shape_are_refused(weights: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        generalized_gaussian_fit(weights)


def test_without_scipy_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match="generalized_gaussian_fit needs scipy: pip install scipy"):
        generalized_gaussian_fit(torch.randn(20))
    assert set(input_projection(nn.Linear(3, 2), [torch.randn(9, 3)])) == {""}


# ---- input_projection -----------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (7, 6)),
    "tokens": (lambda: nn.Linear(6, 5, bias=False), (3, 4, 6)),
    "conv": (lambda: nn.Conv2d(3, 5, 3), (4, 3, 7, 6)),
    "padded": (lambda: nn.Conv2d(3, 5, (3, 2), padding=(2, 1), stride=(2, 3)), (4, 3, 9, 8)),
    "dilated": (lambda: nn.Conv2d(2, 5, (3, 2), dilation=(2, 3), padding=1), (4, 2, 9, 8)),
    "same": (lambda: nn.Conv2d(2, 5, (3, 4), padding="same", dilation=(2, 1)), (4, 2, 6, 7)),
    "valid": (lambda: nn.Conv2d(2, 5, 3, padding="valid"), (4, 2, 6, 7)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), (4, 6, 6, 5)),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, padding=1), (4, 3, 6, 5)),
    "reflect": (lambda: nn.Conv2d(2, 5, 3, padding=(1, 2), padding_mode="reflect"), (4, 2, 6, 5)),
    "replicate": (lambda: nn.Conv2d(2, 5, 3, padding=(2, 0), padding_mode="replicate"), (4, 2, 6, 5)),
    "circular": (lambda: nn.Conv2d(2, 5, 3, padding="same", padding_mode="circular"), (4, 2, 6, 5)),
    "pointwise": (lambda: nn.Conv2d(5, 4, 1, stride=2), (4, 5, 6, 5)),
    "channels_last": (lambda: nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last), (4, 3, 7, 6)),  # type: ignore[call-overload]
    "bf16": (lambda: nn.Conv2d(3, 5, 3).bfloat16(), (4, 3, 7, 6)),
}


def features(layer: Any, batch: Tensor) -> list[list[Tensor]]:
    """Per group, all inputs of the layer as vectors, by taking them out of the padded images one by one."""
    if isinstance(layer, nn.Linear):
        return [list(batch.double().reshape(-1, layer.in_features))]
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    if layer.padding == "same":
        h, w = dh * (kh - 1), dw * (kw - 1)
        sides = [w // 2, w - w // 2, h // 2, h - h // 2]
    elif layer.padding == "valid":
        sides = [0] * 4
    else:
        sides = [layer.padding[1]] * 2 + [layer.padding[0]] * 2
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(batch.double(), sides, mode)
    width = layer.in_channels // layer.groups
    found: list[list[Tensor]] = [[] for _ in range(layer.groups)]
    for image in padded:
        for top in range(0, image.shape[1] - dh * (kh - 1), sh):
            for left in range(0, image.shape[2] - dw * (kw - 1), sw):
                patch = image[:, top : top + dh * (kh - 1) + 1 : dh, left : left + dw * (kw - 1) + 1 : dw]
                for g in range(layer.groups):
                    found[g].append(patch[g * width : (g + 1) * width].flatten())
    return found


def eq12(layer: Any, batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Per group, the eigenvalues in descending order and W U, by Eq. 12 as it is printed."""
    parts = [features(layer, batch) for batch in batches]
    out = []
    for g in range(len(parts[0])):
        hs = [h for part in parts for h in part[g]]
        mu = sum(hs) / len(hs)
        sigma = sum(torch.outer(h, h) for h in hs) / len(hs) - torch.outer(mu, mu)  # type: ignore[arg-type]
        values, u = np.linalg.eigh(sigma.numpy())  # type: ignore[union-attr]
        weight = layer.weight.detach().double().flatten(1).chunk(len(parts[0]))[g].numpy()
        out.append((torch.as_tensor(values[::-1].copy()), torch.as_tensor((weight @ u)[:, ::-1].copy())))
    return out


def batches_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, count: int = 3) -> list[Tensor]:
    """Inputs with a mean, of unequal variances, in batches of different sizes."""
    generator = torch.Generator().manual_seed(11)
    spread = torch.linspace(0.5, 2, shape[1]).reshape(-1, *[1] * (len(shape) - 2)) if len(shape) == 4 else 1.0
    return [(torch.randn(shape[0] + k, *shape[1:], generator=generator) * spread + 0.7).to(dtype) for k in range(count)]


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "bf16"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, of even kernels
def test_the_patches_are_those_that_torch_meets(name: str) -> None:
    """The vectors of this file, times the weights, are the layer's outputs."""
    make, shape = LAYERS[name]
    layer, (batch,) = make().double(), batches_of(shape, torch.float64, count=1)
    outputs = layer(batch).detach()
    rows = outputs.flatten(0, -2) if isinstance(layer, nn.Linear) else outputs.movedim(1, -1).flatten(0, -2)
    groups = features(layer, batch)
    weights = layer.weight.detach().flatten(1).chunk(len(groups))
    products = torch.cat([torch.stack(hs) @ w.mT for hs, w in zip(groups, weights, strict=True)], dim=1)
    bias = 0 if layer.bias is None else layer.bias.detach()
    torch.testing.assert_close(products + bias, rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1 << 22, 50], ids=["whole", "in chunks"])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's, of even kernels
def test_equals_eq12_written_out(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analysis, "_CHUNK", chunk)
    torch.manual_seed(3)
    make, shape = LAYERS[name]
    layer = make()
    batches = batches_of(shape, layer.weight.dtype)
    model = nn.Sequential(layer)
    found = input_projection(model, batches)["0"]
    expected = eq12(layer, batches)
    assert found.dtype == torch.float64
    assert found.shape == layer.weight.flatten(1).shape  # full rank
    # The covariances agree to rounding; an eigenvector turns by at most that over the gap to the next eigenvalue.
    for part, (values, wanted) in zip(found.chunk(len(expected)), expected, strict=True):
        gaps = values[:-1] - values[1:]
        assert (gaps > 1e-4 * values[0]).all()
        length = part.norm(dim=1).max()
        worst = torch.minimum((part - wanted).norm(dim=0), (part + wanted).norm(dim=0)).max()
        assert worst < 1e4 * 1e3 * 2.0**-53 * length
    # A rotation of each group's inputs: lengths stay.
    torch.testing.assert_close(
        found.norm(dim=1), layer.weight.detach().double().flatten(1).norm(dim=1), rtol=1e-12, atol=0
    )


def test_inputs_along_a_known_axis() -> None:
    """By hand: variance 4 along (3, 4) / 5 and 1 across, around a mean that does not count."""
    along, across = torch.tensor([0.6, 0.8]), torch.tensor([-0.8, 0.6])
    rows = torch.stack([torch.tensor([100.0, -50.0]) + a * along + b * across for a in (-2, 2) for b in (-1, 1)])
    layer = nn.Linear(2, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.stack([along, across, 2 * along + across]))
    found = input_projection(layer, [rows[:3], rows[3:]])[""]
    wanted = torch.tensor(
        [[1.0, 0], [0, -1], [2, -1]], dtype=torch.float64
    )  # the largest component of each is positive
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_outputs_without_their_mean_are_projections_times_scores() -> None:
    """What the projection is for: the layer's outputs vary by W U times the coordinates of the inputs in U."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4).double()
    mix = torch.randn(3, 6, dtype=torch.float64)
    inputs = torch.randn(50, 3, dtype=torch.float64) @ mix + 1  # only three directions
    found = input_projection(layer, [inputs])[""]
    assert found.shape == (4, 3)
    outputs = layer(inputs).detach()
    values = np.linalg.eigvalsh(np.cov(inputs.numpy().T, bias=True))[::-1][:3].copy()
    expected = found @ torch.diag(torch.as_tensor(values)) @ found.mT
    torch.testing.assert_close(torch.cov(outputs.T, correction=0), expected, rtol=1e-10, atol=1e-12)
    assert input_projection(layer, [inputs], rtol=0)[""].shape == (4, 6)
    assert input_projection(layer, [inputs], rtol=0.99)[""].shape == (4, 1)


def test_groups_keep_as_many_directions_as_the_one_with_most() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 1, groups=2)
    inputs = torch.randn(8, 4, 3, 3)
    inputs[:, 1] = 2 * inputs[:, 0]
    assert input_projection(layer, [inputs])[""].shape == (4, 2)
    inputs[:, 3] = 5.0
    assert input_projection(layer, [inputs])[""].shape == (4, 1)


def test_inputs_that_are_all_the_same_have_no_directions() -> None:
    batches = [torch.full((5, 3), 0.1), torch.full((4, 3), 0.1)]
    found = input_projection(nn.Linear(3, 2), batches)[""]
    assert found.shape == (2, 0)
    with pytest.raises(ValueError, match="at least 10 weights, got 0"):
        generalized_gaussian_fit(found)


def test_a_large_mean_costs_no_digits() -> None:
    torch.manual_seed(0)
    layer, noise = nn.Linear(4, 3).double(), torch.randn(300, 4, dtype=torch.float64) * torch.tensor([1, 2, 3, 4])
    near = input_projection(layer, noise.split(70))[""]
    far = input_projection(layer, (noise + 2.0**30).split(70))[""]
    torch.testing.assert_close(near, far, rtol=0, atol=1e-5)  # what is left of the inputs: 2 ** -22


class Net(nn.Module):
    """Calls a layer twice, one never, one by keyword; with Dropout and a frozen BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.drop, self.twice, self.unused = nn.Dropout(0.5), nn.Linear(4, 4), nn.Linear(2, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.relu(self.norm(self.conv(x)))).mean((2, 3))
        return self.head(input=self.twice(self.twice(x)))


def net() -> Net:
    torch.manual_seed(4)
    model = Net()
    model.norm.eval()
    return model


def state_of(model: nn.Module) -> Any:
    modules = list(model.modules())
    return [m.training for m in modules], [len(m._forward_hooks) for m in modules]


def test_the_model_is_as_it_was() -> None:
    model, batches = net(), batches_of((4, 3, 5, 5))
    before, weights = state_of(model), {name: t.clone() for name, t in model.state_dict().items()}
    seen = []
    handle = model.drop.register_forward_pre_hook(lambda m, _: seen.append((m.training, torch.is_grad_enabled())))
    rng = torch.get_rng_state()
    with pytest.warns(UserWarning, match="no inputs came to 'unused'"):
        found = input_projection(model, batches)
    handle.remove()
    assert seen == [(False, False)] * 3
    assert list(found) == ["conv", "twice", "head"]
    assert state_of(model) == before
    assert model.training and not model.norm.training and torch.is_grad_enabled()
    assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert {tensor.requires_grad for tensor in found.values()} == {False}
    with pytest.warns(UserWarning, match="unused"):
        again = input_projection(model, batches)
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_every_call_of_a_layer_counts() -> None:
    model, batches = net().eval(), batches_of((4, 3, 5, 5))
    inputs: list[Tensor] = []
    handle = model.twice.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    for batch in batches:
        model(batch)
    handle.remove()
    assert len(inputs) == 6
    found = input_projection(model, batches, ["twice"])
    assert torch.equal(found["twice"], input_projection(model.twice, inputs)[""])


@pytest.mark.parametrize("what", ["loader", "model", "hook"])
def test_after_an_error_the_model_is_as_it_was(what: str) -> None:
    model, batches = net(), batches_of((4, 3, 5, 5))
    before = state_of(model)

    def loader() -> Any:
        yield batches[0]
        if what == "loader":
            raise RuntimeError("on purpose")
        yield torch.zeros(1, 2, 3) if what == "model" else batches[1]

    if what == "hook":
        model.head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        input_projection(model, loader())
    assert state_of(model) == before
    assert torch.is_grad_enabled()


def test_batches_of_other_kinds() -> None:
    layer, batches = nn.Linear(6, 5), batches_of((4, 6))
    plain = input_projection(layer, batches)[""]
    for loader in (
        [(batch, torch.zeros(4)) for batch in batches],
        [[batch] for batch in batches],
        iter(batches),
        [*batches, torch.zeros(0, 6)],
    ):
        assert torch.equal(input_projection(layer, loader)[""], plain)
    named = [{"x": batch} for batch in batches]
    found = input_projection(layer, named, forward=lambda model, batch: model(batch["x"]))
    assert torch.equal(found[""], plain)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat(batches)), batch_size=5)
    torch.testing.assert_close(input_projection(layer, data)[""], plain, rtol=0, atol=1e-12)


def test_single_images() -> None:
    layer, (batch,) = nn.Conv2d(3, 4, 3), batches_of((4, 3, 6, 6), count=1)
    torch.testing.assert_close(
        input_projection(layer, list(batch))[""], input_projection(layer, [batch])[""], rtol=0, atol=1e-12
    )


def test_parametrized_weights_are_those_that_the_layer_uses() -> None:
    layer, batches = fastwrs.nn.bounded_weight_norm(nn.Conv2d(3, 4, 3), rho=2.0), batches_of((4, 3, 6, 6))
    assert input_projection(layer, batches)[""].norm(dim=1).tolist() == pytest.approx([2.0] * 4, rel=1e-6)
    assert input_projection(parametrizations.weight_norm(nn.Linear(6, 5)), batches_of((4, 6)))[""].shape == (5, 6)


class Standardized(nn.Conv2d):
    """Pads as it likes, so that the patches of Conv2d are not those that it meets."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.conv2d(F.pad(input, (1, 1, 1, 1)), self.weight, self.bias)


EMPTY = nn.Linear(4, 1)
EMPTY.weight = nn.Parameter(torch.empty(0, 4))


class Normalized(nn.Linear):
    """Uses other weights than it has."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.linear(input, F.normalize(self.weight), self.bias)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("model", "options", "kind", "message"),
    [
        (Normalized(6, 2), {}, ValueError, r"'' \(Normalized\) does not compute what Linear computes with its weight"),
        (nn.Linear(6, 2), {"loader": 5}, TypeError, "loader must be an iterable of batches, got 5"),
        (nn.Linear(6, 2), {"layers": 5}, TypeError, "layers must be a sequence of module names, got 5"),
        (
            EMPTY,
            {"loader": [torch.zeros(2, 4)]},
            ValueError,
            r"'' \(weight of shape \(0, 4\)\) has no weights",
        ),
        (None, {}, TypeError, "model must be an nn.Module, got NoneType"),
        (nn.ReLU(), {}, ValueError, "no Linear and no Conv2d"),
        (nn.Linear(6, 2), {"layers": ""}, TypeError, "layers must be a sequence of module names, got ''"),
        (nn.Linear(6, 2), {"layers": [0]}, TypeError, "layers must be a sequence of module names"),
        (nn.Linear(6, 2), {"layers": []}, ValueError, "layers names no module"),
        (nn.Linear(6, 2), {"layers": ["fc"]}, ValueError, "the model has no module 'fc'"),
        (nn.Sequential(nn.Linear(6, 2), nn.ReLU()), {"layers": ["1"]}, ValueError, "'1' is a ReLU, not a Linear or"),
        (nn.Sequential(nn.LazyLinear(2)), {}, ValueError, "'0' is not initialized yet"),
        (nn.Sequential(nn.Linear(6, 2, dtype=torch.complex64)), {}, ValueError, "'0' is complex"),
        (nn.Linear(6, 2), {"rtol": -1}, ValueError, "rtol must be >= 0, got -1"),
        (nn.Linear(6, 2), {"rtol": math.nan}, ValueError, "rtol must be finite, got nan"),
        (nn.Linear(6, 2), {"forward": "x"}, TypeError, "forward must be callable, got 'x'"),
        (nn.Linear(6, 2), {"loader": []}, ValueError, "no inputs came to ''"),
        (nn.Linear(6, 2), {"loader": [torch.zeros(0, 6)]}, ValueError, "no inputs came to ''"),
        (nn.Linear(6, 2), {"loader": [{"x": 1}]}, TypeError, "must be a tensor or begin with one, got dict; forward="),
        (nn.Linear(6, 2), {"loader": [()]}, TypeError, "got tuple"),
        (nn.Linear(6, 2), {"loader": [torch.full((3, 6), math.inf)]}, ValueError, "'' has had inputs that are not fin"),
        (net(), {"layers": ["head", "unused"], "loader": [torch.zeros(2, 3, 4, 4)]}, ValueError, "came to 'unused'"),
        (
            Standardized(3, 4, 3),
            {"loader": [torch.zeros(2, 3, 6, 6)]},
            ValueError,
            r"'' \(Standardized\) does not comp",
        ),
    ],
)
def test_bad_input_is_refused(model: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    options = {"loader": [torch.randn(9, 6)], **options}
    with pytest.raises(kind, match=message):
        input_projection(model, options.pop("loader"), **options)
