"""The house: what the README promises exists, things that must be said once are said once, nothing private slips in."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import setuptools

import fastwrs

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = "fastwrs|csrc|tests|docs|bench|examples|requirements"
NOT_THERE = re.compile(r"lion|bench/results/gpu\.jsonl$")  # the rule of the recipe; a record that is still to come
TEXT = {".py", ".md", ".toml", ".txt", ".h", ".cpp", ".cu", ".cuh", ".jsonl", ""}


def files() -> list[Path]:
    """What is or would be tracked."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return [path for name in listed.splitlines() if (path := ROOT / name).is_file() and path.suffix in TEXT]


def pages() -> list[Path]:
    """What a reader may be at."""
    return [path for path in files() if path.suffix == ".md"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_documented_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.M))
    phony = set(re.findall(r"[a-z-]+", read("Makefile").split(".PHONY:")[1].splitlines()[0]))
    documents = "\n".join(page.read_text(encoding="utf-8") for page in pages())
    commands = set(re.findall(r"(?:`|^|; )make ([a-z-]+)", documents, re.M))
    assert {"demo", "test", "bench", "lint", "format"} <= commands
    assert commands <= targets
    assert phony == targets
    assert "make test" in read(".ci/run")


def test_documented_files_exist():
    """Links are relative to the page. That headings exist which they name is for the lane `docs`."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        links = [page.parent / link for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", text)]
        named = [ROOT / path for path in re.findall(rf"`((?:{FOLDERS})/[\w./]+)`", text)]
        missing = [path for path in [*links, *named] if not (path.exists() or NOT_THERE.search(str(path)))]
        assert not missing, f"{page.name} names {missing}"


def test_documented_extras_exist():
    extras = set(re.findall(r"^(\w+) = \[", read("pyproject.toml").split("[project.optional-dependencies]")[1], re.M))
    named = {name for page in pages() for name in re.findall(r"'(?:\.|fastwrs)\[(\w+)\]'", page.read_text("utf-8"))}
    assert {"examples", "triton", "analysis"} <= named <= extras


def test_every_proof_of_the_contract_exists():
    """Each row of docs/contract.md names a test that is there; what is named as a proof of F1 is called f1."""
    text = read("docs/contract.md")
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in read(f"tests/{file}")]
    assert missing == []
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    unproven = [row for row in rows if not row.rstrip(" |").endswith("proof") and "`test_" not in row]
    assert unproven == []
    assert len(named) > 60
    found = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"def (test_f\d+_\w+)\(", read(f"tests/{path.name}"))
    }
    assert found <= {name for _, name in named}


def test_the_contract_names_the_versions_that_are_pinned():
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", read("requirements/ci.txt"), re.M))
    names = {"Hugging Face Trainer": "transformers", "Lightning": "lightning", "Lightning Fabric": "lightning"}
    names |= {"Accelerate": "accelerate"}
    rows = re.findall(r"^\| ([\w .]+) \| (torch )?(\d+\.\d+\.\d+) \|", read("docs/contract.md"), re.M)
    assert len(rows) == 9
    for name, torch, version in rows:
        assert version == pinned["torch" if torch else names[name]], name


def test_the_version_stands_once():
    assert f'"{fastwrs.__version__}"' in read("fastwrs/_version.py")
    assert f"## {fastwrs.__version__}" in read("CHANGELOG.md")
    sources = [path for path in files() if path.suffix in {".py", ".toml", ".cpp", ".h"}]
    assert [path.name for path in sources if fastwrs.__version__ in path.read_text("utf-8")] == ["_version.py"]


def test_the_licence():
    assert "Apache License" in read("LICENSE").splitlines()[0]
    assert "END OF TERMS AND CONDITIONS" in read("LICENSE")
    assert 'license = "Apache-2.0"' in read("pyproject.toml")


def test_nothing_of_a_single_machine():
    folders = "|".join(["work", "farm", "root", "home", "tmp/"])
    hosts = "|".join(["pypi" r"\.org", "python" r"hosted", "download\\.pytorch"])
    private = re.compile(rf"(?<![\w.*])/(?:{folders})(?![\w])|{hosts}")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files()
        if (match := private.search(path.read_text(encoding="utf-8")))
    ]
    assert found == []


def test_public_names_have_docstrings():
    missing = []
    for name in fastwrs.__all__:
        value = getattr(fastwrs, name)
        if not isinstance(value, str) and len(inspect.getdoc(value) or "") < 40:
            missing.append(name)
    assert not missing
    for kind in (fastwrs.SGD, fastwrs.Adam, fastwrs.Rescale, fastwrs.rescale_):  # AdamW's points to Adam's
        assert "update_bn" in (inspect.getdoc(kind) or ""), kind.__name__


def test_importing_needs_torch_only():
    code = "import sys, fastwrs; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    plain = "import sys, torch; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    ours, torch_ = (
        set(subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True).stdout.split())
        for c in (code, plain)
    )
    assert ours - torch_ - sys.stdlib_module_names - {n for n in ours if n.startswith("__editable__")} == {"fastwrs"}


def test_only_the_package_is_installed():
    include = ast.literal_eval(re.findall(r"^include = (\[\"fastwrs.*\])$", read("pyproject.toml"), re.M)[0])
    packages = setuptools.find_packages(str(ROOT), include=include)
    assert packages
    assert all(package.split(".")[0] == "fastwrs" for package in packages)
    assert (ROOT / "fastwrs" / "py.typed").is_file()


def test_files_are_short_enough_to_read():
    sources = [path for path in files() if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}]
    assert [path.name for path in sources if len(path.read_text(encoding="utf-8").splitlines()) > 600] == []


def test_every_test_asserts():
    """A test that asserts nothing passes with a broken kernel too."""
    silent = []
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}

        def asserts(node: ast.AST, seen: frozenset[str], functions: dict[str, ast.FunctionDef]) -> bool:
            for part in ast.walk(node):
                if isinstance(part, ast.Assert):
                    return True
                if isinstance(part, ast.Call):
                    name = ast.unparse(part.func).split(".")[-1]
                    if name in ("raises", "warns", "fail", "opcheck") or name.startswith(("assert_", "check")):
                        return True
                    if name in functions and name not in seen and asserts(functions[name], seen | {name}, functions):
                        return True
            return False

        silent += [
            f"{path.name}::{name}"
            for name, node in functions.items()
            if name.startswith("test_") and not asserts(node, frozenset({name}), functions)
        ]
    assert silent == []
