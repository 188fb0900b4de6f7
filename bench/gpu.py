"""Optimizer steps on a GPU against what people use today: device and host time, bytes per second, as JSON lines.

    python bench/gpu.py --out FILE [--part NAME ...] [--seconds N]   measures, and goes on where FILE ends
    python bench/gpu.py --out FILE --launches                        counts launches instead
    python bench/gpu.py --once COMPARISON SIDE                       two steps, for a profiler
    python bench/gpu.py --summary FILE ... [--plot PICTURE]          prints the table, draws it

Sides take turns (A B C, B C A, ...), with the L2 cache flushed in between. *Device* is the time between two events
around a step that the host has queued completely while the device was kept busy. *Host* is how long ``step()`` takes to
return when the device has nothing to do, *whole* until the device has finished too. Exit code: 0 measured, 1 something
of ours is wrong or failed, 3 time was up, so there is more to measure.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import gpu_record as record
import torch
from gpu_record import Line, append, environment, quartiles

import fastwrs
from fastwrs.benchmark import plot
from fastwrs.benchmark import sides as contenders
from fastwrs.benchmark.checks import check
from fastwrs.benchmark.lists import LISTS, Param, shrunk
from fastwrs.benchmark.plot import Panel
from fastwrs.benchmark.sides import FUSED, PRECISIONS, Side, Step, Work, bytes_per_element, chunks

COPY = "copy"
ROUNDS = 30
MOST_COPIED = 4 << 30  # bytes of either buffer of the copy that is measured beside a step
MORE_TO_DO = 3
CYCLES = 100_000_000  # of the device, to learn how long one takes


@dataclass(frozen=True)
class Comparison:
    """Sides that are measured in turns on one list."""

    list_name: str
    precision: str
    rule: str
    group: str = "main"
    channels_last: bool = False

    @property
    def key(self) -> str:
        """How a record calls it."""
        layout = " channels_last" if self.channels_last else ""
        return "/".join([self.list_name + layout, self.precision, self.rule, self.group])

    def params(self, rehearsal: bool) -> list[Param]:
        """The list, or a few small parameters of its kinds."""
        params = LISTS[self.list_name].params()
        return shrunk(params) if rehearsal else params


def _all(*names: str, precisions: tuple[str, ...] = tuple(PRECISIONS), group: str = "main") -> list[Comparison]:
    rules = ("AdamW",) if group == "compiled" else tuple(contenders.OPTIONS)  # the loop is the same for both
    return [Comparison(name, kind, rule, group) for name in names for kind in precisions for rule in rules]


_CHANNELS_LAST = [Comparison("resnet50", kind, rule, channels_last=True) for _, kind, rule in
                  [(c.list_name, c.precision, c.rule) for c in _all("resnet50")]]  # fmt: skip
PARTS: dict[str, list[Comparison]] = {
    "billion": _all("billion"),
    "convnets": [*_all("resnet50", "vgg16_bn"), *_CHANNELS_LAST],
    "llama": _all("llama_1b", "llama_3b"),
    "small": _all("tiny", "vit_l"),
    "others": _all("resnet50", "vit_l", "llama_1b", precisions=("float32",), group="others"),
    "compiled": _all(
        *("resnet50", "vgg16_bn", "vit_l", "llama_1b", "billion"), precisions=contenders.TORCH_ONLY, group="compiled"
    ),
}
"""The parts that can be run one by one; what matters most comes first."""
COMPARISONS = {comparison.key: comparison for part in PARTS.values() for comparison in part}
LAUNCHES = [Comparison(name, "float32", "AdamW") for name in ("resnet50", "llama_1b", "tiny", "billion")]


# ---- clocks ---------------------------------------------------------------------------------------------------------


class Clock(Protocol):
    """How steps are timed on a device."""

    def device(self, step: Step, ahead: float) -> float:
        """Seconds of the device alone; the host gets ``ahead`` seconds to queue the step."""
        ...

    def host(self, step: Step) -> tuple[float, float]:
        """Seconds until ``step`` returns, and until the device has finished."""
        ...


class CudaClock:
    """Events on the current stream."""

    def __init__(self) -> None:
        l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
        self.flush = torch.empty(4 * l2, dtype=torch.uint8, device="cuda")
        self.cycles_per_second = 1e9
        for _ in range(3):  # the clocks of the device rise with work
            self.cycles_per_second = CYCLES / self.device(lambda: torch.cuda._sleep(CYCLES), 0)

    def device(self, step: Step, ahead: float) -> float:
        """A kernel that only waits holds the queue until the step is in it."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        torch.cuda._sleep(int(ahead * self.cycles_per_second))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def host(self, step: Step) -> tuple[float, float]:
        """The queue is empty before."""
        self.flush.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        return returned - start, time.perf_counter() - start


