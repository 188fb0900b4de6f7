"""What nvcc makes of the CUDA kernels: nothing spills, memory is read and written 16 bytes at a time, nothing computes
in fp64 that need not. Each check is seen to fail on kernels that are broken on purpose.

The architectures are those of TORCH_CUDA_ARCH_LIST, which `make test` sets to the oldest, Hopper and the newest. `make
sass` makes the same checks on all of them, and leaves a hash of what it has read in docs/sass.md.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
import sass
from mutants import ROOT, Mutant
from sass import ARCHES, TRIPLES, Code

pytestmark = pytest.mark.compiled
BUILT = [f"{major}.{minor}" for major, minor, _ in sass.SETUP.listed_arches(sass.SETUP.cuda_arches())]
ALL = list(product(BUILT, range(len(TRIPLES))))

# Loads a vector of some types element by element.
LOAD = "    words[i] = load_word("
BY_ELEMENT = f"""    if constexpr (BROKEN) {{
      constexpr int kPart = int(kWordBytes / sizeof(T));
#pragma unroll
      for (int j = 0; j < kPart; ++j) {{
        const T part = load(address + i * kPart + j);
        memcpy(reinterpret_cast<char*>(words + i) + j * sizeof(T), &part, sizeof part);
      }}
      continue;
    }}
{LOAD}"""
STORE = "    store_word("
STORE_BY_ELEMENT = f"    for (int j = 0; j < N; ++j) store(address + j, x[j]);\n    continue;\n{STORE}"
# An index that is not known until it runs puts an array in local memory.
ON_THE_STACK = """T kept[16];
    for (int i = 0; i < 16; ++i) kept[i] = u * T(i);
    w -= kept[int(w) & 15];"""


def _device(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "csrc/cuda/device.cuh", old, new)


def _sgd(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "csrc/rules/sgd.h", old, new)


# Faults, the triple that each is compiled for, and a pattern of what has to be said of it.
FLOATS, MIXED = TRIPLES.index(("float",) * 3), TRIPLES.index(("bfloat16", "bfloat16", "float"))
BROKEN = (
    (_device("loads by element", LOAD, BY_ELEMENT.replace("BROKEN", "true")), FLOATS, "no loop loads 16 bytes"),
    (_device("states by element", LOAD, BY_ELEMENT.replace("BROKEN", "sizeof(T) == 4")), MIXED, "narrow loads"),
    (_device("stores by element", STORE, STORE_BY_ELEMENT), FLOATS, "words are stored"),
    (_sgd("a double constant", "w -= s.lr * u", "w -= 0.5 * u"), FLOATS, "computes in fp64: DADD, DMUL"),
    (
        _sgd("an array on the stack", "w -= s.lr * u;", ON_THE_STACK),
        FLOATS,
        r"sgd 1 f32/f32/f32 on 9.0: \d+ bytes of stack",
    ),
)


class Builds:
    """Compiles what the selected tests ask for, several at a time, and keeps what was found."""

    def __init__(self, compiler: sass.Compiler) -> None:
        self.compiler = compiler
        self.pool = ThreadPoolExecutor(sass.workers())
        self.codes: dict[tuple[str, int], Future[list[Code]]] = {}
        self.broken: dict[Mutant, Future[list[Code]]] = {}

    def submit(self, arch: str, triple: int) -> Future[list[Code]]:
        if (arch, triple) not in self.codes:
            self.codes[arch, triple] = self.pool.submit(self.compiler.read, arch, triple)
        return self.codes[arch, triple]

    def submit_broken(self, mutant: Mutant, triple: int, folder: Path) -> None:
        """Plants a fault in a copy of the sources."""
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        path = folder / mutant.file
        text = path.read_text(encoding="utf-8")
        count = text.count(mutant.old)
        assert count == 1, f"the list of faults is out of date: {mutant.old!r} is {count} times in {mutant.file}"
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        # Without the kernels for strided tensors, which take more than half of the time.
        kernels = folder / "csrc/cuda/kernels.cu"
        text = kernels.read_text(encoding="utf-8")
        kernels.write_text(text.replace("Mine::find<true>(key)", "Mine::find<false>(key)"), encoding="utf-8")
        self.broken[mutant] = self.pool.submit(sass.Compiler(folder).read, "9.0", triple)

    def everything(self) -> list[Code]:
        return [code for future in [self.submit(*asked) for asked in ALL] for code in future.result()]


@pytest.fixture(scope="module")
def builds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builds]:
    """Without nvcc, cuobjdump or nvdisasm this is an error, so that every test that needs them fails."""
    builds = Builds(sass.Compiler())
    selected = [getattr(item, "callspec", None) for item in request.session.items]
    for asked in [spec.params for spec in selected if spec]:
        if "mutant" in asked:
            builds.submit_broken(asked["mutant"], asked["triple"], tmp_path_factory.mktemp("broken"))
        elif "arch" in asked:
            builds.submit(asked["arch"], asked["triple"])
    yield builds
    builds.pool.shutdown(cancel_futures=True)


def name_of(triple: int) -> str:
    return "_".join(sass.SHORT[name] for name in TRIPLES[triple])


everywhere = pytest.mark.parametrize(("arch", "triple"), ALL, ids=[f"{arch}-{name_of(i)}" for arch, i in ALL])


@everywhere
def test_every_kernel_is_there(builds: Builds, arch: str, triple: int) -> None:
    """So that the other tests do not pass because they saw nothing."""
    found = [code.kernel for code in builds.submit(arch, triple).result()]
    assert len(found) == len(set(found))
    assert set(found) == sass.kernels_of(triple)


@everywhere
def test_no_spills_and_no_stack(builds: Builds, arch: str, triple: int) -> None:
    assert [fault for code in builds.submit(arch, triple).result() for fault in sass.spills(code)] == []


@everywhere
def test_memory_is_moved_in_16_bytes(builds: Builds, arch: str, triple: int) -> None:
    assert [fault for code in builds.submit(arch, triple).result() for fault in sass.narrow_accesses(code)] == []


@everywhere
def test_no_fp64_but_for_fp64(builds: Builds, arch: str, triple: int) -> None:
    codes = builds.submit(arch, triple).result()
    assert [fault for code in codes for fault in sass.doubles(code)] == []
    # What looks for it would find it.
    assert all(code.doubles for code in codes if code.kernel.param == "double" and code.kernel.phase == "step")


def test_the_table_in_the_docs_is_up_to_date(builds: Builds) -> None:
    """`make sass` writes it, from these sources. Another nvcc makes other code."""
    written = (ROOT / "docs/sass.md").read_text(encoding="utf-8")
    if builds.compiler.tools.nvcc_release() not in written:
        return
    assert f"`{builds.compiler.key()}`" in written, "the kernels are not those of the page: make sass"
    rows = [line.strip("| ").split(" | ") for line in written.splitlines() if line.startswith("| ")]
    head = next(row for row in rows if row[0] == "kernel")
    on_the_page = {row[0]: dict(zip(head, row, strict=True)) for row in rows if len(row) == len(head)}
    for code in sass.unique(builds.everything()):
        row = on_the_page[str(code.kernel)]
        assert row[code.arch] == sass.cell_of(code), code
        loads, stores = sass.loads_and_stores(code)
        assert loads in row["loads"].split(" or ") and stores in row["stores"].split(" or "), code
    assert sass.shared_table([]) in written


@pytest.mark.parametrize(
    ("mutant", "triple", "said"), BROKEN, ids=[mutant.name.replace(" ", "_") for mutant, *_ in BROKEN]
)
def test_a_broken_kernel_is_caught(builds: Builds, mutant: Mutant, triple: int, said: str) -> None:
    broken, sound = builds.broken[mutant].result(), builds.submit("9.0", triple).result()
    faults = [fault for code in broken for check in sass.FAULTS for fault in check(code)]
    assert any(re.search(said, fault) for fault in faults), faults
    assert not any(re.search(said, fault) for code in sound for check in sass.FAULTS for fault in check(code))


@pytest.mark.parametrize("missing", ["nvcc", "cuobjdump", "nvdisasm"])
def test_a_missing_tool_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str) -> None:
    """And not a reason to skip: without it nothing is known of the kernels."""
    tools = sass.Tools.find()
    programs = {"nvcc": tools.nvcc, "cuobjdump": tools.cuobjdump, "nvdisasm": tools.nvdisasm, "c++filt": tools.filt}
    programs["c++"] = shutil.which(tools.compiler.split()[0]) or ""
    for name in programs.keys() - {missing}:
        (tmp_path / name).symlink_to(programs[name])
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sass.SETUP, "cuda_root", lambda _: tmp_path)
    assert missing == "nvcc" or sass.SETUP.find_nvcc() == str(tmp_path / "nvcc")
    with pytest.raises(FileNotFoundError, match=f"there is no {missing}"):
        sass.Tools.find()


def test_occupancy() -> None:
    """Against what NVIDIA's occupancy calculator says."""
    for arch, registers, blocks in (
        *(("9.0", 32, 8), ("9.0", 33, 6), ("9.0", 40, 6), ("9.0", 64, 4), ("9.0", 65, 3), ("9.0", 80, 3)),
        *(("9.0", 96, 2), ("9.0", 128, 2), ("9.0", 255, 1), ("7.5", 32, 4), ("8.6", 40, 6), ("12.0", 24, 6)),
    ):
        assert sass.blocks_by_registers(arch, registers) == blocks, (arch, registers)
    assert [sass.blocks_by_shared(arch, 48 * 1024) for arch in ARCHES] == [1, 3, 2, 4, 4, 2]
