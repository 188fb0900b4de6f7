"""Loads the C++ extension, which registers ``torch.ops.fastwrs``, and says why where it cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

OLDEST_TORCH = 2, 10


@functools.cache
def why_not() -> str | None:
    """Why the C++ extension cannot be used here, or None if it is loaded."""
    if _torch_version() < OLDEST_TORCH:
        return f"the C++ extension needs torch {'.'.join(map(str, OLDEST_TORCH))} or later, this is {torch.__version__}"
    if importlib.util.find_spec("fastwrs._C") is None:
        return _why_not_built(Path(__file__).resolve().parent)
    try:
        importlib.import_module("fastwrs._C")
    except ImportError as error:
        return f"the C++ extension does not load: {error}"
    importlib.import_module("fastwrs.ops")
    isa = os.environ.get("FASTWRS_CPU_ISA")
    if isa and isa not in _isas()[1:]:
        raise ValueError(f"FASTWRS_CPU_ISA={isa!r}: this processor and build have {', '.join(map(repr, _isas()[1:]))}")
    return None


def _torch_version() -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))


def _why_not_built(package: Path) -> str:
    """What setup.py has left in the place of the extension; or that these are only its sources."""
    note = package / "_not_built.txt"
    if note.exists():
        return f"fastwrs was installed without its C++ extension: {note.read_text(encoding='utf-8')}"
    return (
        f"there is no C++ extension in {package}: `pip install --no-build-isolation -e .` builds it there, and a "
        "fastwrs that is installed elsewhere is found from any other folder"
    )


def load() -> None:
    """Loads the extension; RuntimeError with the reason if that is not possible."""
    reason = why_not()
    if reason is not None:
        raise RuntimeError(f"fastwrs: {reason}")


def extension() -> Any:
    """The module of the extension, once it is loaded."""
    return sys.modules["fastwrs._C"]


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
