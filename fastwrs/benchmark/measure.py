"""Whole steps of many sides on one list of parameters, in turns, beside a copy of memory."""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fastwrs.benchmark import turns
from fastwrs.benchmark.checks import check
from fastwrs.benchmark.lists import Param, shrunk
from fastwrs.benchmark.sides import FUSED, PRECISIONS, Side, Work, bytes_per_element, chunks, made, make_grads
from fastwrs.benchmark.turns import Ratio, Step

COPY = "copy"
MOST_COPIED = 1 << 30  # bytes of either buffer of the copy
LOOKED_AT = 1 << 22
"""Elements of the real list that are compared with the oracle before it is timed; the norms are, of all."""


@dataclass(frozen=True)
class Figures:
    """What is reported of a side. Medians; ratios are taken round by round."""

    side: str
    seconds: float
    quartiles: tuple[float, float]
    to_fused: Ratio
    """Whole steps over those of torch fused in the same round."""
    gb_per_s: float
    """The bytes that such a step cannot do without over its time, whatever the side really moves."""
    share_of_copy: float
    """That over the speed of a copy, bytes read plus bytes written."""
    host_seconds: float
    """A step on as many tensors of one element: what does not depend on the size of the parameters."""
    rounds: int


class WrongError(RuntimeError):
    """A side of ours, or what all are compared with, is wrong or cannot run: there is nothing to report."""


def refused(side: Side, why: str) -> str:
    """The line in place of the figures of a side; WrongError for those that nothing goes without."""
    if side.ours:
        raise WrongError(f"{side.name}: {why}")
    return f"{side.name}: {why}"


def compare(
    params: list[Param],
    rule: str,
    sides: list[Side],
    *,
    device: str = "cpu",
    precision: str = "float32",
    rounds: int = 30,
    seconds: float = float("inf"),
) -> Iterator[Figures | str]:
    """The figures of every side, torch fused first; in place of one that is wrong or fails, a line that says why."""
    kind = PRECISIONS[precision]
    sides = [side for side in sides if side.fits(rule, precision)]
    sound = []
    for side in sides:
        if why := why_not(side, rule, params, precision, device):
            yield refused(side, why)
        else:
            sound.append(side)
    host = host_seconds(sound, rule, params, precision, device)
    elements = sum(torch.Size(param.shape).numel() for param in params)
    moved = elements * bytes_per_element(rule, kind)
    weights = elements * kind.params.itemsize
    kept = (moved - weights) / 2  # all but the gradients is read and written, and these are shared
    sizes = {side.name: kept + (side.spare + side.own_grads) * weights for side in sound}
    buffer = min(moved // 2, MOST_COPIED)
    room = capacity(device) - weights - 2 * buffer  # the gradients, which all share
    least = sizes[FUSED.name] + max(sizes.values())
    if room < least:
        needed = least + weights + 2 * buffer
        raise WrongError(f"two sides need {needed:.1e} bytes of memory, {capacity(device):.1e} may be used")
    grads = make_grads(params, kind.params, device)
    source = torch.empty(buffer, dtype=torch.uint8, device=device)
    source.random_()
    target = torch.empty_like(source)
    parts = list(chunks(sound, sizes, room))
    for number, part in enumerate(parts):
        steps: dict[str, Step] = {COPY: waiting(lambda: target.copy_(source), device)}
        for side in list(part):
            try:
                work = Work.new(rule, kind, params, grads)
                step = made(side, work)
                why = "; ".join(check(side, work, step, LOOKED_AT)[:3])
            except Exception as error:  # one that cannot take so many, or so large ones
                why = f"{type(error).__name__}: {error}"[:500]
            if why:
                part.remove(side)
                yield refused(side, why)
            else:
                steps[side.name] = waiting(step, device)
        times = turns.in_turns(steps, rounds, seconds=seconds / len(parts))
        copied = 2 * source.numel() / statistics.median(times[COPY])
        for side in part:
            if number == 0 or side is not FUSED:
                yield figures(side, times, moved, copied, host[side.name])
        steps.clear()
        gc.collect()


def figures(side: Side, times: dict[str, list[float]], moved: int, copied: float, host: float) -> Figures:
    """Of one side, from the times of all; ``copied`` in bytes per second."""
    mine = times[side.name]
    low, median, high = statistics.quantiles(mine, n=4)
    ratio = Ratio.of(mine, times[FUSED.name])
    return Figures(
        side.name, median, (low, high), ratio, moved / median / 1e9, moved / median / copied, host, len(mine)
    )


def why_not(side: Side, rule: str, params: list[Param], precision: str, device: str) -> str:
    """What is wrong with a side, by a few steps on small parameters of the same kinds; empty if nothing is."""
    few = shrunk(params)
    kind = PRECISIONS[precision]
    try:
        work = Work.new(rule, kind, few, make_grads(few, kind.params, device))
        return "; ".join(check(side, work, made(side, work))[:3])
    except Exception as error:  # another package that does not run here is no reason not to measure the others
        return f"{type(error).__name__}: {error}"[:500]


def host_seconds(
    sides: list[Side], rule: str, params: list[Param], precision: str, device: str, rounds: int = 15
) -> dict[str, float]:
    """Medians of steps on as many tensors of one element, in turns."""
    kind = PRECISIONS[precision]
    tiny = [Param((1,) * len(param.shape), param.role) for param in params]
    grads = make_grads(tiny, kind.params, device)
    steps = {side.name: waiting(made(side, Work.new(rule, kind, tiny, grads)), device) for side in sides}
    return {name: statistics.median(times) for name, times in turns.in_turns(steps, rounds).items()}


def waiting(step: Step, device: str) -> Step:
    """The step, until the device has finished."""
    if device == "cpu":
        return step
    wait = torch.cuda.synchronize if device.startswith("cuda") else torch.accelerator.synchronize

    def whole() -> None:
        step()
        wait(torch.device(device))

    return whole


def capacity(device: str) -> float:
    """Bytes of memory that may be used."""
    if device.startswith("cuda"):
        return 0.8 * torch.cuda.mem_get_info(device)[0]
    return 0.8 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
