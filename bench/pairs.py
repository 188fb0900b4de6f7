"""The sides of the comparisons: ours, torch fused, and torch fused with the loop that users write after it."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastwrs
from fastwrs.benchmark.lists import Shape
from fastwrs.benchmark.sides import PRECISIONS, bytes_per_element, divided, one_after_another, replaced
from fastwrs.benchmark.turns import Step


def make_params(shapes: list[Shape], channels_last: bool = False) -> list[torch.nn.Parameter]:
    """Parameters with gradients. The same seed for both sides, and memory of their own."""
    seed = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes:
        layout = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
        weight, grad = (torch.randn(shape, generator=seed).contiguous(memory_format=layout) for _ in range(2))
        params.append(torch.nn.Parameter(weight))
        params[-1].grad = grad.mul_(1e-2)
    return params


def groups(params: list[torch.nn.Parameter], axis: str | None) -> list[dict[str, object]]:
    """Weights with two or more dimensions rescaled and not decayed, the rest decayed: as ``param_groups`` does it."""
    weights = [p for p in params if p.ndim >= 2]
    rest = [p for p in params if p.ndim < 2]
    rescale = fastwrs.Rescale(axis=axis) if axis else None
    return [{"params": weights, "rescale": rescale, "weight_decay": 0.0}, {"params": rest, "weight_decay": 1e-2}]


OPTIONS = {"AdamW": {"lr": 1e-3}, "SGD": {"lr": 1e-3, "momentum": 0.9}}


def step_bytes(rule: str, elements: int) -> int:
    """What a step on so many fp32 elements has to move."""
    return elements * bytes_per_element(rule, PRECISIONS["float32"])


def ours(name: str, params: list[torch.nn.Parameter], axis: str | None = "out") -> Step:
    """A step of fastwrs, on the cpu backend or not at all."""
    kind = getattr(fastwrs, name)
    return kind(groups(params, axis), backend="cpu", **OPTIONS[name]).step


def torch_fused(name: str, params: list[torch.nn.Parameter]) -> Step:
    """A step of torch's fused optimizer, without any rescaling."""
    return getattr(torch.optim, name)(params, fused=True, weight_decay=1e-2, **OPTIONS[name]).step


def with_loop(rescale: Callable[[list[torch.Tensor]], object]) -> Callable[[str, list[torch.nn.Parameter]], Step]:
    """A step of torch's fused optimizer, then ``rescale`` on its weights."""
    return lambda name, params: one_after_another(
        torch_fused(name, params), rescale, (param for param in params if param.ndim >= 2)
    )


torch_fused_and_loop = with_loop(replaced)
torch_fused_and_inplace_loop = with_loop(divided)
