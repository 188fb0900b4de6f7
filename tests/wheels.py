"""Builds the sdist, and of the sdist the wheels, and tries each wheel in empty environments: the matrix of a release.

    python tests/wheels.py [--pythons 3.11 3.12] [--torches 2.10.0 2.13.0] [--cuda] [--built] [--log docs/wheels.log]

`make wheels` calls it. What is built lies in dist/: the sdist, a wheel with the CPU kernels, and with --cuda one that
has the CUDA kernels too, which needs nvcc and no GPU. Both are for all Pythons and torches, so they are built once and
tried with each: by TRIALS, in a new environment outside of the tree that has torch and the wheel, and nothing else.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
CUDA_BUILD = "1cuda"  # a wheel's build tag: two wheels of one version, and pip prefers this one where both are offered
LIMIT_S = 1800
PIP = ("-I", "-m", "pip", "--disable-pip-version-check", "--no-input")
INSTALL = (*PIP, "install", "--quiet", "--no-compile", "--only-binary", ":all:")


@dataclass(frozen=True)
class Trial:
    """A command for the Python of an environment, and the packages that it needs beside torch and the wheel."""

    name: str
    needs: tuple[str, ...]
    arguments: tuple[str, ...]
    """WHEEL and KIND stand for the wheel's file and for "cpu" or "cuda"."""


# Those that need nothing come first: what is installed for one stays.
CHECK = ("-I", "-u", "-X", "faulthandler", str(ROOT / "tests" / "wheel_check.py"), "WHEEL", "KIND")
TRIALS = (
    Trial("check", (), CHECK),
    Trial("bench", ("timm",), ("-I", "-m", "fastwrs", "bench", "--model", "resnet50", "--rounds", "3")),
)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    python: str
    torch: str
    wheel: str
    trial: str
    verdict: str
    seconds: str


class FailedError(Exception):
    """What did not work, in few words for the table; what was printed has been shown."""


