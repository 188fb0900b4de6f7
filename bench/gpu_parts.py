"""Builds, tests and measures on a machine with a GPU and no network, part by part; or rehearses that without one.

    python bench/gpu_parts.py --out DIR [--part NAME ...] [--minutes N] [--done FILE ...] [--rehearse]

No part takes nine minutes, and each can be run alone; what DIR says is done for these sources is not done again unless
it is named. DIR gets parts.jsonl (a verdict per part), gpu.jsonl (the measurements), profile.txt, log.txt with all that
was printed, and summary.md; bench/README.md says how to read them. Exit code: 0 all is well, 1 a part has failed, 3
parts are left.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_record as record
from gpu_record import ROOT, Line, append

LONGEST = 530
"""Seconds that a part may take."""
TESTS = {
    "tests": (("tests/test_gpu.py", "tests/test_gpu_training.py"), "not triton"),
    "tests-triton": (("tests/test_gpu.py",), "triton"),
    "tests-triton-training": (("tests/test_gpu_training.py", "tests/test_gpu_triton.py"), "triton"),
}
"""The parts of lane 7: files, and which of their tests. Those on Triton are apart, because they compile for minutes."""
MORE_TO_DO = 3
"""What bench/gpu.py exits with when time was up."""
DRAWING = 60.0  # seconds
LOST = 9
"""What pytest exits with when a test has broken the CUDA context, as tests/on_gpu.py has it."""
NOTHING_LEFT = 5
"""And when there is no test to run."""
PLANTED = {"memcheck": "bounds", "racecheck": "race", "initcheck": "uninitialised", "synccheck": "divergent"}
"""Which fault of tests/cpp/planted_faults.cu a tool has to find, before it is believed that there is none in ours."""
FAULTS = re.compile(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: )(\d+)")
PROFILED = (
    (record.BILLION, record.CUDA),
    (record.BILLION, record.TRITON),
    (record.BILLION, "torch fused"),
    ("resnet50/float32/AdamW/main", record.CUDA),
)
KERNELS = {"cuda": ("fastwrs",), "triton": ("gate_kernel", "shift_kernel", "step_kernel", "project_kernel")}
"""What the names of our kernels contain."""
REDUCED = {"cuda": "150", "triton": "240"}
"""Seconds in which cases begin under compute-sanitizer; Triton compiles on the way."""
INTERPRETED = {"TRITON_INTERPRET": "1"}
"""For a process that rehearses: Triton's kernels then run on the CPU."""


class BrokenError(Exception):
    """Why a part has failed."""


class UnfinishedError(Exception):
    """A part has done what it had time for."""


