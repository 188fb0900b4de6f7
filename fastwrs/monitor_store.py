"""What a :class:`fastwrs.Monitor` keeps: measurements on the device, in full at first, reduced when they are old."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastwrs import library


class Layout(NamedTuple):
    """Whose rows a buffer has, in order; without the parameters that have none."""

    names: tuple[str, ...]
    counts: tuple[int, ...]
    weights: tuple[bool, ...]
    """Which have two or more dimensions, and elements."""


class Part(NamedTuple):
    """The figures of one launch: [groups, 8], or [parameters, 4, 8] once they are reduced."""

    layout: Layout
    values: Tensor
    lengths: Tensor | None = None
    """The counts of the layout on the device of figures that are not reduced yet; None where these are on the CPU."""


@dataclass(slots=True)
class Reading:
    """One measured step."""

    step: int
    loss: Any = None
    parts: list[Part] = field(default_factory=list)

    def rows(self) -> Iterator[tuple[str, Tensor]]:
        """Name and rows of each parameter, of a reading in full."""
        for layout, values, _ in self.parts:
            yield from zip(layout.names, values.split(list(layout.counts)), strict=True)


class Store:
    """The last ``full`` readings as they are, and ``reduced`` older ones as four statistics of each parameter."""

    def __init__(self, full: int, reduced: int) -> None:
        self.room = full
        self._full: deque[Reading] = deque()
        self._reduced: deque[Reading] = deque(maxlen=reduced)

    def add(self, reading: Reading) -> None:
        """Keeps a reading; one that is too old for its place is reduced, one that is too old for that is dropped."""
        self._full.append(reading)
        while len(self._full) > self.room:
            oldest = self._full.popleft()
            if self._reduced.maxlen:
                self._reduced.append(_reduction(oldest))

    def clear(self) -> None:
        """Drops all of them."""
        self._full.clear()
        self._reduced.clear()

    def drop_after(self, step: int) -> None:
        """Drops the readings of later steps."""
        for readings in (self._full, self._reduced):
            while readings and readings[-1].step > step:
                readings.pop()

    def all(self) -> list[Reading]:
        """Every reading, where it is and as it is: for what is known on the host."""
        return [*self._reduced, *self._full]

    def full(self) -> list[Reading]:
        """The readings in full, on the CPU."""
        _bring_home(self._full)
        return list(self._full)

    def reduced(self) -> list[Reading]:
        """All readings reduced, on the CPU."""
        fresh = [_reduction(reading) for reading in self._full]
        _bring_home(self._reduced)
        _bring_home(fresh)
        return [*self._reduced, *fresh]


def lengths_on(counts: Iterable[int], device: torch.device) -> Tensor:
    """The counts of a layout on a device, brought there without waiting for it."""
    # A default device would move them, and only memory of the CPU can be pinned.
    there = torch.tensor(list(counts), device="cpu", pin_memory=device.type == "cuda")
    return there.to(device, non_blocking=True)


def _reduction(reading: Reading) -> Reading:
    """Minimum, mean, maximum and total (the root of the sum of squares) of each parameter's groups."""
    parts = []
    for layout, values, known in reading.parts:
        if values.device.type == "cpu" and library.why_not() is None:
            found = values.new_empty(len(layout.counts), 4, values.shape[1])
            torch.ops.fastwrs.reduce_measured(values, layout.counts, found)
            parts.append(Part(layout, found))
            continue
        lengths = lengths_on(layout.counts, values.device) if known is None else known
        wide = values.double()

        def over(of: Tensor, how: str, lengths: Tensor = lengths) -> Tensor:
            # `unsafe` leaves out a check of the lengths that would wait for the device.
            return torch.segment_reduce(of, how, lengths=lengths, axis=0, unsafe=True)

        found = over(values, "min"), over(wide, "mean"), over(values, "max"), over(wide.square(), "sum").sqrt()
        parts.append(Part(layout, torch.stack([one.float() for one in found], dim=1)))
    return Reading(reading.step, reading.loss, parts)


def _bring_home(readings: Iterable[Reading]) -> None:
    """Copies to the CPU what is still on a device, tensors of one size together; each only once."""
    away: dict[Any, list[tuple[Reading, int]]] = {}
    for reading in readings:
        for k, part in enumerate(reading.parts):
            if part.values.device.type != "cpu":
                away.setdefault((part.values.device, part.values.shape), []).append((reading, k))
    for found in away.values():
        together = torch.stack([reading.parts[k].values for reading, k in found]).cpu()
        for (reading, k), values in zip(found, together, strict=True):
            reading.parts[k] = Part(reading.parts[k].layout, values)
