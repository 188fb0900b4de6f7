"""What nvcc makes of the CUDA kernels: compiles them for every architecture and reads the machine code back.

    python tests/sass.py [--arch 9.0 ...] [--triple 0 ...] [--write docs/sass.md]

No GPU is needed. The cubins are made with the flags of setup.py and kept under build/sass/ until a source, a flag or
the compiler changes. Registers and stack come from `cuobjdump -res-usage`; loads, stores and loops from the control
flow graph of `nvdisasm`. tests/test_compiled.py is the lane that holds the kernels to what is found here.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

from mutants import ROOT, setup_module

from fastwrs.spec import RULES

SETUP = setup_module(ROOT)
CACHE = ROOT / "build" / "sass"
HEADERS, HEADER = ("csrc/core", "csrc/rules", "csrc/norms", "csrc/cuda"), {".h", ".cuh"}
THREADS = 256  # of a block, as the kernels are launched
REGISTERS, QUARTERS, WARP = 65536, 4, 32  # of a multiprocessor; its quarters have a file of registers each
WORD = 128  # bits: from here on an access is wide
SIZES = {"float": 4, "double": 8, "bfloat16": 2, "float16": 2}
SHORT = {"float": "f32", "double": "f64", "bfloat16": "bf16", "float16": "f16"}


class Multiprocessor(NamedTuple):
    """What blocks share, apart from registers; of shared memory the system takes `reserved` bytes for each block."""

    threads: int
    blocks: int
    shared: int
    reserved: int = 1024


MULTIPROCESSORS = {
    "7.5": Multiprocessor(1024, 16, 64 * 1024, reserved=0),
    "8.0": Multiprocessor(2048, 32, 164 * 1024),
    "8.6": Multiprocessor(1536, 16, 100 * 1024),
    "9.0": Multiprocessor(2048, 32, 228 * 1024),
    "10.0": Multiprocessor(2048, 32, 228 * 1024),
    "12.0": Multiprocessor(1536, 24, 100 * 1024),
}
ARCHES: tuple[str, ...] = tuple(arch.removesuffix("+PTX") for arch in SETUP.DEFAULT_ARCHES.split(";"))


def blocks_by_registers(arch: str, registers: int) -> int:
    """How many blocks of THREADS threads a multiprocessor has registers (and room for threads) for."""
    of_a_warp = -(-registers * WARP // 256) * 256
    warps = REGISTERS // QUARTERS // of_a_warp * QUARTERS
    return min(warps * WARP, MULTIPROCESSORS[arch].threads) // THREADS


def blocks_by_shared(arch: str, shared: int) -> int:
    """How many blocks of THREADS threads it has shared memory for, if each asks for so many bytes."""
    sm = MULTIPROCESSORS[arch]
    return min(sm.shared // (shared + sm.reserved), sm.blocks, sm.threads // THREADS)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def dtype_triples() -> list[tuple[str, ...]]:
    """The (param, grad, state) that kernels are compiled for, in the order of FASTWRS_TRIPLE_INDEX."""
    text = (ROOT / "csrc/core/dtypes.h").read_text(encoding="utf-8")
    lines = text.split("#define FASTWRS_DTYPE_TRIPLES(X)", 1)[1].split("\n\n", 1)[0]
    return [tuple(types.split(", ")) for types in re.findall(r"X\((\w+, \w+, \w+)\)", lines)]


TRIPLES = dtype_triples()
OF_PARAMETERS = ("finish", "project", "shift")  # phases whose kernels depend on the type of the parameter alone
TOLD = {None: 0, "gate": 1, "shift": 2}  # numbers that a step reads for each element, by what the rule looks at first


@dataclass(frozen=True)
class Kernel:
    """One kernel. `types` are those of its arrays: parameter, gradient, states; of step_kernel alone more than one."""

    phase: str
    types: tuple[str, ...]
    walk: bool
    rule: str = ""
    state_type: str = ""  # of a rule without states too

    @property
    def param(self) -> str:
        return self.types[0]

    @property
    def vector(self) -> int:
        """Elements that a thread takes at a time: the shortest type fills 16 bytes."""
        return 16 // min(SIZES[name] for name in (*self.types, self.state_type or self.param))

    @property
    def words(self) -> list[int]:
        """Words of 16 bytes that such a vector has in each array; a gradient that is not read has none."""
        return [SIZES[name] * self.vector // 16 for name in self.types[: 1 if self.rule == "project" else None]]

    @property
    def stored(self) -> int:
        """Words of such a vector in the arrays that may be written: all, but for the passes of a rule with a gate.

        None in a first look at the weights alone, nor by a rule without an update, which keeps them on chip.
        """
        if self.phase == "shift" or self.rule == "project":
            return 0
        if not (self.rule and RULES[self.rule].gated):
            return sum(self.words)
        if self.phase == "gate":
            return sum(self.words[1:])
        return sum(self.words) if self.rule == "sgdp" else sum(self.words[:2])  # its states have been written before

    def __str__(self) -> str:
        dtypes = (*self.types[:2], self.state_type) if self.rule else self.types
        rule = f" {self.rule} {len(self.types) - 2}" if self.rule else ""
        return f"{self.phase}{rule} {'/'.join(SHORT[name] for name in dtypes)}{' walk' if self.walk else ''}"


def kernels_of(triple: int) -> set[Kernel]:
    """All kernels that have to be there for a triple of dtypes."""
    param, grad, state = TRIPLES[triple]
    kernels = {Kernel(phase, (param,), walk) for phase in OF_PARAMETERS for walk in (False, True)}
    for rule, walk in product(RULES.values(), (False, True)):
        for slots in range(sum(slot.when is None for slot in rule.slots), len(rule.slots) + 1):
            for phase in ("gate", "step") if rule.gated else ("step",):
                kernels.add(Kernel(phase, (param, grad, *[state] * slots), walk, rule.name, state))
    # there is no gradient, and no state, to have another type
    return {k for k in kernels if k.rule != "project" or (param == grad and state != "bfloat16")}


def kernel_of(demangled: str) -> Kernel:
    """The kernel that a function is, by its C++ name."""
    match = re.match(r"void fastwrs::cuda::(gate|shift|step|finish|project)_kernel<(.*)>\(", demangled)
    # nothing else may be there: a function that is not inlined has registers, stack and memory accesses of its own
    assert match, f"not a kernel, or not one that tests/sass.py knows: {demangled}"
    phase, arguments = match[1], [re.sub(r"\w+::", "", argument) for argument in match[2].split(", ")]
    walk = arguments.pop() == "true"
    if phase in OF_PARAMETERS:
        return Kernel(phase, (arguments[-1],), walk)
    name = {rule.replace("_", ""): rule for rule in RULES}[arguments[0].lower()]
    if phase == "gate":
        arguments.insert(1, str(len(RULES[name].slots)))
    _, slots, param, grad, state = arguments
    return Kernel(phase, (param, grad, *[state] * int(slots)), walk, name, state)


# ---- machine code ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Accesses to global memory: words of 16 bytes that wide ones move, and the number of narrower ones."""

    wide_loads: int = 0
    narrow_loads: int = 0
    wide_stores: int = 0
    narrow_stores: int = 0