def call(what: str, *command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints. Where it fails that is shown, and FailedError says what was tried."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FASTWRS_", "PYTHON"))}
    env |= environment
    try:
        done = subprocess.run(
            command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise FailedError(f"{what} took over {LIMIT_S} s") from None
    except OSError as error:
        raise FailedError(f"{what}: {error}") from None
    if done.returncode:
        print(done.stdout, flush=True)
        died = f" (signal {-done.returncode})" if done.returncode < 0 else ""
        last = [f": {line.strip()}" for line in done.stdout.splitlines() if line.strip()][-1:]
        raise FailedError("".join([what, died, *last]))
    return done.stdout


def pinned(package: str) -> str:
    """The version in requirements/ci.txt."""
    pins = (ROOT / "requirements" / "ci.txt").read_text(encoding="utf-8")
    return re.findall(rf"^{re.escape(package)}==([\w.]+)", pins, re.M)[0]


def kind_of(wheel: Path) -> str:
    return "cuda" if f"-{CUDA_BUILD}-" in wheel.name else "cpu"


def build_all(dist: Path, cuda: bool) -> list[Path]:
    """Builds what git tracks into ``dist``, where nothing else of ours is left; the sdist, then the wheels."""
    with tempfile.TemporaryDirectory(prefix="fastwrs-") as name:
        scratch = Path(name)
        listed = call("git ls-files", "git", "ls-files", cwd=ROOT)
        for file in listed.splitlines():
            (scratch / "tree" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, scratch / "tree" / file)
        sdist = build(scratch / "tree", scratch / "sdist", "--sdist")
        built = [sdist]
        for kind in ("cpu", "cuda") if cuda else ("cpu",):
            shutil.unpack_archive(sdist, scratch / kind)
            tag = (f"-C--build-option=--build-number={CUDA_BUILD}",) if kind == "cuda" else ()
            (source,) = (scratch / kind).iterdir()
            with_cuda = str(int(kind == "cuda"))
            wheel = build(source, scratch / f"wheel-{kind}", "--wheel", *tag, FASTWRS_CPU="1", FASTWRS_CUDA=with_cuda)
            if "-cp310-abi3-" not in wheel.name:
                raise FailedError(f"{wheel.name} is not for every Python from 3.10 on")
            built.append(wheel)
        dist.mkdir(exist_ok=True)
        for old in dist.glob("fastwrs-*"):
            old.unlink()
        return [Path(shutil.copy2(file, dist)) for file in built]


def build(source: Path, out: Path, *options: str, **environment: str) -> Path:
    """The file that `python -m build` makes of a folder, with the torch of this environment."""
    settings = [f"{name}={value}" for name, value in environment.items()]
    print("python -m build", *options, *settings, flush=True)
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", out, *options, source)
    call(f"python -m build {options[0]}", *command, cwd=source.parent, **environment)
    (file,) = out.iterdir()
    return file


def described(file: Path) -> str:
    """A line on a file of dist/; of a wheel also what its extension needs of the system."""
    line = f"{file.name}, {file.stat().st_size / 1e6:.1f} MB"
    return f"{line}, needs {' '.join(system_needs(file))}" if file.suffix == ".whl" else line


def system_needs(wheel: Path) -> list[str]:
    """The newest version of each of the system's libraries of which the extension uses a symbol."""
    with tempfile.TemporaryDirectory(prefix="fastwrs-") as name:
        with zipfile.ZipFile(wheel) as archive:
            file = archive.extract("fastwrs/_C.abi3.so", name)
        listed = call("readelf", "readelf", "--version-info", "--wide", file, cwd=Path(name))
    newest: dict[str, tuple[int, ...]] = {}
    for library, version in re.findall(r"Name: (\w+)_([\d.]+)", listed):
        newest[library] = max(newest.get(library, ()), tuple(map(int, version.split("."))))
    return [f"{library}_{'.'.join(map(str, version))}" for library, version in sorted(newest.items())]


def find_python(wanted: str) -> tuple[str, str]:
    """The command and the version of a Python: of one such as 3.12 on the PATH or of pyenv, or of a command."""
    by_version = re.fullmatch(r"3\.\d+", wanted)
    for candidate in (f"python{wanted}", python_of_pyenv(wanted)) if by_version else (wanted,):
        command = shutil.which(candidate)
        if command is None:
            continue
        code = "import platform; print(platform.python_version())"
        done = subprocess.run([command, "-c", code], capture_output=True, text=True, check=False)
        version = done.stdout.strip()
        if done.returncode == 0 and (not by_version or version.startswith(f"{wanted}.")):
            return command, version
    raise FailedError(f"no Python {wanted} on the PATH or in pyenv")


def python_of_pyenv(version: str) -> str:
    if shutil.which("pyenv") is None:
        return ""
    done = subprocess.run(["pyenv", "prefix", version], capture_output=True, text=True, check=False)
    return str(Path(done.stdout.strip(), "bin", "python")) if done.returncode == 0 else ""


def environment(folder: Path, command: str, torch: str) -> tuple[str, str]:
    """Makes an environment with one torch alone; its Python, and the version as torch's own metadata has it."""
    call("making an environment", command, "-m", "venv", folder, cwd=folder.parent)
    python = str(folder / "bin" / "python")
    call(f"installing torch {torch}", python, *INSTALL, f"torch=={torch}", cwd=folder.parent)
    code = "from importlib.metadata import version; print(version('torch'))"
    return python, call("finding torch", python, "-I", "-c", code, cwd=folder.parent).strip()


def try_in_one(wanted: str, torch: str, wheels: Sequence[Path], say: Callable[[Row], None]) -> None:
    """All trials of all wheels with one Python and one torch. The first row's time includes the environment."""
    start = time.monotonic()

    def row(wheel: str, trial: str, verdict: str) -> None:
        nonlocal start
        say(Row(version, torch, wheel, trial, verdict, f"{time.monotonic() - start:.0f}"))
        start = time.monotonic()

    version = wanted
    with tempfile.TemporaryDirectory(prefix="fastwrs-") as name:
        folder = Path(name)
        try:
            command, version = find_python(wanted)
            python, torch = environment(folder / "environment", command, torch)
        except FailedError as why:
            row("all", "all", f"FAILED: {why}")
            return
        for trial in TRIALS:
            for wheel in wheels:
                row(kind_of(wheel), trial.name, verdict_of(folder, python, torch, trial, wheel))


def verdict_of(folder: Path, python: str, torch: str, trial: Trial, wheel: Path) -> str:
    try:
        run_trial(folder, python, torch, trial, wheel)
    except FailedError as why:
        return f"FAILED: {why}"
    return "ok"


def run_trial(folder: Path, python: str, torch: str, trial: Trial, wheel: Path) -> None:
    """Installs a wheel, runs the trial in an empty folder, and takes the wheel away again."""
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    if trial.needs:
        what = f"installing {' '.join(trial.needs)}"
        call(what, python, *INSTALL, *trial.needs, f"torch=={torch}", cwd=elsewhere)
    # No index: whatever it needs beside torch would be missing.
    call("installing the wheel", python, *INSTALL, "--no-index", wheel, cwd=elsewhere)
    meant = {"WHEEL": str(wheel), "KIND": kind_of(wheel)}
    for script in filter(os.path.isfile, trial.arguments):  # a script is run where nothing of the tree is beside it
        meant[script] = str(shutil.copy2(script, elsewhere))
    arguments = [meant.get(argument, argument) for argument in trial.arguments]
    try:
        print(call(trial.name, python, *arguments, cwd=elsewhere), flush=True)
    finally:
        call("removing the wheel", python, *PIP, "uninstall", "--quiet", "--yes", "fastwrs", cwd=elsewhere)


def table(rows: Iterable[Row]) -> str:
    head = Row("Python", "torch", "wheel", "trial", "verdict", "seconds")
    lines = [astuple(row) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def header(dist: Path, built: bool) -> str:
    """When and where, and what was built: of files that were there before nobody knows."""
    commit = "" if built else call("git", "git", "describe", "--always", "--dirty", cwd=ROOT).strip()
    of_what = f"of commit {commit}" if commit else f"built before, in {dist.name}/"
    today = datetime.now(timezone.utc).date()
    return f"{today}, Linux {platform.machine()}, {' '.join(platform.libc_ver())}, {of_what}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Builds sdist and wheels and tries them in empty environments.")
    parser.add_argument("--pythons", nargs="+", default=PYTHONS, help="versions such as 3.12, or commands")
    parser.add_argument("--torches", nargs="+", default=[pinned("torch")], help="versions such as 2.13.0")
    parser.add_argument("--cuda", action="store_true", help="a wheel with the CUDA kernels, too")
    parser.add_argument("--built", action="store_true", help="take the wheels that are in dist/")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where they are, or go (default: dist/)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append the table to a file")
    asked = parser.parse_args(arguments)
    dist = asked.dist.resolve()
    try:
        files = sorted(dist.glob("fastwrs-*")) if asked.built else build_all(dist, asked.cuda)
        lines = [described(file) for file in files]
    except FailedError as why:
        print(f"FAILED: {why}", file=sys.stderr)
        return 1
    wheels = [file for file in files if file.suffix == ".whl"]
    if not wheels:
        parser.error(f"no wheel in {dist}")
    rows: list[Row] = []

    def say(row: Row) -> None:
        rows.append(row)
        print(*astuple(row), flush=True)

    for python in asked.pythons:
        for torch in asked.torches:
            try_in_one(python, torch, wheels, say)
    text = "\n".join([header(dist, asked.built), *lines, table(rows)])
    print(f"\n{text}", flush=True)
    if asked.log:
        with asked.log.open("a", encoding="utf-8") as log:
            print(text, end="\n\n", file=log)
    return int(any(row.verdict != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
