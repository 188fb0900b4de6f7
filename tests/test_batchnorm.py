"""BatchNorm's running statistics follow a rescale: in eval mode the network computes what it computed before."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from calls import one_thread
from networks import ResNet18, batch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import fastwrs
from fastwrs.measuring import Measured, Rows, Scope

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("backend")]

Network = TypeVar("Network", bound=nn.Module)
Use = Callable[[Any, Tensor], Any]

OUT = fastwrs.Rescale()
BIG = fastwrs.Rescale(target=4.0)


@pytest.fixture(autouse=True)
def _on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def evaluated(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        found = model(images)
    model.train()
    return found


def trained(model: Network, images: Tensor) -> Network:
    """Weights of some scale and statistics that belong to them."""
    with torch.no_grad():
        for _ in range(20):
            model(images * (1 + 0.3 * torch.randn(1)))
    return model


def rounding(model: nn.Module, images: Tensor) -> float:
    """What fp32 itself costs in the outputs: the distance to the same network in fp64."""
    exact = evaluated(copy.deepcopy(model).double(), images.double())
    return float((evaluated(model, images) - exact).abs().max())


def zero_gradients(model: nn.Module) -> None:
    for param in model.parameters():
        param.grad = torch.zeros_like(param)


@pytest.fixture
def images() -> Tensor:
    return batch()[0]


@pytest.fixture
def resnet(images: Tensor) -> ResNet18:
    torch.manual_seed(0)
    return trained(ResNet18(bias=True), images)


OPTIONS: dict[str, dict[str, Any]] = {
    "out": {"rescale": fastwrs.Rescale(target=0.5)},
    "tensor": {"rescale": fastwrs.Rescale(axis="tensor", target=3.0)},
    "shrink": {"rescale": None, "shrink": fastwrs.Shrink(0.3)},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_resnet18_computes_the_same_after_a_rescale(resnet: ResNet18, images: Tensor, kind: str) -> None:
    """The gradients are 0: nothing but the rescale happens. The head has no BatchNorm, so it is left alone."""
    groups = fastwrs.param_groups(resnet, head="skip", **OPTIONS[kind])
    optimizer = fastwrs.SGD(groups, lr=1.0)
    follower = fastwrs.follow_batchnorm(resnet, optimizer)
    assert len(follower.pairs) == 20 and follower.unpaired == ()
    assert follower.pairs["blocks.2.shortcut.0"] == ("blocks.2.shortcut.1",)
    stale = copy.deepcopy(resnet)
    before, noise = evaluated(resnet, images), rounding(resnet, images)
    weight = resnet.conv1.weight.detach().clone()
    zero_gradients(resnet)
    optimizer.step()
    assert not torch.allclose(weight, resnet.conv1.weight)
    change = float((evaluated(resnet, images) - before).abs().max())
    assert change <= 4 * (noise + rounding(resnet, images)), f"{change:.3g}, rounding is {noise:.3g}"
    # and that is no matter of course: with the statistics of before, the outputs are others
    with torch.no_grad():
        for mine, theirs in zip(stale.parameters(), resnet.parameters(), strict=True):
            mine.copy_(theirs)
    assert float((evaluated(stale, images) - before).abs().max()) > 1000 * change


def test_steps_with_a_rescale_compute_what_steps_without_it_would(resnet: ResNet18, images: Tensor) -> None:
    """One real step from the same place, rescaled and not."""
    results = []
    for rescale in (None, OUT):
        model = copy.deepcopy(resnet)
        optimizer = fastwrs.AdamW(fastwrs.param_groups(model, rescale=rescale, head="skip"), lr=1e-3)
        fastwrs.follow_batchnorm(model, optimizer)
        F.cross_entropy(model(images), batch()[1]).backward()
        optimizer.step()
        results.append((evaluated(model, images), rounding(model, images)))
    (plain, noise), (rescaled, other) = results
    assert float((rescaled - plain).abs().max()) <= 4 * (noise + other)


def test_every_kind_of_layer(images: Tensor) -> None:
    """Biases, transposed and 1 x 1 convolutions, Linear, Identity and Dropout in between, two BatchNorms."""

    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 6, 2)
            self.up_norm = nn.BatchNorm2d(6, eps=0.1)
            self.point = nn.Conv2d(6, 5, 1)
            self.between = nn.Sequential(nn.Identity(), nn.Dropout2d(0.1))
            self.norms = nn.ModuleList([nn.BatchNorm2d(5), nn.BatchNorm2d(5, affine=False)])
            self.flat = nn.Linear(5, 7)
            self.flat_norm = nn.BatchNorm1d(7)
            self.head = nn.Linear(7, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.between(self.point(F.relu(self.up_norm(self.up(x)))))
            x = self.norms[0](x) + self.norms[1](x)
            return self.head(F.relu(self.flat_norm(self.flat(x.mean((2, 3))))))

    torch.manual_seed(1)
    model = trained(Several(), images)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.3)
    groups = fastwrs.param_groups(model, rescale=fastwrs.Rescale(target=2.0), head="skip")
    groups += [{"params": []}]
    for group in groups:  # the 1 x 1 convolution by "in", which has one position
        if "point.weight" in group.get("param_names", ()):
            place = group["param_names"].index("point.weight")
            group["param_names"].pop(place)
            groups[-1] = {"params": [group["params"].pop(place)], "param_names": ["point.weight"]}
            groups[-1]["rescale"] = fastwrs.Rescale(axis="in")
    optimizer = fastwrs.SGD(groups, lr=1.0)
    follower = fastwrs.follow_batchnorm(model, optimizer)
    assert follower.pairs == {"up": ("up_norm",), "point": ("norms.0", "norms.1"), "flat": ("flat_norm",)}
    before, noise = evaluated(model, images), rounding(model, images)
    zero_gradients(model)
    optimizer.step()
    assert float((evaluated(model, images) - before).abs().max()) <= 4 * (noise + rounding(model, images))


def test_what_has_no_pair_is_listed() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alone, self.first, self.second = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.shared, self.loose, self.fresh = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
            self.no_stats = nn.BatchNorm2d(3, track_running_stats=False)
            self.left = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.loose(F.relu(self.alone(x)))
            x = self.shared(self.first(x)) + self.shared(self.second(x))
            return self.no_stats(self.fresh(x)) + self.left(x)

    model = Several()
    groups = fastwrs.param_groups(model, rescale=OUT)
    groups[0]["params"] = [p for p in groups[0]["params"] if p is not model.left.weight]  # no matter then
    groups[0]["param_names"].remove("left.weight")
    optimizer = fastwrs.SGD(groups, lr=0.1)
    follower = fastwrs.follow_batchnorm(model, optimizer)
    assert follower.pairs == {}
    assert follower.unpaired == ("alone", "first", "second", "fresh")
    assert "unpaired=('alone'" in repr(follower)
    assert follower.before_step() is Scope.NOTHING


def small(kernel: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, kernel), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * (9 - kernel) ** 2, 2))


def test_named_pairs(images: Tensor) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = small()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) if float(x.sum()) < 1e9 else x

    model = trained(Branching(), images)
    optimizer = fastwrs.SGD(fastwrs.param_groups(model, rescale=fastwrs.Rescale(target=4.0), head="skip"), lr=1.0)
    with pytest.raises(ValueError, match=r"torch.fx cannot trace Branching .*pairs=\{"):
        fastwrs.follow_batchnorm(model, optimizer)
    for pairs in ({"body.0": "body.1"}, {"body.0": ["body.1"]}, [("body.0", "body.1")]):
        with fastwrs.follow_batchnorm(model, optimizer, pairs) as follower:
            assert follower.pairs == {"body.0": ("body.1",)}
    fastwrs.follow_batchnorm(model, optimizer, {"body.0": "body.1"})
    before, noise = evaluated(model, images), rounding(model, images)
    zero_gradients(model)
    optimizer.step()
    assert float((evaluated(model, images) - before).abs().max()) <= 4 * (noise + rounding(model, images))


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def test_skipped_and_removed_and_vanished_channels_keep_their_statistics(images: Tensor) -> None:
    model = trained(small(), images)
    optimizer = fastwrs.SGD(fastwrs.param_groups(model, rescale=fastwrs.Rescale(target=4.0)), lr=1.0)
    follower = fastwrs.follow_batchnorm(model, optimizer)
    before = statistics(model)

    def unchanged() -> bool:
        return all(torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True))

    zero_gradients(model)
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert unchanged()
    optimizer.found_inf = None  # type: ignore[attr-defined]
    follower.remove()
    optimizer.step()
    assert unchanged()
    group = optimizer.param_groups[0]
    group["rescale"], group["shrink"] = None, fastwrs.Shrink(1e9)
    fastwrs.follow_batchnorm(model, optimizer)
    optimizer.step()
    assert not any(bool(param.any()) for param in optimizer.param_groups[0]["params"])
    assert unchanged()


def test_with_a_monitor_and_every_third_step(images: Tensor) -> None:
    model = trained(small(), images)
    optimizer = fastwrs.SGD(fastwrs.param_groups(model, rescale=fastwrs.Rescale(every=3), head="skip"), lr=1.0)
    monitor = fastwrs.Monitor(optimizer, every=2)
    fastwrs.follow_batchnorm(model, optimizer)
    zero_gradients(model)
    changed, variance = [], model[1].running_var
    assert isinstance(variance, Tensor)
    for _ in range(4):
        before = variance.clone()
        optimizer.step()
        changed.append(not torch.equal(before, variance))
    assert changed == [False, False, True, False]
    assert {record["step"] for record in monitor.channels()} == {2, 4}
    assert {record["name"] for record in monitor.channels()} == {name for name, _ in model.named_parameters()}


def test_following_reads_nothing_back() -> None:
    """Everything lies on the meta device, where reading a number is an error."""
    model = small()
    optimizer = fastwrs.SGD(fastwrs.param_groups(model, rescale=OUT), lr=1.0)
    follower = fastwrs.follow_batchnorm(model, optimizer)
    model.to("meta")
    assert follower.before_step() is Scope.PROJECTED
    followed = follower._projected.keys()
    follower.after_step([Measured(Rows(list(followed), [4]), torch.empty(4, 8, device="meta"))], None)
    assert model[1].running_mean.is_meta  # type: ignore[union-attr]


def test_an_axis_without_a_common_factor_is_refused() -> None:
    model = small()
    optimizer = fastwrs.SGD(fastwrs.param_groups(model, rescale=fastwrs.Rescale(axis="in")), lr=0.1)
    message = r"parameter '0.weight' \(shape \(4, 3, 3, 3\)\) has axis 'in', that is 36 norm groups .* 4 channels"
    with pytest.raises(ValueError, match=message):
        fastwrs.follow_batchnorm(model, optimizer)
    assert optimizer._watchers == ()
    for axis in ((0,), (0, 2, 3), (1, 2), -1):
        optimizer.param_groups[0]["params"] = [model[0].weight]
        optimizer.param_groups[0]["rescale"] = fastwrs.Rescale(axis=axis)
        with pytest.raises(ValueError, match="there is no common factor per channel"):
            fastwrs.follow_batchnorm(model, optimizer)
    optimizer.param_groups[0]["rescale"] = fastwrs.Rescale(axis=(1, 2, 3))
    assert fastwrs.follow_batchnorm(model, optimizer).pairs == {"0": ("1",)}


@pytest.mark.parametrize("change", ["axis", "statistics"])
def test_what_changes_later_is_refused_before_the_step(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    # An id comes back once its object is gone: here every object has the same.
    monkeypatch.setattr("fastwrs.batchnorm.id", lambda _: 0, raising=False)
    model = small()
    optimizer = fastwrs.SGD(fastwrs.param_groups(model, rescale=OUT), lr=0.1)
    fastwrs.follow_batchnorm(model, optimizer)
    zero_gradients(model)
    optimizer.step()
    message = (
        "has axis 'in'" if change == "axis" else "'1' has lost its running statistics since it was paired with '0'"
    )
    if change == "axis":
        optimizer.param_groups[0]["rescale"] = fastwrs.Rescale(axis="in", target=9.0)
    else:
        model[1].running_mean = None  # type: ignore[assignment]
    before = [param.detach().clone() for param in model.parameters()] + statistics(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    after = [param.detach() for param in model.parameters()] + statistics(model)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert float(optimizer.state[next(model.parameters())]["step"]) == 1


def without_statistics(model: nn.Sequential) -> None:
    model[1] = nn.BatchNorm2d(4, track_running_stats=False)


def of_other_width(model: nn.Sequential) -> None:
    model[1] = nn.BatchNorm2d(5)


def nothing(model: nn.Sequential) -> None:
    assert len(model) == 4


@pytest.mark.parametrize(
    ("pairs", "change", "kind", "message"),
    [
        ({"0": "bn"}, nothing, ValueError, "the model has no module 'bn'"),
        ({"1": "1"}, nothing, ValueError, "'1' must be Linear or Conv, it is BatchNorm2d"),
        ({"0": "3"}, nothing, ValueError, "'3' must be a BatchNorm, it is Linear"),
        ({"0": "1", "3": "1"}, nothing, ValueError, "'1' cannot follow '3': it has 4 channels, the layer has 2"),
        ([("0", "1"), ("0", "1")], nothing, ValueError, "'1' cannot follow several layers"),
        ({"0": "1"}, without_statistics, ValueError, "it has no running statistics"),
        ({"0": "1"}, of_other_width, ValueError, "it has 5 channels, the layer has 4"),
        ({"0": 1}, nothing, TypeError, "pairs must be names of modules"),
        (7, nothing, TypeError, "pairs must be names of modules"),
    ],
)
def test_wrong_pairs_are_refused(
    pairs: Any, change: Callable[[nn.Sequential], None], kind: type[Exception], message: str
) -> None:
    model = small()
    change(model)
    optimizer = fastwrs.SGD(fastwrs.param_groups(model, rescale=OUT), lr=0.1)
    with pytest.raises(kind, match=message):
        fastwrs.follow_batchnorm(model, optimizer, pairs)
    assert optimizer._watchers == ()


def test_wrong_models_and_optimizers_are_refused() -> None:
    model = small()
    optimizer = fastwrs.SGD(model.parameters(), lr=0.1)
    anything: Any = list(model)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        fastwrs.follow_batchnorm(anything, optimizer)
    other: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="optimizer must be one of fastwrs, got SGD"):
        fastwrs.follow_batchnorm(model, other)
    elsewhere = fastwrs.SGD(small().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"parameter '0.weight' is not in the optimizer"):
        fastwrs.follow_batchnorm(model, elsewhere, {"0": "1"})


class Both(nn.Module):
    """A pair that can be followed, and one whose widths show that channels and features are not the same."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)
        self.linear, self.of_length = nn.Linear(9, 5), nn.BatchNorm1d(length)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_length(self.linear(self.bn(self.conv(x))))


