"""The CUDA kernels: one launch for a whole list of tensors, one pass over memory, no synchronisation."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastwrs import library
from fastwrs.backends.projecting import norms_by, rescale_by
from fastwrs.backends.workspace import allocate, keep_for_this_stream
from fastwrs.plan import StepCall
from fastwrs.spec import DTYPE_TRIPLES

NAME = "cuda"
TICKET_BYTES = 2048
"""What of a workspace has to be 0 before a step, and is after it: the tickets of a launch and of its tensors."""
_TOO_SMALL = "fastwrs: the workspace has"


def why_not(device_type: str | None = None, dtypes: tuple[str, str, str] | None = None) -> str | None:
    """It needs the extension built with nvcc, a GPU and driver that can run it, tensors there, and known dtypes."""
    if device_type not in (None, "cuda"):
        return f"its tensors must be on a CUDA device, not on {device_type}"
    reason = _why_not_here()
    if reason is None and dtypes is not None and dtypes not in DTYPE_TRIPLES:
        reason = f"it has no kernel for (param, grad, state) dtypes {dtypes}"
    return reason


@functools.cache
def _why_not_here() -> str | None:
    """Why it cannot run in this process. Asks the driver, which must not happen before it is wanted: see dispatch."""
    if torch.version.hip is not None:
        return "this torch was built for ROCm"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    return library.why_not() or torch.ops.fastwrs.cuda_why_not() or None


def step(call: StepCall, dry_run: bool = False) -> None:
    """One step of every tensor in the call: all of them, or on an error none.

    The workspace is allocated in the first step, and again only where one needs a larger one.
    """
    if call.workspace is not None:
        keep_for_this_stream(call.workspace)
        try:
            torch.ops.fastwrs.step(*call.arguments(), dry_run)
        except RuntimeError as error:
            if not str(error).startswith(_TOO_SMALL):
                raise
        else:
            return
    size, _ = torch.ops.fastwrs.step_plan(*call.arguments())
    call.workspace = allocate(call, size)
    keep_for_this_stream(call.workspace)
    torch.ops.fastwrs.step(*call.arguments(), dry_run)


def rescale_(tensors: list[Tensor], axes: list[int], target: float) -> None:
    """Sets the norm of every group to the target."""
    rescale_by(step, tensors, axes, target)


def channel_norms(tensors: list[Tensor], axes: list[int], out: list[Tensor]) -> None:
    """Writes the norm of every group into ``out``."""
    norms_by(step, tensors, axes, out)