@dataclass(frozen=True)
class Code:
    """What a kernel has become on one architecture. `loops` are the innermost ones that have a wide access."""

    arch: str
    kernel: Kernel
    registers: int
    stack: int
    shared: int
    instructions: int
    spill_stores: int
    spill_loads: int
    doubles: tuple[str, ...]
    loops: tuple[Traffic, ...]

    @property
    def blocks(self) -> int:
        return blocks_by_registers(self.arch, self.registers)

    @property
    def hot_loops(self) -> list[Traffic]:
        """The loops that read whole vectors."""
        return [loop for loop in self.loops if loop.wide_loads]

    def __str__(self) -> str:
        return f"{self.kernel} on {self.arch}"


# Everything that begins with D computes in fp64 (DADD, DFMA, DMMA, DMNMX, DMUL, DSETP, ...) but DEPBAR, which waits.
# Others name the type: F2F.F64.F32, I2F.F64, F2I.F64.TRUNC, FRND.F64, ATOMG.ADD.F64, MUFU.RCP64H.
DOUBLE = re.compile(r"(?!DEPBAR)D[A-Z]|.*\.(F64|\w*64H)\b")
BITS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}


def access(opcode: str) -> tuple[str, int] | None:
    """Whether an instruction loads from global memory or stores to it, and how many bits."""
    name, *modifiers = opcode.split(".")
    kind = {"LDG": "load", "LD": "load", "LDGSTS": "load", "STG": "store", "ST": "store"}.get(name)
    return (kind, next((BITS[m] for m in modifiers if m in BITS), 32)) if kind else None


