"""Runs the lanes one by one, each in a process of its own, with the time of each against its budget.

    python tests/run_lanes.py [LANE ...]        without arguments: all of them

Every test is in exactly one lane, by its markers; the sanitizer lane runs those of test_cpu.py and test_entry.py a
second time, against kernels built with AddressSanitizer and UndefinedBehaviorSanitizer, and the emulated lane those of
test_entry.py once more. A lane over its budget fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANITIZED, EMULATED = ROOT / "build" / "sanitize", ROOT / "build" / "emulated"
PRINTING = threading.Lock()
COMPILER = next(filter(shutil.which, (*os.environ.get("CXX", "").split()[:1], "c++", "g++", "clang++")), None)


@dataclass(frozen=True)
class Lane:
    """A part of the suite and the seconds that it may take on two cores."""

    name: str
    budget: int
    run: Callable[[], int]


def call(*command: str | Path, **environment: str) -> int:
    return call_in(ROOT, *command, **environment)


def call_in(folder: Path, *command: str | Path, **environment: str) -> int:
    """The exit status of a command. What it prints comes at once, or when it has ended if others run beside it."""
    beside = threading.current_thread() is not threading.main_thread()
    stdout, stderr = (subprocess.PIPE, subprocess.STDOUT) if beside else (None, None)
    env = {**os.environ, **environment}
    done = subprocess.run(command, cwd=folder, env=env, stdout=stdout, stderr=stderr, check=False)
    if beside:
        with PRINTING:
            print(done.stdout.decode(errors="replace"), end="", flush=True)
    return done.returncode


def side_by_side(*parts: Callable[[], int]) -> int:
    """Runs parts of a lane, two at a time and in this order, all of them whichever fails; 0 if none does."""

    def code_of(part: Callable[[], int]) -> int:
        try:
            return part()
        except RuntimeError as error:  # a build
            print(error, file=sys.stderr)
            return 1

    with ThreadPoolExecutor(2) as pool:
        return int(any(list(pool.map(code_of, parts))))


def output(*command: str | Path) -> str:
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def pytest_(markers: str, *arguments: str, **environment: str) -> int:
    """Runs the tests that the markers select, in the files that are given, or in all."""
    named = any(argument.startswith("tests/") for argument in arguments)
    files = () if named else files_with(markers.split()[0])
    # Not `python -m pytest`: it would put the working tree before PYTHONPATH.
    return call(Path(sys.executable).parent / "pytest", "-q", "-m", markers, *arguments, *files, **environment)


def files_with(marker: str) -> list[str]:
    """The files that name a marker, none for `not`. To import the others takes longer than some lanes."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(file) for file in files if re.search(rf"\bmark\.{marker}\b", file.read_text(encoding="utf-8"))]


def pytest_on_two_cores(markers: str, *arguments: str, **environment: str) -> int:
    # torch's threads would otherwise spin while they wait, and keep the other process from its core.
    environment["OMP_WAIT_POLICY"] = "PASSIVE"
    return pytest_(markers, "-n", "2", "--dist", "worksteal", *arguments, **environment)


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
    return call_in(source, *command, **settings)


def sanitizers() -> int:
    """The tests of the C++ kernels, against kernels with AddressSanitizer and UndefinedBehaviorSanitizer."""
    if failed := build(ROOT, SANITIZED / "lib", SANITIZED / "objects", FASTWRS_SANITIZE="address"):
        return failed
    if b"__asan_report" not in (SANITIZED / "lib" / "fastwrs" / "_C.abi3.so").read_bytes():
        print("the extension was built without AddressSanitizer", file=sys.stderr)
        return 1
    environment = {"PYTHONPATH": str(SANITIZED / "lib"), **sanitizer_environment()}
    return pytest_on_two_cores("cpu", "tests/test_cpu.py", "tests/test_entry.py", ENTRY_CALLS="10000", **environment)


def build_emulated(sanitizer: str) -> Path:
    """Builds the package with emulated CUDA kernels, or brings it up to date, and returns where it is.

    Under AddressSanitizer they are all there, otherwise those of the triples of emulated.small_cases.
    """
    folder = EMULATED / (sanitizer or "plain") / "build"
    environment = {"FASTWRS_EMULATED": "1", **({"FASTWRS_SANITIZE": sanitizer} if sanitizer else {})}
    if sanitizer != "address":
        environment["FASTWRS_TRIPLES"] = "0 2"
    if build(ROOT, folder / "lib", folder / "objects", **environment):
        raise RuntimeError("the emulated kernels do not build")
    return folder


def emulated_environment(source: Path, sanitizer: str) -> dict[str, str]:
    """What a process needs that runs them."""
    return {"PYTHONPATH": str(source / "build" / "lib"), **(sanitizer_environment(sanitizer) if sanitizer else {})}


def emulated() -> int:
    """The CUDA kernels in the emulator: all tests under AddressSanitizer, all kernels under ThreadSanitizer."""

    def ready(sanitizer: str) -> int:
        build_emulated(sanitizer)
        return 0

    if failed := side_by_side(partial(ready, "address"), partial(ready, "thread")):
        return failed
    checked = emulated_environment(EMULATED / "address", "address")
    cases = pytest_on_two_cores("emulated", **checked)
    cases = pytest_on_two_cores("cpu", "tests/test_entry.py", ENTRY_CALLS="4000", **checked) or cases
    environment = emulated_environment(EMULATED / "thread", "thread")
    sizes = ("64", "256")  # threads of a block
    return side_by_side(*(partial(call, sys.executable, "tests/emulated.py", n, **environment) for n in sizes)) or cases


def interpreted() -> int:
    """The Triton kernels in the interpreter; then kernels broken on purpose."""
    cases = pytest_on_two_cores("interpreted", "tests/test_interpreted.py", TRITON_INTERPRET="1")
    return cases or pytest_("interpreted", "tests/test_interpreted_control.py")


OTHERS = (
    "oracle or cpu or fuzz or negative_control or emulated or emulated_control or compiled or interpreted"
    " or triton_compiled or gpu or frameworks or docs"
)
LANES = (
    Lane("lint", 60, lint),
    Lane("oracle", 60, lambda: pytest_on_two_cores("oracle")),
    Lane("cpu", 180, lambda: pytest_on_two_cores("cpu and not negative_control")),
    Lane("house", 150, lambda: pytest_on_two_cores(f"not ({OTHERS})")),
    Lane("docs", 60, lambda: pytest_on_two_cores("docs")),
    # As on a machine that may not ask the hub of Hugging Face.
    Lane("frameworks", 180, lambda: pytest_on_two_cores("frameworks", HF_HUB_OFFLINE="1")),
    Lane("fuzz", 180, lambda: pytest_on_two_cores("fuzz")),
    Lane("sanitizers", 360, sanitizers),
    Lane("negative control", 420, lambda: pytest_("negative_control")),
    Lane("emulated", 540, emulated),
    Lane("emulated control", 600, lambda: pytest_("emulated_control")),
    Lane("compiled", 360, lambda: pytest_("compiled")),
    Lane("interpreted", 600, interpreted),
    Lane("triton_compiled", 600, lambda: pytest_("triton_compiled")),
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
