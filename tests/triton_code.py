"""What Triton makes of its kernels: compiles every variant for several GPUs and reads the machine code back.

    python tests/triton_code.py [--targets sm_90 gfx942 ...] [--write docs/triton.md] [--log FILE] [--sources FOLDER]

No GPU is needed: Triton brings the compilers and disassemblers along. A kernel is compiled as `launch.run` has it
compiled. tests/test_triton_compiled.py is the lane that holds the kernels to what is found here; tests/sass.py does the
same for the CUDA kernels.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from mutants import ROOT
from sass import DOUBLE, WORD, markdown_row, output

from fastwrs.spec import DTYPE_TRIPLES, RULES

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942")
PROCESSES = 2
FLAGS = tuple(product((False, True), repeat=2))  # measure, walk
SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
SHORT = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}


class Kernel(NamedTuple):
    """One kernel, by the variant that it is launched for. Kernels that variants share are named by the first."""

    kind: str
    rule: str
    slots: int
    dtypes: tuple[str, str, str]
    measure: bool
    walk: bool

    @property
    def line(self) -> str:
        """The line of the table that it is in: all that share it differ in `measure` and `walk`, or in their rule."""
        if self.kind in ("gate", "step"):
            return f"{self.kind} {self.rule} {self.slots} {'/'.join(SHORT[name] for name in self.dtypes)}"
        return f"{self.kind} {SHORT[self.dtypes[0]]}"

    @property
    def looks(self) -> bool:
        """Whether its rule looks at whole tensors first."""
        return RULES[self.rule].look is not None

    @property
    def arrays(self) -> tuple[list[str], list[str]]:
        """The types of the arrays that it reads in contiguous memory, if it does, and of those that it writes.

        A gradient may have to be unscaled. Behind a gate a step writes one state again.
        """
        param, grad, state = self.dtypes
        states = [state] * self.slots
        if self.walk and self.kind not in ("gate", "shift"):
            return [], []
        if self.kind == "shift":
            return [param], []
        if self.kind == "project":
            return [param], [param]
        if not RULES[self.rule].updates:
            return [param], [param]
        written = (
            [grad, *states] if self.kind == "gate" else [param, grad, *states[: 1 if RULES[self.rule].gated else None]]
        )
        return [param, grad, *states], written

    @property
    def aligned_branches(self) -> int:
        """How many of its branches do so 16 bytes at a time: without norms to measure a unit of some tiles has one."""
        return 2 if self.kind == "step" and not self.measure else 1

    def __str__(self) -> str:
        slots = "" if self.kind != "project" else f" {self.slots}"
        return f"{self.line}{slots}{' measure' if self.measure else ''}{' walk' if self.walk else ''}"


def every_kernel() -> list[Kernel]:
    """All that a step can launch. `project` depends on some of a variant's properties alone."""
    kernels: dict[tuple[object, ...], Kernel] = {}
    for rule, dtypes, (measure, walk) in product(RULES.values(), DTYPE_TRIPLES, FLAGS):
        if not rule.updates and (dtypes[0] != dtypes[1] or dtypes[2] == "bfloat16"):
            continue  # there is no gradient, and no state, to have another type
        for slots in range(sum(slot.when is None for slot in rule.slots), len(rule.slots) + 1):
            variant = (rule.name, slots, dtypes, measure, walk)
            if rule.gated and not measure:
                kernels[("gate", *variant)] = Kernel("gate", *variant)
            if rule.look == "shift" and not measure:
                kernels.setdefault(("shift", dtypes[0], walk), Kernel("shift", *variant))
            kernels[("step", *variant)] = Kernel("step", *variant)
            kernels.setdefault(("project", dtypes[0], slots, measure, walk), Kernel("project", *variant))
    return list(kernels.values())


