"""The weight rescaling paper's theory, on a real network with BatchNorm in fp64: what the optimizers rest on."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from calls import one_thread
from networks import ResNet18, batch, set_eps
from torch import Tensor, nn
from torch.nn import functional as F

import fastwrs

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("backend")]

EPS = 1e-12
"""BatchNorm's epsilon. The identities hold where it is 0; what it leaves is of its size over the variances."""


@pytest.fixture(autouse=True)
def _on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture
def model() -> ResNet18:
    torch.manual_seed(2)
    network = ResNet18(width=4).double()
    set_eps(network, EPS)
    return network


def weights_before_batchnorm(model: ResNet18) -> dict[str, nn.Parameter]:
    """All but the head: every convolution of this network has a BatchNorm behind it."""
    return {name: param for name, param in model.named_parameters() if param.ndim == 4}


def backward(model: nn.Module) -> None:
    images, labels = batch(dtype=torch.float64)
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()


def squares(tensor: Tensor) -> Tensor:
    """The squared norm of every output channel."""
    return tensor.detach().square().sum((1, 2, 3))


def test_gradients_are_orthogonal_to_weights(model: ResNet18) -> None:
    """Lemma 3.1: the loss does not depend on a channel's norm, so its gradient has no part along the weights."""
    backward(model)
    weights = weights_before_batchnorm(model)
    assert len(weights) == 20
    for name, weight in weights.items():
        assert weight.grad is not None
        cosine = (weight.grad * weight.detach()).sum((1, 2, 3)).abs() / (squares(weight) * squares(weight.grad)).sqrt()
        assert float(cosine.max()) < 1e-9, name
    grad, head = model.fc.weight.grad, model.fc.weight.detach()
    assert grad is not None  # the head has no BatchNorm behind it
    assert float(((grad * head).sum(1).abs() / (grad.norm(dim=1) * head.norm(dim=1))).max()) > 1e-3


def test_the_squared_norm_grows_by_the_squared_step(model: ResNet18) -> None:
    """Corollary 3.3, for SGD without weight decay, from the monitor's figures (fp32) and from the weights (fp64)."""
    lr = 0.5
    optimizer = fastwrs.SGD(model.parameters(), lr=lr)
    monitor = fastwrs.Monitor(optimizer, names=model.named_parameters())
    for _ in range(3):
        backward(model)
        before = {name: squares(weight) for name, weight in weights_before_batchnorm(model).items()}
        optimizer.step()
        figures = monitor.latest()
        for name, weight in weights_before_batchnorm(model).items():
            assert weight.grad is not None
            growth, step = squares(weight) - before[name], lr**2 * squares(weight.grad)
            torch.testing.assert_close(growth, step, rtol=1e-9, atol=1e-12)
            assert float(step.max()) > 1e-8
            of = figures[name]
            grown = of["norm_before"] ** 2 + lr**2 * of["update_norm"] ** 2
            torch.testing.assert_close(of["norm_after"] ** 2, grown, rtol=1e-6, atol=0)


def test_small_steps_with_weight_decay_shrink_norms_exponentially(model: ResNet18) -> None:
    """Corollary 3.2: ``|w(t)|^2 = |w(0)|^2 exp(-2 decay t)``, t the sum of the learning rates.

    A step of Euler's method does this but for terms of second order: (1 - lr decay)^2 is not exp(-2 lr decay), and
    the squared step is added. Both are bounded by what is measured.
    """
    lr, decay, steps = 1e-5, 0.5, 20
    optimizer = fastwrs.SGD(model.parameters(), lr=lr, weight_decay=decay)
    before = {name: squares(weight) for name, weight in weights_before_batchnorm(model).items()}
    pushed = {name: torch.zeros_like(norms) for name, norms in before.items()}
    for _ in range(steps):
        backward(model)
        for name, weight in weights_before_batchnorm(model).items():
            assert weight.grad is not None
            pushed[name] += lr**2 * squares(weight.grad)
        optimizer.step()
    for name, weight in weights_before_batchnorm(model).items():
        exponential = before[name] * math.exp(-2 * decay * lr * steps)
        second_order = 2 * steps * (lr * decay) ** 2 * before[name] + pushed[name]
        difference = (squares(weight) - exponential).abs()
        assert bool((difference <= second_order + 1e-12).all()), name
        # the corollary says something: the decay itself is far larger than what it leaves out
        assert bool((before[name] - squares(weight) > 5 * difference).all()), name


def test_one_factor_for_the_head_changes_no_prediction(model: ResNet18) -> None:
    """Section III-B: a head without bias has logits that grow with it, all alike."""
    images, _ = batch(dtype=torch.float64)
    before = model(images).detach()
    norm = float(model.fc.weight.detach().norm())
    fastwrs.rescale_(model.fc.weight, axis="tensor", target=3 * norm)
    after = model(images).detach()
    torch.testing.assert_close(after, 3 * before, rtol=1e-10, atol=1e-12)
    assert torch.equal(after.argmax(1), before.argmax(1))


def test_rescaled_channels_change_no_prediction_in_train_mode(model: ResNet18) -> None:
    """Scale invariance itself, with one factor for each channel."""
    images, _ = batch(dtype=torch.float64)
    before = model(images).detach()
    fastwrs.rescale_(list(weights_before_batchnorm(model).values()), target=2.0)
    torch.testing.assert_close(model(images).detach(), before, rtol=1e-8, atol=1e-10)