def test_a_pair_that_does_not_fit_is_listed() -> None:
    model = Both(length=4)
    optimizer = fastwrs.SGD(fastwrs.param_groups(model, rescale=OUT), lr=0.1)
    follower = fastwrs.follow_batchnorm(model, optimizer)
    assert follower.pairs == {"conv": ("bn",)}
    assert follower.unpaired == ("linear",)


def test_channels_that_are_no_features_are_refused_before_anything_is_changed() -> None:
    """[batch, length, features], where the length happens to be the number of features."""
    model = nn.Sequential(nn.Linear(9, 5), nn.BatchNorm1d(5))
    optimizer = fastwrs.SGD(fastwrs.param_groups(model, rescale=OUT, head="rescale"), lr=0.1)
    with fastwrs.follow_batchnorm(model, optimizer) as follower:
        assert follower.pairs == {"0": ("1",)}
        zero_gradients(model)
        model(torch.randn(8, 9))
        optimizer.step()
        model(torch.randn(8, 5, 9))
        before = [param.detach().clone() for param in model.parameters()] + statistics(model)
        with pytest.raises(ValueError, match="'1' was called on 3 dimensions"):
            optimizer.step()
        after = [param.detach() for param in model.parameters()] + statistics(model)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    model(torch.randn(8, 5, 9))
    optimizer.step()
    assert not model[1]._forward_hooks and not hasattr(model[1], "_fastwrs_input_shape")
    copy.deepcopy(model)


