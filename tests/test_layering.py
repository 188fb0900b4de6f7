"""Who may import what: reads the imports and the #include lines, and shows on planted faults that it would notice."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("fastwrs", "tests", "bench", "examples")

# The only modules of ours that these may import.
ONLY = {
    "fastwrs._version": (),
    "fastwrs.spec": (),
    "fastwrs.options": (),
    "fastwrs.library": ("fastwrs._C", "fastwrs.ops"),
    "fastwrs.ops": (),
    "fastwrs.reference": ("fastwrs.spec", "fastwrs.reference"),
    "fastwrs.plan": ("fastwrs.spec", "fastwrs.options"),
    "fastwrs.backends": (
        *("fastwrs.backends", "fastwrs.spec", "fastwrs.options", "fastwrs.library", "fastwrs.plan"),
        *("fastwrs.reference", "fastwrs.ops", "fastwrs.triton_kernels.launch"),
    ),
    "fastwrs.triton_kernels": ("fastwrs.triton_kernels",),
    "fastwrs.measuring": ("fastwrs.spec", "fastwrs.options"),
    "fastwrs.monitor": (
        *("fastwrs.measuring", "fastwrs.monitor_export", "fastwrs.monitor_store", "fastwrs.optim.base"),
        *("fastwrs.spec", "fastwrs.wrapper"),
    ),
    "fastwrs.monitor_export": ("fastwrs.spec",),
    "fastwrs.monitor_store": ("fastwrs.library",),
    "fastwrs.batchnorm": (
        *("fastwrs.batchnorm_pairs", "fastwrs.measuring", "fastwrs.optim.base"),
        *("fastwrs.options", "fastwrs.spec", "fastwrs.wrapper"),
    ),
    "fastwrs.batchnorm_pairs": (),
    "fastwrs.nn": ("fastwrs.options",),
    "fastwrs.window": ("fastwrs.options", "fastwrs.wrapper"),
    "fastwrs.rescaler": (
        *("fastwrs.measuring", "fastwrs.optim.base", "fastwrs.options", "fastwrs.plan", "fastwrs.spec"),
        "fastwrs.wrapper",
    ),
    "fastwrs.wrapper": (),
    "fastwrs.analysis": ("fastwrs.options",),
}
# What a module may import beyond torch, when it is used: an extra. test_house.py sees that `import fastwrs` does not.
EXTRAS = {"fastwrs.analysis": {"scipy"}, "fastwrs.benchmark.plot": {"matplotlib"}}
THROUGH_TRITON = ("fastwrs.triton_kernels", "fastwrs.backends.triton", "fastwrs.backends.triton_available")
# Modules that only the listed ones may import.
ONLY_BY = {
    # fastwrs.__main__ imports the function backends(), which looks the same here.
    "fastwrs.backends": ("fastwrs.dispatch", "fastwrs.backends", "fastwrs.__main__"),
    "fastwrs.triton_kernels": (*THROUGH_TRITON, "tests", "bench"),
    "fastwrs.benchmark": ("fastwrs.benchmark", "fastwrs.__main__", "tests", "bench"),
    "tests": ("tests",),
    "bench": ("bench", "tests"),
    "examples": ("examples", "tests"),
}

C_ONLY = {  # folder of csrc: what its files may include of ours
    "core": ("core",),
    "rules": ("rules", "core"),
    "norms": ("norms", "core"),
    "cpu": ("cpu", "core", "rules", "norms"),
    "triton": ("triton", "core", "norms"),
}
TORCH_HEADER = re.compile(r"^(torch|ATen|c10|aten)/|^Python\.h$")
MAY_SEE_TORCH = re.compile(r"^csrc/(bindings[^/]*|.*/launch[^/]*)$")


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def imports(path: Path, module: str, is_package: bool) -> Iterator[str]:
    """The absolute names of what a file imports anywhere, import_module("...") included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = parents[: len(parents) - node.level + is_package]
                base = ".".join([*kept, base] if base else kept)
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func) and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield "fastwrs" + name.value if name.value.startswith(".") else name.value


def python_faults(root: Path) -> Iterator[str]:
    # tests and bench find their helpers by bare name (pytest's pythonpath), so a bare name means that folder.
    bare = {path.stem: folder for folder in ("tests", "bench") for path in (root / folder).glob("*.py")}
    for path in sorted(p for folder in OURS for p in (root / folder).rglob("*.py")):
        relative = path.relative_to(root)
        parts = relative.with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        for name in imports(path, module, is_package):
            top = name.split(".")[0]
            if module.startswith("fastwrs"):
                more = {"triton"} if within(module, THROUGH_TRITON) else EXTRAS.get(module, set())
                needed = {"torch"} | more
                if top not in OURS and top not in sys.stdlib_module_names | needed and top not in bare:
                    yield f"{relative} imports {name}: torch is the only dependency at run time"
                if top in bare:
                    name = f"{bare[top]}.{name}"
            for package, importers in ONLY_BY.items():
                if within(name, (package,)) and not within(module, importers):
                    yield f"{relative} imports {name}: only {', '.join(importers)} may"
            for package, allowed in ONLY.items():
                ours = name.split(".")[0] in OURS
                if within(module, (package,)) and ours and name != "fastwrs" and not within(name, allowed):
                    may = ", ".join(allowed) or "nothing of ours"
                    yield f"{relative} imports {name}: {package} may import only {may}"