def traffic(opcodes: Iterable[str]) -> Traffic:
    counts: dict[str, int] = defaultdict(int)
    for opcode in opcodes:
        if (found := access(opcode)) is not None:
            kind, bits = found
            counts[f"{'wide' if bits >= WORD else 'narrow'}_{kind}s"] += max(1, bits // WORD)
    return Traffic(**counts)


class Graph:
    """The control flow graph of a function: the opcodes of each basic block, and which blocks follow it."""

    def __init__(self) -> None:
        self.blocks: dict[str, list[str]] = {}
        self.next: dict[str, list[str]] = defaultdict(list)

    def opcodes(self, blocks: Iterable[str] | None = None) -> Iterator[str]:
        for block in self.blocks if blocks is None else blocks:
            yield from self.blocks[block]

    def loops(self) -> list[set[str]]:
        """The blocks of each loop: what reaches the branch back to its head, by way of blocks after the head."""
        entry = next(iter(self.blocks))
        before: dict[str, list[str]] = defaultdict(list)
        back: dict[str, list[str]] = defaultdict(list)
        path, on_path, seen = [(entry, iter(self.next.get(entry, ())))], {entry}, {entry}
        while path:
            block, successors = path[-1]
            after = next(successors, None)
            if after is None:
                on_path.remove(block)
                path.pop()
                continue
            (back[after] if after in on_path else before[after]).append(block)
            if after not in seen:
                seen.add(after)
                on_path.add(after)
                path.append((after, iter(self.next.get(after, ()))))
        loops = []
        for head, ends in back.items():
            body, waiting = {head}, list(ends)
            while waiting:
                if (block := waiting.pop()) not in body:
                    body.add(block)
                    waiting += [*before.get(block, ()), *back.get(block, ())]
            loops.append(body)
        return loops

    def wide_loops(self) -> tuple[Traffic, ...]:
        """What the innermost loops with a wide access do to memory."""
        loops = [loop for loop in self.loops() if has_wide(traffic(self.opcodes(loop)))]
        innermost = [loop for loop in loops if not any(other < loop for other in loops)]
        return tuple(traffic(self.opcodes(loop)) for loop in innermost)


def has_wide(found: Traffic) -> bool:
    return found.wide_loads + found.wide_stores > 0


def read_graphs(dot: str) -> dict[str, Graph]:
    """The functions in what `nvdisasm -bbcfg` prints. A subroutine of the compiler counts to the kernel before it."""
    graphs: dict[str, Graph] = {}
    graph, block = Graph(), ""
    for line in dot.splitlines():
        if match := re.match(r'subgraph "cluster_(.*)" \{', line):
            if not match[1].startswith("$"):
                graph = graphs[match[1]] = Graph()
        elif match := re.match(r'"([^"]+)":\w+:\w+ -> "([^"]+)":', line):
            graph.next[match[1]].append(match[2])
        elif line.startswith('"'):
            block = line.strip('"')
        elif line.startswith("[label="):
            # instructions end in \l, their blanks are escaped: "\ \ @!P0\ LDG.E\ R2,\ desc\[UR8\]\[R2.64\]\ ;\l"
            graph.blocks[block] = re.findall(r"(?:\\ |>|\\l)(?:@!?U?P[T\d]+\\ )?([A-Z][\w.]*)(?:\\ [^;]*)?;\\l", line)
    return graphs


# ---- tools -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tools:
    """The programs that are needed."""

    nvcc: str
    compiler: str
    cuobjdump: str
    nvdisasm: str
    filt: str

    @classmethod
    def find(cls) -> Tools:
        """All of them, or an error that says which one is missing: without them nothing is known of the kernels."""
        nvcc, compiler, filt = SETUP.find_nvcc(), SETUP.find_compiler(), shutil.which("c++filt")
        if nvcc is None:
            raise FileNotFoundError("there is no nvcc (set CUDA_HOME)")
        if compiler is None or filt is None:
            raise FileNotFoundError("there is no C++ compiler, or no c++filt (on Debian: apt-get install g++)")
        triton = importlib.util.find_spec("triton")
        folders = [SETUP.cuda_root(nvcc) / "bin"]
        folders += [Path(path) / "backends/nvidia/bin" for path in (triton and triton.submodule_search_locations) or ()]
        path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
        found = {name: shutil.which(name, path=path) for name in ("cuobjdump", "nvdisasm")}
        if missing := [name for name, program in found.items() if program is None]:
            raise FileNotFoundError(f"there is no {' and no '.join(missing)} (the triton package has them)")
        return cls(nvcc, compiler, found["cuobjdump"] or "", found["nvdisasm"] or "", filt)

    def nvcc_release(self) -> str:
        """Like "13.0, V13.0.88"."""
        return output(self.nvcc, "--version").rpartition("release ")[2].splitlines()[0]


def output(*command: str | Path, given: str | None = None) -> str:
    words = [str(word) for word in command]
    for wait in (1, 10, 0):
        try:
            done = subprocess.run(words, input=given, capture_output=True, text=True, check=False)
            break
        except OSError as error:
            if isinstance(error, FileNotFoundError) or not wait:
                raise
            # Hundreds of processes are started from several threads; once one of them could not be, for that moment.
            print(f"could not start {words[0]}: {error!r}", file=sys.stderr, flush=True)
            time.sleep(wait)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


class Compiler:
    """Compiles kernels and reads them. Of a copy of the sources nothing is kept."""

    def __init__(self, root: Path = ROOT) -> None:
        self.tools = Tools.find()
        self.root = root
        self.cache = CACHE / self.key() if root == ROOT else root / "cubins"
        if root == ROOT and not self.cache.exists():
            shutil.rmtree(CACHE, ignore_errors=True)  # those of former sources
        self.cache.mkdir(parents=True, exist_ok=True)
        if root == ROOT:
            self.take_from_the_library()

    def take_from_the_library(self) -> None:
        """Takes what has been built, if the library is newer than its sources: `make` has just done so."""
        library = ROOT / "fastwrs" / "_C.abi3.so"
        if any(self.cache.iterdir()) or not library.exists():
            return
        sources = [ROOT / "setup.py", *(path for folder in HEADERS for path in (ROOT / folder).iterdir())]
        if library.stat().st_mtime < max(path.stat().st_mtime for path in sources):
            return
        with tempfile.TemporaryDirectory(dir=self.cache) as folder:
            subprocess.run(
                [self.tools.cuobjdump, "-xelf", "all", library], cwd=folder, capture_output=True, check=False
            )
            for cubin in Path(folder).glob("*.cubin"):
                usage = output(self.tools.cuobjdump, "-res-usage", cubin)
                names = output(self.tools.filt, given="\n".join(re.findall(r"Function (\S+):", usage))).splitlines()
                found = {kernel_of(name) for name in names}
                triples = [triple for triple in range(len(TRIPLES)) if found and found <= kernels_of(triple)]
                number = re.search(r"sm_(\d+)", cubin.name)
                if len(triples) == 1 and number:
                    arch = f"{number[1][:-1]}.{number[1][-1]}"
                    cubin.replace(self.cache / f"{arch}_{triples[0]}.cubin")

    def key(self) -> str:
        """A hash of all that a cubin depends on: compiler, flags, and sources without comments and layout."""
        digest = hashlib.sha256(f"{SETUP.NVCC_FLAGS} {self.tools.nvcc_release()}".encode())
        headers = (path for folder in HEADERS for path in (self.root / folder).iterdir() if path.suffix in HEADER)
        for path in (self.root / SETUP.KERNELS, *sorted(headers)):
            code = re.sub("//.*", "", path.read_text(encoding="utf-8"))
            digest.update(f"{path.relative_to(self.root)} {' '.join(code.split())}\n".encode())
        return digest.hexdigest()[:16]

    def cubin(self, arch: str, triple: int) -> Path:
        """The machine code of one triple's kernels, compiled if that has not been done."""
        path = self.cache / f"{arch}_{triple}.cubin"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=self.cache) as folder:
                made = Path(folder) / path.name
                output(
                    *(self.tools.nvcc, "-ccbin", self.tools.compiler, *SETUP.NVCC_FLAGS.split()),
                    *(*SETUP.gencodes(arch).split(), f"-DFASTWRS_TRIPLE_INDEX={triple}"),
                    *("-cubin", "-o", made, self.root / SETUP.KERNELS),
                )
                made.replace(path)
        return path

    def read(self, arch: str, triple: int) -> list[Code]:
        """What the kernels of one triple have become."""
        cubin = self.cubin(arch, triple)
        usage = output(self.tools.cuobjdump, "-res-usage", cubin)
        graphs = read_graphs(output(self.tools.nvdisasm, "-bbcfg", cubin))
        used = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
        assert sorted(graphs) == sorted(name for name, *_ in used), "cuobjdump and nvdisasm see different functions"
        demangled = output(self.tools.filt, given="\n".join(name for name, *_ in used)).splitlines()
        codes = []
        for (name, *numbers), readable in zip(used, demangled, strict=True):
            opcodes = list(graphs[name].opcodes())
            codes.append(
                Code(
                    arch,
                    kernel_of(readable),
                    *map(int, numbers),
                    instructions=len(opcodes),
                    spill_stores=sum(opcode.startswith("STL") for opcode in opcodes),
                    spill_loads=sum(opcode.startswith("LDL") for opcode in opcodes),
                    doubles=tuple(sorted({opcode for opcode in opcodes if DOUBLE.match(opcode)})),
                    loops=graphs[name].wide_loops(),
                )
            )
        return sorted(codes, key=lambda code: (code.kernel.walk, code.kernel.phase != "step", str(code.kernel)))


