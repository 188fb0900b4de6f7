"""The C++ kernels for the CPU: one pass over memory, vectorised, on all of torch's threads."""

from __future__ import annotations

import torch
from torch import Tensor

from fastwrs import library
from fastwrs.backends import kept
from fastwrs.plan import StepCall
from fastwrs.spec import DTYPE_TRIPLES

NAME = "cpu"


def why_not(device_type: str | None = None, dtypes: tuple[str, str, str] | None = None) -> str | None:
    """It needs the C++ extension, tensors on the CPU, and dtypes that it has kernels for."""
    reason = library.why_not()
    if reason is not None:
        return reason
    if device_type not in (None, "cpu"):
        return f"its tensors must be on the CPU, not on {device_type}"
    if dtypes is not None and dtypes not in DTYPE_TRIPLES:
        return f"it has no kernel for (param, grad, state) dtypes {dtypes}"
    return None


def step(call: StepCall, dry_run: bool = False) -> None:
    """One step of every tensor in the call: all of them, or on an error none."""
    grads = [] if call.grads is call.params else call.grads  # it updates nothing
    states, kept_states = kept.handed_over("states", call.states, call.kept)
    steps, kept_steps = kept.handed_over("steps", call.steps, call.kept)
    lists = call.params, grads, states, steps
    torch.ops.fastwrs.step(call.rule, *lists, *call.arguments()[len(lists) + 1 :], dry_run, kept_states, kept_steps)


def rescale_(tensors: list[Tensor], axes: list[int], target: float) -> None:
    """Sets the norm of every group to the target."""
    torch.ops.fastwrs.rescale_(tensors, axes, target)


def channel_norms(tensors: list[Tensor], axes: list[int], out: list[Tensor]) -> None:
    """Writes the norm of every group into ``out``."""
    sizes = [norms.numel() for norms in out]
    flat = out[0].new_empty(sum(sizes))
    torch.ops.fastwrs.channel_norms(tensors, axes, flat)
    for norms, values in zip(out, flat.split(sizes), strict=True):
        norms.copy_(values.view(norms.shape))
