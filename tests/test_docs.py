"""The documentation: it builds without a warning, its examples run as written, its tables say what the code says.

Every ```python block of README.md and docs/ is run, page by page, in order and in one namespace, which begins with
``prelude``; that of docs/getting_started.md begins empty, as a newcomer's. Every ``>>>`` of a public docstring is run
with a prelude of its own.
"""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from calls import one_thread
from tolerances import NORM_BOUND
from torch import Tensor, nn

import fastwrs
from fastwrs import dispatch, optim
from fastwrs.spec import COMMON, DTYPE_TRIPLES, RULES, Rule

pytestmark = pytest.mark.docs
ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README, START = ROOT / "README.md", DOCS / "getting_started.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
OPTIMIZERS = [getattr(optim, name) for name in optim.__all__]


class Fence(NamedTuple):
    """A fenced block, with the line that it begins in."""

    tag: str
    line: int
    code: str


def fences(page: Path) -> list[Fence]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", text, re.M)
    return [Fence(match[2], text.count("\n", 0, match.start(3)), textwrap.dedent(match[3])) for match in found]


def code_of(page: Path) -> list[Fence]:
    return [fence for fence in fences(page) if fence.tag == "python"]


def run(page: Path, names: dict[str, Any]) -> int:
    """Runs a page; returns how many blocks it has. A traceback has the lines of the page."""
    blocks = code_of(page)
    for block in blocks:
        exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
    return len(blocks)


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn1(self.conv1(x)).relu()


