"""The clock: steps of several sides in turns, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Step = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """The ratio of two series that were measured in turns: its median over the rounds, and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numerators: list[float], denominators: list[float]) -> Ratio:
        """The two series, sample by sample."""
        ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        return cls(median, low, high)


def timed(step: Step, repeat: int = 1) -> float:
    """Seconds per step, over ``repeat`` of them."""
    start = time.perf_counter()
    for _ in range(repeat):
        step()
    return (time.perf_counter() - start) / repeat


def in_turns(
    sides: Mapping[str, Any],
    rounds: int,
    *,
    repeat: int = 1,
    seconds: float = float("inf"),
    least: int = 5,
    clock: Callable[[Any, int], float] = timed,
) -> dict[str, list[float]]:
    """Seconds per step of each side in every round, after three rounds that do not count.

    Each second round has an order of its own, by chance but always the same, and the one after it is that order
    backwards: who goes before whom, and leaves what in the cache, is nobody's advantage.

    ``clock`` takes ``repeat`` steps of a side and says how long one took. Ends after ``rounds`` of them, or when
    ``seconds`` are over and there have been ``least``.
    """
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    begun, dice = time.monotonic(), random.Random(0)
    for turn in range(-3, rounds):
        if turn >= least and time.monotonic() - begun > seconds:
            break
        names = names[::-1] if turn % 2 else dice.sample(names, len(names))
        for name in names:
            took = clock(sides[name], repeat)
            if turn >= 0:
                times[name].append(took)
    return times