def workers() -> int:
    return min(4, len(os.sched_getaffinity(0)))


# ---- what a kernel must not do ---------------------------------------------------------------------------------------


def spills(code: Code) -> list[str]:
    """Registers that do not suffice, and arrays that were not put in registers. In fp64 numbers take two each."""
    if code.kernel.param == "double" or not (code.stack or code.spill_stores or code.spill_loads):
        return []
    return [f"{code}: {code.stack} bytes of stack, {code.spill_stores} stores to it, {code.spill_loads} loads"]


def doubles(code: Code) -> list[str]:
    """Arithmetic in fp64, which most GPUs do 64 times slower, where the parameter is of another type."""
    if code.kernel.param == "double" or not code.doubles:
        return []
    return [f"{code}: computes in fp64: {', '.join(code.doubles)}"]


def narrow_accesses(code: Code) -> list[str]:
    """Where the loop over contiguous memory does not take 16 bytes at a time.

    An array that is not aligned as the parameter goes element by element, in the same loop. So a vector of all arrays
    may come with one narrow access per element of each array but the first, and hardly more.
    """
    kernel, faults = code.kernel, []
    if kernel.walk or kernel.phase == "finish":
        return []
    if not code.hot_loops:
        return [f"{code}: no loop loads 16 bytes at a time"]
    words, others = sum(kernel.words), kernel.vector * (len(kernel.types) - 1)
    for loop in code.hot_loops:
        vectors = loop.wide_loads / words  # more than one where the compiler unrolls
        if vectors < 1 or loop.wide_loads % words:
            faults.append(f"{code}: {loop.wide_loads} words are loaded, {words} are a vector of all arrays")
        if loop.wide_stores < vectors * kernel.stored:
            faults.append(f"{code}: {loop.wide_stores} words are stored for {loop.wide_loads} that are loaded")
        # a factor for each element, or the scale of the gradients and what a look tells of each element
        asks = kernel.vector * TOLD[RULES[kernel.rule].look] if kernel.phase == "step" else 0
        enough = kernel.vector if kernel.phase == "project" else others + 1 + asks
        if loop.narrow_loads > vectors * enough:
            faults.append(f"{code}: {loop.narrow_loads} narrow loads, {enough} are enough")
        if loop.narrow_stores > vectors * others:
            faults.append(f"{code}: {loop.narrow_stores} narrow stores, {others} are enough")
    if kernel.phase == "step":
        scaling = [loop for loop in code.loops if not loop.wide_loads]
        if not scaling:
            faults.append(f"{code}: no loop stores the scaled weights 16 bytes at a time")
        faults += [f"{code}: narrow accesses where weights are scaled" for loop in scaling if loop.narrow_stores]
    return faults