class HostClock:
    """For rehearsals: the device is the host."""

    def device(self, step: Step, ahead: float) -> float:  # noqa: ARG002 (the interface of clocks)
        """The time of a step."""
        return self.host(step)[0]

    def host(self, step: Step) -> tuple[float, float]:
        """The time of a step, twice."""
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        return seconds, seconds


@dataclass
class Samples:
    """Seconds of one side, round by round."""

    device: list[float]
    host: list[float]
    whole: list[float]


def measure(steps: dict[str, Step], clock: Clock, rounds: int) -> dict[str, Samples]:
    """Times all steps in turns."""
    waits = {name: statistics.median(clock.host(step)[0] for _ in range(3)) for name, step in steps.items()}
    samples = {name: Samples([], [], []) for name in steps}
    names = list(steps)
    gc.disable()  # it would hit one side or another
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].device.append(clock.device(steps[name], 1.5 * waits[name] + 1e-4))
        for name in names[first:] + names[:first]:
            host, whole = clock.host(steps[name])
            samples[name].host.append(host)
            samples[name].whole.append(whole)
    gc.enable()
    return samples


# ---- one comparison -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """Where and how is measured."""

    device: str
    backends: list[str]
    rounds: int

    @property
    def rehearsal(self) -> bool:
        """Without a GPU: every step of the way, on small tensors, and no figure of it means anything."""
        return self.device == "cpu"

    @classmethod
    def here(cls, rehearsal: bool, rounds: int) -> Setup:
        """As this machine allows; SystemExit with the reason if nothing can be measured."""
        reasons = fastwrs.backends()
        if rehearsal:
            torch.set_num_threads(1)  # small tensors gain nothing from more
            plain = next(name for name in ("cpu", "reference") if reasons[name] is None)
            return cls("cpu", [plain] + ["triton"] * (reasons["triton"] is None), 2)  # Triton's runs in its interpreter
        if not torch.cuda.is_available():
            sys.exit(f"torch {torch.__version__} finds no CUDA device (--rehearse does without one)")
        if reasons["cuda"] is not None:
            sys.exit(f"nothing to measure: the cuda backend cannot run: {reasons['cuda']}")
        return cls("cuda", [name for name in ("cuda", "triton") if reasons[name] is None], rounds)

    def environment(self) -> Line:
        """What is written beside every figure."""
        return environment() | ({"rehearsal": True} if self.rehearsal else {})

    def clock(self) -> Clock:
        """The clock for this device."""
        return HostClock() if self.rehearsal else CudaClock()

    def capacity(self) -> float:
        """Bytes of memory that may be used, less what the check of a side takes."""
        if self.rehearsal:
            return 1e9
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return 0.95 * free - min(8e9, 0.2 * total)


class FailedError(Exception):
    """Something of ours, or what everything is compared with, is wrong or cannot run."""