def test_parameters_that_change_places_are_looked_at_again() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    groups = [
        {"params": [model[0].weight], "rescale": OUT},
        {"params": [model[3].weight], "rescale": fastwrs.Rescale(axis="in")},
    ]
    optimizer = fastwrs.SGD(groups, lr=0.1)
    fastwrs.follow_batchnorm(model, optimizer)
    zero_gradients(model)
    optimizer.step()
    first, second = optimizer.param_groups
    first["params"], second["params"] = second["params"], first["params"]
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(ValueError, match="has axis 'in'"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_one_follower_at_a_time_for_as_long_as_its_optimizer_lives(images: Tensor) -> None:
    model = nn.Sequential(*small(), nn.BatchNorm1d(2))

    def phase() -> tuple[fastwrs.SGD, Any]:
        optimizer = fastwrs.SGD(fastwrs.param_groups(model, rescale=BIG, head="skip"), lr=1.0)
        return optimizer, weakref.ref(fastwrs.follow_batchnorm(model, optimizer))

    optimizer, held = phase()
    gc.collect()  # it goes on, held by the optimizer alone, and while it is held by the user alone it is over
    follower = held()
    assert follower is not None and kept(model, optimizer, images)
    with pytest.raises(ValueError, match="is followed already"):
        phase()
    del optimizer
    optimizer, held = phase()
    assert kept(model, optimizer, images)
    follower.remove()
    with pytest.raises(ValueError, match="is followed already"):
        phase()
    del follower, optimizer
    optimizer, _ = phase()
    assert kept(model, optimizer, images) and len(model[4]._forward_hooks) == 1


def test_a_bias_that_is_projected_too_is_refused() -> None:
    model = small()
    optimizer = fastwrs.SGD(model.parameters(), lr=0.1, rescale=fastwrs.Rescale(axis="tensor"))
    with pytest.raises(ValueError, match=r"'0.bias' is rescaled or shrunk too"):
        fastwrs.follow_batchnorm(model, optimizer)


def test_groups_of_a_transposed_convolution_that_are_no_channels_are_refused() -> None:
    """As many norm groups as channels, by accident: two positions of the kernel, and two groups."""
    model = nn.Sequential(nn.ConvTranspose2d(4, 8, (2, 3), groups=2), nn.BatchNorm2d(8))
    groups = [{"params": [model[0].weight], "rescale": fastwrs.Rescale(axis=(0, 3))}]
    with pytest.raises(ValueError, match="no common factor per channel"):
        fastwrs.follow_batchnorm(model, fastwrs.SGD(groups, lr=0.1))


def test_a_channel_without_variance_stays_finite() -> None:
    """Its factor is so small that nothing is left of variance and eps."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2))
    (weight, *_), (_, variance, *_) = model.parameters(), model.buffers()
    with torch.no_grad():
        weight.mul_(2e4)
        variance.zero_()
    optimizer = fastwrs.SGD([{"params": [weight], "rescale": OUT}], lr=0.1)
    fastwrs.follow_batchnorm(model, optimizer)
    zero_gradients(model)
    optimizer.step()
    assert evaluated(model, torch.zeros(1, 3, 2, 2)).isfinite().all()


def kept(model: nn.Module, optimizer: fastwrs.SGD, images: Tensor) -> bool:
    """Whether a step with gradients of 0 leaves the outputs in eval mode as they are."""
    trained(model, images)
    before, noise = evaluated(model, images), rounding(model, images)
    zero_gradients(model)
    optimizer.step()
    return float((evaluated(model, images) - before).abs().max()) <= 4 * (noise + rounding(model, images))


def test_replaced_and_late_parameters_are_followed(images: Tensor) -> None:
    model = small()
    optimizer = fastwrs.SGD([{"params": [model[3].weight]}, {"params": [model[0].weight], "rescale": BIG}], lr=1.0)
    follower = fastwrs.follow_batchnorm(model, optimizer)
    optimizer.param_groups[1]["params"][0] = model[0].weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    assert kept(model, optimizer, images) and follower.pairs == {"0": ("1",)}
    gone = optimizer.param_groups.pop()
    assert kept(model, optimizer, images) and follower.pairs == {} and follower.before_step() is Scope.NOTHING
    optimizer.add_param_group({"params": gone["params"], "rescale": fastwrs.Rescale(target=0.1)})
    optimizer.param_groups[0]["rescale"] = OUT  # of the head, where it was not
    zero_gradients(model)
    optimizer.step()
    assert follower.pairs == {"0": ("1",)} and follower.unpaired == ("3",)
    optimizer.defaults["rescale"] = BIG
    optimizer.param_groups[:] = [{"params": [model[0].weight]}]  # by hand: it gets the defaults
    assert kept(model, optimizer, images) and follower.unpaired == ()


class Used(nn.Module):
    """Something else may use the layer's output, or its weight."""

    def __init__(self, use: Use, layer: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.layer, self.norm = layer or nn.Conv2d(3, 4, 3), norm or nn.BatchNorm2d(4)
        self.between, self.use = nn.Dropout(0.1), use

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.layer(x))
        return self.norm(input=y) * y.shape[0] + self.use(self, y)


class Standardized(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's)
        return F.conv2d(input, self.weight / self.weight.std(), self.bias)


HOOKED = nn.Conv2d(3, 4, 3)
HOOKED.register_forward_hook(lambda _module, _inputs, output: output * 2 + 1)


@pytest.mark.parametrize(
    ("use", "layer", "kept_one"),
    [
        (lambda _, y: y.size(0), None, True),
        (lambda _, y: y, None, False),
        (lambda model, _: model.layer.weight.sum(), None, False),
        (lambda *_: 0, Standardized(3, 4, 3), False),
        (lambda *_: 0, HOOKED, False),
    ],
)
def test_layers_whose_outputs_cannot_be_kept_are_listed(
    images: Tensor, use: Use, layer: nn.Module | None, kept_one: bool
) -> None:
    model = Used(use, copy.deepcopy(layer))
    optimizer = fastwrs.SGD([{"params": [model.layer.weight], "rescale": BIG}], lr=1.0)
    with fastwrs.follow_batchnorm(model, optimizer) as follower:
        assert (follower.pairs, follower.unpaired) == (({"layer": ("norm",)}, ()) if kept_one else ({}, ("layer",)))
        assert kept(model, optimizer, images) or not kept_one
    assert fastwrs.follow_batchnorm(model, optimizer, {"layer": "norm"}).unpaired == ()  # the user knows


def test_dimensions_are_seen_in_keyword_calls() -> None:
    model = Used(lambda *_: 0, nn.Linear(9, 5), nn.BatchNorm1d(5))
    optimizer = fastwrs.SGD([{"params": [model.layer.weight], "rescale": OUT}], lr=0.1)
    fastwrs.follow_batchnorm(model, optimizer)
    zero_gradients(model)
    model(torch.randn(8, 5, 9))
    with pytest.raises(ValueError, match="'norm' was called on 3 dimensions"):
        optimizer.step()
    optimizer.param_groups[0]["rescale"] = None  # no matter then
    optimizer.step()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_a_followed_model_can_be_scripted_and_saved() -> None:
    model, x = nn.Sequential(nn.Linear(9, 5), nn.BatchNorm1d(5)), torch.randn(8, 9)
    optimizer = fastwrs.SGD([{"params": [model[0].weight], "rescale": OUT}], lr=0.1)
    fastwrs.follow_batchnorm(model, optimizer)
    assert torch.equal(torch.jit.script(model)(x), model(x)) and model[1]._forward_hooks
    assert torch.equal(copy.deepcopy(model)(x), pickle.loads(pickle.dumps(model))(x))


def test_parameters_of_no_layer_are_listed_by_their_names() -> None:
    pruned, normed = nn.Conv2d(3, 4, 3), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    prune.random_unstructured(pruned, "weight", 0.3)
    model = nn.Sequential(pruned, nn.BatchNorm2d(4), normed, nn.MultiheadAttention(4, 2), nn.Linear(4, 2))
    optimizer = fastwrs.SGD([p for p in model.parameters() if p.ndim > 1], lr=0.1, rescale=OUT)
    expected = "0.weight_orig", *(f"2.parametrizations.weight.original{i}" for i in (0, 1))
    expected += "3.in_proj_weight", "3.out_proj", "4"
    assert fastwrs.follow_batchnorm(model, optimizer, {}).unpaired == expected
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": [model[1].weight], "rescale": fastwrs.Rescale(axis="tensor")})
    assert fastwrs.follow_batchnorm(model, optimizer, {}).unpaired == ("1.weight",)


def test_tracing_leaves_the_model_as_it_was() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.calls, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), 0, None
            self.seen, self.noise = nn.Buffer(torch.zeros(2)), nn.Buffer(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            self.calls, self.noise = self.calls + 1, torch.rand(2)
            self.seen += 1
            self.last = self.extra = self.conv(x)
            return self.norm(self.last) + self.noise.sum()

    model, state = Counting(), torch.get_rng_state()
    optimizer = fastwrs.SGD([model.conv.weight], lr=0.1, rescale=OUT)
    assert fastwrs.follow_batchnorm(model, optimizer).pairs == {"conv": ("norm",)}
    assert (model.calls, model.last) == (0, None) and not hasattr(model, "extra")
    assert not model.seen.any() and not model.noise.any() and torch.equal(state, torch.get_rng_state())
