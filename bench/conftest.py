"""The report at the end of `make bench`, and its record: `make bench BENCH=--record` appends to bench/results/."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

import fastwrs
from fastwrs import library

RESULTS = Path(__file__).parent / "results" / "step.jsonl"
LOAD = pytest.StashKey[float]()
LINES = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="append the results to bench/results/step.jsonl")
    parser.addoption("--rounds", type=int, default=40, help="rounds per comparison")


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[LINES] = []
    session.config.stash[LOAD] = os.getloadavg()[0]
    if (why := fastwrs.backends()["cpu"]) is not None:
        pytest.exit(f"nothing to report: the C++ kernels cannot run, and the reference is not a benchmark: {why}", 1)


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--rounds"))  # type: ignore[arg-type]


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
    names = [line.split(":", 1)[1].strip() for line in cpuinfo() if line.startswith("model name")]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
        "cpu": names[0] if names else platform.processor(),
        "isa": library.cpu_isa(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "fastwrs": fastwrs.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = config.stash[LINES]
    if not lines:
        return
    where = {**environment(), "load_before": round(config.stash[LOAD], 2)}
    write = terminalreporter.write_line
    write("")
    write(", ".join(f"{key} {value}" for key, value in where.items()))
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
            out.writelines(json.dumps({**line, **where}) + "\n" for line in lines)
        write(f"recorded in {RESULTS}")
