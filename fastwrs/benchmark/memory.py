"""How much memory a step takes for itself, above parameters, gradients and states.

    python -m fastwrs.benchmark.memory LIST RULE SIDE      prints bytes

A process of its own for each figure: what an earlier side has left with the allocator would hide what the next one
takes. The peak is the kernel's count of resident memory, so that whatever allocates is seen; large blocks are given
back at once (MALLOC_MMAP_THRESHOLD_), so that the next step has to take them again.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import torch

from fastwrs.benchmark.lists import LISTS, shrunk
from fastwrs.benchmark.sides import PRECISIONS, SLOTS, Work, made, make_grads, sides

LARGE = 65536
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(LARGE), "MALLOC_TRIM_THRESHOLD_": str(LARGE)}
PAGE, ALIGNMENT, HEADER = os.sysconf("SC_PAGE_SIZE"), 64, 16  # of glibc, which torch asks for memory aligned to 64
STEPS = 3


def resident(word: str) -> int:
    """Bytes of resident memory: now (VmRSS), or the most since the last reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(word))


def above_states(list_name: str, rule: str, side_name: str) -> int:
    """The most that the steps of a side take beside parameters, gradients and states, in this process."""
    given = LISTS[list_name].params()
    side = next(side for side in sides("peers", ["cpu"], True) if side.name == side_name)
    few = shrunk(given)
    warm = made(side, Work.new(rule, PRECISIONS["float32"], few, make_grads(few, torch.float32, "cpu")))
    for _ in range(STEPS):  # code, threads and their stacks
        warm()
    work = Work.new(rule, PRECISIONS["float32"], given, make_grads(given, torch.float32, "cpu"))
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    step = made(side, work)
    for _ in range(STEPS):
        step()
    return resident("VmHWM") - before - cost_of_states(work)


def cost_of_states(work: Work) -> int:
    """What the allocator takes for states: a large block has pages of its own, aligned and with a header in front."""
    sizes = [4 * param.numel() + ALIGNMENT + HEADER for param in work.params for _ in range(SLOTS[work.rule])]
    return sum(size if size < LARGE else -(-size // PAGE) * PAGE for size in sizes)


def in_a_process(list_name: str, rule: str, side_name: str) -> int:
    """The same, in a process of its own."""
    command = [sys.executable, "-m", "fastwrs.benchmark.memory", list_name, rule, side_name]
    done = subprocess.run(command, env={**os.environ, **ALLOCATOR}, capture_output=True, text=True, check=True)
    return int(done.stdout)


if __name__ == "__main__":
    print(above_states(*sys.argv[1:]))