FAULTS = (spills, doubles, narrow_accesses)


# ---- tables ----------------------------------------------------------------------------------------------------------


def loads_and_stores(code: Code) -> tuple[str, str]:
    """Of one turn of the hot loop: words of 16 bytes + narrower accesses."""
    loops = code.hot_loops
    loads = " and ".join(f"{loop.wide_loads}+{loop.narrow_loads}" for loop in loops)
    stores = " and ".join(f"{loop.wide_stores}+{loop.narrow_stores}" for loop in loops)
    return loads or "-", stores or "-"


def unique(codes: Iterable[Code]) -> list[Code]:
    """Without the kernels that two triples share: those that depend on the parameter's type alone."""
    return list({(code.arch, code.kernel): code for code in codes}.values())


def full_table(codes: Iterable[Code]) -> str:
    """A line for each architecture and kernel."""
    head = ("arch", "kernel", "regs", "shared", "stack", "spills", "blocks", "loads", "stores", "code")
    rows: list[tuple[str, ...]] = [head]
    for code in unique(codes):
        spilled = f"{code.spill_stores}+{code.spill_loads}"
        numbers = (code.registers, code.shared, code.stack, spilled, code.blocks, *loads_and_stores(code))
        rows.append((code.arch, str(code.kernel), *map(str, numbers), str(code.instructions)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def markdown_row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def cell_of(code: Code) -> str:
    """Registers / blocks, and the stack if there is one."""
    spilled = f", {code.stack} B {code.spill_stores}+{code.spill_loads}" if code.stack else ""
    return f"{code.registers}/{code.blocks}{spilled}"


def kernel_table(codes: Iterable[Code]) -> str:
    """A line for each kernel, in Markdown."""
    by_kernel: dict[Kernel, dict[str, Code]] = defaultdict(dict)
    for code in unique(codes):
        by_kernel[code.kernel][code.arch] = code
    rows = [("kernel", "loads", "stores", *ARCHES), ("---",) * (3 + len(ARCHES))]
    for kernel, on in by_kernel.items():
        accesses = zip(*(loads_and_stores(on[arch]) for arch in ARCHES), strict=True)
        cells = [" or ".join(dict.fromkeys(of_arches)) for of_arches in accesses]
        rows.append((str(kernel), *cells, *(cell_of(on[arch]) for arch in ARCHES)))
    return "\n".join(map(markdown_row, rows))


def shared_table(codes: Iterable[Code]) -> str:
    """How many blocks fit by their shared memory, which a launch asks for, in Markdown."""
    assert not any(code.shared > MULTIPROCESSORS[code.arch].reserved for code in codes), "all shared memory is dynamic"
    rows = [("weights of a tile", "shared memory", *ARCHES), ("---",) * (2 + len(ARCHES))]
    for weights in (4096, 8192, 16384, 28672, 49152):
        shared = 4 * weights + 2048
        rows.append((f"{weights:,}", f"{shared:,} B", *(str(blocks_by_shared(arch, shared)) for arch in ARCHES)))
    return "\n".join(map(markdown_row, rows))


def document(codes: Sequence[Code], release: str, key: str) -> str:
    return f"""# What nvcc makes of the kernels

Written by `make sass` (`tests/sass.py`) from the machine code that nvcc {release} makes with the flags of
`setup.py`; a hash of all that went in is `{key}`. Nothing here was run, and no GPU was needed. The lane
`compiled` (`tests/test_compiled.py`) fails if this file is not up to date, and on kernels that spill, that compute in
fp64 where the parameter is of another type, or whose loop over contiguous memory does not take 16 bytes at a time.

## Registers, loads and stores

A kernel is named by its phase, its rule with the number of states, the dtypes of parameter, gradient and states, and
`walk` where it is the one for strided tensors. Under each compute capability: registers of a thread / blocks of
{THREADS} threads that a multiprocessor has room and registers for; of a stack bytes, stores to it, loads from it.

Loads and stores are those of one turn of the loop over contiguous memory: words of 16 bytes + narrower accesses. The
narrower ones serve arrays that are not aligned as the parameter is, element by element; others read the scale of the
gradients, and in `project` the factors of the groups. Of the stores one serves a gradient that is unscaled, and the
parameter has two: with a hint for the cache, and without where a second pass follows.

{kernel_table(codes)}

## Shared memory

No kernel has shared memory of its own; a launch asks for what its largest tile needs. A tile that waits for its norm
keeps 4 bytes for each weight (8 in fp64) and up to 2 KB of sums. So many blocks then fit a multiprocessor:

{shared_table(codes)}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What nvcc makes of the CUDA kernels.")
    parser.add_argument("--arch", action="append", choices=ARCHES, help="an architecture (default: all)")
    parser.add_argument("--triple", action="append", type=int, choices=range(len(TRIPLES)), help="the triple's index")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a Markdown page too")
    asked = parser.parse_args(arguments)
    if asked.write and (asked.arch or asked.triple):
        parser.error("--write is for all kernels")
    compiler = Compiler()
    cubins = list(product(asked.arch or ARCHES, asked.triple or range(len(TRIPLES))))
    with ThreadPoolExecutor(workers()) as pool:
        codes = [code for read in pool.map(lambda cubin: compiler.read(*cubin), cubins) for code in read]
    print(full_table(codes))
    faults = [fault for code in unique(codes) for check in FAULTS for fault in check(code)]
    print(f"\n{len(faults)} faults", *faults, sep="\n")
    if asked.write:
        asked.write.write_text(document(codes, compiler.tools.nvcc_release(), compiler.key()), encoding="utf-8")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
