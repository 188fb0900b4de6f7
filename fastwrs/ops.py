"""What torch needs to know about ``torch.ops.fastwrs`` to trace it; imported once the extension is loaded.

The schemas are in csrc/bindings.cpp. The ops that write do so in place and return nothing, so that tracing them has no
result to describe.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor


@torch.library.register_fake("fastwrs::step")
def _step(_rule: str, *args: object, **_kwargs: object) -> None:
    # One meta tensor among real ones sends the whole call here: without this nothing would happen, and nobody would
    # know.
    devices = {tensor.device for tensors in args[:4] for tensor in cast("list[Tensor]", tensors)}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")


@torch.library.register_fake("fastwrs::rescale_")
def _rescale(*_args: object) -> None:
    return None


@torch.library.register_fake("fastwrs::channel_norms")
def _channel_norms(*_args: object) -> None:
    return None