def include_faults(root: Path) -> Iterator[str]:
    csrc = root / "csrc"
    for path in sorted(p for p in csrc.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh", ".inc"}):
        relative = path.relative_to(root).as_posix()
        folder = path.relative_to(csrc).parts[0]
        for line in path.read_text().splitlines():
            if not (match := re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)):
                continue
            header = match[1]
            if TORCH_HEADER.search(header) and not MAY_SEE_TORCH.match(relative):
                yield f"{relative} includes {header}: torch headers only in bindings and launch"
            found = next((p for base in (path.parent, csrc) if (p := (base / header).resolve()).is_file()), None)
            if found is None or csrc.resolve() not in found.parents or folder not in C_ONLY:
                continue
            target = found.relative_to(csrc.resolve()).parts[0]
            if target not in C_ONLY[folder]:
                yield f"{relative} includes {header}: csrc/{folder} may include only {', '.join(C_ONLY[folder])}"


@functools.cache
def faults(root: Path) -> list[str]:
    return sorted({*python_faults(root), *include_faults(root)})


def test_the_tree_keeps_the_rules():
    assert faults(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("fastwrs/spec.py", "from .options import Rescale", "spec may import only nothing of ours"),
        ("fastwrs/spec.py", "import fastwrs.plan", "spec may import only nothing of ours"),
        ("fastwrs/reference/planted.py", "from ..options import axis_mask", "reference may import only"),
        ("fastwrs/plan.py", "from . import dispatch", "plan may import only"),
        ("fastwrs/optim/planted.py", "from ..backends import cpu", "only fastwrs.dispatch"),
        (
            "fastwrs/optim/planted.py",
            "import importlib; importlib.import_module('.backends.cpu', 'fastwrs')",
            "only fast",
        ),
        ("fastwrs/backends/planted.py", "from ..optim import base", "backends may import only"),
        ("fastwrs/measuring.py", "from fastwrs import plan", "measuring may import only"),
        ("fastwrs/monitor.py", "from fastwrs import dispatch", "monitor may import only"),
        ("fastwrs/monitor_export.py", "import pandas", "torch is the only dependency"),
        ("fastwrs/monitor_store.py", "from fastwrs import plan", "monitor_store may import only fastwrs.library"),
        ("fastwrs/batchnorm.py", "from fastwrs import monitor", "batchnorm may import only"),
        ("fastwrs/batchnorm_pairs.py", "from fastwrs import groups", "batchnorm_pairs may import only"),
        ("fastwrs/nn.py", "from fastwrs.optim import base", "nn may import only"),
        ("fastwrs/window.py", "from fastwrs import plan", "window may import only"),
        ("fastwrs/analysis.py", "from fastwrs import monitor", "analysis may import only"),
        ("fastwrs/analysis.py", "def late():\n    import sklearn", "torch is the only dependency"),
        ("fastwrs/nn.py", "import scipy", "torch is the only dependency"),
        ("fastwrs/planted.py", "import triton", "torch is the only dependency"),
        ("fastwrs/planted.py", "from fastwrs.triton_kernels import rules", "only fastwrs.triton_kernels"),
        ("fastwrs/triton_kernels/rules.py", "from fastwrs.spec import RULES", "triton_kernels may import only"),
        ("csrc/triton/table.cpp", '#include "../rules/all.h"', "csrc/triton may include only"),
        ("fastwrs/planted.py", "import tests.test_layering", "only tests may"),
        ("fastwrs/planted.py", "from test_layering import faults", "only tests may"),
        ("fastwrs/planted.py", "def late():\n    import numpy", "torch is the only dependency"),
        ("csrc/core/table.h", '#include "rules/all.h"', "csrc/core may include only core"),
        ("csrc/rules/all.h", '#include "../norms/geometry.h"', "csrc/rules may include only"),
        ("csrc/norms/geometry.h", '#include "rules/all.h"', "csrc/norms may include only"),
        ("csrc/cpu/engine.h", '  # include "bindings.h"', "csrc/cpu may include only"),
        ("csrc/cpu/engine.h", "#include <torch/csrc/stable/tensor.h>", "torch headers only"),
    ],
)
def test_a_planted_fault_is_found(tmp_path, file, line, message):
    for folder in (*OURS, "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "out", "__pycache__"))
    (tmp_path / "csrc/bindings.h").touch()
    with (tmp_path / file).open("a") as out:
        out.write(f"\n{line}\n")
    found = [fault for fault in faults(tmp_path) if fault not in faults(ROOT)]
    assert len(found) == 1, found
    assert found[0].startswith(file)
    assert message in found[0]
