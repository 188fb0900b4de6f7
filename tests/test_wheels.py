"""What of a release can be seen without building one: versions that agree, what is shipped; and that its tools work.

`make wheels` builds and tries the wheels; what is in one that was built without a compiler is in test_build.py.
"""

from __future__ import annotations

import fnmatch
import platform
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import mutants
import pytest
import wheel_check
import wheels

import fastwrs
from fastwrs import library

ROOT = Path(__file__).resolve().parents[1]
SYSTEM = f"linux_{platform.machine()}"
NAME = f"fastwrs-9.9-cp310-abi3-{SYSTEM}.whl"
METADATA = (
    "Metadata-Version: 2.4\nName: fastwrs\nVersion: 9.9\nLicense-Expression: Apache-2.0\n"
    "Requires-Dist: torch>=2.10\nRequires-Dist: triton>=3.6; extra == 'triton'\n"
)
WHEEL = f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp310-abi3-{SYSTEM}\n"
FILES = {
    "fastwrs/__init__.py": "",
    "fastwrs/optim/adam.py": "",
    "fastwrs/py.typed": "",
    "fastwrs/_C.abi3.so": "\0csrc/bindings.cpp\0",
    "fastwrs-9.9.dist-info/METADATA": METADATA,
    "fastwrs-9.9.dist-info/WHEEL": WHEEL,
    "fastwrs-9.9.dist-info/licenses/LICENSE": "Apache License\n",
    "fastwrs-9.9.dist-info/RECORD": "",
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def wheel_of(folder: Path, files: dict[str, str | None], name: str = NAME) -> Path:
    """A file like a wheel, with these changes; None leaves one out."""
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file, text in {**FILES, **files}.items():
            if text is not None:
                archive.writestr(file, text)
    return folder / name


def test_the_oldest_versions_are_the_same_everywhere():
    setup, project = mutants.setup_module(ROOT), read("pyproject.toml")
    ((major, minor),) = re.findall(r'^dependencies = \["torch>=(\d+)\.(\d+)"\]$', project, re.M)
    assert int(setup.TORCH_TARGET, 16) == int(major) << 56 | int(minor) << 48
    assert f"every torch from {major}.{minor} on" in read("README.md")
    ((major, minor),) = re.findall(r'^requires-python = ">=(\d+)\.(\d+)"$', project, re.M)
    assert wheels.PYTHONS[0] == f"{major}.{minor}"
    assert f"every Python from {major}.{minor}" in read("README.md")
    assert f"(3, {minor})" in read("Makefile")
    assert f"#define Py_LIMITED_API 0x03{int(minor):02X}0000" in read("csrc/bindings.cpp")
    assert f'py_limited_api = "cp{major}{minor}"' in read("setup.py")
    assert f'target-version = "py{major}{minor}"' in project
    assert f'pythonVersion = "{major}.{minor}"' in project


def test_what_is_shipped_is_named():
    """Files of the package that are not Python are package data, and the sdist has what setup.py compiles."""
    (data,) = re.findall(r"^fastwrs = \[(.*)\]$", read("pyproject.toml"), re.M)
    patterns = re.findall(r'"([^"]+)"', data)
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "fastwrs"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    others = [name.partition("/")[2] for name in listed if not name.endswith(".py")]
    assert "py.typed" in others
    assert [name for name in others if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)] == []
    assert [name for name in listed if not (ROOT / name).with_name("__init__.py").is_file()] == []
    setup = mutants.setup_module(ROOT)
    compiled = (*setup.SOURCES, setup.LEAVES, *setup.CUDA_SOURCES, setup.KERNELS, setup.LAUNCH)
    assert all(name.startswith("csrc/") and (ROOT / name).is_file() for name in compiled)
    manifest = [line.split() for line in read("MANIFEST.in").splitlines()]
    assert ["graft", "csrc"] in manifest
    assert all((ROOT / name).exists() for _, *names in manifest for name in names)


