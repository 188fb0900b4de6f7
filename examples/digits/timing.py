"""Milliseconds per optimizer step: fastwrs against torch's fused optimizer with a rescaling loop after it.

Both step the same network with the same gradients, in turns, so that what else the machine does hits both alike.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import train
from torch import nn

import fastwrs


def eager_loop(groups: list[dict[str, Any]], lr: float) -> Callable[[], None]:
    """What users write today: one round of small kernels for every weight."""

    @torch.no_grad()
    def after_step() -> None:
        for group in groups:
            option = group.get("rescale") or group.get("shrink")
            if option is None:
                continue
            for weight in group["params"]:
                dims = tuple(range(1, weight.ndim)) if option.axis == "out" else (1,)
                norm = torch.linalg.vector_norm(weight, dim=dims, keepdim=True)
                if isinstance(option, fastwrs.Rescale):
                    weight.mul_(option.target / norm)
                else:
                    weight.mul_((1 - lr * option.rate * norm).clamp_(min=0))

    return after_step


def compare(
    make_model: Callable[[], nn.Module], name: str, method: str, backend: str, rounds: int = 200
) -> tuple[float, float]:
    """The median milliseconds of a step of fastwrs, and of torch fused plus the loop (no loop for plain decay)."""
    torch.manual_seed(0)
    model = make_model()
    rival = copy.deepcopy(model)
    for param, other in zip(model.parameters(), rival.parameters(), strict=True):
        param.grad = torch.randn_like(param)
        other.grad = param.grad.clone()
    ours = train.make_optimizer(model, name, method, backend)
    groups = train.make_groups(rival, name, method)
    plain = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
    options = train.OPTIMIZERS[name][1]
    theirs: torch.optim.Optimizer = getattr(torch.optim, name)(plain, fused=True, **options)
    loop = eager_loop(groups, options["lr"])

    def torch_step() -> None:
        theirs.step()
        loop()

    samples: tuple[list[float], list[float]] = ([], [])
    for round_ in range(rounds + 10):
        for step, times in zip((ours.step, torch_step), samples, strict=True):
            start = time.perf_counter()
            step()
            if round_ >= 10:  # the first ones make the states and warm up
                times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(samples[0]), statistics.median(samples[1])
