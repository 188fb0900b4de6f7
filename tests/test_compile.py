"""``step()`` inside a function that torch.compile has compiled: the same numbers, and nothing is compiled again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import fastwrs

pytestmark = [
    pytest.mark.cpu,
    # PyTorch's own: when the compiler is imported, and when a function goes on after a graph break
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute"),
]
WARM = 2
"""Steps after which all is compiled: the first one makes states, the second one finds them."""


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def training(lr: Any, rule: Any, seed: int = 0) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = rule(fastwrs.param_groups(model, rescale=fastwrs.Rescale(every=3)), lr=lr)
    return model, optimizer, lr_scheduler.ExponentialLR(optimizer, 0.9)


@pytest.mark.parametrize("rule", [fastwrs.SGD, fastwrs.AdamW, fastwrs.AdamP])
@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_compiled_training_step(compiler: str, kind: str, rule: Any) -> None:
    """The learning rate changes in every step, by a scheduler: no recompilation, whether it is a tensor or a number."""
    runs = [training(torch.tensor(0.01) if kind == "tensor" else 0.01, rule) for _ in range(2)]
    x = torch.randn(5, 8)

    def step(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    compiled = torch.compile(step, backend=compiler)
    for k in range(7):
        with torch._dynamo.config.patch(error_on_recompile=k >= WARM):
            losses = [f(model, optimizer, x) for f, (model, optimizer, _) in zip((compiled, step), runs, strict=True)]
        for _, _, schedule in runs:
            schedule.step()
        torch.testing.assert_close(losses[0], losses[1])
    (model, optimizer, _), (other, eager, _) = runs
    # the kernels of the model are others, those of the step are not
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert [float(s["step"]) for s in optimizer.state.values()] == [7.0] * 4 == [
        float(s["step"]) for s in eager.state.values()
    ]  # fmt: skip


def test_a_compiled_step_by_itself_has_the_same_bits() -> None:
    runs = [training(0.01, fastwrs.AdamW) for _ in range(2)]
    steps = [torch.compile(runs[0][1].step, backend="aot_eager"), runs[1][1].step]
    for k in range(7):
        torch.manual_seed(k)
        grads = [torch.randn_like(p) for p in runs[0][0].parameters()]
        for (model, _, schedule), step in zip(runs, steps, strict=True):
            for p, g in zip(model.parameters(), grads, strict=True):
                p.grad = g.clone()
            with torch._dynamo.config.patch(error_on_recompile=k >= WARM):
                step()
            schedule.step()
    assert all(torch.equal(p, q) for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True))


def test_the_step_of_another_optimizer_with_a_rescaler() -> None:
    """Its hooks are no part of what is compiled."""
    runs = []
    for compiler in (None, "aot_eager"):
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        torch.manual_seed(0)
        for param in model.parameters():
            nn.init.normal_(param)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
        rescaler = fastwrs.WeightRescaler(optimizer, fastwrs.Rescale(every=2))
        step = optimizer.step if compiler is None else torch.compile(optimizer.step, backend=compiler)
        for k in range(4):
            torch.manual_seed(k)
            for param in model.parameters():
                param.grad = torch.randn(param.shape)
            step()
        assert {state["step"].item() for state in rescaler.state_dict()["state"].values()} == {4.0}
        runs.append(list(model.parameters()))
    for ours, expected in zip(*runs, strict=True):
        torch.testing.assert_close(ours, expected)
