"""``rescale_``, ``channel_norms`` and ``WeightRescaler`` as the tests of every backend call them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import tolerances
import torch
from calls import LAYOUTS, bits, place
from cases import axes_for, dims_of, mask_of
from tolerances import NORM_BOUND, norm_deviation
from torch import Tensor

import fastwrs

SMALL = [(64, 3, 7, 7), (5, 7, 3, 3), (12, 10, 1, 1), (13, 29), (17,), (), (3, 0)]
SHAPES = [*SMALL, (300, 200), (3, 40001), (8195, 5)]
TARGET = 0.7
FLOATS = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}

Placed = tuple[Tensor, Tensor, Any]


def some_tensors(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> Iterator[Placed]:
    """(buffer, tensor, axis) for all shapes and axes, in all layouts in turn; among the groups are rows of zeros."""
    layouts = list(LAYOUTS)
    generator = torch.Generator().manual_seed(5)
    for shape in shapes:
        for k, axis in enumerate(axis for axis in axes_for(shape) if axis is not None):
            layout = layouts[(k + len(shape)) % len(layouts)]
            values = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1
            values = values.sign() * values.abs().clamp(min=0.01)
            if len(shape) > 1:
                values[:1] *= 0
            yield *place(values, "c" if layout == "cl" and len(shape) != 4 else layout, dtype, "cpu"), axis


def check_rescale(rescale: Any, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> None:
    """``rescale(tensors, masks, TARGET)`` against the oracle, and all memory around the tensors."""
    buffers, tensors, axes = map(list, zip(*some_tensors(dtype, shapes), strict=True))
    before, copies = [tensor.clone() for tensor in tensors], [buffer.clone() for buffer in buffers]
    rescale(tensors, [mask_of(axis, t.ndim) for axis, t in zip(axes, tensors, strict=True)], TARGET)
    hyper = {"lr": 1.0, "maximize": 0, "every": 1, "start": 0, "stop": math.inf, "target": TARGET, "rate": 0}
    for tensor, old, axis, buffer, copy in zip(tensors, before, axes, buffers, copies, strict=True):
        dims = dims_of(axis, tensor.ndim)
        zeros = torch.zeros_like(old)
        inputs = tolerances.Inputs("project", old, zeros, {}, t=1, first=True, lr=1.0, hyper=hyper, dims=dims)
        tolerances.check_soon(inputs, {"param": tensor, "grad": zeros}, f"{tuple(tensor.shape)}, axis {axis}: ")
        for storage in (buffer, copy):
            storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).zero_()
        assert torch.equal(bits(buffer), bits(copy)), "memory that belongs to no tensor was written"


def check_norms(channel_norms: Any, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> None:
    """``channel_norms(tensors, masks, out)`` against torch in fp64; it writes nothing else."""
    buffers, tensors, axes = map(list, zip(*some_tensors(dtype, shapes), strict=True))
    copies = [buffer.clone() for buffer in buffers]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    out = []
    for tensor, axis in zip(tensors, axes, strict=True):
        kept = tensor.sum(dims_of(axis, tensor.ndim)).shape
        out.append(torch.full(kept, math.nan, dtype=compute))
    channel_norms(tensors, [mask_of(axis, t.ndim) for axis, t in zip(axes, tensors, strict=True)], out)
    for got, tensor, axis in zip(out, tensors, axes, strict=True):
        tolerances.check_norms(got, tensor, dims_of(axis, tensor.ndim) or ())
    assert all(torch.equal(bits(buffer), bits(copy)) for buffer, copy in zip(buffers, copies, strict=True))


def check_rescaler(backend: str) -> None:
    """Five steps of torch's SGD, one of them skipped by ``found_inf``, against the reference backend."""
    runs = []
    for name in (backend, "reference"):
        generator = torch.Generator().manual_seed(3)
        shapes = ((40, 50), (8, 3, 3, 3), (2, 20001), (17,), (0, 4))
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(0.1)) for shape in shapes]
        optimizer: Any = torch.optim.SGD(params, lr=0.05, momentum=0.9, fused=True)
        rescaler = fastwrs.WeightRescaler(optimizer, fastwrs.Rescale(every=2, target=1.5), backend=name)
        norms = []
        for step in range(6):
            for param in params[: len(params) - (step == 1)]:
                param.grad = torch.randn(param.shape, generator=generator)
            optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.step()
            optimizer.zero_grad()
            norms.append([norm_deviation(p.detach(), dims_of("out", p.ndim) or (), 1.5) for p in params[:3]])
        held = [max(of_step) <= NORM_BOUND[torch.float32] for of_step in norms]
        assert held == [False, True, True, False, True, False]
        assert [state["step"].item() for state in rescaler.state_dict()["state"].values()] == [5.0, 5.0, 5.0, 4.0]
        runs.append(params)
    for ours, expected in zip(*runs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
