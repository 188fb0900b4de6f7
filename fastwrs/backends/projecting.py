"""``rescale_`` and ``channel_norms`` by the kernels of a step: one of the rule without an update."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastwrs.backends import reference
from fastwrs.plan import StepCall, overlaps_itself
from fastwrs.spec import MEASURED, NO_STOP, RULES

_RULE = RULES["project"]
_NORM = MEASURED.index("norm_before")


def rescale_by(step: Callable[[StepCall], None], tensors: list[Tensor], axes: list[int], target: float) -> None:
    """Sets the norm of every group to the target, in one pass."""
    step(_call(tensors, axes, every=1.0, target=target))


def norms_by(step: Callable[[StepCall], None], tensors: list[Tensor], axes: list[int], out: list[Tensor]) -> None:
    """Writes the norm of every group into ``out``.

    Kernels measure in fp32, so that the norms of fp64 are PyTorch's, and so are those of tensors that overlap
    themselves, which kernels refuse though they write nothing here.
    """
    if tensors[0].dtype == torch.float64 or any(map(overlaps_itself, tensors)):
        return reference.channel_norms(tensors, axes, out)
    call = _call(tensors, axes)
    sizes = [norms.numel() for norms in out]
    call.measured = torch.empty(sum(sizes), len(MEASURED), dtype=torch.float32, device=tensors[0].device)
    step(call)
    for norms, rows in zip(out, call.measured.split(sizes), strict=True):
        norms.copy_(rows[:, _NORM].view(norms.shape))
    return None


def _call(tensors: list[Tensor], axes: list[int], **numbers: float) -> StepCall:
    record = {"lr": 1.0, "lr_tensor": -1.0, "stop": NO_STOP} | numbers
    steps = torch.zeros(len(tensors), dtype=torch.float32, device=tensors[0].device)
    return StepCall(
        rule=_RULE.name,
        params=tensors,
        grads=tensors,  # which are not read
        states=[],
        steps=list(steps.unbind()),
        hyper=[record.get(hyper.name, 0.0) for hyper in _RULE.record],
        groups=[0] * len(tensors),
        axes=axes,
        fresh=[],
        lrs=[],
    )