class Net(nn.Module):
    """A network with the names of torchvision's ResNets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.layer1, self.fc = nn.Sequential(Block()), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(self.bn1(self.conv1(x)).relu()).mean((2, 3)))


def prelude() -> dict[str, Any]:
    """What an example may take as given."""
    torch.manual_seed(0)
    model = Net()
    loader = [(torch.randn(8, 3, 6, 6), torch.randint(10, (8,))) for _ in range(12)]
    return {
        "torch": torch,
        "nn": nn,
        "fastwrs": fastwrs,
        "model": model,
        "loader": loader,
        "x": loader[0][0],
        "y": loader[0][1],
        "loss_fn": nn.functional.cross_entropy,
        "optimizer": fastwrs.SGD(fastwrs.param_groups(model), lr=0.1, momentum=0.9),
    }


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield


# ------------------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("page", [p for p in PAGES if p != START and code_of(p)], ids=lambda page: page.stem)
def test_a_page_runs(page: Path) -> None:
    assert run(page, prelude()) > 0


def test_the_quick_start_holds_its_norms() -> None:
    names = prelude()
    assert run(README, names) == 1
    norms = fastwrs.channel_norms([names["model"].conv1.weight, names["model"].fc.weight])
    assert max(float((n - 1).abs().max()) for n in norms) <= NORM_BOUND[torch.float32]


def test_the_newcomers_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """First training, checkpoint, norms: with nothing but what the page says."""
    names: dict[str, Any] = {"__name__": "__main__"}
    assert run(START, names) > 5
    said = re.search(r"([\d.]+) % of the other 297 digits", capsys.readouterr().out)
    assert said is not None
    assert float(said[1]) > 70
    assert float((names["norms"] - 1).abs().max()) <= NORM_BOUND[torch.float32]
    assert (tmp_path / "checkpoint.pt").stat().st_size > 0
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    assert [step for step, _ in names["monitor"].curve("norm_after")["0.weight"]] == list(range(10, 121, 10))


def test_the_newcomers_installation() -> None:
    """The page's commands are those of `make demo`, without pins; the last one is run where the page says."""
    (commands,) = [fence.code.splitlines() for fence in fences(START) if fence.tag == "bash"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").partition("# Stamps")[2]
    ours = [re.sub(r"\$\(PINS\) ", "", line) for line in re.findall(r"^\t\$\(PIP\) (install .*)$", makefile, re.M)]
    assert commands[:-1] == [f"pip {line}" for line in ours[:2]]
    *_, readme = [fence.code for fence in fences(README) if fence.tag == "bash"]
    assert commands[0] in readme.splitlines()
    python, dash, package, command = commands[-1].split()
    assert (python, dash, package) == ("python", "-m", "fastwrs")
    said = subprocess.run(
        [sys.executable, "-m", package, command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "cpu       can run" in said.stdout


def test_what_is_installed_from_the_sources_is_built_against_the_torch_that_is_there() -> None:
    """An isolated build finds no torch, and leaves a package without the extension."""
    texts = [page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "CONTRIBUTING.md"]]
    commands = [command for text in texts for command in re.findall(r"pip install ([^`]*?)(?:`|$)", text, re.M)]
    ours = [command for command in commands if re.search(r"(^|\s)'?\.(\[|'|\s|$)", command)]
    assert len(ours) > 3 and all("--no-build-isolation" in command for command in ours), ours


def test_links_into_the_readme_name_a_heading() -> None:
    """Sphinx does not look: the README is no page of its own."""
    headings = re.findall(r"^#+ (.*)$", README.read_text(encoding="utf-8"), re.M)
    known = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = [link for page in PAGES for link in re.findall(r"README\.md#([\w-]+)", page.read_text(encoding="utf-8"))]
    assert links and set(links) <= known, set(links) - known


def test_no_code_hides_behind_another_tag() -> None:
    """What looks like Python is tagged as such, hence run."""
    tags = {"python", "bash", "math", "", "{toctree}", "{eval-rst}"}
    for page in PAGES:
        assert {fence.tag for fence in fences(page)} <= tags, page
        assert not [f for f in fences(page) if f.tag == "" and re.search(r"fastwrs\.|import |\(\)", f.code)], page


def documented() -> dict[str, Any]:
    """All public functions and classes, by their names."""
    found = {f"fastwrs.{name}": getattr(fastwrs, name) for name in fastwrs.__all__}
    for module in (fastwrs.nn, fastwrs.analysis):
        public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        found |= {f"{module.__name__}.{name}": value for name, value in public.items()}
    names = ("fastwrs", "fastwrs.nn", "fastwrs.analysis")
    return {
        name: value
        for name, value in found.items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and (name.rpartition(".")[0] in names[:1] or value.__module__ in names[1:])
    }


@pytest.mark.parametrize("name", [name for name in documented() if name != "fastwrs.analysis.GeneralizedGaussian"])
def test_the_example_of_a_docstring_runs(name: str) -> None:
    text = inspect.getdoc(documented()[name]) or ""
    example = doctest.DocTestParser().get_doctest(text, prelude(), name, None, None)
    assert example.examples
    said: list[str] = []
    found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False).run(example, out=said.append)
    assert found.failed == 0, "".join(said)


def test_literal_blocks_of_docstrings_are_formulas() -> None:
    """Code stands in examples, which are run."""
    for name, value in documented().items():
        literal = re.findall(r"::\n\n((?: {4}.*\n|\n)+)", inspect.getdoc(value) or "")
        assert not [block for block in literal if "fastwrs." in block or "optimizer" in block], name


# -------------------------------------------------------------------------------------------------- tables and the code


def table(page: Path, first: str) -> dict[str, list[str]]:
    """The rows of all tables whose first column has this name, by that column, without backticks."""
    blocks = re.findall(rf"^\| {first} \|.*\n\| ---.*\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"), re.M)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for block in blocks for row in block.splitlines()]
    return {row[0].strip("`"): row[1:] for row in rows}


def page_of(kind: type) -> Path:
    return DOCS / "optimizers" / f"{kind.__name__.lower()}.md"


