"""Lane 7: what only the Triton backend has: a table that is brought to the device, and kernels that are compiled late.

That it computes what it should, test_gpu.py and test_gpu_training.py see, on the same cases as for the CUDA kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import on_gpu
import pytest
import torch
from calls import same
from on_gpu import context, gpu  # noqa: F401 (fixtures)
from test_gpu_training import (
    KINDS,
    LONG_ENOUGH,
    SHAPES,
    TALL,
    captured,
    everything,
    give,
    launched,
    make,
    no_waiting,
    on_device,
    split,
    start,
    traced,
)
from torch import Tensor, nn

import fastwrs
from fastwrs import dispatch
from fastwrs.benchmark import lists

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("context")]

TRITON: Any = dispatch._MODULES["triton"]
MODELS = ("resnet50", "llama_1b")
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "AdamW": {}}


@pytest.fixture(scope="module", autouse=True)
def _triton() -> Iterator[None]:
    on_gpu.require("triton")
    before, on_gpu.BACKEND = on_gpu.BACKEND, "triton"
    yield
    on_gpu.BACKEND = before


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are compiled from here on, or fetched from Triton's cache on disk."""
    from triton import knobs

    from fastwrs.triton_kernels import kernels, launch

    monkeypatch.setattr(launch, "_compiled", set())
    for kernel in (kernels.step_kernel, kernels.project_kernel):
        kernel.device_caches.clear()
    names: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda *, fn, **_: names.append(fn.name))
    return names


def optimizer_on(which: str, name: str, **more: Any) -> Any:
    """An optimizer for the list of a model, in rows as long as the model's."""
    groups = split(lists.LISTS[which].params(), 300)
    return getattr(fastwrs, name)(groups, **({"lr": 0.01, "backend": "triton"} | OPTIONS[name] | more))


def params_of(optimizer: Any) -> list[nn.Parameter]:
    return [*chain.from_iterable(group["params"] for group in optimizer.param_groups)]


def copies_of(params: list[nn.Parameter]) -> list[Tensor]:
    """Of their gradients, hence at other addresses."""
    return [param.grad.clone() for param in params if param.grad is not None]


def exchange(params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad


# ---- what a step brings to the device -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("which", MODELS)
def test_one_small_copy_where_something_has_changed(which: str, name: str, tmp_path: Path) -> None:
    """One kernel per step; a copy before it where an address or a number has changed, and none where nothing has."""
    optimizer = optimizer_on(which, name)
    params = params_of(optimizer)
    for _ in range(3):
        exchange(params, copies_of(params))
        optimizer.step()
    assert launched(optimizer.step, tmp_path) == ["step_kernel"]

    def after(change: str, others: list[list[Tensor]]) -> None:
        if change == "all gradients":
            exchange(params, others.pop())
        elif change == "the last gradient":
            exchange(params[-1:], others.pop()[-1:])
        else:
            optimizer.param_groups[0][change] += 0.01
        optimizer.step()

    for change in ("all gradients", "the last gradient", "lr", "weight_decay"):
        step = partial(after, change, [copies_of(params) for _ in range(2)])  # it is traced twice
        copy, kernel = traced(step, tmp_path)
        assert "HtoD" in copy["name"] and copy["args"]["bytes"] <= 8 * (24 * len(params) + 100), (change, copy)
        assert kernel["name"] == "step_kernel", (change, kernel)
    assert launched(optimizer.step, tmp_path) == ["step_kernel"]


def test_a_new_address_does_not_wait_for_the_device() -> None:
    optimizer = optimizer_on("resnet50", "AdamW")
    params = params_of(optimizer)
    optimizer.step()
    torch.cuda._sleep(LONG_ENOUGH)
    for _ in range(4):  # with that, there is pinned memory for steps that the host queues ahead
        exchange(params, copies_of(params))
        optimizer.step()
    exchange(params, copies_of(params))
    with no_waiting():
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.02
        optimizer.step()
    assert {state["step"].item() for state in optimizer.state.values()} == {7}


# ---- compilations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("which", MODELS)
def test_a_model_compiles_one_kernel_once(which: str, name: str, compiled: list[str]) -> None:
    """Whatever lr, step count, addresses of gradients, weight decay, schedule and GradScaler say."""
    optimizer = optimizer_on(which, name)
    params = params_of(optimizer)
    for step in range(12):
        exchange(params, copies_of(params))
        for k, group in enumerate(optimizer.param_groups):
            group["lr"] = torch.tensor(0.01, device=on_gpu.DEVICE) if step in (5, 6) else 0.01 / (1 + step)
            group["weight_decay"] = 0.03 * ((step + k) % 2)
        optimizer.param_groups[0]["rescale"] = [None, fastwrs.Rescale(), fastwrs.Rescale(every=2, target=1.5)][step % 3]
        scaled = step in (7, 8)
        optimizer.grad_scale = torch.tensor(4.0, device=on_gpu.DEVICE) if scaled else None
        optimizer.found_inf = torch.tensor(float(step == 8), device=on_gpu.DEVICE) if scaled else None
        optimizer.step()
    assert compiled == ["step_kernel"]
    optimizer_on(MODELS[which == MODELS[0]], name).step()
    assert compiled == ["step_kernel"], "another list is another compilation"


def test_what_needs_further_launches_compiles_three_kernels(compiled: list[str]) -> None:
    """Groups in columns that fit no program."""
    params = on_device(start((TALL, (64, 300))))
    optimizer = make(*KINDS[0], params, fastwrs.Rescale(axis=(0,)))
    for step in range(5):
        give(params, step)
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
        optimizer.step()
    assert sorted(compiled) == ["project_kernel", "step_kernel"]


# ---- graphs ---------------------------------------------------------------------------------------------------------


def test_memory_for_graphs_is_laid_in_by_steps() -> None:
    """As many captures as one step lays in memory for; one more is refused, and leaves everything as it was."""
    params, twins = on_device(start(SHAPES[:3])), on_device(start(SHAPES[:3]))
    optimizer, eager = (make(*KINDS[2], tensors, fastwrs.Rescale(every=3)) for tensors in (params, twins))
    for tensors, each in ((params, optimizer), (twins, eager)):
        give(tensors, 0)
        each.step()
    graphs = [captured(optimizer.step) for _ in range(TRITON.SPARES)]
    with pytest.raises(RuntimeError, match="take a step before"):
        captured(optimizer.step)
    torch.cuda.synchronize()
    assert same(everything(optimizer), everything(eager))
    optimizer.step()
    graphs.append(captured(optimizer.step))
    for graph in graphs:
        graph.replay()
    for _ in range(1 + len(graphs)):
        eager.step()
    torch.cuda.synchronize()
    assert same(everything(optimizer), everything(eager))
    assert optimizer.state[params[0]]["step"].item() == 2 + len(graphs)
    assert all(math.isfinite(param.sum().item()) for param in params)