def usual_kernels(target: str) -> list[Kernel]:
    """For CI: of the rules that look first those of two triples of dtypes, of the others three; for AMD fp32 alone.

    To `project` the number of states is only a distance between addresses: one is enough. What a strided tensor takes
    is measured in fp32 alone.
    """
    looking = [("float32", "float32", "float32"), ("bfloat16", "bfloat16", "float32")]
    others = [*looking, ("float64",) * 3]
    if target.startswith("gfx"):
        looking = others = looking[:1]
    kernels = [kernel for kernel in every_kernel() if kernel.dtypes in (looking if kernel.looks else others)]
    kernels = [k for k in kernels if not (k.measure and k.walk) or k.dtypes == looking[0]]
    return [kernel for kernel in kernels if kernel.kind != "project" or kernel.slots == 1]


class Accesses(NamedTuple):
    """Vector accesses to global memory: words of 16 bytes, and accesses of 8."""

    loads: int = 0
    stores: int = 0
    loads_of_8: int = 0
    stores_of_8: int = 0

    def __str__(self) -> str:
        short = f" and {self.loads_of_8}+{self.stores_of_8} of 8" if self.loads_of_8 or self.stores_of_8 else ""
        return f"{self.loads}+{self.stores}{short}"


NONE = Accesses()


@dataclass(frozen=True)
class Row:
    """What a kernel has become on one target. `error`: why it does not compile."""

    target: str
    kernel: Kernel
    threads: int = 0
    needed: Accesses = NONE
    registers: int = 0
    spills: int = 0
    """Vector registers on AMD's GPUs; on NVIDIA's the instructions that store or load them."""
    moved: int = 0
    """Scalar registers of AMD's GPUs that are kept in vector registers. No memory is used for them."""
    stack: int = 0
    accesses: Accesses = NONE
    doubles: tuple[str, ...] = ()
    ordered: bool = False
    """Whether the threads of a program wait for each other before it takes its ticket."""
    error: str = ""

    def __str__(self) -> str:
        return f"{self.kernel} on {self.target}"


# ---- compiling -------------------------------------------------------------------------------------------------------


