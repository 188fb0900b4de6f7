"""Builds the C++ extension with ninja; everything else about the package is in pyproject.toml.

The extension uses LibTorch's stable ABI and Python's limited API, so one binary serves torch 2.10 and later and Python
3.10 and later. Without a C++ compiler (or without torch at build time) the package installs without it, runs on the
reference backend, and `fastwrs.backends()` says why. Environment:

CXX                   the C++ compiler (default: c++, then g++, then clang++)
FASTWRS_CPU=0|1       0: never build the extension; 1: fail if it cannot be built (default: build it if possible)
FASTWRS_CUDA=0|1      0: leave the CUDA kernels out; 1: fail if they cannot be built (default: if there is an nvcc)
TORCH_CUDA_ARCH_LIST  the GPUs to build for, as for torch, like "8.0;9.0+PTX" (default: all from 7.5 on). No GPU is
                      needed, and none is looked at
FASTWRS_SANITIZE      "address" (with undefined behaviour) or "thread": build with these sanitizers
FASTWRS_EMULATED=1    for tests: the CUDA kernels, compiled for the CPU behind tests/emulation/, take the CPU's place
FASTWRS_TRIPLES       for tests: the CUDA kernels of these dtype triples alone, like "0 2" (default: all)
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = (
    *("csrc/bindings.cpp", "csrc/cpu/engine.cpp", "csrc/cpu/isa.cpp"),
    *("csrc/norms/geometry.cpp", "csrc/triton/table.cpp"),
)
LEAVES = "csrc/cpu/leaves.cpp"  # compiled once per instruction set
ISA_FLAGS = {
    "plain": "",
    "avx2": "-mavx2 -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512",
}
# No contraction, so that every instruction set gives the same bits; no errno and no traps, so that loops vectorise.
WARNINGS = "-Wall -Wextra -Wno-psabi"  # psabi: vectors are passed between our own functions only
NUMERIC_FLAGS = "-ffp-contract=off -fno-math-errno -fno-trapping-math"
CUDA_SOURCES = ("csrc/cuda/plan.cpp", "csrc/cuda/find.cpp")
KERNELS, LAUNCH, TRIPLES = "csrc/cuda/kernels.cu", "csrc/cuda/launch.cu", 6  # kernels: once per dtype triple
OLDEST_ARCH = 7, 5
DEFAULT_ARCHES = "7.5;8.0;8.6;9.0;10.0;12.0+PTX"
# No contraction on the GPU either: the emulated kernels are then the same arithmetic.
NVCC_FLAGS = "-std=c++17 -O3 -fmad=false -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off"
SANITIZERS = {
    "address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "thread": "-fsanitize=thread",
}
NOTE = "_not_built.txt"  # in the package, in the place of the extension: why there is none
TORCH_TARGET = "0x020a000000000000"  # the oldest torch that the binary runs with: 2.10


def switch(name: str) -> str:
    """A variable that is 0, 1 or not there."""
    value = os.environ.get(name, "auto")
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"fastwrs: {name}={value!r}; allowed are 0, 1 and auto")
    return value


def find_compiler() -> str | None:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


def find_nvcc() -> str | None:
    """The CUDA compiler of CUDA_HOME or of the PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def cuda_root(nvcc: str) -> Path:
    """The toolkit that an nvcc belongs to, as it says itself: the one on the PATH may be a link or a wrapper."""
    dry_run = [nvcc, "--dryrun", "-x", "cu", "/dev/null"]
    said = subprocess.run(dry_run, capture_output=True, text=True, check=False).stderr
    tops = [line.split("=", 1)[1].strip() for line in said.splitlines() if line.startswith("#$ TOP=")]
    return Path(tops[0]) if tops else Path(nvcc).resolve().parents[1]


def cuda_arches() -> str:
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHES


def listed_arches(arches: str) -> list[tuple[str, str, str]]:
    """(major, minor, "+PTX" or nothing) of a list in the form of TORCH_CUDA_ARCH_LIST."""
    found = []
    for arch in filter(None, arches.replace(" ", ";").split(";")):
        match = re.fullmatch(r"(\d+)\.(\d)(\+PTX)?", arch)
        if not match:
            raise SystemExit(f"fastwrs: TORCH_CUDA_ARCH_LIST has {arch!r}; allowed are numbers like 8.0 or 9.0+PTX")
        if (int(match[1]), int(match[2])) < OLDEST_ARCH:
            oldest = ".".join(map(str, OLDEST_ARCH))
            raise SystemExit(f"fastwrs: TORCH_CUDA_ARCH_LIST has {arch!r}; the kernels need {oldest} or later")
        found.append((match[1], match[2], match[3] or ""))
    return found