def test_a_wheel_as_it_should_be(tmp_path: Path):
    assert wheel_check.content_faults(wheel_of(tmp_path, {})) == []
    tags = WHEEL.replace("linux_", "manylinux_2_28_")
    name = f"fastwrs-9.9-{wheels.CUDA_BUILD}-cp310-abi3-manylinux_2_28_{platform.machine()}.whl"
    assert wheel_check.content_faults(wheel_of(tmp_path, {"fastwrs-9.9.dist-info/WHEEL": tags}, name)) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"fastwrs/py.typed": None}, "it lacks fastwrs/py.typed"),
        ({"fastwrs/_C.abi3.so": None}, "it lacks fastwrs/_C.abi3.so"),
        ({"fastwrs-9.9.dist-info/licenses/LICENSE": None}, "it lacks fastwrs-9.9.dist-info/licenses/LICENSE"),
        ({"fastwrs-9.9.dist-info/licenses/LICENSE": "MIT"}, "its licence is not Apache-2.0"),
        ({"tests/cases.py": ""}, "it has tests/cases.py"),
        ({"bench/lists.py": ""}, "it has bench/lists.py"),
        ({"fastwrs/bindings.cpp": ""}, "it has fastwrs/bindings.cpp"),
        ({"fastwrs/_C.abi3.so": "\0/at/home/csrc/bindings.cpp\0"}, "the extension names /at/home/csrc/bindings.cpp"),
        ({"fastwrs-9.9.dist-info/METADATA": METADATA.replace("9.9", "9.8")}, "its metadata has version 9.8"),
        ({"fastwrs-9.9.dist-info/METADATA": f"{METADATA}Requires-Dist: numpy\n"}, "not torch alone"),
        ({"fastwrs-9.9.dist-info/WHEEL": WHEEL.replace("abi3", "cp310")}, "its WHEEL has other tags than its name"),
        ({"fastwrs-9.9.dist-info/WHEEL": WHEEL.replace("false", "true")}, "or calls it pure"),
    ],
)
def test_what_is_wrong_with_a_wheel_is_found(files: dict[str, str | None], message: str, tmp_path: Path):
    (fault,) = wheel_check.content_faults(wheel_of(tmp_path, files))
    assert message in fault


@pytest.mark.parametrize(
    ("tags", "message"),
    [(f"cp311-cp311-{SYSTEM}", "it is for cp311-cp311"), ("cp310-abi3-any", "it is for any")],
)
def test_a_wheel_for_something_else_is_found(tags: str, message: str, tmp_path: Path):
    wheel = wheel_of(tmp_path, {"fastwrs-9.9.dist-info/WHEEL": WHEEL + f"Tag: {tags}\n"}, f"fastwrs-9.9-{tags}.whl")
    assert any(message in fault for fault in wheel_check.content_faults(wheel))


@pytest.mark.parametrize("check", wheel_check.WORKS)
def test_what_a_wheel_has_to_do(check):
    check()


def test_what_a_wheel_does_wrong_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fastwrs, "rescale_", lambda *_, **__: None)
    with pytest.raises(AssertionError, match="not close"):
        wheel_check.check_projection()


def test_a_missing_python_is_a_failure_that_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    library.load()
    extension = sys.modules["fastwrs._C"].__file__
    assert extension is not None
    wheel = wheel_of(tmp_path, {"fastwrs/_C.abi3.so": None})
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.write(extension, "fastwrs/_C.abi3.so")
    log = tmp_path / "log"
    asked = ("--built", "--dist", str(tmp_path), "--pythons", "3.99", "--log", str(log))
    assert wheels.main(asked) == 1
    assert re.search(r"^3\.99 .*FAILED: no Python 3\.99 on the PATH or in pyenv", log.read_text(), re.M)
    assert re.search(rf"^{re.escape(NAME)}, [\d.]+ MB, needs .*GLIBC_2\.\d+", log.read_text(), re.M)
    assert log.read_text().strip() in capsys.readouterr().out


def test_every_wheel_is_tried_and_a_failure_is_a_row(monkeypatch: pytest.MonkeyPatch):
    did = []

    def call(what: str, *command: str | Path, cwd: Path, **_: str) -> str:
        did.append((what, cwd.is_relative_to(ROOT)))
        if what == "check" and command[-1] == "cuda":
            raise wheels.FailedError(what)
        return "2.13.0\n"

    monkeypatch.setattr(wheels, "call", call)
    monkeypatch.setattr(wheels, "TRIALS", wheels.TRIALS[:1])
    monkeypatch.setattr(wheels, "find_python", lambda wanted: ("python", f"{wanted}.1"))
    rows: list[wheels.Row] = []
    files = [Path(NAME), Path(NAME.replace("-cp310", f"-{wheels.CUDA_BUILD}-cp310"))]
    wheels.try_in_one("3.12", "2.13.0", files, rows.append)
    assert [(row.python, row.wheel, row.verdict) for row in rows] == [
        ("3.12.1", "cpu", "ok"),
        ("3.12.1", "cuda", "FAILED: check"),
    ]
    assert did.count(("installing the wheel", False)) == did.count(("removing the wheel", False)) == len(files)
    assert not any(inside for _, inside in did)