def compare(comparison: Comparison, setup: Setup, clock: Clock) -> Iterator[Line]:
    """The lines of one comparison. Raises FailedError after the lines that say why."""
    params, precision = comparison.params(setup.rehearsal), PRECISIONS[comparison.precision]
    convolutions = LISTS[comparison.list_name].convolutions
    sides = contenders.sides(comparison.group, setup.backends, convolutions)
    sides = [side for side in sides if side.fits(comparison.rule, comparison.precision, comparison.channels_last)]
    grads = contenders.make_grads(params, precision.params, setup.device, comparison.channels_last)
    elements = sum(grad.numel() for grad in grads)
    moved = elements * bytes_per_element(comparison.rule, precision)
    source = torch.empty(min(moved // 2, MOST_COPIED), dtype=torch.uint8, device=setup.device).random_()
    target = torch.empty_like(source)
    weights = elements * precision.params.itemsize
    kept = (moved - weights) / 2  # all but the gradients is read and written, and these are shared
    sizes = {side.name: kept + side.spare * weights for side in sides}
    common = {"comparison": comparison.key, "list": comparison.list_name, "tensors": len(params), "elements": elements,
              "precision": comparison.precision, "rule": comparison.rule, "bytes": moved}  # fmt: skip

    for number, chunk in enumerate(chunks(sides, sizes, setup.capacity())):
        steps: dict[str, Step] = {COPY: lambda: target.copy_(source)}
        refused = False
        for side in chunk:
            work = step = None  # one that has failed gives its memory back
            try:
                work = Work.new(comparison.rule, precision, params, grads)
                step = contenders.made(side, work)
                faults = check(side, work, step)
            except Exception as error:  # a rival that cannot run here is no reason not to measure the others
                yield common | {"kind": "failed", "side": side.name, "why": f"{type(error).__name__}: {error}"[:500]}
                refused |= side.ours
                continue
            if faults:
                yield common | {"kind": "refused", "side": side.name, "why": "; ".join(faults[:3])}
                refused |= side.ours
                continue
            steps[side.name] = step
        if refused:
            raise FailedError(comparison.key)
        samples = measure(steps, clock, setup.rounds)
        for name in steps:
            if name == COPY:
                yield common | {"kind": "copy", "side": name} | figures(samples, name, 2 * source.numel(), source)
            elif number == 0 or name != FUSED.name:
                line = common | {"kind": "step", "side": name} | figures(samples, name, moved, source)
                yield line | to_cuda(samples, name, setup.backends[0])
        steps.clear()
        step = work = None
        gc.collect()


def figures(samples: dict[str, Samples], name: str, moved: int, copied: torch.Tensor) -> Line:
    """What is reported of a side: medians with quartiles, and ratios taken round by round."""
    mine, fused, copy = samples[name], samples[FUSED.name], samples[COPY]
    rate = moved / statistics.median(mine.device) / 1e9
    copy_rate = 2 * copied.numel() / statistics.median(copy.device) / 1e9
    return {
        "device_us": quartiles([1e6 * t for t in mine.device]),
        "host_us": quartiles([1e6 * t for t in mine.host]),
        "whole_us": quartiles([1e6 * t for t in mine.whole]),
        "gb_per_s": round(rate, 2),
        "copy_gb_per_s": round(copy_rate, 2),
        "share_of_copy": round(rate / copy_rate, 4),
        "device_to_fused": quartiles([a / b for a, b in zip(mine.device, fused.device, strict=True)]),
        "whole_to_fused": quartiles([a / b for a, b in zip(mine.whole, fused.whole, strict=True)]),
        "rounds": len(mine.device),
    }


def to_cuda(samples: dict[str, Samples], name: str, cuda: str) -> Line:
    """A Triton side's ratio to the same on our CUDA kernels, if they were measured in turns.

    ``cuda`` is the backend that stands in for these in a rehearsal.
    """
    twin = samples.get(name.replace("fastwrs triton", f"fastwrs {cuda}"))
    if twin is None or not name.startswith("fastwrs triton"):
        return {}
    return {"device_to_cuda": quartiles([a / b for a, b in zip(samples[name].device, twin.device, strict=True)])}


# ---- all of them ----------------------------------------------------------------------------------------------------


def run(names: list[str], out: Path, done: list[Path], setup: Setup, seconds: float) -> int:
    """Measures what the records do not have for these sources; returns the exit code."""
    until = time.monotonic() + seconds
    where = setup.environment()
    before = [
        line
        for line in record.read(out, *done)
        if line["source"] == where["source"] and line.get("rehearsal", False) == setup.rehearsal
    ]
    known = {line["comparison"] for line in before if line["kind"] == "done"}
    missing = [why for why in contenders.absent(setup.backends) if why not in {line.get("why") for line in before}]
    append(out, [{"kind": "absent", "why": why} | where for why in missing])
    clock, failed = setup.clock(), False
    for key in [comparison.key for name in names for comparison in PARTS[name]]:
        if key in known:
            continue
        if time.monotonic() >= until:
            print("time is up, and there is more to measure", flush=True)
            return 1 if failed else MORE_TO_DO
        begun, lines = time.monotonic(), []
        try:
            # One by one, so that what was said before a failure is kept.
            lines.extend(line | where for line in compare(COMPARISONS[key], setup, clock))
            lines.append({"kind": "done", "comparison": key} | where)
        except FailedError:
            failed = True
        except torch.OutOfMemoryError as error:
            lines.append({"kind": "absent", "comparison": key, "why": f"out of memory: {error}"[:300]} | where)
        append(out, lines)
        print(f"{key}: {sum(li['kind'] == 'step' for li in lines)} sides, {time.monotonic() - begun:.1f} s", flush=True)
    return int(failed)


def prepared(comparison: Comparison, setup: Setup, side: Side) -> tuple[Work, Step]:
    """A side that has taken three steps."""
    params, precision = comparison.params(setup.rehearsal), PRECISIONS[comparison.precision]
    grads = contenders.make_grads(params, precision.params, setup.device, comparison.channels_last)
    work = Work.new(comparison.rule, precision, params, grads)
    step = contenders.made(side, work)
    for _ in range(3):
        step()
    return work, step


def launches(step: Step) -> dict[str, list[float]]:
    """What one step makes the device do: name: [how often, microseconds in all]."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    for _ in range(2):  # the first profile of a process misses launches
        with profile(activities=activities) as profiled:
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    found: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            count, microseconds = found.get(event["name"], (0, 0.0))
            found[event["name"]] = [count + 1, round(microseconds + event["dur"], 3)]
    return found


def count_launches(out: Path, setup: Setup) -> int:
    """Launches of a step, side by side."""
    for comparison in LAUNCHES:
        for side in [ours for ours in contenders.sides("main", setup.backends, False) if ours.fits("AdamW", "float32")]:
            work, step = prepared(comparison, setup, side)
            found = launches(step)
            line = {"kind": "launches", "comparison": comparison.key, "side": side.name, "kernels": found}
            line |= {"launches": int(sum(count for count, _ in found.values()))}
            append(out, [line | setup.environment()])
            print(f"{comparison.key}, {side.name}: {line['launches']} launches", flush=True)
            del work, step
            setup.capacity()  # gives the memory back
    return 0


def once(key: str, name: str, setup: Setup) -> int:
    """Two steps between the marks that a profiler started with ``--profile-from-start off`` looks for."""
    comparison = COMPARISONS[key]
    found = contenders.sides(comparison.group, setup.backends, LISTS[comparison.list_name].convolutions)
    side = next((side for side in found if side.name == name), None)
    if side is None:
        sys.exit(f"no side {name!r}; there are: {', '.join(side.name for side in found)}")
    _work, step = prepared(comparison, setup, side)
    if not setup.rehearsal:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    step()
    step()
    if not setup.rehearsal:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    print(f"{key}, {name}: two steps")
    return 0


def panels(lines: list[Line]) -> dict[str, Panel]:
    """What is drawn of a record: the sides of each comparison."""
    copies = {line["comparison"]: line["gb_per_s"] for line in lines if line["kind"] == COPY}
    found = {line["comparison"]: Panel({}, copies[line["comparison"]]) for line in record.latest(lines)}
    for line in record.latest(lines):
        found[line["comparison"]].bars[line["side"]] = line["gb_per_s"]
    return found


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="the record; what it has already is not measured again")
    parser.add_argument("--done", type=Path, nargs="*", default=[], help="further records to leave out what they have")
    parser.add_argument("--part", nargs="*", choices=PARTS, default=list(PARTS), help="parts of the benchmark")
    parser.add_argument("--seconds", type=float, default=480.0, help="no comparison begins after so many seconds")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="samples of each side")
    parser.add_argument("--rehearse", action="store_true", help="go through the motions without a GPU")
    parser.add_argument("--launches", action="store_true", help="count launches")
    parser.add_argument("--once", nargs=2, metavar=("COMPARISON", "SIDE"), help="take two steps, for a profiler")
    parser.add_argument("--summary", type=Path, nargs="+", metavar="FILE", help="print the table of records")
    parser.add_argument("--plot", type=Path, help="with --summary: draw it too, where matplotlib is installed")
    given = parser.parse_args(arguments)
    if given.summary:
        lines = record.read(*given.summary)
        print(record.summary(lines))
        if given.plot:
            print(plot.why_not(given.plot) or plot.draw(panels(lines), given.plot) or f"plot: {given.plot}")
        return 0
    setup = Setup.here(given.rehearse, given.rounds)
    if given.once:
        return once(given.once[0], given.once[1], setup)
    if given.out is None:
        parser.error("--out is needed")
    if given.launches:
        return count_launches(given.out, setup)
    return run(given.part, given.out, given.done, setup, given.seconds)


if __name__ == "__main__":
    sys.exit(main())
