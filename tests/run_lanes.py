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
SANITIZED, EMULATED = ROOT / "build" / "sanitize", ROOT / "build" / "emulated"
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
    folders = (ROOT / "csrc", ROOT / "tests" / "cpp", ROOT / "tests" / "emulation")
    suffixes = {".h", ".cpp", ".cu", ".cuh"}
    sources = sorted(str(p) for folder in folders for p in folder.rglob("*") if p.suffix in suffixes)
    checks = (
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("clang-format", "--dry-run", "--Werror", *sources),
        ("pyright", "--warnings", "--pythonpath", sys.executable),
    )
    return max([call(scripts / name, *arguments) for name, *arguments in checks])


def sanitizer_environment(sanitizer: str = "address") -> dict[str, str]:
    """What a process needs that loads an extension built with sanitizers."""
    assert COMPILER is not None
    names = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}[sanitizer]
    return {
        "LD_PRELOAD": " ".join(output(COMPILER, f"-print-file-name={name}") for name in names),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself keeps memory until it exits
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66",
    }


def build(source: Path, lib: Path, objects: Path, **environment: str) -> int:
    """Builds the package of ``source`` into a folder of its own."""
    arguments = ("build_py", "--build-lib", lib, "build_ext", "--build-lib", lib, "--build-temp", objects)
    command = [sys.executable, "setup.py", "-q", *arguments]
    settings = {"FASTWRS_CPU": "1", "FASTWRS_CUDA": "0", **environment}
    return subprocess.run(command, cwd=source, env={**os.environ, **settings}, check=False).returncode


def sanitizers() -> int:
    """The tests of the C++ kernels, against kernels with AddressSanitizer and UndefinedBehaviorSanitizer."""
    if failed := build(ROOT, SANITIZED / "lib", SANITIZED / "objects", FASTWRS_SANITIZE="address"):
        return failed
    if b"__asan_report" not in (SANITIZED / "lib" / "fastwrs" / "_C.abi3.so").read_bytes():
        print("the extension was built without AddressSanitizer", file=sys.stderr)
        return 1
    return pytest_("cpu", "tests/test_cpu.py", PYTHONPATH=str(SANITIZED / "lib"), **sanitizer_environment())


def build_emulated(source: Path, sanitizer: str) -> None:
    """Builds the package with emulated CUDA kernels into ``build/lib`` below the source."""
    environment = {"FASTWRS_EMULATED": "1", **({"FASTWRS_SANITIZE": sanitizer} if sanitizer else {})}
    if build(source, source / "build" / "lib", source / "build" / "objects", **environment):
        raise RuntimeError("the emulated kernels do not build")


def emulated_environment(source: Path, sanitizer: str) -> dict[str, str]:
    """What a process needs that runs them."""
    return {"PYTHONPATH": str(source / "build" / "lib"), **(sanitizer_environment(sanitizer) if sanitizer else {})}


def emulated() -> int:
    """The CUDA kernels in the emulator: plain, under AddressSanitizer, and under ThreadSanitizer in two block sizes."""
    failed = 0
    for sanitizer in ("", "address", "thread"):
        folder = EMULATED / (sanitizer or "plain")
        environment = {"FASTWRS_EMULATED": "1", **({"FASTWRS_SANITIZE": sanitizer} if sanitizer else {})}
        if build(ROOT, folder / "build" / "lib", folder / "build" / "objects", **environment):
            return 1
        environment = emulated_environment(folder, sanitizer)
        if sanitizer == "thread":
            for threads in ("64", "256"):
                failed |= call(sys.executable, "tests/emulated.py", threads, **environment)
        else:
            failed |= pytest_("emulated", **environment)
    return failed


def interpreted() -> int:
    """The Triton kernels in the interpreter, cases shared by two processes; then kernels broken on purpose."""
    command = [Path(sys.executable).parent / "pytest", "-q", "-m", "interpreted", "tests/test_interpreted.py"]
    several = [
        subprocess.Popen(
            [*command, *only], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1", "INTERPRETED_PART": part}
        )
        for part, only in (("0/2", ()), ("1/2", ("-k", "test_step or test_norms_of")))
    ]
    failed = max([abs(process.wait()) for process in several])
    return failed or pytest_("interpreted", "tests/test_interpreted_control.py")


OTHERS = (
    "oracle or cpu or negative_control or emulated or emulated_control or compiled or interpreted or triton_compiled"
    " or gpu"
)
LANES = (
    Lane("lint", 60, lint),
    Lane("oracle", 60, lambda: pytest_("oracle")),
    Lane("cpu", 180, lambda: pytest_("cpu and not negative_control")),
    Lane("house", 90, lambda: pytest_(f"not ({OTHERS})")),
    Lane("sanitizers", 240, sanitizers),
    Lane("negative control", 300, lambda: pytest_("negative_control")),
    Lane("emulated", 420, emulated),
    Lane("emulated control", 400, lambda: pytest_("emulated_control")),
    Lane("compiled", 360, lambda: pytest_("compiled")),
    Lane("interpreted", 420, interpreted),
    Lane("triton_compiled", 360, lambda: pytest_("triton_compiled")),
)


def main(names: list[str]) -> int:
    if unknown := set(names) - {lane.name for lane in LANES}:
        sys.exit(f"no such lane: {', '.join(sorted(unknown))}; there are: {', '.join(lane.name for lane in LANES)}")
    if COMPILER is None:
        sys.exit("make test needs a C++ compiler (on Debian: apt-get install g++), or set CXX")
    if why := output(sys.executable, "-c", "import fastwrs; print(fastwrs.backends()['cpu'] or '')"):
        sys.exit(f"the cpu backend cannot run, so its tests cannot: {why}")
    code = "import torch; from fastwrs import library; library.load(); print(torch.ops.fastwrs.cuda_why_not())"
    if "built without CUDA" in (why := output(sys.executable, "-c", code)):
        sys.exit(f"make test needs the CUDA kernels, and nvcc to look at them: {why} (install the toolkit, make again)")
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
