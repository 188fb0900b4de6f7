"""The report at the end of `make bench`, and its record: `make bench BENCH=--record` appends to bench/results/."""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import fastwrs
from fastwrs.benchmark import command
from fastwrs.benchmark.measure import Figures

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "step.jsonl"
LOAD = pytest.StashKey[float]()
LINES = pytest.StashKey[list[dict[str, Any]]]()
SIDES = pytest.StashKey[list[dict[str, Any]]]()
PLAIN_FP32 = {"precision": "float32", "device": "cpu"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="append the results to bench/results/step.jsonl")
    parser.addoption("--rounds", type=int, default=40, help="rounds per comparison")


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[LINES] = []
    session.config.stash[SIDES] = []
    session.config.stash[LOAD] = os.getloadavg()[0]
    if (why := fastwrs.backends()["cpu"]) is not None:
        pytest.exit(f"nothing to report: the C++ kernels cannot run, and the reference is not a benchmark: {why}", 1)
    tests = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-x", "-m", "cpu", "tests/test_cpu.py"]
    done = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.exit(f"nothing to report: the tests of what is timed are red\n{done.stdout[-2000:]}", 1)


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--rounds"))  # type: ignore[arg-type]


@pytest.fixture
def keep_side(request: pytest.FixtureRequest):
    """Keeps the figures of a side for the table of all sides; of one that could not be measured, why."""

    def keep(list_name: str, rule: str, line: Figures | str) -> None:
        said = {"why": line} if isinstance(line, str) else asdict(line)
        request.config.stash[SIDES].append({"kind": "side", "list": list_name, "rule": rule, **PLAIN_FP32, **said})

    return keep


@pytest.fixture
def keep_memory(request: pytest.FixtureRequest):
    """Keeps what a side takes beside parameters, gradients and states."""

    def keep(list_name: str, rule: str, side: str, peak: int) -> None:
        line = {"kind": "memory", "list": list_name, "rule": rule, "side": side, "bytes_above_states": peak}
        request.config.stash[SIDES].append(line)

    return keep


@pytest.fixture
def record(request: pytest.FixtureRequest):
    """Keeps one comparison for the report."""

    def keep(case, ratio, our_times: list[float], their_times: list[float], bytes_per_step: int) -> None:
        ours, theirs = statistics.median(our_times), statistics.median(their_times)
        line = {
            "name": case.name,
            "ratio": round(ratio.median, 4),
            "quartiles": [round(ratio.low, 4), round(ratio.high, 4)],
            "goal": case.goal,
            "met": case.met(ratio.median) if case.goal else None,
            "ours_ms": round(1e3 * ours, 4),
            "theirs_ms": round(1e3 * theirs, 4),
            "bytes": bytes_per_step,
            "ours_gb_per_s": round(bytes_per_step / ours / 1e9, 2),
            "rounds": len(our_times),
        }
        request.config.stash[LINES].append(line)

    return keep


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    commit = git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    return {**command.environment(), "commit": commit, "cores": os.cpu_count()}


def tables(sides: list[dict[str, Any]]) -> Iterator[str]:
    """A table for each list and rule, in the order in which they were measured."""
    for key, group in itertools.groupby(sides, lambda line: (line["kind"], line["list"], line["rule"])):
        yield ", ".join(key[1:] if key[0] == "side" else ("memory above the states", *key[1:]))
        for line in group:
            if "bytes_above_states" in line:
                yield f"  {line['side']:<50}{line['bytes_above_states'] / 1e6:>10.2f} MB"
            elif "why" in line:
                yield f"  not measured: {line['why']}"
            else:
                ratio = line["to_fused"]
                yield (
                    f"  {line['side']:<50}{1e3 * line['seconds']:>10.3f} ms{ratio['median']:>8.3f} "
                    f"({ratio['low']:.3f} to {ratio['high']:.3f}){line['gb_per_s']:>7.1f} GB/s "
                    f"{line['share_of_copy']:>5.2f} of copy, host {1e3 * line['host_seconds']:.3f} ms"
                )
        yield ""


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines, sides = config.stash[LINES], config.stash[SIDES]
    if not lines and not sides:
        return
    where = {**environment(), "load_before": round(config.stash[LOAD], 2)}
    write = terminalreporter.write_line
    write("")
    write(", ".join(f"{key} {value}" for key, value in where.items()))
    for text in tables(sides):
        write(text)
    if lines:
        write(f"{'':<56}{'ours ms':>9}{'theirs':>9}{'GB/s':>7}   ratio (quartiles)      target")
    for line in lines:
        low, high = line["quartiles"]
        verdict = "" if line["met"] is None else f"{line['goal']} {'met' if line['met'] else 'MISSED'}"
        write(
            f"{line['name']:<56}{line['ours_ms']:>9.3f}{line['theirs_ms']:>9.3f}{line['ours_gb_per_s']:>7.1f}"
            f"   {line['ratio']:.3f} ({low:.3f} to {high:.3f})   {verdict}"
        )
    write("")
    write("Ratios as their names say, per round; medians and quartiles. torch fused does no rescaling.")
    if where["load_before"] > 0.5:
        write(f"Warning: the machine was busy (load {where['load_before']}): these figures say little.")
    if config.getoption("--record"):
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps({**line, **where}) + "\n" for line in [*lines, *sides])
        write(f"recorded in {RESULTS}")