def gencodes(arches: str) -> str:
    """The flags of nvcc for such a list."""
    flags = []
    for major, minor, ptx in listed_arches(arches):
        number = major + minor
        flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
        flags += [f"-gencode arch=compute_{number},code=compute_{number}"] if ptx else []
    return " ".join(flags)


def find_torch() -> Path | None:
    spec = importlib.util.find_spec("torch")
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def ninja_file(compiler: str, torch: Path, output: Path) -> str:
    """The text of build.ninja: one object per source, the leaves once per instruction set, one shared library."""
    root = Path(__file__).resolve().parent

    def at(source: str) -> str:
        return in_ninja(root / source)

    emulated = os.environ.get("FASTWRS_EMULATED") == "1"
    sanitizer = os.environ.get("FASTWRS_SANITIZE")
    link = SANITIZERS[sanitizer] if sanitizer else ""
    optimise = f"-O1 -g1 {link} -fno-omit-frame-pointer" if sanitizer else "-O3 -g0"
    includes = f"-isystem {in_command(torch / 'include')} -isystem {in_command(sysconfig.get_paths()['include'])}"
    # Emulated, no step is taken by the leaves; to a sanitizer they are the same loops, which it keeps from vectors.
    isas = ISA_FLAGS if is_x86() and not emulated and not sanitizer else {"plain": ""}
    defines = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}" + (" -DFASTWRS_WITH_X86" if len(isas) > 1 else "")
    nvcc = None if emulated else cuda_compiler()
    if nvcc or emulated:
        defines += " -DFASTWRS_WITH_CUDA"
    if emulated:
        defines += " -DFASTWRS_EMULATED -x c++ -Wno-unknown-pragmas"
        includes += f" -I {in_command(root / 'csrc')} -I {in_command(root / 'tests' / 'emulation')}"
        optimise = optimise.replace("-O3", "-O2")
    if nvcc:
        link += f" -L{in_command(cuda_root(nvcc) / 'lib64')} -lcudart_static -lpthread -lrt -ldl"
    # Messages name source files, and the machine that built it is nobody's concern. Where both match, the last counts.
    shown = f"{in_command(f'-ffile-prefix-map={root}/=')} {in_command(f'-ffile-prefix-map={torch}=torch')}"
    flags = f"-std=c++17 -fPIC -fvisibility=hidden {WARNINGS} {optimise} {NUMERIC_FLAGS} {defines} {shown} {includes}"
    lines = [
        "ninja_required_version = 1.3",
        "rule compile",
        f"  command = {compiler} -MMD -MF $out.d {flags} $isa -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        # torch is imported first, so that its library is found by name without a path in the binary
        f"  command = {compiler} -shared -pthread $in {link} -L{in_command(torch / 'lib')} -ltorch_cpu -o $out",
    ]
    objects = []
    for source in SOURCES:
        objects.append(Path(source).stem + ".o")
        lines.append(f"build {objects[-1]}: compile {at(source)}")
    for isa, isa_flags in isas.items():
        objects.append(f"leaves_{isa}.o")
        lines.append(f"build {objects[-1]}: compile {at(LEAVES)}\n  isa = -DFASTWRS_ISA={isa} {isa_flags}")
    if nvcc or emulated:
        rule = "compile"
        if nvcc:
            arches = gencodes(cuda_arches())
            rule = "nvcc"
            lines += [
                "rule nvcc",
                f"  command = {in_command(nvcc)} -ccbin {compiler} -MMD -MF $out.d {NVCC_FLAGS} {arches} $isa -c $in "
                "-o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
        triples = os.environ.get("FASTWRS_TRIPLES", " ".join(map(str, range(TRIPLES)))).split()
        found = "".join(f"X({triple})" for triple in triples)
        for source in (*CUDA_SOURCES, *(["tests/emulation/emulation.cpp"] if emulated else [])):
            objects.append(f"cuda_{Path(source).stem}.o")
            lines.append(f"build {objects[-1]}: compile {at(source)}\n  isa = '-DFASTWRS_TRIPLES(X)={found}'")
        for triple in triples:
            objects.append(f"kernels_{triple}.o")
            lines.append(f"build {objects[-1]}: {rule} {at(KERNELS)}\n  isa = -DFASTWRS_TRIPLE_INDEX={triple}")
        if nvcc:
            objects.append("launch.o")
            known = "".join(f"v{int(a):02}{b}{int(bool(ptx))}" for a, b, ptx in listed_arches(cuda_arches()))
            lines.append(f"build {objects[-1]}: nvcc {at(LAUNCH)}\n  isa = -DFASTWRS_CUDA_ARCHES={known}")
    lines.append(f"build {in_ninja(output.resolve())}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


def in_command(path: Path | str) -> str:
    """A path as ninja hands it to the shell."""
    return shlex.quote(str(path)).replace("$", "$$")


def in_ninja(path: Path) -> str:
    """A path as a line of ninja's names a file."""
    return re.sub("([$ :])", r"$\1", str(path))


def cuda_compiler() -> str | None:
    """The CUDA compiler, if the CUDA kernels are to be built."""
    wanted = switch("FASTWRS_CUDA")
    nvcc = None if wanted == "0" else find_nvcc()
    if wanted == "1" and nvcc is None:
        raise SystemExit("fastwrs: cannot build the CUDA kernels: no nvcc found (set CUDA_HOME)")
    return nvcc


class BuildExtension(build_ext):
    """Runs ninja instead of distutils' compiler, or leaves the extension out and says why."""

    def run(self) -> None:
        wanted = switch("FASTWRS_CPU"), switch("FASTWRS_CUDA")  # one library has both
        reason = "FASTWRS_CPU=0" if wanted[0] == "0" else self.why_not()
        package = Path(__file__).resolve().parent / "fastwrs"
        if not (self.inplace or self.editable_mode):
            package = Path(self.build_lib).resolve() / "fastwrs"
            for old in package.glob("_C.*"):  # of a build before: what is left there would be shipped
                old.unlink()
        (package / NOTE).unlink(missing_ok=True)
        if reason is None:
            super().run()
        elif "1" in wanted:
            raise SystemExit(f"fastwrs: cannot build the C++ extension: {reason}")
        else:
            print(f"fastwrs: built without the C++ extension: {reason}", file=sys.stderr)
            self.extensions = []
            package.mkdir(parents=True, exist_ok=True)
            (package / NOTE).write_text(reason, encoding="utf-8")

    def why_not(self) -> str | None:
        if find_compiler() is None:
            return "no C++ compiler found (set CXX)"
        if find_torch() is None:
            return "torch is not installed in the build environment (install torch, then use --no-build-isolation)"
        if self.find_ninja() is None:
            return "ninja is not installed"
        return None

    @staticmethod
    def find_ninja() -> list[str] | None:
        if importlib.util.find_spec("ninja"):
            return [sys.executable, "-m", "ninja"]
        return ["ninja"] if shutil.which("ninja") else None

    def build_extension(self, ext: Extension) -> None:
        compiler, torch, ninja = find_compiler(), find_torch(), self.find_ninja()
        assert compiler and torch and ninja  # why_not() has checked
        # Objects of an editable installation are kept: `make` installs twice, and compiles once.
        kept = Path(__file__).resolve().parent / "build" / "editable"
        folder = kept if self.editable_mode else Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(ninja_file(compiler, torch, output), encoding="utf-8")
        subprocess.run([*ninja, "-C", str(folder)], check=True)


class Wheel(bdist_wheel):
    """One wheel for every Python from 3.10 on; without the extension another one, for every machine."""

    def finalize_options(self) -> None:
        self.py_limited_api = "cp310"
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        build = self.get_finalized_command("build_ext")
        return super().get_tag() if build.extensions else ("py3", "none", "any")


setup(
    ext_modules=[Extension("fastwrs._C", sources=[*SOURCES, LEAVES], py_limited_api=True)],
    cmdclass={"build_ext": BuildExtension, "bdist_wheel": Wheel},
)
