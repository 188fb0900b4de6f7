"""Ours and torch.optim side by side: the same weights, the same gradients, and how far the two may part."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tolerances import ulp
from torch import Tensor, nn

TORCH_ULPS = 16  # the agreement with torch.optim that the project promises, over 20 steps
SHAPES = ((7, 5), (4, 3, 3, 3), (33,), (), (0, 4))


def parameters(dtype: torch.dtype = torch.float32, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients(params: list[nn.Parameter], step: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        yield torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)


def run(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range, late: int = 3
) -> list[list[Tensor]]:
    """The weights after each step. The second parameter gets its first gradient in step ``late``."""
    history = [[param.detach().clone() for param in params]]
    for step in steps:
        for k, (param, grad) in enumerate(zip(params, gradients(params, step), strict=True)):
            param.grad = None if k == 1 and step < late else grad
        optimizer.step()
        history.append([param.detach().clone() for param in params])
    return history


def assert_close_to_torch(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> None:
    for k in range(len(ours[0])):
        if not ours[0][k].numel():
            continue
        path = torch.stack([weights[k] for weights in theirs])
        moves = path.diff(dim=0)
        largest = max(path.abs().max().item(), moves.abs().max().item())
        unit = ulp(torch.tensor(largest, dtype=torch.float64), path.dtype).item()
        worst = max((a[k] - b[k]).abs().max().item() for a, b in zip(ours, theirs, strict=True))
        assert worst <= TORCH_ULPS * unit, f"tensor {k}: {worst / unit:.1f} ulps"
