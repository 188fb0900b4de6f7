"""What is built and shipped: the ABI of the extension, installing without a compiler, what is in wheel and sdist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import mutants
import pytest
import torch

from fastwrs import library

ROOT = Path(__file__).resolve().parents[1]
NOT_SHIPPED = ("*.so", "*.egg-info", "__pycache__", "build", "dist", "out", ".*")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, since setuptools leaves files where it works."""
    return shutil.copytree(
        ROOT, tmp_path_factory.mktemp("build") / "fastwrs", ignore=shutil.ignore_patterns(*NOT_SHIPPED)
    )


def python(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python where no compiler can be found."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("FASTWRS_", "PYTHON"))}
    env |= {"PATH": "/nonexistent", "CXX": "/nonexistent/c++", **environment}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=300
    )


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    """A wheel built without a compiler, where there was one before."""
    old = tree / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "fastwrs/_C.abi3.so"
    old.parent.mkdir(parents=True)
    old.touch()
    pip = ("-m", "pip", "--disable-pip-version-check", "wheel", "--no-build-isolation", "--no-deps", "--no-index")
    done = python(*pip, "--wheel-dir", tree.parent, tree, cwd=tree.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = tree.parent.glob("*.whl")
    return found


def test_the_extension_uses_stable_interfaces_only() -> None:
    """One binary serves torch 2.10 and Python 3.10 and later: nothing of theirs but C functions that they promise."""
    library.load()
    file = library.extension().__file__
    assert file is not None
    assert Path(file).name == "_C.abi3.so"
    nm = shutil.which("nm")
    assert nm is not None, "nm is missing (on Debian: apt-get install binutils)"
    listed = subprocess.run([nm, "-D", "--undefined-only", file], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1].split("@")[0] for line in listed.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    of_python = {symbol for symbol in symbols if re.match("_?Py", symbol)}
    assert of_python <= {"PyModule_Create2", "PyLong_AsLongLong", "PyErr_Occurred", "_Py_NoneStruct"}
    assert [symbol for symbol in symbols if re.match(r"_Z\w*?(2at|3c10|5torch|6caffe2)\d", symbol)] == []


def test_without_a_compiler_it_installs_and_runs_on_the_reference_backend(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = """
import sys
# an editable installation would still find the extension in the repository
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import torch, fastwrs
print(fastwrs.__file__)
print(fastwrs.backends()["cpu"])
print(fastwrs.backends()["reference"])
w = torch.nn.Parameter(torch.ones(3, 4))
w.grad = torch.ones(3, 4)
fastwrs.AdamW([w], lr=0.1, rescale=fastwrs.Rescale(target=2.0)).step()
print(float((w.norm(dim=1) - 2).abs().max()))
"""
    done = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    file, cpu, reference, error = done.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert cpu == "fastwrs was installed without its C++ extension: no C++ compiler found (set CXX)"
    assert reference == "None"
    assert float(error) < 1e-6


def test_asking_for_the_extension_without_a_compiler_fails(tree: Path) -> None:
    done = python("setup.py", "-q", "build_ext", "--build-lib", tree.parent / "lib", cwd=tree, FASTWRS_CPU="1")
    assert done.returncode != 0
    assert "cannot build the C++ extension: no C++ compiler found" in done.stderr


def test_a_torch_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert library.why_not.__wrapped__() == "the C++ extension needs torch 2.10 or later, this is 2.9.1+cpu"


def test_the_oldest_torch_is_the_one_that_is_built_for() -> None:
    major, minor = library.OLDEST_TORCH
    assert int(mutants.setup_module(ROOT).TORCH_TARGET, 16) == major << 56 | minor << 48
    assert f'"torch>={major}.{minor}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_sources_that_were_not_built_say_so(tmp_path: Path) -> None:
    assert f"no C++ extension in {tmp_path}: `pip install --no-build-isolation -e .`" in library._why_not_built(
        tmp_path
    )


@pytest.mark.parametrize("name", ["FASTWRS_CPU", "FASTWRS_CUDA"])
def test_switches_are_0_or_1(tree: Path, name: str) -> None:
    done = python("setup.py", "-q", "build_ext", "--build-lib", tree.parent / "lib", cwd=tree, **{name: "off"})
    assert done.returncode != 0
    assert f"{name}='off'; allowed are 0, 1 and auto" in done.stderr


def test_a_folder_with_a_space(tmp_path: Path) -> None:
    folder = tmp_path / "My Projects $1"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy2(ROOT / "setup.py", folder)
    setup = mutants.setup_module(folder)
    compiler, torch_, ninja = setup.find_compiler(), setup.find_torch(), setup.BuildExtension.find_ninja()
    rules = setup.ninja_file(compiler, torch_, folder / "fastwrs/_C.abi3.so")
    (folder / "build.ninja").write_text(rules, encoding="utf-8")
    for arguments in (["isa.o", "geometry.o"], ["-n"]):
        done = subprocess.run([*ninja, *arguments], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "isa.o").stat().st_size > 0


def test_asking_for_cuda_without_nvcc_fails(tree: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    assert compiler is not None
    folders = ("--build-lib", tree.parent / "lib", "--build-temp", tree.parent / "temp")
    asked = {"CXX": compiler, "FASTWRS_CPU": "1", "FASTWRS_CUDA": "1", "CUDA_HOME": "/nonexistent"}
    done = python("setup.py", "-q", "build_ext", *folders, cwd=tree, **asked)
    assert done.returncode != 0
    assert "cannot build the CUDA kernels: no nvcc found (set CUDA_HOME)" in done.stderr


def test_architectures_are_those_of_torchs_list() -> None:
    setup = mutants.setup_module(ROOT)
    assert setup.gencodes("8.0; 9.0+PTX").split(" -gencode ") == [
        "-gencode arch=compute_80,code=sm_80",
        "arch=compute_90,code=sm_90",
        "arch=compute_90,code=compute_90",
    ]
    assert [arch[:2] for arch in setup.listed_arches(setup.DEFAULT_ARCHES)][::5] == [("7", "5"), ("12", "0")]
    for wrong in ("Hopper", "90", "8.0,9.0"):
        with pytest.raises(SystemExit, match=f"TORCH_CUDA_ARCH_LIST has {wrong!r}; allowed are numbers like"):
            setup.gencodes(wrong)
    with pytest.raises(SystemExit, match=re.escape("has '7.0'; the kernels need 7.5 or later")):
        setup.gencodes("7.0;8.0")


def test_the_wheel(wheel: Path) -> None:
    assert "-py3-none-any" in wheel.name  # with the extension another, which `make wheels` looks at
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = {f"fastwrs/{path.relative_to(ROOT / 'fastwrs')}" for path in (ROOT / "fastwrs").rglob("*.py")}
    assert modules <= set(names)
    assert "fastwrs/py.typed" in names and not [name for name in names if name.endswith(".so")]
    assert [name for name in names if name.endswith("licenses/LICENSE")]
    others = [name for name in names if not name.startswith("fastwrs/")]
    assert all(name.split("/")[0].endswith(".dist-info") for name in others), others


def test_the_sdist(tree: Path) -> None:
    done = python("setup.py", "-q", "sdist", "--dist-dir", tree.parent / "sdist", cwd=tree)
    assert done.returncode == 0, done.stderr
    (file,) = (tree.parent / "sdist").glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert wanted | {"setup.py", "pyproject.toml", "LICENSE", "README.md", "fastwrs/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests", "bench"))]