def needed(kernel: Kernel, tile: int, threads: int) -> Accesses:
    """The vector accesses that the aligned branches cannot do without, if a thread takes its elements side by side.

    Each array is loaded once and stored once at most. What is less than 8 bytes for each thread has no vectors, and
    cannot be told from other accesses.
    """
    loads, stores = ([SIZES[name] * tile // threads for name in arrays] for arrays in kernel.arrays)
    words = (kernel.aligned_branches * sum(size // 16 for size in sizes) for sizes in (loads, stores))
    of_8 = (kernel.aligned_branches * sizes.count(8) for sizes in (loads, stores))
    return Accesses(*words, *of_8)


def _use_sources(folder: str) -> Any:
    # The module that launches the kernels, from a folder that has fastwrs/triton_kernels.
    package = importlib.import_module("fastwrs")
    path = str(Path(folder) / "fastwrs")
    if package.__path__[0] != path:
        for name in [name for name in sys.modules if name.startswith("fastwrs.triton_kernels")]:
            del sys.modules[name]
        vars(package).pop("triton_kernels", None)
        package.__path__.insert(0, path)
        importlib.invalidate_caches()
    launch = importlib.import_module("fastwrs.triton_kernels.launch")
    assert str(launch.__file__).startswith(path), f"{launch.__file__} is not in {path}"
    return launch


def _start_worker(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache


def _compile(folder: str, kernel: Kernel, target: str) -> Row:
    # In a process of the pool.
    launch = _use_sources(folder)
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    nvidia = target.startswith("sm_")
    gpu = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    variant = launch.Variant(*kernel[1:])
    if kernel.kind in ("gate", "shift"):
        variant = variant._replace(gate_walk=kernel.walk)
    function, constants = getattr(variant, kernel.kind)()
    options = launch.options_for(gpu.backend)
    threads = options["num_warps"] * gpu.warp_size
    row = Row(target, kernel, threads, needed(kernel, variant.blocks.tile, threads))
    # What the table is known to be when it is launched: aligned, and on AMD's GPUs of less than 2 GB.
    attributes = {(0,): make_backend(gpu).parse_attr("D" if nvidia else "DS")}
    signature = {"table": "*i64", **dict.fromkeys(constants, "constexpr")}
    values = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, values, attributes)
    try:
        code = triton.compile(source, target=gpu, options=options).asm
    except Exception as error:  # of whatever stage
        why: BaseException = error
        while why.__cause__ is not None:  # an error in a function says so of each of its callers
            why = why.__cause__
        return replace(row, error=f"{type(why).__name__}: {str(why).strip().splitlines()[-1]}")
    return read_nvidia(row, code) if nvidia else read_amd(row, code)


def read_nvidia(row: Row, code: Mapping[str, Any]) -> Row:
    """Reads a cubin. Accesses of 8 bytes are taken from PTX: only there can vectors be told from 64-bit numbers."""
    triton = importlib.import_module("triton")
    tools = Path(str(triton.__file__)).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(code["cubin"])
        cubin.flush()
        usage = output(tools / "cuobjdump", "-res-usage", cubin.name)
        listing = output(tools / "nvdisasm", "-c", cubin.name)
    used = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    assert len(used) == 1, f"{row} is not one function: {usage}"
    # "        /*0120*/                   @!P0 LDG.E.128 R4, desc[UR6][R2.64] ;"
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]+ )?([A-Z][\w.]*)", listing, re.MULTILINE)
    assert opcodes[-1:], f"no instructions of {row} were found"
    wide: dict[str, int] = defaultdict(int)
    for opcode in opcodes:
        if (name := opcode[:3]) in ("LDG", "STG") and (bits := re.search(r"\.(128|256)\b", opcode)):
            wide[name] += int(bits[1]) // WORD
    vectors = re.findall(r"\b(ld|st)\.global\S*?\.v2\.b32\b", code["ptx"])
    return replace(
        row,
        registers=int(used[0][0]),
        stack=int(used[0][1]),
        spills=sum(opcode.startswith(("LDL", "STL")) for opcode in opcodes),
        accesses=Accesses(wide["LDG"], wide["STG"], vectors.count("ld"), vectors.count("st")),
        doubles=tuple(sorted({opcode for opcode in opcodes if DOUBLE.match(opcode)})),
        ordered=takes_its_ticket_last(row, code["ptx"], r"\bbar\.sync\b", r"\batom\.global\b", r"\bst\.global\b"),
    )


def read_amd(row: Row, code: Mapping[str, Any]) -> Row:
    """Reads the assembler text. Arrays are buffers there; the table and partial sums are accessed in other ways."""
    text: str = code["amdgcn"]

    def number(name: str) -> int:
        found = re.findall(rf"^\s+\.{name}:\s+(\d+)$", text, re.MULTILINE)
        assert len(found) == 1, f"{name} of {row}: {found}"
        return int(found[0])

    vectors = re.findall(r"^\s+buffer_(load|store)_dwordx([24])\b", text, re.MULTILINE)
    return replace(
        row,
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        spills=number("vgpr_spill_count"),
        moved=number("sgpr_spill_count"),
        accesses=Accesses(*(vectors.count((kind, n)) for n in "42" for kind in ("load", "store"))),
        doubles=tuple(sorted(set(re.findall(r"^\s+(v_\w*f64\w*)", text, re.MULTILINE)))),
        ordered=takes_its_ticket_last(row, text, r"\bs_barrier\b", r"\w+_atomic_add\b", r"\b(global|buffer)_store_"),
    )


def takes_its_ticket_last(row: Row, text: str, barrier: str, atomic: str, store: str) -> bool:
    """Whether there is a barrier between all else that a program writes and each atomic that says that it is done.

    A step takes a ticket of what its tile is a part of, and one of the launch.
    """
    *parts, _ = re.split(atomic, text)
    assert len(parts) == (2 if row.kernel.kind == "step" else 1), f"{len(parts)} atomics in {row}"
    behind = [re.split(barrier, part) for part in parts]
    return all(len(pieces) > 1 and re.search(store, pieces[-1]) is None for pieces in behind)


class Compiler:
    """Compiles kernels in processes of its own, with a cache that is gone afterwards."""

    def __init__(self, cache: str) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would share the threads of torch
        self.pool = ProcessPoolExecutor(PROCESSES, mp_context=spawn, initializer=_start_worker, initargs=(cache,))

    def submit(self, kernels: Iterable[Kernel], target: str, folder: Path = ROOT) -> list[Future[Row]]:
        """Compiles some kernels, of a copy of the sources too."""
        return [self.pool.submit(_compile, str(folder), kernel, target) for kernel in kernels]


@contextmanager
def compiler() -> Iterator[Compiler]:
    """A compiler, and its end."""
    with tempfile.TemporaryDirectory() as cache:
        made = Compiler(cache)
        try:
            yield made
        finally:
            made.pool.shutdown(cancel_futures=True)


# ---- what a kernel must not do ---------------------------------------------------------------------------------------


def spills(row: Row) -> list[str]:
    """Registers that do not suffice. A stack that no instruction uses is none on NVIDIA's GPUs."""
    if row.spills or (row.stack and row.target.startswith("gfx")):
        return [f"{row}: {row.spills} spills, {row.stack} bytes of stack, {row.registers} registers"]
    return []


def doubles(row: Row) -> list[str]:
    """Arithmetic in fp64 where the parameter is of another type."""
    if row.kernel.dtypes[0] == "float64" or not row.doubles:
        return []
    return [f"{row}: computes in fp64: {', '.join(row.doubles)}"]


def narrow_accesses(row: Row) -> list[str]:
    """Fewer vector accesses than the aligned branches need."""
    if all(have >= need for have, need in zip(row.accesses, row.needed, strict=True)):
        return []
    return [f"{row}: {row.accesses} vectors are loaded and stored, {row.needed} are needed"]


def unordered(row: Row) -> list[str]:
    """A ticket taken while other threads of the program may still have to read their tensor's step."""
    return [] if row.ordered else [f"{row}: no barrier before the ticket"]


def faults(row: Row) -> list[str]:
    """What is wrong with a kernel."""
    if row.error:
        return [f"{row} does not compile: {row.error}"]
    return [*spills(row), *doubles(row), *narrow_accesses(row), *unordered(row)]


# ---- tables ----------------------------------------------------------------------------------------------------------


def version() -> str:
    """Triton's."""
    return str(importlib.import_module("triton").__version__)


def cell(rows: Sequence[Row]) -> str:
    """Registers of the kernels of a line, the most of those with the same flags, and what they spill."""
    numbers = []
    for flags in FLAGS:
        if of_flags := [row for row in rows if (row.kernel.measure, row.kernel.walk) == flags]:
            spilled = max(row.spills for row in of_flags)
            numbers.append(f"{max(row.registers for row in of_flags)}{f' ({spilled} spilled)' if spilled else ''}")
    return "error" if any(row.error for row in rows) else " ".join(numbers)


def accesses_of(rows: Sequence[Row], targets: Sequence[str]) -> str:
    """Loads and stores of 16 bytes, on each kind of GPU that differs: plain, then measured."""
    texts = []
    for target in targets:
        plain = [row for row in rows if row.target == target and not row.kernel.walk and any(row.kernel.arrays)]
        texts.append(" ".join(dict.fromkeys(f"{row.accesses.loads}+{row.accesses.stores}" for row in plain)))
    return " or ".join(dict.fromkeys(text or "-" for text in texts))


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line for each kind of kernel, rule and dtypes; the first line names the columns."""
    targets = [target for target in TARGETS if any(row.target == target for row in rows)]
    lines: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        lines[row.kernel.line].append(row)
    cells = [("kernel", "16 bytes", *targets)]
    for line, of_line in lines.items():
        registers = [cell([row for row in of_line if row.target == target]) for target in targets]
        cells.append((line, accesses_of(of_line, targets), *registers))
    return cells


def document(rows: Sequence[Row]) -> str:
    """The page of the docs."""
    head, *body = table(rows)
    lines = "\n".join(map(markdown_row, (head, ("---",) * len(head), *body)))
    return f"""# What Triton makes of its kernels

Written by `make sass` (`tests/triton_code.py`) from the machine code that Triton {version()} makes. Nothing here was
run, and no GPU was needed. The lane `triton_compiled` (`tests/test_triton_compiled.py`) fails if the columns of two
targets are not up to date, and on kernels that spill, that compute in fp64 where the parameter is of another type, or
that do not move 16 bytes at a time where memory is contiguous and aligned. `docs/sass.md` is the same for the CUDA
kernels; `docs/triton-full.log` is what `make triton-full` found with the oldest and the newest Triton.

A kernel is named by its phase, its rule with the number of states, and the dtypes of parameter, gradient and states;
`project` and `shift` by the dtype of the parameter. `gate` comes before the step of a rule with a gate,
`shift` before that of SGD with shifted L2; they have no variants of their own where norms are measured. Under each
target: registers of a thread, of the kernel that is launched plainly, for strided tensors, where norms are measured,
and for both; what is spilled would follow in brackets. On AMD's GPUs the registers are vector registers; scalar
registers that do not suffice are kept in some of them, which uses no memory and is no spill. Blocks have 256 threads on
NVIDIA's GPUs and 512 on AMD's.

16 bytes: loads + stores of 16 bytes in the plain kernel and in the one that measures, on NVIDIA's GPUs or on AMD's,
where a thread has half as many elements. In `step` the plain kernel has two branches with such accesses, the other one.

{lines}
"""


def summary(target: str, rows: Sequence[Row], seconds: float) -> str:
    """A line of the log."""
    wrong = sum(len(faults(row)) for row in rows)
    most = max(rows, key=lambda row: row.registers)
    spilled = sum(row.spills for row in rows)
    moved = max(row.moved for row in rows)
    return (
        f"  {target:<7} {len(rows)} kernels, at most {most.registers} registers ({most.kernel}), {spilled} spills, "
        f"{f'at most {moved} scalar registers in vector registers, ' if moved else ''}{wrong} faults, {seconds:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What Triton makes of its kernels.")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS, help="GPUs (default: all)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write a Markdown page too")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append a line for each target")
    parser.add_argument("--sources", type=Path, metavar="FOLDER", default=ROOT, help="where fastwrs/triton_kernels is")
    asked = parser.parse_args(arguments)
    if asked.write and set(asked.targets) != set(TARGETS):
        parser.error("--write is for all targets")
    rows: list[Row] = []
    wrong: list[str] = []

    def report(*lines: str) -> None:
        # at once: all targets take some time
        print(*lines, sep="\n", file=sys.stderr, flush=True)
        if asked.log:
            with asked.log.open("a", encoding="utf-8") as log:
                print(*lines, sep="\n", file=log)

    report(f"triton {version()}")
    with compiler() as made:
        for target in asked.targets:
            start = time.monotonic()
            of_target = [future.result() for future in made.submit(every_kernel(), target, asked.sources.resolve())]
            found = [fault for row in of_target for fault in faults(row)]
            report(summary(target, of_target, time.monotonic() - start), *(f"    {fault}" for fault in found))
            rows += of_target
            wrong += found
    cells = table(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(*("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells), sep="\n")
    print(f"\n{len(wrong)} faults", *wrong, sep="\n")
    if asked.write:
        asked.write.write_text(document(rows), encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
