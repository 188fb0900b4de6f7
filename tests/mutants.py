"""Faults to plant in the kernels, and how a copy of the package is built with one of them and put to the tests.

A mutant is a textual replacement in one file whose ``old`` text must be there exactly once, so that a list that has
fallen behind the code is noticed. Every mutant faces the same tests, those of ``face_the_tests``, in a process of its
own that loads the faulty extension.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import forked

if TYPE_CHECKING:
    from cases import Case

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
PATCHING = threading.Lock()
TRIPLES = re.compile(r"(#define FASTWRS_DTYPE_TRIPLES\(X\)).*?\n(?=\n)", re.DOTALL)
FEW = (("float",) * 3, ("bfloat16", "bfloat16", "float"), ("float16", "float16", "float"))


class Mutant(NamedTuple):
    """One fault."""

    name: str
    file: str
    old: str
    new: str
    triples: int = 1
    """How many of ``FEW`` it is compiled for, and put to the tests with: one, unless others see the fault alone."""


def _adam(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "csrc/rules/adam.h", old, new)


def _sgd(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "csrc/rules/sgd.h", old, new)


def _adamp(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "csrc/rules/adamp.h", old, new)


def _sgdp(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "csrc/rules/sgdp.h", old, new)


def _gate(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "csrc/norms/gate.h", old, new)


def _shift(name: str, old: str, new: str, triples: int = 1) -> Mutant:
    return Mutant(name, "csrc/norms/shift.h", old, new, triples)


def _shifted(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "csrc/rules/sgd_shifted.h", old, new)


def _projection(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "csrc/norms/projection.h", old, new)


def _measured(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "csrc/norms/measured.h", old, new)


def _bindings(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "csrc/bindings.cpp", old, new)


def _worker(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "csrc/cpu/worker.h", old, new)


def _origin(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "csrc/cpu/origin.h", old, new)


def _updates(name: str, old: str, new: str, triples: int = 1) -> Mutant:
    return Mutant(name, "csrc/cpu/leaf_updates.h", old, new, triples)


def _sums(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "csrc/cpu/leaf_sums.h", old, new)


def _looks(name: str, old: str, new: str) -> Mutant:
    return Mutant(name, "csrc/cpu/leaf_looks.h", old, new)


MUTANTS = (
    # the rules
    _adam("bias correction 1 of the step before", "c.log_beta1, t)", "c.log_beta1, t - 1)"),
    _adam("bias correction 2 of the step before", "c.log_beta2, t)", "c.log_beta2, t - 1)"),
    _adam("no decoupled decay", "T(1) - lr * c.decoupled_decay", "T(1)"),
    _adam("no coupled decay in adam", "s.coupled_decay != 0 ? g + s.coupled_decay * w : g", "g"),
    Mutant("eps under the root", "csrc/rules/moments.h", "square_root(v) *", "square_root(v + eps) *"),
    _adam("amsgrad without its maximum", "state[2] = largest = maximum(", "state[2] = maximum("),
    _sgd("no weight decay in sgd", "s.weight_decay != 0 ? g + s.weight_decay * w : g", "g"),
    _sgd("no nesterov", "s.nesterov != 0 ? g + s.momentum * buffer : buffer", "buffer"),
    _sgd("no dampening", "1 - h[kDampening]", "1"),
    _sgd("no first step", "s.first != 0 ? g :", ""),
    _adamp("no ratio of weight decay", "gate.open ? s.open_keep : s.keep", "s.keep"),
    _adamp("no nesterov in adamp", "s.nesterov != 0 ? s.beta1 * state[0] + s.one_minus_beta1 * g :", ""),
    _sgdp("a buffer that is always projected", "s.project_momentum != 0 ? step : state[0]", "step"),
    # the gate
    _gate("a gate that forgets the length of rows", "quotient(delta, root)", "delta"),
    _gate("the cosine has a sign", "cosine < 0 ? -cosine : cosine", "cosine"),
    _gate(
        "along weights that are not of length 1",
        "quotient(quotient(sums[kStepWeight], norm), norm)",
        "quotient(sums[kStepWeight], norm)",
    ),
    _worker("the last row alone decides", "largest = maximum(largest, gate_cosine(", "largest = (gate_cosine("),
    _looks("a gate on another product", "gate_term(k, u, g, w)", "gate_term(k, u, g + w, w)"),
    Mutant("no rows for the gate", "csrc/norms/geometry.cpp", "- 1) & ~int64_t(1);", "- 1);"),
    # the shifted term
    _shifted("the term without lam * mu", "+ s.lam * shift.mean)", ")"),
    _shifted("not of the distance from the mean", "(w - shift.mean)", "w"),
    _shifted("always shifted", "shift.there ? g + (", "true ? g + ("),
    _shifted(
        "weights decay or are shifted",
        "s.sgd);",
        "{s.sgd.lr, s.sgd.momentum, s.sgd.one_minus_dampening, 0, s.sgd.nesterov, s.sgd.first});",
    ),
    _shift("a deviation of n, not n - 1", "length - 1", "length"),
    _shift("eps * s, not eps / s", "quotient(eps, deviation)", "eps * deviation"),
    _shift("constant channels are shifted", "squares <= 0 ? T(0) :", "", triples=2),
    _shift("sums that cancel", "return first + quotient(sum, count);", "return first * 0;"),
    _shift("squares about the origin", "- average * sums[kDistance]", ""),
    _shift("a mean without its origin", "*mean = origin + average", "*mean = average"),
    _origin("the origin of another channel", "channel % g.cols;\n  const int64_t count", "0;\n  const int64_t count"),
    _worker(
        "what the neighbour is told",
        "of_channel[channel]);\n      });",
        "of_channel[channel ? channel - 1 : 0]);\n      });",
    ),
    _worker("one mean for all", "found + call.look.head + k * g.channels;", "found + call.look.head;"),
    _updates("only the first slope", "kEach ? told0_each[i] :", "kEach ? told0_each[0] :"),
    # schedule, rescale, shrink
    _projection("rescale a step late", "every * whole(t / every) == t", "every * whole((t - 1) / every) == t - 1"),
    _projection("stop is included", "t < stop", "t <= stop"),
    _projection("start is excluded", "start <= t", "start < t"),
    _projection("rescale with lr 0", "p.rescale = lr != 0 &&", "p.rescale ="),
    _projection("a zero norm is scaled", "norm > 0 && is_finite(norm)", "is_finite(norm)"),
    _projection("an infinite norm is scaled", "norm > 0 && is_finite(norm)", "norm > 0"),
    _projection("an epsilon in the quotient", "quotient(T(target), norm)", "quotient(T(target), norm + T(1e-12))"),
    _measured("shrink by the norm after", "shrink_factor(before,", "shrink_factor(updated,"),
    # norms
    Mutant(
        "norms of the wrong axis",
        "csrc/bindings_tensors.h",
        "view.reduced = axes;",
        "for (int64_t mask = axes, d = axes = mask > 0 ? 0 : mask; mask > 0 && d < view.dims; ++d) "
        "axes |= ((mask >> d) & 1) << (view.dims - 1 - d);\n  view.reduced = axes;",
    ),
    Mutant("norms in the wrong order", "csrc/norms/geometry.cpp", "if (!row_major && !dim.reduced)", "if (false)"),
    _sums("sums without a last element", "j < m; ++j) lanes[j] += term", "j + (n == m) < m; ++j) lanes[j] += term"),
    _sums(
        "running sums",
        "carry(block, block + width, width, a.blocks);",
        "for (int64_t j = 0; a.blocks != 0 && j < width; ++j) block[j] += block[width + j];\n"
        "  for (int64_t k = 1; a.cols == 1 && k < a.width; a.levels[k++] = 0) a.levels[0] += a.levels[k];\n"
        "  carry(block, block + width, width, a.blocks = 0);",
    ),
    _worker(
        "the factors of another strip",
        "b.unit * w.plan.geometry.cols + b.first_column;\n      for_runs",
        "b.unit * w.plan.geometry.cols;\n      for_runs",
    ),
    Mutant("an item for a range of them", "csrc/cpu/plan.h", "end_item * units_per_item)", "units_per_item)"),
    _updates(
        "weights that are not updated are not widened",
        "if (kUpdates<Rule> || !std::is_same_v<P, C>)",
        "if (kUpdates<Rule>)",
        triples=2,
    ),
    _updates(
        "u is measured by the gradient",
        "terms[kUpdate] = u * u;",
        "terms[kUpdate] = g * g;",
    ),
    _sums("the rest of a row is its beginning", "add(whole, n - whole);", "add(0, n - whole);"),
    _sums("the last turn of a block", "lanes[k][j] += terms[k];", "lanes[k][j] = terms[k];"),
    _sums(
        "a block is carried once",
        "bits = blocks; bits & 1; bits >>= 1, level += width",
        "bits = blocks & 1; bits; bits = 0, level += width",
    ),
    # the update
    _updates(
        "no last element",
        "C(widen(param[i]));\n      C g",
        "C(widen(param[i]));\n      if (i + 1 == a.n) return;\n      C g",
    ),
    _updates("maximize ignored", "const C sign = a.maximize ? C(-1) : C(1)", "const C sign = C(1)"),
    _worker("a row is scaled by the factor of another", "find_factor(row - 1)", "find_factor(row)"),
    _updates(
        "the unscaled gradient is not written",
        "g = g / grad_scale;\n        grad[i] = narrow(g, G());",
        "g = g / grad_scale;",
    ),
    Mutant(
        "scattered by the parameter's strides",
        "csrc/cpu/gather.h",
        "[size](char* memory, const char* from, int64_t count, int64_t stride) {",
        "[size, &geometry](char* memory, const char* from, int64_t count, int64_t stride) {\n"
        "stride = geometry.walk.back().stride[0];",
    ),
    Mutant("bfloat16 is cut off", "csrc/core/dtypes.h", "(u + 0x7fffu + ((u >> 16) & 1u)) >> 16", "u >> 16", triples=2),
    Mutant(
        "float16 is cut off",
        "csrc/core/dtypes.h",
        "(a + 0xfffu + ((a >> 13) & 1u) - (112u << 23)) >> 13",
        "(a - (112u << 23)) >> 13",
        triples=3,
    ),
    # the call
    _bindings("found_inf is compared with 1", "job.found_inf.value != 0", "job.found_inf.value == 1"),
    _bindings("fresh ignored", ".fresh = true;", ".fresh = false;"),
    _bindings("lr tensors ignored", "h[kLrTensor] < 0 ? Number{h[kLr]} :", "true ? Number{h[kLr]} :"),
    _bindings("the first record for all", "row = a.groups[i];", "row = 0;"),
    Mutant("steps stand still", "csrc/cpu/engine.cpp", "*job.steps[i].step = finished[i];", ";"),
    _measured(
        "another norm is measured", "quotient(norm[kUpdate], norm[kBefore])", "quotient(norm[kUpdated], norm[kBefore])"
    ),
)

# What tests of values cannot see, and AddressSanitizer does.
OUT_OF_BOUNDS = (_worker("scratch one too short", "s.resize(sums)", "s.resize(sums - 1)"),)


def setup_module(folder: Path) -> ModuleType:
    """The setup.py of a folder, imported without running it."""
    spec = importlib.util.spec_from_file_location("fastwrs_setup", folder / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module


def copy_of_the_package(folder: Path, triples: int) -> Path:
    """What a build needs, in a folder: csrc and setup.py, and fastwrs in lib, where the extension comes to lie.

    Its steps take the first triples of dtypes of FEW alone, which is quicker to compile.
    """
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    dtypes = folder / "csrc/core/dtypes.h"
    few = " ".join(f"X({', '.join(triple)})" for triple in FEW[:triples])
    text, count = TRIPLES.subn(rf"\1 {few}\n", dtypes.read_text(encoding="utf-8"))
    assert count == 1
    dtypes.write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "fastwrs", folder / "lib/fastwrs", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy2(ROOT / "setup.py", folder)
    return folder


def build(folder: Path, mutant: Mutant | None = None, **environment: str) -> str | None:
    """Builds the extension in a copy, with a mutant planted; returns why that failed, if it did.

    For speed it has plain code only and no optimisation. ninja makes only what the mutant changes where the folder
    is a copy of one that has been built: all paths are relative.
    """
    if mutant is not None:
        path = folder / ("lib" if mutant.file.startswith("fastwrs/") else "") / mutant.file
        text = path.read_text(encoding="utf-8")
        if (count := text.count(mutant.old)) != 1:
            return f"the list of mutants is out of date: {mutant.old!r} is {count} times in {mutant.file}"
        path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    settings = {"FASTWRS_CUDA": "0", **environment}
    with PATCHING, mock.patch.dict(os.environ, settings):  # one at a time: others patch the same
        setup = setup_module(folder)
        with mock.patch.object(setup, "is_x86", return_value=False):
            target = folder / "lib/fastwrs/_C.abi3.so"
            rules = setup.ninja_file(setup.find_compiler(), setup.find_torch(), target)
    objects = folder / "objects"
    objects.mkdir(exist_ok=True)
    rules = re.sub("-O[13]( -g1)?", "-O0", rules.replace(str(folder.resolve()), ".."))
    (objects / "build.ninja").write_text(rules, encoding="utf-8")
    ninja = [*setup.BuildExtension.find_ninja(), "-C", str(objects), "-j1"]
    done = subprocess.run(ninja, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else None


def by_turns(cases: list[Case]) -> list[Case]:
    """Each rule and theme in turn, so that a fault that few cases see does not wait for the end of the list."""
    piles: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        piles.setdefault((case.rule, case.theme), []).append(case)
    return [case for turn in itertools.zip_longest(*piles.values()) for case in turn if case is not None]


def face_the_tests(triples: tuple[tuple[str, ...], ...]) -> None:
    """The tests that every mutant faces: all cases of a step, projections, norms. Raises at the first that fails."""
    import test_cpu
    from calls import one_thread
    from cases import CASES

    few = {tuple({"float": "float32", "double": "float64"}.get(name, name) for name in triple) for triple in triples}
    tests = []
    for name, dtype in test_cpu.FLOATS.items():
        tests += [(test_cpu.test_rescale_op, (dtype,)), (test_cpu.test_channel_norms_op, (dtype,))]
        if name in {triple[0] for triple in few}:
            tests += [(test_cpu.test_norms_after_a_rescale, (28_672, axis, dtype)) for axis in ("out", "tensor", (0,))]
    steps = [(test_cpu.test_step, (case,)) for case in by_turns([case for case in CASES if case.dtypes in few])]
    tests = steps[:150] + tests + steps[150:]
    with one_thread():
        for test, arguments in tests:
            print(test.__name__, getattr(arguments[0], "id", arguments), flush=True)
            test(*arguments)


if __name__ == "__main__":
    importlib.import_module("test_cpu")  # what is slow to import
    forked.serve(lambda triples: face_the_tests(FEW[: int(triples)]))
