"""What torch needs to know about ``torch.ops.fastwrs`` to trace it; imported once the extension is loaded.

The schemas are in csrc/bindings.cpp. The ops that write do so in place and return nothing, so that tracing them has no
result to describe.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_devices(*args: object) -> None:
    """One meta tensor among real ones sends a whole call to the fakes: nothing would happen, and nobody would know."""
    listed = (item for arg in args for item in (arg if isinstance(arg, (list, tuple)) else (arg,)))
    devices = {item.device for item in listed if isinstance(item, Tensor)}
    if len(devices) > 1:
        raise RuntimeError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")


@torch.library.register_fake("fastwrs::step")
def _step(*args: object, **_kwargs: object) -> None:
    check_devices(*args)


@torch.library.register_fake("fastwrs::reduce_measured")
def _reduce_measured(*args: object) -> None:
    check_devices(*args)


@torch.library.register_fake("fastwrs::rescale_")
def _rescale(*args: object) -> None:
    check_devices(*args)


@torch.library.register_fake("fastwrs::channel_norms")
def _channel_norms(*args: object) -> None:
    check_devices(*args)
