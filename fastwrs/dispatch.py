"""Which backend runs a launch, and why the others do not.

Each backend is a module of ``fastwrs.backends`` that answers ``why_not``. Everything that the optimizers launch goes
through :func:`launch`, so that a test or a benchmark can put a stub there and look at the host side alone.
"""

from __future__ import annotations

import os
from typing import Protocol, cast

from torch import Tensor

# Imported here and at once, so that the name `fastwrs.backends` is free for the function of the public API afterwards.
from fastwrs.backends import cpu, cuda, reference, triton
from fastwrs.plan import StepCall, Triple

BACKENDS = (cuda.NAME, triton.NAME, cpu.NAME, reference.NAME)
"""All backends, in the order in which ``backend="auto"`` tries them."""
ENVIRONMENT = "FASTWRS_BACKEND"


class Backend(Protocol):
    """What every module in ``fastwrs.backends`` provides."""

    NAME: str

    def why_not(self, device_type: str | None = None, dtypes: Triple | None = None) -> str | None:
        """Why it cannot run at all, or not on these; None if it can."""
        ...

    def step(self, call: StepCall, dry_run: bool = False) -> None:
        """One step of the tensors in the call; raises before it writes anything, or not at all."""
        ...

    def rescale_(self, tensors: list[Tensor], axes: list[int], target: float) -> None:
        """Projects tensors of one device and dtype in place."""
        ...

    def channel_norms(self, tensors: list[Tensor], axes: list[int], out: list[Tensor]) -> None:
        """Writes the norms of tensors of one device and dtype into ``out``."""
        ...


_MODULES = {module.NAME: cast(Backend, module) for module in (cuda, triton, cpu, reference)}


def why_not(name: str, device_type: str | None = None, dtypes: Triple | None = None) -> str | None:
    """Why the backend cannot run (on this device and these dtypes), or None if it can."""
    return _MODULES[name].why_not(device_type, dtypes)


def _why_not_unasked(name: str) -> str | None:
    """Why ``"auto"`` passes over a backend that could run."""
    if name == triton.NAME and triton.interpreted():
        return "its kernels are interpreted (TRITON_INTERPRET), which has to be asked for by name"
    return None


def backends() -> dict[str, str | None]:
    """All backends by name, with None if they can run here, or the reason why they cannot.

    Raises:
        ValueError: ``FASTWRS_CPU_ISA`` in the environment names no instruction set of this processor and build.

    Example:
        >>> [name for name, why in fastwrs.backends().items() if why is None]
        [...'reference']
    """
    return {name: why_not(name) for name in BACKENDS}


def check(name: str) -> None:
    """Refuses an unknown backend, and one that was asked for and cannot run.

    ``"auto"`` is not looked into before there are tensors: asking for a GPU starts the driver, and a process that has
    done so cannot fork workers that use one.
    """
    if name != "auto" or os.environ.get(ENVIRONMENT):
        choose(name)


def choose(name: str = "auto", device_type: str | None = None, dtypes: Triple | None = None) -> Backend:
    """The backend called ``name``, or for ``"auto"`` the first that can run on this device and these dtypes.

    The environment variable ``FASTWRS_BACKEND`` stands in for ``"auto"``.

    Raises:
        ValueError: there is no backend of this name.
        RuntimeError: it cannot run; the message gives its reason.
    """
    given = f"backend={name!r}"
    if name == "auto":
        name = os.environ.get(ENVIRONMENT) or "auto"
        given = f"{ENVIRONMENT}={name}"
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"{given}: no such backend; allowed: 'auto', {', '.join(map(repr, BACKENDS))}")
    reasons = {}
    for candidate in BACKENDS if name == "auto" else (name,):
        reasons[candidate] = _why_not_unasked(candidate) if name == "auto" else None
        reasons[candidate] = reasons[candidate] or why_not(candidate, device_type, dtypes)
        if reasons[candidate] is None:
            return _MODULES[candidate]
    raise RuntimeError(f"{given} cannot run: {'; '.join(f'{n}: {reason}' for n, reason in reasons.items())}")


def launch(backend: Backend, call: StepCall, dry_run: bool = False) -> None:
    """The seam between plan and kernel."""
    backend.step(call, dry_run)
