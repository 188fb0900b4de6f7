"""Whether Triton and a GPU for it are here, and in words why not. Nothing in here raises an exception."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import shutil

import torch

from fastwrs import library

OLDEST = (3, 6)
LEAST_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether Triton interprets kernels instead of compiling them. It reads the variable in the same way."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "y", "on")


@functools.cache
def why_not_here() -> str | None:
    """Why it cannot run in this process. Asks the driver, which must not happen before it is wanted: see dispatch."""
    try:
        return _why_no_triton() or library.why_not() or _why_no_gpu() or _why_no_kernels()
    except Exception as error:  # of somebody else's module or driver, whatever it is
        return f"it cannot be looked into: {type(error).__name__}: {error}"


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'fastwrs[triton]')"
    try:
        import triton
    except Exception as error:
        return f"triton does not load: {type(error).__name__}: {error}"
    version = str(getattr(triton, "__version__", ""))
    numbers = re.match(r"(\d+)(?:\.(\d+))?", version)
    if numbers is None:
        return f"what is imported as triton has no version that is known ({version!r})"
    if (int(numbers[1]), int(numbers[2] or 0)) < OLDEST:
        return f"triton {version} is too old; {'.'.join(map(str, OLDEST))} is the first that will do"
    return None


def _why_no_gpu() -> str | None:
    """All GPUs have to do: which of them the tensors are on is not known yet."""
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    if torch.version.hip is None:
        found, device = min((torch.cuda.get_device_capability(k), k) for k in range(torch.cuda.device_count()))
        if found < LEAST_CAPABILITY:
            oldest, least = (f"{major}.{minor}" for major, minor in (found, LEAST_CAPABILITY))
            return (
                f"the compute capability of cuda:{device} is {oldest}; Triton's kernels are for {least} and newer "
                "(CUDA_VISIBLE_DEVICES can leave out a GPU)"
            )
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton compiles its launcher with a C compiler, and there is none (install gcc, or set CC)"
    return None


def _why_no_kernels() -> str | None:
    try:
        importlib.import_module("fastwrs.triton_kernels.launch")
    except Exception as error:
        return f"its kernels do not load with this triton: {type(error).__name__}: {error}"
    return None
