"""The sides of the comparisons: ours, torch fused, and torch fused with the loop that users write after it."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fastwrs
from fastwrs.benchmark.lists import Shape
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
BYTES = {"AdamW": 28, "SGD": 20}
"""Bytes that a step has to move per fp32 element: read parameter, gradient and states, write all but the gradient."""


def ours(name: str, params: list[torch.nn.Parameter], axis: str | None = "out") -> Step:
    """A step of fastwrs, on the cpu backend or not at all."""
    kind = getattr(fastwrs, name)
    return kind(groups(params, axis), backend="cpu", **OPTIONS[name]).step


def torch_fused(name: str, params: list[torch.nn.Parameter]) -> Step:
    """A step of torch's fused optimizer, without any rescaling."""
    return getattr(torch.optim, name)(params, fused=True, weight_decay=1e-2, **OPTIONS[name]).step


def norms(weight: torch.Tensor) -> torch.Tensor:
    """The norm of every channel, as a loop gets it."""
    return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)


def with_loop(rescale: Callable[[torch.Tensor], object]) -> Callable[[str, list[torch.nn.Parameter]], Step]:
    """A step of torch's fused optimizer, then ``rescale`` on every weight."""

    def make(name: str, params: list[torch.nn.Parameter]) -> Step:
        fused = torch_fused(name, params)
        weights = [p for p in params if p.ndim >= 2]

        @torch.no_grad()
        def step() -> None:
            fused()
            for weight in weights:
                rescale(weight)

        return step

    return make


torch_fused_and_loop = with_loop(lambda weight: weight.copy_(weight / norms(weight)))
"""With the loop as nGPT and Algorithm 1 of the WRS paper have it: ``W = W / |W|``."""

torch_fused_and_inplace_loop = with_loop(lambda weight: weight.div_(norms(weight)))
"""With the loop of somebody who counts bytes: divided in place."""
