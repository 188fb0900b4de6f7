"""Runs the lanes one by one, each in a process of its own, with the time of each against its budget.

    python tests/run_lanes.py [LANE ...]        without arguments: all of them

Every test is in exactly one lane, by its markers; the sanitizer lane runs those of test_cpu.py a second time, against
kernels built with AddressSanitizer and UndefinedBehaviorSanitizer. A lane over its budget fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANITIZED = ROOT / "build" / "sanitize"
COMPILER = next(filter(shutil.which, (*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++")), None)


@dataclass(frozen=True)
class Lane:
    """A part of the suite and the seconds that it may take on two cores."""

    name: str
    budget: int
    run: Callable[[], int]


def call(*command: str | Path, **environment: str) -> int:
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode


def output(*command: str | Path) -> str:
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def pytest_(markers: str, *arguments: str, **environment: str) -> int:
    # Not `python -m pytest`: it would put the working tree before PYTHONPATH.
    return call(Path(sys.executable).parent / "pytest", "-q", "-m", markers, *arguments, **environment)


def lint() -> int:
    scripts = Path(sys.executable).parent
    folders = (ROOT / "csrc", ROOT / "tests" / "cpp")
    sources = sorted(str(p) for folder in folders for p in folder.rglob("*") if p.suffix in {".h", ".cpp"})
    checks = (
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("clang-format", "--dry-run", "--Werror", *sources),
        ("pyright", "--warnings", "--pythonpath", sys.executable),
    )
    return max([call(scripts / name, *arguments) for name, *arguments in checks])


def sanitizer_environment() -> dict[str, str]:
    """What a process needs that loads an extension built with sanitizers."""
    assert COMPILER is not None
    libraries = [output(COMPILER, f"-print-file-name={name}") for name in ("libasan.so", "libubsan.so")]
    return {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself keeps memory until it exits
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }


def sanitizers() -> int:
    """Builds the package into a folder of its own and runs against it."""
    assert COMPILER is not None
    failed = call(
        *(sys.executable, "setup.py", "-q", "build_py", "--build-lib", SANITIZED / "lib"),
        *("build_ext", "--build-lib", SANITIZED / "lib", "--build-temp", SANITIZED / "objects"),
        FASTWRS_SANITIZE="address", FASTWRS_CUDA="0",
        FASTWRS_CPU="1",
    )
    if failed:
        return failed
    if b"__asan_report" not in (SANITIZED / "lib" / "fastwrs" / "_C.abi3.so").read_bytes():
        print("the extension was built without AddressSanitizer", file=sys.stderr)
        return 1
    return pytest_("cpu", "tests/test_cpu.py", PYTHONPATH=str(SANITIZED / "lib"), **sanitizer_environment())


LATER = "emulated or compiled or interpreted or triton_compiled or gpu"
LANES = (
    Lane("lint", 60, lint),
    Lane("oracle", 60, lambda: pytest_("oracle")),
    Lane("cpu", 180, lambda: pytest_("cpu and not negative_control")),
    Lane("house", 90, lambda: pytest_(f"not (oracle or cpu or negative_control or {LATER})")),
    Lane("sanitizers", 200, sanitizers),
    Lane("negative control", 200, lambda: pytest_("negative_control")),
)


def main(names: list[str]) -> int:
    if unknown := set(names) - {lane.name for lane in LANES}:
        sys.exit(f"no such lane: {', '.join(sorted(unknown))}; there are: {', '.join(lane.name for lane in LANES)}")
    if COMPILER is None:
        sys.exit("make test needs a C++ compiler (on Debian: apt-get install g++), or set CXX")
    if why := output(sys.executable, "-c", "import fastwrs; print(fastwrs.backends()['cpu'] or '')"):
        sys.exit(f"the cpu backend cannot run, so its tests cannot: {why}")
    rows = []
    for lane in LANES:
        if names and lane.name not in names:
            continue
        print(f"\n=== {lane.name} (budget {lane.budget} s)", flush=True)
        start = time.monotonic()
        failed = lane.run()
        seconds = time.monotonic() - start
        verdict = "FAILED" if failed else "ok" if seconds <= lane.budget else "OVER BUDGET"
        rows.append((verdict, f"{lane.name:<18}{seconds:>6.0f} s of {lane.budget:>4} s   {verdict}"))
    print("\n" + "\n".join(line for _, line in rows), flush=True)
    return int(any(verdict != "ok" for verdict, _ in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
