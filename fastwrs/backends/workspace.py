"""Scratch memory for launches on a GPU: made in a first step, then kept by the optimizer.

A step can be captured in a graph once another one has run before, and the graph's memory stays its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastwrs.plan import StepCall

_streams: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The streams that each workspace has been used on."""


def is_captured(call: StepCall) -> bool:
    """Whether a graph is being captured on the stream that a call goes to."""
    return call.params[0].is_cuda and torch.cuda.is_current_stream_capturing()


def allocate(call: StepCall, size: int) -> Tensor:
    """Zeroed memory of at least so many bytes. RuntimeError while a graph is captured."""
    if is_captured(call):
        raise RuntimeError(
            "fastwrs: this step needs a workspace, and none can be made while a graph is captured: take a step before"
        )
    return torch.zeros(-(-size // 4), dtype=torch.float32, device=call.params[0].device)


def keep_for_this_stream(workspace: Tensor) -> None:
    """Tells the allocator of every stream that uses the workspace, so that it is not reused under a running kernel."""
    if workspace.device.type != "cuda":
        return  # kernels that run on the CPU in tests
    stream = torch.cuda.current_stream(workspace.device)
    known: set[int] = _streams.setdefault(workspace, set())  # type: ignore[assignment]
    if stream.cuda_stream not in known:
        workspace.record_stream(stream)
        known.add(stream.cuda_stream)
