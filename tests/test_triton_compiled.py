"""What Triton makes of its kernels, for an NVIDIA and an AMD GPU: nothing spills, aligned memory is moved 16 bytes at a
time, nothing computes in fp64 that need not. Each check is seen to fail on kernels that are broken on purpose.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import triton_code
from mutants import ROOT, Mutant
from triton_code import Compiler, Kernel, Row

pytestmark = pytest.mark.triton_compiled
TARGETS = ("sm_90", "gfx942")
ON_THE_PAGE = ROOT / "docs/triton.md"

ADDRESS = """        at = tl.multiple_of(at, 16)
        array_start = at.to(tl.pointer_type(KIND))
        return tl.multiple_of(array_start, 16) + start"""
ADDRESS_WITHOUT = "        return at.to(tl.pointer_type(KIND)) + start"
COUNT_WITHOUT = "    mask = within < count\n    p, before"
COUNT = f"    if ALIGNED:\n        count = count // VECTOR * VECTOR\n{COUNT_WITHOUT}"


def _mutant(name: str, old: str, new: str, file: str = "kernels") -> Mutant:
    return Mutant(name, f"fastwrs/triton_kernels/{file}.py", old, new)


# Faults, the kernel that each is compiled in, and a pattern of what has to be said of it.
FLOATS = ("float32", "float32", "float32")
PLAIN = Kernel("step", "sgd", 0, FLOATS, False, False)
HELD = Kernel("step", "adam", 2, FLOATS, False, False)
BEFORE_GATE = Kernel("gate", "sgdp", 1, FLOATS, False, False)
BEFORE_SHIFT = Kernel("shift", "sgd_shifted", 0, FLOATS, False, False)
BROKEN = (
    (_mutant("no hint at addresses", ADDRESS, ADDRESS_WITHOUT, "access"), PLAIN, r": 0\+0 .*vectors"),
    (
        _mutant("no hint at offsets", "start // VECTOR * VECTOR + within", "start + within", "access"),
        PLAIN,
        r": 0\+0 .*vectors",
    ),
    (
        _mutant(
            "no hint at counts before a gate",
            "    if ALIGNED:\n        count =",
            "    if WALK:\n        count =",
            "gate",
        ),
        BEFORE_GATE,
        r": 0\+0 .*vectors",
    ),
    (
        _mutant(
            "no hint at counts before a shift",
            "    if ALIGNED:\n        count =",
            "    if WALK:\n        count =",
            "shift",
        ),
        BEFORE_SHIFT,
        r": 0\+0 .*vectors",
    ),
    (_mutant("no hint at counts", COUNT, COUNT_WITHOUT), PLAIN, r": (4\+4|2\+2) .*vectors"),
    (_mutant("no hint at units", "unit = unit // VECTOR * VECTOR", "pass"), PLAIN, r": (4\+4|2\+2) .*vectors"),
    (
        _mutant("no such name", "new = after.to(TYPES[0])\n    stored", "new = afterwards\n    stored"),
        PLAIN,
        "does not compile: .*afterwards",
    ),
    (
        Mutant(
            "a product in fp64",
            "fastwrs/triton_kernels/rules.py",
            "return w - lr * u, u",
            "return (w.to(tl.float64) - lr.to(tl.float64) * u).to(tl.float32), u",
        ),
        PLAIN,
        r"computes in fp64: .*(DADD|v_add_f64)",
    ),
    (
        Mutant(
            "too large tiles",
            "fastwrs/triton_kernels/launch.py",
            "else Blocks(2048, 8, 64, 32)",
            "else Blocks(4096, 8, 128, 32)",
        ),
        HELD,
        r": \d+ spills, \d+ bytes of stack",
    ),
)


# On AMD's GPUs those whose traces look different there: memory, and arithmetic.
ON_AMD = ("no hint at addresses", "no hint at counts before a gate", "a product in fp64")
PLANTED = [
    (mutant, kernel, said, target)
    for mutant, kernel, said in BROKEN
    for target in TARGETS
    if target == "sm_90" or mutant.name in ON_AMD
]


GATED = {("adamp", 2): 7, ("sgdp", 1): 7}
LOOKING = GATED | {("sgd_shifted", 0): 7, ("sgd_shifted", 1): 7}


class Builds:
    """What is compiled once for all tests."""

    def __init__(self, compiler: Compiler, folder: Path) -> None:
        self.broken: dict[tuple[str, str], Future[Row]] = {}
        sources = {mutant: self.planted(mutant, folder / mutant.name.replace(" ", "_")) for mutant, *_ in BROKEN}
        for mutant, kernel, _, target in PLANTED:
            (self.broken[mutant.name, target],) = compiler.submit([kernel], target, sources[mutant])
        self.sound = {target: compiler.submit(triton_code.usual_kernels(target), target) for target in TARGETS}

    @staticmethod
    def planted(mutant: Mutant, folder: Path) -> Path:
        """A copy of the kernels with a fault."""
        shutil.copytree(ROOT / "fastwrs/triton_kernels", folder / "fastwrs/triton_kernels")
        path = folder / mutant.file
        text = path.read_text(encoding="utf-8")
        count = text.count(mutant.old)
        assert count == 1, f"the list of faults is out of date: {mutant.old!r} is {count} times in {mutant.file}"
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        return folder

    def rows(self, target: str) -> list[Row]:
        return [future.result() for future in self.sound[target]]


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builds]:
    with triton_code.compiler() as compiler:
        yield Builds(compiler, tmp_path_factory.mktemp("broken"))


everywhere = pytest.mark.parametrize("target", TARGETS)


@everywhere
def test_every_kernel_is_there(builds: Builds, target: str) -> None:
    """So that the other tests do not pass because they saw nothing."""
    rows = builds.rows(target)
    kernels = triton_code.usual_kernels(target)
    assert [row.kernel for row in rows] == kernels
    assert [f"{row}: {row.error}" for row in rows if row.error] == []
    assert all(row.registers for row in rows)
    # of each rule with each number of states: three triples of dtypes, norms measured or not, strided or not, not both
    # but in fp32; for AMD fp32 alone
    all_types = target.startswith("sm_")
    steps = [(kernel.rule, kernel.slots) for kernel in kernels if kernel.kind == "step"]
    counts = {step: steps.count(step) for step in steps}
    # of those that look first two triples, each with a kernel before the gate, strided or not, or one before the shift
    plain = dict.fromkeys([("sgd", 0), ("sgd", 1), ("adam", 2), ("adam", 3), ("project", 0)], 10)
    assert counts == {step: count if all_types else 4 for step, count in (plain | LOOKING).items()}
    gates = [(kernel.rule, kernel.slots) for kernel in kernels if kernel.kind == "gate"]
    assert {gate: gates.count(gate) for gate in gates} == dict.fromkeys(GATED, 4 if all_types else 2)
    assert sum(kernel.kind == "shift" for kernel in kernels) == (4 if all_types else 2)


@everywhere
def test_no_spills(builds: Builds, target: str) -> None:
    assert [fault for row in builds.rows(target) for fault in triton_code.spills(row)] == []


@pytest.mark.parametrize(("vector", "stack", "is_fault"), [(0, 0, False), (3, 0, True), (0, 16, True)])
def test_what_is_a_spill_on_amd(vector: int, stack: int, is_fault: bool) -> None:
    """Scalar registers that are kept in vector registers use no memory."""
    numbers = {
        "vgpr_count": 100,
        "vgpr_spill_count": vector,
        "sgpr_spill_count": 9,
        "private_segment_fixed_size": stack,
    }
    text = "".join(f"    .{name}: {number}\n" for name, number in numbers.items())
    project = Kernel("project", "sgd", 0, FLOATS, False, False)
    row = triton_code.read_amd(Row("gfx942", project), {"amdgcn": text + "global_atomic_add"})
    assert (row.registers, row.spills, row.moved, row.stack) == (100, vector, 9, stack)
    assert bool(triton_code.spills(row)) == is_fault


@everywhere
def test_memory_is_moved_in_16_bytes(builds: Builds, target: str) -> None:
    rows = builds.rows(target)
    assert [fault for row in rows for fault in triton_code.narrow_accesses(row)] == []
    # Plain fp32 has 16 bytes for every thread: what is asked for is not nothing.
    arrays = [row for row in rows if row.kernel.kind == "step" and row.kernel.dtypes == FLOATS and row.needed.loads]
    assert len(arrays) == 10 + 2 * len(LOOKING)


@everywhere
def test_steps_are_advanced_after_all_have_read_them(builds: Builds, target: str) -> None:
    assert [fault for row in builds.rows(target) for fault in triton_code.unordered(row)] == []


@pytest.mark.parametrize(
    ("lines", "is_last"),
    [
        ("st.global a; bar.sync 0; atom.global b; st.global c; bar.sync 0; ld.global d; atom.global e", True),
        ("st.global a; bar.sync 0; atom.global b; bar.sync 0; st.global c; atom.global d", False),
        ("st.global a; bar.sync 0; atom.global b; st.global c; atom.global d; bar.sync 0", False),
        ("bar.sync 0; st.global a; atom.global b; st.global c; bar.sync 0; atom.global d", False),
    ],
)
def test_what_takes_its_ticket_last(lines: str, is_last: bool) -> None:
    """No kernel can be broken in this way: Triton has a barrier of its own before an atomic whose result is used."""
    row = Row("sm_90", PLAIN)
    assert triton_code.takes_its_ticket_last(row, lines, "bar.sync", "atom.global", "st.global") == is_last


@everywhere
def test_no_fp64_but_for_fp64(builds: Builds, target: str) -> None:
    rows = builds.rows(target)
    assert [fault for row in rows for fault in triton_code.doubles(row)] == []
    # What looks for it would find it.
    assert all(row.doubles for row in rows if row.kernel.dtypes[0] == "float64")


def _columns(cells: list[tuple[str, ...]]) -> dict[str, dict[str, str]]:
    # Of each line of a table its cells, by the names of the columns.
    head, *body = cells
    return {line[0]: dict(zip(head, line, strict=True)) for line in body}


def test_the_table_in_the_docs_is_up_to_date(builds: Builds) -> None:
    """`make sass` writes it. It names every variant; another Triton makes other code. Some are not compiled here."""
    text = ON_THE_PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    written = _columns([tuple(row.split(" | ")) for row in rows if not row.startswith("---")])
    assert list(written) == list(dict.fromkeys(kernel.line for kernel in triton_code.every_kernel()))
    assert all(set(triton_code.TARGETS) < set(cells) for cells in written.values())
    if f"Triton {triton_code.version()} " in text:
        found = _columns(triton_code.table([row for target in TARGETS for row in builds.rows(target)]))
        compiled = {line: {name: cells[name] for name in TARGETS if cells[name]} for line, cells in found.items()}
        assert all("sm_90" in cells for cells in compiled.values())
        for (
            line,
            cells,
        ) in compiled.items():  # of some types the last number, what is measured of strided tensors, is not
            for name, numbers in cells.items():
                assert f"{written[line][name]} ".startswith(f"{numbers} "), (line, name)


@pytest.mark.parametrize(
    ("mutant", "kernel", "said", "target"),
    PLANTED,
    ids=[f"{mutant.name.replace(' ', '_')}-{target}" for mutant, _, _, target in PLANTED],
)
def test_a_broken_kernel_is_caught(builds: Builds, mutant: Mutant, kernel: Kernel, said: str, target: str) -> None:
    (sound,) = (row for row in builds.rows(target) if row.kernel == kernel)
    faults = triton_code.faults(builds.broken[mutant.name, target].result())
    assert any(re.search(said, fault) for fault in faults), faults
    assert triton_code.faults(sound) == []
