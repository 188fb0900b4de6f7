"""An optimizer for each parameter, which steps in the backward pass as soon as the gradient is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastwrs

pytestmark = pytest.mark.cpu


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3))


def step_in_backward(model: nn.Module, kind: Any, **options: Any) -> dict[Tensor, Any]:
    """As in PyTorch's tutorial: the gradient is freed at once."""
    optimizers = {}
    for group in fastwrs.param_groups(model, rescale=fastwrs.Rescale(every=2), weight_decay=0.1):
        for param in group["params"]:
            optimizers[param] = kind([{**group, "params": [param], "param_names": ["p"]}], **options)

    def hook(param: Tensor) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(hook)
    return optimizers


@pytest.mark.parametrize("kind", [fastwrs.SGD, fastwrs.AdamW, fastwrs.AdamP])
def test_as_one_optimizer_for_all(kind: Any) -> None:
    """The same bits, also where a parameter takes no part in some steps; no gradient is left."""
    model, other = network(), network()
    optimizers = step_in_backward(model, kind, lr=0.01)
    together = kind(fastwrs.param_groups(other, rescale=fastwrs.Rescale(every=2), weight_decay=0.1), lr=0.01)
    for step in range(5):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        for one in (model, other):
            one[3].requires_grad_(step != 2)
            one(x).square().mean().backward()
        together.step()
        together.zero_grad()
        assert all(param.grad is None for param in model.parameters())
        assert all(map(torch.equal, model.parameters(), other.parameters()))
    counts = [optimizer.state[param]["step"].item() for param, optimizer in optimizers.items()]
    assert sorted(counts) == [4.0, 4.0, 5.0, 5.0, 5.0, 5.0]
