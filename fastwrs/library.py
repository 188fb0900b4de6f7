"""Loads the C++ extension, which registers ``torch.ops.fastwrs``, and says why where it cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch


@functools.cache
def why_not() -> str | None:
    """Why the C++ extension cannot be used here, or None if it is loaded."""
    if importlib.util.find_spec("fastwrs._C") is None:
        return "fastwrs was installed without its C++ extension (no C++ compiler was found when it was built)"
    try:
        importlib.import_module("fastwrs._C")
    except ImportError as error:
        return f"the C++ extension does not load: {error}"
    importlib.import_module("fastwrs.ops")
    isa = os.environ.get("FASTWRS_CPU_ISA")
    if isa and isa not in _isas()[1:]:
        raise ValueError(f"FASTWRS_CPU_ISA={isa!r}: this processor and build have {', '.join(map(repr, _isas()[1:]))}")
    return None


def load() -> None:
    """Loads the extension; RuntimeError with the reason if that is not possible."""
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"fastwrs: {reason}")


def cpu_features() -> tuple[str, ...]:
    """The instruction sets that the extension has code for and this processor runs, the best last."""
    load()
    return _isas()[1:]


def cpu_isa() -> str:
    """The instruction set that the kernels use."""
    load()
    return _isas()[0]


@functools.cache
def _isas() -> tuple[str, ...]:
    return tuple(torch.ops.fastwrs.cpu_isa().split())