@dataclass
class Session:
    """Where the parts write, and how much time the one that runs now has."""

    out: Path
    rehearsal: bool
    done: list[Path] = field(default_factory=list)
    until: float = 0.0
    builds: bool = True
    """Whether a rehearsal compiles, where there is an nvcc."""
    where: Line = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds that the part has left."""
        return self.until - time.monotonic()

    def say(self, text: str) -> None:
        """Prints a line, to the log too."""
        print(text, flush=True)
        with (self.out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(text + "\n")

    def call(self, *command: str | Path, **environment: str) -> tuple[int, str]:
        """Runs a program in the repository: exit code and output, which goes to the log; it has until time is up."""
        self.say(f"$ {' '.join(map(str, command))}")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
        with (self.out / "log.txt").open("ab") as log:
            begin = log.tell()
            # A session of its own, so that what it starts ends with it.
            streams: dict[str, Any] = {"stdout": log, "stderr": subprocess.STDOUT}
            with subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **streams) as process:
                try:
                    code = process.wait(timeout=max(1.0, self.left))
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    raise BrokenError(f"stopped: {Path(command[0]).name} took too long") from None
        text = (self.out / "log.txt").read_bytes()[begin:].decode(errors="replace")
        return code, text

    def python(self, *arguments: str | Path, **environment: str) -> tuple[int, str]:
        """Runs this Python."""
        return self.call(sys.executable, *arguments, **environment)


def last(text: str, lines: int = 1) -> str:
    """The last lines that say something."""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])


# ---- the parts ------------------------------------------------------------------------------------------------------


def build(session: Session) -> str:
    """Compiles the extension into the tree for the GPU that is there; a rehearsal for 9.0, into a folder of its own."""
    environment = {"FASTWRS_CPU": "1", "FASTWRS_CUDA": "1"}
    if not session.rehearsal:
        environment["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or session.where["capability"]
        code, text = session.python("setup.py", "-q", "build_ext", "--inplace", **environment)
        if code:
            raise BrokenError(last(text, 5))
        reasons = probe(session)["backends"]
        if reasons["cuda"] is not None:
            raise BrokenError(f"it was built, and the cuda backend cannot run: {reasons['cuda']}")
        triton = f"; triton cannot run: {reasons['triton']}" if reasons["triton"] else ""
        return f"for {environment['TORCH_CUDA_ARCH_LIST']}{triton}"
    if record.tool("nvcc") is None or not session.builds:
        return "nothing compiled: " + ("left out" if record.tool("nvcc") else "there is no nvcc")
    environment["TORCH_CUDA_ARCH_LIST"] = "9.0"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "lib"
        where = ("--build-lib", library, "build_ext", "--build-lib", library, "--build-temp", Path(folder) / "objects")
        code, text = session.python("setup.py", "-q", "build_py", *where, **environment)
        if code:
            raise BrokenError(last(text, 5))
        # Not the package in the tree, which `-c` finds first.
        look = "import sys; del sys.path[0]; import fastwrs; print(fastwrs.__file__, fastwrs.backends()['cuda'])"
        code, text = session.python("-c", look, PYTHONPATH=str(library))
        if code or str(library) not in last(text):
            raise BrokenError(last(text, 5))
        return "for 9.0; here it says: " + last(text).split(maxsplit=1)[1]


def probe(session: Session) -> Line:
    """The environment, and why which backend cannot run, from a process of its own."""
    code, text = session.python("bench/gpu_record.py")
    if code:
        raise BrokenError(last(text, 5))
    return json.loads(last(text))


def tests(name: str) -> Callable[[Session], str]:
    """A part of lane 7. Where a test breaks the CUDA context, those after it run in a new process."""
    files, which = TESTS[name]
    # Whatever plugins and warnings another machine has, they are not what is tested here.
    command = ("-m", "pytest", "-m", "gpu", "-k", which, "-v", "-rN", "--tb=short", "--maxfail=40", "-W", "default")
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def part(session: Session) -> str:
        if importlib.util.find_spec("pytest") is None:
            raise BrokenError("pytest is not installed")
        if session.rehearsal:
            code, text = session.python(*command, *files, "--collect-only", "-q", **environment)
            found = re.search(r"(\d+)(?:/\d+)? tests? collected", text)
            if code or found is None:
                raise BrokenError(last(text, 5))
            return f"{found[1]} tests collected"
        finished: dict[str, str] = {}
        for _ in range(5):
            leave_out = [f"--deselect={name}" for name in finished]
            code, text = session.python(*command, *files, *leave_out, **environment)
            code = 0 if code == NOTHING_LEFT and finished else code
            finished |= dict(re.findall(r"^(tests/\S+::\S+) (PASSED|FAILED|ERROR)", text, re.M))
            if code != LOST:
                break
        failed = [name for name, verdict in finished.items() if verdict != "PASSED"]
        if code or failed or not finished:
            raise BrokenError(
                f"{len(failed)} of {len(finished)} tests failed (pytest: {code}): {', '.join(failed[:5])}"
            )
        return f"{len(finished)} passed"

    return part


def sanitizer(tool: str, backend: str = "cuda") -> Callable[[Session], str]:
    """A part that runs one tool of compute-sanitizer over the reduced set of cases."""

    def part(session: Session) -> str:
        reduced = ("tests/gpu_reduced.py", "--tool", tool, "--backend", backend, "--seconds")
        if session.rehearsal:
            code, text = session.python(*reduced, "3", "--device", "cpu", **INTERPRETED)
            if code:
                raise BrokenError(last(text, 5))
            return f"{last(text)}, without the tool"
        program, nvcc = record.tool("compute-sanitizer"), record.tool("nvcc")
        if program is None or nvcc is None:
            raise BrokenError("there is no " + ("compute-sanitizer" if nvcc else "nvcc"))
        options = (program, "--tool", tool, "--print-limit", "20")
        with tempfile.TemporaryDirectory() as folder:
            planted = Path(folder) / "planted"
            arch = "sm_" + session.where["capability"].replace(".", "")
            code, text = session.call(nvcc, f"-arch={arch}", "-o", planted, "tests/cpp/planted_faults.cu")
            if code:
                raise BrokenError(last(text, 5))
            clean, found = (session.call(*options, planted, name)[1] for name in ("none", PLANTED[tool]))
            if faults_in(clean) != 0 or not faults_in(found):
                said = f"{faults_in(clean)} faults where there are none, {faults_in(found)} where one was planted"
                raise BrokenError(f"{tool} cannot be believed here, it finds {said}: {last(found)}")
        # Each tensor in an allocation of its own size, so that one element too far is seen.
        only = _ours_alone(session, program, tool, backend)
        code, text = session.call(*options, *only, sys.executable, *reduced, REDUCED[backend],
                                  PYTORCH_NO_CUDA_MEMORY_CACHING="1")  # fmt: skip
        passed = re.search(r"^(\d+) of \d+ cases passed", text, re.M)
        if code or passed is None or faults_in(text) != 0:
            raise BrokenError(f"exit code {code}, {faults_in(text)} faults: {last(text, 3)}")
        return f"{passed[0]}, no faults; the planted one was found"

    return part


def faults_in(text: str) -> int | None:
    """How many faults compute-sanitizer says that it has found; None if it has not come to an end."""
    found = FAULTS.findall(text)
    return int(found[-1]) if found else None


def _ours_alone(session: Session, program: str, tool: str, backend: str) -> tuple[str, ...]:
    """Options that leave torch's kernels alone; initcheck has to see what they write."""
    if tool == "initcheck" or "--kernel-regex" not in session.call(program, "--help")[1]:
        return ()
    return tuple(option for name in KERNELS[backend] for option in ("--kernel-regex", f"kns={name}"))


