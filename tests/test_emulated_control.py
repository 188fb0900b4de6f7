"""Kernels broken on purpose: the emulated lane has to notice, by wrong values, by its own checks, or as a named race.

Every barrier is removed in turn, which also shows that no kernel has one too many.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import run_lanes
from forked import PASSED, Servers

pytestmark = pytest.mark.emulated_control
ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests/emulated.py"
KERNELS, TILES = "csrc/cuda/kernels.cuh", "csrc/cuda/tiles.cuh"
FINISH, GATE, GATE_MATHS = "csrc/cuda/finish.cuh", "csrc/cuda/gate.cuh", "csrc/norms/gate.h"
LOOK, SHIFT = "csrc/cuda/look.cuh", "csrc/cuda/shift.cuh"
PLAN = "csrc/cuda/plan.cpp"
FILES = KERNELS, TILES, FINISH, GATE, LOOK, SHIFT
NEIGHBOUR = "(unit ? unit - 1 : 0)"
THREADS = 64


class Mutant(NamedTuple):
    """One fault, and what has to be said about it (empty: anything but that all is well)."""

    name: str
    file: str
    old: str
    new: str
    thread_sanitizer: bool = False
    message: str = ""
    triples: tuple[int, ...] = (0,)
    """Of dtypes: which kernels are broken, and run. The functions are the same for all."""


def barrier(comment: str, file: str = KERNELS, *, race: bool = True, message: str = "") -> Mutant:
    old = f"barrier();  // {comment}"
    return Mutant(f"no barrier: {comment}", file, old, "", race, message or "data race" * race)


MUTANTS = (
    barrier("the values are complete"),
    barrier("the partial sums are complete"),
    barrier("the factors are complete"),
    barrier("the sums of this unit are taken"),
    barrier("the sums of the lanes are complete", FINISH),
    barrier("the sums of the warps are complete", TILES),
    barrier("the largest of the warps are complete", TILES),
    barrier("the gate's values are complete", GATE),
    barrier("the gate's partial sums are complete", GATE),
    barrier("the sums of the rows before are taken", LOOK),
    barrier("the parts of these rows are complete", LOOK),
    barrier("the weights are complete", SHIFT),
    barrier("the origins are complete", SHIFT),
    barrier("the partial sums of distances are complete", SHIFT),
    barrier("all threads of this block have left their sums", TILES, race=False, message="a ticket is taken while"),
    barrier("all threads of this block have read their step", TILES, race=False, message="a ticket is taken while"),
    Mutant("no barrier before steps advance", TILES, "if (!barrier_any(last)) return;", "if (!last) return;"),
    Mutant("a bound off by one", TILES, "tile.base < size ?", "tile.base + 1 < size ?"),
    Mutant("no bound", TILES, "numel - tile.base < size ? entry.numel - tile.base : size", "tile * 0 + size"),
    Mutant("no mask on the tail", TILES, "(tile.width - head) / kVector", "(tile.width - head) / kVector + 1"),
    Mutant("no tail", TILES, "const uint32_t covered = per_run * kVector,", "const uint32_t covered = tile.width,"),
    Mutant("a gradient is read that updates nothing", KERNELS, "return !kIdle && (", "return ("),
    Mutant("a moment is not started", KERNELS, "moment.t == C(1) || (entry_.flags & kFresh)", "false"),
    Mutant("a late moment is not started", KERNELS, " || (entry_.flags & kFresh)", ""),
    Mutant("the sum of the neighbour", TILES, "term(k, unit * tile", f"term(k, {NEIGHBOUR} * tile"),
    Mutant("the factor of the neighbour", TILES, "factors + unit * cols", f"factors + {NEIGHBOUR} * cols"),
    Mutant("a step advanced too early", TILES, "== block_count() - 1", "== 0"),
    Mutant("a ticket is kept", TILES, "store(header.ticket, 0u)", "store(header.ticket, 1u)"),
    Mutant(
        "sums finished too early",
        TILES,
        "end - params.entries[tensor].first_block - 1;",
        "(end - params.entries[tensor].first_block) / 2;",
    ),
    Mutant("a tensor's ticket is kept", TILES, "store(ticket, 0u)", "store(ticket, 1u)"),
    Mutant(
        "no barrier after a tensor's ticket", TILES, "if (!barrier_any(last)) return false;", "if (!last) return false;"
    ),
    Mutant(
        "NaN opens a gate",
        GATE_MATHS,
        "return cosine < quotient(delta, root)",
        "return !(cosine >= quotient(delta, root))",
    ),
    Mutant("the channel of the neighbour", LOOK, "if (++rest_ == look_.inner_)", "if (rest_++ == look_.inner_)"),
    Mutant("one channel for two", LOOK, "(first + 1) * inner_", "(first + 2) * inner_"),
    Mutant("slopes for means", LOOK, "rows_ + k * channels_ + channel", "rows_ + channel"),
    Mutant("the last part of a row is forgotten", LOOK, "tile < tiles;", "tile + 1 < tiles;"),
    Mutant("each half of a channel by itself", SHIFT, "row_tiles == 1", "row_tiles <= 2"),
    Mutant("the length of a tile", SHIFT, "C(entry_.rows)", "C(tile_.unit_size)"),
    Mutant("another origin at the end", SHIFT, "origin_of_row<false>(row));", "origin_of_row<false>(0));"),
    Mutant(
        "a state that is not written",
        KERNELS,
        "if constexpr (!kStatesBefore) {\n      return true;",
        "if constexpr (!kStatesBefore) {\n      return Rule::kLook == Look::kNone;",
    ),
    Mutant("unscaled twice", GATE, "if (scalars_.nesterov == 0) write(grad()", "write(grad()"),
    Mutant("a gate for the whole tensor takes nothing", GATE, "gate_along(total, scalars_.eps) : C(0)", "C(0) : C(0)"),
    Mutant("the schedule of the step before", TILES, "(step)) + C(1)", "(step))"),
    Mutant("an overflow of two devices counts", TILES, "(header.found_inf) != 0", "(header.found_inf) == 1"),
    Mutant("vectors anywhere", TILES, "(address) % kWordBytes == 0", "(address) != 0"),
    Mutant("only the first weights are scaled", KERNELS, "factors += groups_of<1, kWalk>(entry).first;", ""),
    Mutant("partial sums of one kind", KERNELS, "k * int64_t(entry_.partial.per_sum) + first", "first"),
    Mutant("no compensation", TILES, "is_finite(next) ? (next - sum) - y : C(0)", "C(0)"),
    Mutant("twice the lr of double tensors", TILES, "magnitude - (896ull << 52)", "magnitude - (895ull << 52)"),
    Mutant("more than a launch takes", PLAN, "kEntryBytes / entry_bytes() * entry_bytes()", "kEntryBytes"),
    Mutant("a row is left out", TILES, "row += lanes) {\n", "row += lanes + (row > 0)) {\n"),
)
UNBROKEN = (
    Mutant("unbroken", KERNELS, "", "", triples=(0, 2)),
    Mutant("unbroken under ThreadSanitizer", KERNELS, "", "", True),
)


class Control:
    """Builds mutants and runs the emulated cases with them, several at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0))))
        self.bases: dict[bool, Future[Path]] = {}
        self.servers: dict[bool, Servers] = defaultdict(partial(Servers, SCRIPT))
        self.verdicts: dict[Mutant, Future[str]] = {}

    def submit(self, asked: list[Mutant]) -> None:
        for thread_sanitizer in sorted({mutant.thread_sanitizer for mutant in asked}):
            self.bases[thread_sanitizer] = self.pool.submit(self.base, thread_sanitizer)
        for mutant in asked:
            self.verdicts[mutant] = self.pool.submit(self.verdict, mutant, len(self.verdicts))

    def base(self, thread_sanitizer: bool) -> Path:
        """The sources, and a build without a fault: that of the emulated lane, brought up to date."""
        sanitizer = "thread" if thread_sanitizer else ""
        folder = self.folder / (sanitizer or "plain")
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        shutil.copytree(run_lanes.build_emulated(sanitizer), folder / "build")
        return folder

    def verdict(self, mutant: Mutant, number: int) -> str:
        """What the cases say about a mutant. Only the objects that the fault changes are compiled again."""
        base = self.bases[mutant.thread_sanitizer].result()
        folder = self.folder / f"mutant{number}"
        shutil.copytree(base, folder)
        source = folder / mutant.file
        text = source.read_text(encoding="utf-8")
        assert not mutant.old or text.count(mutant.old) == 1, f"{mutant.file} has it {text.count(mutant.old)} times"
        source.write_text(text.replace(mutant.old, mutant.new) if mutant.old else text, encoding="utf-8")
        for command in self.commands(folder, mutant):
            subprocess.run(command, shell=True, cwd=folder / "build/objects", check=True)
        threads = THREADS if mutant.thread_sanitizer else 256
        environment = run_lanes.emulated_environment(base, "thread" if mutant.thread_sanitizer else "")
        servers, built = self.servers[mutant.thread_sanitizer], folder / "build/lib"
        said = servers.test(base / "build/lib", built, threads, *mutant.triples, **environment)
        shutil.rmtree(folder)
        return said

    @staticmethod
    def commands(folder: Path, mutant: Mutant) -> Iterator[str]:
        """How ninja would compile the objects with the fault, and link; without optimisation, which takes longer."""
        ninja = [sys.executable, "-m", "ninja", "-t", "commands"]
        built = run_lanes.EMULATED / ("thread" if mutant.thread_sanitizer else "plain") / "build"
        changed = ["cuda_plan.o"] if mutant.file == PLAN else [f"kernels_{k}.o" for k in mutant.triples]
        for target in (*([name] for name in changed), []):
            listed = subprocess.run(
                [*ninja, *target], cwd=folder / "build/objects", capture_output=True, text=True, check=True
            )
            command = listed.stdout.splitlines()[-1].replace(str(built), str(folder / "build"))
            yield re.sub(r" -O[123]\b", " -O0", command.replace(f"{ROOT}/csrc", f"{folder}/csrc"))

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        for servers in self.servers.values():
            servers.close()


@pytest.fixture(scope="module")
def control(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    control = Control(tmp_path_factory.mktemp("emulated").resolve())
    selected = [getattr(item, "callspec", None) for item in request.session.items]
    control.submit([spec.params["mutant"] for spec in selected if spec and "mutant" in spec.params])
    yield control
    control.close()
    shutil.rmtree(control.folder)


by_name = partial(pytest.mark.parametrize, "mutant", ids=lambda mutant: mutant.name.replace(" ", "_"))


@by_name(UNBROKEN)
def test_the_unbroken_build_passes(control: Control, mutant: Mutant) -> None:
    said = control.verdicts[mutant].result()
    assert PASSED in said, said


@by_name(MUTANTS)
def test_caught(control: Control, mutant: Mutant) -> None:
    said = control.verdicts[mutant].result()
    print("\n".join(said.splitlines()[-40:]))
    assert PASSED not in said, "this mutant survives: the lane has a hole"
    assert mutant.message in said


def test_every_barrier_has_a_mutant() -> None:
    """A barrier that is added without one is not shown to be needed."""
    there = sum((ROOT / file).read_text(encoding="utf-8").count("barrier();  //") for file in FILES)
    assert there == sum(mutant.old.startswith("barrier();") for mutant in MUTANTS)
