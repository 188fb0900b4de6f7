"""The report at the end of `make bench`, and its record: `make bench BENCH=--record` appends to bench/results/."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gpu_record
import pytest
import tables

import fastwrs
from fastwrs.benchmark import command
from fastwrs.benchmark.measure import Figures

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "step.jsonl"
TESTS = [f"tests/test_{name}.py" for name in ("cpu", "optim", "adamp", "shifted", "monitor", "rescaler")]
"""Of all that is timed."""
WHERE = pytest.StashKey[dict[str, Any]]()
LINES = pytest.StashKey[list[dict[str, Any]]]()
PLAIN_FP32 = {"precision": "float32", "device": "cpu"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="append the results to bench/results/step.jsonl")
    parser.addoption("--rounds", type=int, default=40, help="rounds per comparison")


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[LINES] = []
    session.config.stash[WHERE] = {**environment(), "load_before": round(os.getloadavg()[0], 2)}
    if (why := fastwrs.backends()["cpu"]) is not None:
        pytest.exit(f"nothing to report: the C++ kernels cannot run, and the reference is not a benchmark: {why}", 1)
    tests = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-x", "-m", "cpu or oracle", *TESTS]
    done = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.exit(f"nothing to report: the tests of what is timed are red\n{done.stdout[-2000:]}", 1)


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--rounds"))  # type: ignore[arg-type]


@pytest.fixture
def keep_side(request: pytest.FixtureRequest):
    """Keeps the figures of a side for the table of all sides; of one that could not be measured, why."""

    def keep_one(list_name: str, rule: str, line: Figures | str) -> None:
        said = {"why": line} if isinstance(line, str) else asdict(line)
        keep(request.config, {"kind": "side", "list": list_name, "rule": rule, **PLAIN_FP32, **said})

    return keep_one


@pytest.fixture
def keep_memory(request: pytest.FixtureRequest):
    """Keeps what a side takes beside parameters, gradients and states."""

    def keep_one(list_name: str, rule: str, side: str, peak: int) -> None:
        line = {"kind": "memory", "list": list_name, "rule": rule, "side": side, "bytes_above_states": peak}
        keep(request.config, line)

    return keep_one


@pytest.fixture
def record(request: pytest.FixtureRequest):
    """Keeps one comparison for the report."""

    def keep_one(case, ratio, our_times: list[float], their_times: list[float], bytes_per_step: int) -> None:
        ours, theirs = statistics.median(our_times), statistics.median(their_times)
        line = {
            "name": case.name,
            "ratio": round(ratio.median, 4),
            "quartiles": [round(ratio.low, 4), round(ratio.high, 4)],
            "inverse": case.inverse,
            "goal": case.goal,
            "met": case.met(ratio.median) if case.goal else None,
            "ours_ms": round(1e3 * ours, 4),
            "theirs_ms": round(1e3 * theirs, 4),
            "bytes": bytes_per_step,
            "ours_gb_per_s": round(bytes_per_step / ours / 1e9, 2),
            "rounds": len(our_times),
        }
        keep(request.config, line)

    return keep_one


def keep(config: pytest.Config, line: dict[str, Any]) -> None:
    """For the report, and at once for the record: a run that is ended early leaves what it has measured."""
    line |= config.stash[WHERE]
    config.stash[LINES].append(line)
    if config.getoption("--record"):
        gpu_record.append(RESULTS, [line])


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    # the record grows while it is written
    changes = git("status", "--porcelain", "--", ":(top)", ":(top,exclude)bench/results")
    commit = git("rev-parse", "--short", "HEAD") + ("+changes" if changes else "")
    return {**command.environment(), "commit": commit, "cores": os.cpu_count()}


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines, write = config.stash[LINES], terminalreporter.write_line
    pairs = [line for line in lines if "ratio" in line]
    memory = [line for line in lines if line.get("kind") == "memory"]
    every = dict.fromkeys((line["list"], line["rule"]) for line in lines if line.get("kind") == "side")
    found = {", ".join(key): tables.sides(lines, *key) for key in every}
    found |= {"memory": tables.memory(lines)} if memory else {}
    found |= {"pairs": tables.ratios(lines, "")} if pairs else {}
    for title, text in found.items():
        write(f"\n{title}\n\n{text}")
    if lines and config.stash[WHERE]["load_before"] > 0.5:
        write(f"Warning: the machine was busy (load {config.stash[WHERE]['load_before']}): these figures say little.")