def measured(name: str) -> Callable[[Session], str]:
    """A part that measures a part of the benchmark."""

    def part(session: Session) -> str:
        arguments = ["bench/gpu.py", "--out", session.out / "gpu.jsonl", "--part", name]
        arguments += ["--done", *session.done] if session.done else []
        arguments += ["--rehearse"] if session.rehearsal else ["--seconds", f"{session.left - 90:.0f}"]
        code, text = session.python(*arguments, **INTERPRETED if session.rehearsal else {})
        if code == MORE_TO_DO:
            raise UnfinishedError(last(text))
        if code:
            raise BrokenError(last(text))
        return f"{len(re.findall(r': [1-9][0-9]* sides, ', text))} comparisons"

    return part


def launches(session: Session) -> str:
    """Counts launches through torch's profiler."""
    arguments = ["bench/gpu.py", "--out", session.out / "gpu.jsonl", "--launches"]
    code, text = session.python(*arguments, *["--rehearse"] * session.rehearsal,
                                **INTERPRETED if session.rehearsal else {})  # fmt: skip
    if code:
        raise BrokenError(last(text, 3))
    return f"{len(re.findall(r'launches$', text, re.M))} sides"


def profile(session: Session) -> str:
    """What Nsight Compute says of the kernels: occupancy, bytes, what they wait for."""
    if session.rehearsal:
        code, text = session.python("bench/gpu.py", "--rehearse", "--once", PROFILED[0][0], "torch fused")
        if code:
            raise BrokenError(last(text, 3))
        return "without Nsight Compute"
    program = record.tool("ncu")
    if program is None:
        raise BrokenError("there is no ncu; the part launches has the times of the kernels")
    sections = [f"--section={name}" for name in ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis",
                                                 "WarpStateStats")]  # fmt: skip
    # The clocks are left as they are: they may not be ours to set.
    options = ("--clock-control", "none", "--profile-from-start", "off", "--launch-count", "4", *sections)
    for comparison, side in PROFILED:
        code, text = session.call(program, *options, sys.executable, "bench/gpu.py", "--once", comparison, side)
        if code or "==PROF==" not in text:
            raise BrokenError(last(text, 3))
        with (session.out / "profile.txt").open("a", encoding="utf-8") as out:
            out.write(f"{comparison}, {side}\n{text}\n")
    return f"{len(PROFILED)} sides, in profile.txt"


@dataclass(frozen=True)
class Part:
    """One part: what it does, and the seconds that have to be left for it to begin."""

    run: Callable[[Session], str]
    least: int = 60