def rules_of(kind: Any) -> list[Rule]:
    return [kind.rule, *filter(None, [getattr(kind, "shifted_rule", None)])]


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_an_optimizers_options_and_states(kind: Any) -> None:
    """The page has the signature's options with their defaults, the bounds of the spec, and the state slots."""
    own, shared = table(page_of(kind), "option"), table(DOCS / "optimizers" / "common.md", "option")
    defaults = {p.name: p.default for p in inspect.signature(kind).parameters.values() if p.name != "params"}
    assert not own.keys() & shared.keys()
    assert own.keys() | shared.keys() == defaults.keys()
    for name, (default, *_) in (own | shared).items():
        assert (ast.literal_eval(default) if default else inspect.Parameter.empty) == defaults[name], name

    hypers = {hyper.name: hyper for rule in rules_of(kind) for hyper in (*COMMON, *rule.hypers)}
    parts = {"betas": ("beta1", "beta2"), "shifted_l2": ("shifted_l2_lam", "shifted_l2_eps")}
    for name, (_, allowed, _) in own.items():
        if name in parts:
            assert {f"both {hypers[part].allowed}" for part in parts[name]} == {allowed}, name
        else:
            assert allowed == (hypers[name].allowed if name in hypers and not hypers[name].flag else ""), name

    states = table(page_of(kind), "key") or table(page_of(kind.__base__), "key")
    assert list(states) == ["step", *(slot.name for slot in kind.rule.slots)]


def test_every_rule_has_a_page() -> None:
    """An optimizer has a page of its name that names its rules; a rule that updates nothing belongs to none."""
    named = set()
    for kind in OPTIMIZERS:
        text = page_of(kind).read_text(encoding="utf-8")
        assert all(f"`{rule.name}`" in text for rule in rules_of(kind)), kind
        named |= {rule.name for rule in rules_of(kind)}
    assert named == {name for name, rule in RULES.items() if rule.updates}


def test_the_tables_of_numerics_and_backends() -> None:
    page = DOCS / "numerics.md"
    rows = re.findall(r"^\| (\w+) \| (\w+) \| (\w+) \|$", page.read_text(encoding="utf-8"), re.M)
    assert rows[1:] == list(DTYPE_TRIPLES)
    bounds = {name.partition(",")[0]: float(cells[0]) for name, cells in table(page, "dtype of the weights").items()}
    assert bounds == {str(k).removeprefix("torch."): v for k, v in NORM_BOUND.items() if k != torch.float64}
    assert tuple(table(DOCS / "backends.md", "backend")) == dispatch.BACKENDS


def test_every_public_name_is_in_the_reference() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\.\. (?:auto\w+|data):: (\S+)$", text, re.M))
    for module, members in re.findall(r"^\.\. automodule:: (\S+)\n +:members: (.*)$", text, re.M):
        named |= {f"{module}.{member}" for member in members.split(", ")}
    assert documented().keys() | {f"fastwrs.{name}" for name in fastwrs.__all__} <= named


# ------------------------------------------------------------------------------------------------------------ the build


def build(docs: Path, out: Path) -> subprocess.CompletedProcess[str]:
    """What `make docs` runs, on these sources."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^docs:.*\n\t\$\(VENV\)/bin/(.+) docs build/docs$", makefile, re.M)
    assert recipe is not None
    program, *options = recipe[1].split()
    command = [Path(sys.executable).parent / program, *options, docs, out]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_make_docs(tmp_path: Path) -> None:
    done = build(DOCS, tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    for page in DOCS.rglob("*.md"):
        assert (tmp_path / "out" / page.relative_to(DOCS).with_suffix(".html")).is_file()
    reference = (tmp_path / "out" / "api.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in reference for name in documented())


def test_planted_faults_fail_the_build(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(DOCS / "conf.py", docs)
    faults = {
        "[a page](no_such_page.md)": "no_such_page.md",
        "[a file of the tree](../fastwrs/no_such_file.py)": "no_such_file.py",
        "[a heading](other.md#no-such-heading)": "no-such-heading",
        "```{eval-rst}\n:func:`fastwrs.no_such_function`\n```": "fastwrs.no_such_function",
        "```{eval-rst}\n.. autofunction:: fastwrs.no_such_object\n```": "no_such_object",
    }
    (docs / "index.md").write_text("# Faults\n\n" + "\n\n".join(faults) + "\n")
    (docs / "other.md").write_text("# In no table of contents\n")
    build(docs, tmp_path / "out")
    done = build(docs, tmp_path / "out")  # what the first one has left makes no warning silent
    assert done.returncode != 0
    for sign in (*faults.values(), "other.md: WARNING: document isn't included in any toctree"):
        assert sign in done.stderr
