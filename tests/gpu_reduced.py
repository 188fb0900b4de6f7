"""Cases in an order that has every kernel early, until time is up: for tools that make kernels slow.

    compute-sanitizer python tests/gpu_reduced.py --tool memcheck --seconds 150 [--backend triton]

Every tensor lies in an allocation of exactly its size (with PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that memcheck sees
one element too far; for initcheck, what lies between the elements of a tensor and the workspace is left unwritten.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import on_gpu
import tolerances
import torch
from calls import GUARD, Call, one_thread
from cases import Case, select
from torch import Tensor

from fastwrs import library

LARGEST = {"memcheck": 100_000, "initcheck": 100_000, "racecheck": 20_000, "synccheck": 100_000}
"""Elements of a case, at most. racecheck keeps a record of all accesses to shared memory."""
FEWEST = 20


def reduced(largest: int) -> list[Case]:
    """Rules, triples of dtypes and numbers of states in turns."""
    cases = [case for case in select(largest) if case.numel and not case.found_inf]
    random.Random(7).shuffle(cases)
    seen: dict[tuple[object, ...], int] = {}
    turns = []
    for case in cases:
        kind = case.rule, case.dtypes, len(case.slots)
        seen[kind] = seen.get(kind, 0) + 1
        turns.append((seen[kind], len(turns)))
    return [cases[k] for _, k in sorted(turns)]


def tight(call: Call, poisoned: bool) -> Call:
    """The call with every tensor in an allocation that ends with it. Strides and alignment stay."""
    homes: dict[int, Tensor] = {}
    for _, tensor in call.buffers:
        reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        lead = tensor.storage_offset() - GUARD
        home = torch.empty(lead + (1 + reach if tensor.numel() else 0), dtype=tensor.dtype, device=tensor.device)
        if poisoned:
            home.fill_(float("nan"))
        homes[id(tensor)] = home.as_strided(tensor.shape, tensor.stride(), lead).copy_(tensor)
    for tensors in (call.params, call.grads, call.states):
        tensors[:] = [homes[id(tensor)] for tensor in tensors]
    call.buffers.clear()
    return call


def check(case: Case, device: str, poisoned: bool) -> None:
    """One case against the oracle."""
    call = tight(case.build(device), poisoned)
    # Only elements are looked at: copies of what lies between them would read what was never written.
    shadow = case.build("cpu")
    before = tolerances.snapshot(shadow)
    workspace = on_gpu.planned(*call.args())
    if workspace is not None and not poisoned:
        count = on_gpu.tickets()
        tickets, workspace = workspace[:count], torch.empty_like(workspace)
        workspace[:count] = tickets
    call.workspace = workspace
    on_gpu.take(*call.args())
    for mine, theirs in (
        *zip(shadow.params, call.params, strict=True),
        *zip(shadow.grads, call.grads, strict=True),
        *zip(shadow.states, call.states, strict=True),
        *zip(shadow.steps, call.steps, strict=True),
    ):
        mine.copy_(theirs)
    if shadow.measured is not None and call.measured is not None:
        shadow.measured.copy_(call.measured)
    assert [float(step) for step in shadow.steps] == [tensor.t for tensor in case.tensors]
    tolerances.check_call(before, shadow)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tool", choices=LARGEST, default="memcheck", help="what it runs under")
    parser.add_argument("--seconds", type=float, default=150.0, help="no case begins after so many")
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal; of Triton with TRITON_INTERPRET=1")
    parser.add_argument("--backend", choices=on_gpu.BACKENDS, default=on_gpu.BACKENDS[0], help="whose kernels")
    given = parser.parse_args(arguments)
    library.load()
    if given.device == "cuda" and (why := on_gpu.why_not(given.backend)) is not None:
        sys.exit(f"cannot run: {why}")
    if given.device == "cpu" and given.backend == "triton":
        import interpreted
        from triton.runtime import interpreter

        interpreted.mend(interpreter)
    on_gpu.BACKEND = given.backend
    until, cases, passed = time.monotonic() + given.seconds, reduced(LARGEST[given.tool]), 0
    with one_thread():
        for case in cases:
            late = time.monotonic() >= until
            if late and (
                given.device == "cuda" or passed >= FEWEST
            ):  # a rehearsal is to end well on a slow machine too
                break
            try:
                check(case, given.device, poisoned=given.tool != "initcheck")
            except Exception as error:
                sys.exit(f"{case.id}: {type(error).__name__}: {error}")
            passed += 1
    print(f"{passed} of {len(cases)} cases passed")
    return int(passed < FEWEST)


if __name__ == "__main__":
    sys.exit(main())