PARTS = {
    "build": Part(build),
    **{name: Part(tests(name), 240) for name in TESTS},
    **{tool: Part(sanitizer(tool), 240) for tool in PLANTED},
    **{f"{tool}-triton": Part(sanitizer(tool, "triton"), 330) for tool in PLANTED},
    **{f"bench-{name}": Part(measured(name), 180)
       for name in ("billion", "convnets", "llama", "small", "others", "compiled")},
    "launches": Part(launches),
    "profile": Part(profile, 120),
}  # fmt: skip


# ---- all of them ----------------------------------------------------------------------------------------------------


def run(session: Session, names: list[str], again: bool, seconds: float) -> int:
    """Runs parts until time is up; returns the exit code."""
    session.out.mkdir(parents=True, exist_ok=True)
    verdicts, until = session.out / "parts.jsonl", time.monotonic() + seconds
    session.until = min(until, time.monotonic() + LONGEST)
    session.where = {key: value for key, value in probe(session).items() if key != "backends"}
    if not session.rehearsal and session.where["gpu"] is None:
        sys.exit(f"torch {session.where['torch']} finds no CUDA device (--rehearse does without one)")
    passed = {
        line["part"]
        for line in record.read(verdicts)
        if line["verdict"] == "ok"
        and line["source"] == session.where["source"]
        and line.get("rehearsal", False) == session.rehearsal
    }
    usable = session.rehearsal or probe(session)["backends"]["cuda"] is None
    if not usable and "build" not in names:
        names = ["build", *names]  # a fresh machine
    results = []
    for name in names:
        part, begun = PARTS[name], time.monotonic()
        if name in passed and not again and (usable or name != "build"):
            results.append((name, "ok", "done before"))
            continue
        if until - begun < part.least:
            results.append((name, "left", "no time for it"))
            continue
        session.until = min(until, begun + LONGEST)
        session.say(f"\n=== {name}")
        try:
            verdict, note = "ok", part.run(session)
        except UnfinishedError as error:
            verdict, note = "left", str(error)
        except BrokenError as error:
            verdict, note = "FAILED", str(error)
        taken = time.monotonic() - begun
        results.append((name, verdict, note))
        session.say(f"=== {name}: {verdict}, {taken:.0f} s: {note}")
        line = {"part": name, "verdict": verdict, "note": note, "seconds": round(taken, 1)}
        append(verdicts, [line | session.where | ({"rehearsal": True} if session.rehearsal else {})])
        if name == "build" and verdict != "ok":
            break
    lines = record.read(session.out / "gpu.jsonl", *session.done)
    table = "\n".join(f"{name:<22}{verdict:<8}{note}" for name, verdict, note in results)
    text = f"{record.summary(lines)}\n```\n{table}\n```\n"
    (session.out / "summary.md").write_text(text, encoding="utf-8")
    session.say("\n" + text)
    if record.latest(lines):
        session.until = time.monotonic() + DRAWING
        files = [session.out / "gpu.jsonl", *session.done]
        session.python("bench/gpu.py", "--summary", *files, "--plot", session.out / "roofline.png")
    verdicts_seen = {verdict for _, verdict, _ in results}
    return 1 if "FAILED" in verdicts_seen else MORE_TO_DO if "left" in verdicts_seen else 0


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where all results go")
    parser.add_argument("--part", nargs="+", choices=PARTS, help="only these, also where they are done")
    parser.add_argument("--minutes", type=float, default=1e4, help="no part runs longer than this from now")
    parser.add_argument("--done", type=Path, nargs="*", default=[], metavar="FILE", help="earlier records")
    parser.add_argument("--rehearse", action="store_true", help="go through the motions without a GPU")
    parser.add_argument("--no-build", action="store_true", help="compile nothing in a rehearsal")
    given = parser.parse_args(arguments)
    if importlib.util.find_spec("torch") is None:
        sys.exit(f"{sys.executable} has no torch: make gpu PYTHON=... takes another Python")
    done = [file.resolve() for file in given.done]
    session = Session(given.out.resolve(), given.rehearse, done, builds=not given.no_build)
    return run(session, given.part or list(PARTS), given.part is not None, 60 * given.minutes)


if __name__ == "__main__":
    sys.exit(main())
