"""Triton kernels broken on purpose: the interpreted lane has to notice, by wrong values or by its own checks."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import interpreted_copy
import pytest
from interpreted import PASSED

pytestmark = pytest.mark.interpreted
# ruff: noqa: E501
ROOT = Path(__file__).resolve().parents[1]
KERNELS, NORMS, RULES, NUMERIC, ACCESS, GATE, LOOK, SHIFT = (
    f"fastwrs/triton_kernels/{name}.py"
    for name in ("kernels", "norms", "rules", "numeric", "access", "gate", "look", "shift")
)
NOT_AN_OPERAND = "belong to no operand"


class Mutant(NamedTuple):
    """One fault, and what has to be said about it (empty: anything but that all is well)."""

    name: str
    file: str
    old: str
    new: str
    message: str = ""
    what: str = "cases"
    """The part of the tests that it faces."""


MUTANTS = (
    Mutant("no mask on a load", KERNELS, "grad = tl.load(g, mask, other=0)", "grad = tl.load(g)", NOT_AN_OPERAND),
    Mutant("no mask on a store", KERNELS, "tl.store(a0, s0.to(TYPES[2]), mask)", "tl.store(a0, s0.to(TYPES[2]))"),
    Mutant("a mask off by one", KERNELS, "    mask = within < count\n    p, before", "    mask = within <= count\n    p, before"),
    Mutant("an offset off by one", ACCESS, "start = tile * size\n", "start = tile * size + 1\n"),
    Mutant("a wrong tile of a unit", ACCESS, "start = end - unit + tile % row_tiles * TILE", "start = end - unit + tile * TILE"),
    Mutant("a claim of alignment that is not true", KERNELS, "if ((flags & words.ALIGNED) != 0) & whole:", "if whole:", "no multiple"),
    Mutant("a step advanced twice", KERNELS, "tl.load(step, mask, other=0) + 1", "tl.load(step, mask, other=0) + 2", "step counts"),
    Mutant("a ticket that stays", KERNELS, "        tl.store(ticket, 0)\n", "", "ticket"),
    Mutant("found_inf ignored", ACCESS, "    return found != 0", "    return found > 1e30"),
    Mutant("the momentum is not started", KERNELS, "(t == 1) | ((flags & words.FRESH) != 0)", "t < 0"),
    Mutant("the norm of the neighbour", NORMS, "tl.gather(sums, at - row, 0)", "tl.gather(sums, tl.maximum(at - row - rows // 8, 0), 0)"),
    Mutant("a group that loses rows", NORMS, "while step < rows:", "while 2 * step < rows:"),
    Mutant("rescale off by a step", NORMS, "multiple = every * tl.floor(quotient(t, every)) == t", "multiple = every * tl.floor(quotient(t - 1, every)) == t - 1"),
    Mutant("shrink with the new norm", KERNELS, "            x = tl.where(shrink, before, after)\n            if groups", "            x = after\n            if groups"),
    Mutant("a norm of 0 divided by", NORMS, "whole = (updated > 0) & is_finite(updated)", "whole = updated == updated"),
    Mutant("no bias correction of the first moment", RULES, "step_size, inverse1 = quotient(lr, correction1)", "step_size, inverse1 = quotient(lr, 1.0 + 0 * correction1)"),
    Mutant("no bias correction of the second", RULES, "quotient(1.0, square_root(correction2))", "quotient(1.0, 1.0 + 0 * square_root(correction2))"),
    Mutant("too few terms of a series", NUMERIC, "18 if log_base.dtype == tl.float64 else 10", "18 if log_base.dtype == tl.float64 else 2"),
    Mutant("early bias corrections of another rounding", NUMERIC, "return 1 - (1 - result) if", "return result if", "not those of torch", "functions"),
    Mutant("bias corrections that cancel", NUMERIC, "tl.where(x > -0.5, -x * series, 1 - tl.exp(x))", "1 - tl.exp(x)", "bias corrections", "functions"),
    Mutant("Nesterov without the gradient", RULES, "g + momentum * s0, s0)\n    return w - lr", "momentum * s0, s0)\n    return w - lr"),
    Mutant("only the first partial sums", KERNELS, "first += HEIGHT * lanes", "first += row_tiles", "sums are off", "functions"),
    Mutant("rounding of partial sums lost", NUMERIC, "    x = x - lost\n", "", "equal parts", "functions"),
    Mutant("an infinite part spoils the rest", NUMERIC, "tl.where(is_finite(new), (new - total) - x, 0)", "(new - total) - x", "infinite part", "functions"),
    Mutant("sums of all tensors in one place", ACCESS, "workspace = tl.load(table + words.WORKSPACE).to(tl.pointer_type(COMPUTE)) + tl.load(entry + words.PARTIAL_AT)", "workspace = tl.load(table + words.WORKSPACE).to(tl.pointer_type(COMPUTE))"),
    Mutant("a held tile written over", KERNELS, "new = new + (tl.where(k == j, x, held[j]),)", "new = new + (tl.where(k >= j, x, held[j]),)"),
    Mutant("the gradient stays scaled", ACCESS, "        if writes:\n            tl.store(g, grad.to(GRAD), mask)\n", ""),
    Mutant("rescaled with a learning rate of 0", NORMS, "grouped & (lr != 0) & (every > 0)", "grouped & (every > 0)"),
    Mutant("rescaled after the window", NORMS, " & (t < tl.load(control + words.STOP))", ""),
    Mutant("ties of a learning rate not to even", NUMERIC, " + ((magnitude >> 29) & 1)", "", "what is right", "functions"),
    Mutant("a power that leaves the range", NUMERIC, "steps = tl.floor(whole + rest)", "steps = tl.floor(whole)", "are allowed", "functions"),
    Mutant("columns mixed up", KERNELS, "return mine == col", "return mine >= col"),
    Mutant("sums finished too early", KERNELS, "unit * strips + strip, row_tiles)", "unit * strips + strip, tl.maximum(row_tiles - 1, 1))"),
    Mutant("sums finished by the program of the last part", KERNELS, "if is_last(table, entry, unit * strips + strip, row_tiles):", "if tile // strips % row_tiles == row_tiles - 1:"),
    Mutant("the ticket of sums stays", ACCESS, "    tl.store(ticket, 0, last)\n", "", "a ticket of the table"),
    Mutant("one ticket for all columns of a unit", KERNELS, "unit * strips + strip, row_tiles", "unit * strips, row_tiles"),
    Mutant("one ticket for all units", KERNELS, "unit * strips + strip, row_tiles", "strip, row_tiles"),
    Mutant("tickets of all tensors in one place", ACCESS, "ticket += tl.load(entry + words.FIRST_TICKET) + number", "ticket += number"),
    Mutant("the norm after for that before", KERNELS, "norms[0], norms[1 if MEASURE else 0])\n", "norms[0], norms[0])\n"),
    Mutant("a gate decides too early", GATE, "tl.load(gate + words.PROGRAMS)):", "tl.load(gate + words.PROGRAMS) - 1):", what="gates"),
    Mutant("a gate forgets a row", GATE, "there = row < channels\n", "there = row < channels - 1\n", what="gates"),
    Mutant("a gate forgets parts of rows", LOOK, "        first += lanes\n", "        first += parts\n", what="gates"),
    Mutant("the ticket of a gate stays", ACCESS, "    tl.store(ticket, 0, last)\n", "", "a ticket of the table", "gates"),
    Mutant("NaN opens a gate", GATE, "((_cosine(totals, eps) < limit) == 0)", "(_cosine(totals, eps) >= limit)", what="gates"),
    Mutant("a gate that never opens as a whole", GATE, "tl.where(opens, WHOLE, CLOSED)", "CLOSED", what="gates"),
    Mutant("the bound of another length", GATE, "square_root(tl.load(gate + words.ROWS)", "square_root(tl.load(gate + words.NUMEL)", what="gates"),
    Mutant("what the neighbouring channel loses", LOOK, "_advance_by(start // inner % channels, more", "_advance_by((start // inner + 1) % channels, more", what="gates"),
    Mutant("what the neighbouring column loses", LOOK, "return (start + within) // inner % channels", "return (start + within + 1) // inner % channels", what="gates"),
    Mutant("channels do not begin again", LOOK, "_, channel = _advance_by", "channel, _ = _advance_by", what="gates"),
    Mutant("nothing is taken out", RULES, "step - along * w, step)", "step, step)", what="gates"),
    Mutant("weight decay of a closed gate", RULES, "tl.where(is_open, open_keep, keep)", "keep", what="gates"),
    Mutant("states are not stored", GATE, "        tl.store(addresses[k], narrow, mask)\n", "", what="gates"),
    Mutant("the momentum is not projected", GATE, "if is_open & (tl.load(control + words.PROJECT_MOMENTUM) != 0):", "if tl.load(control + words.PROJECT_MOMENTUM) < 0:", what="gates"),
    Mutant("the gradient unscaled twice", GATE, "tl.load(control + words.NESTEROV) == 0, TYPES[1])", "True, TYPES[1])", what="gates"),
    Mutant("a gate of the gradient that goes down", GATE, "    return tl.abs(quotient(quotient(totals[1], weight), grad))", "    return quotient(quotient(totals[1], weight), grad)", what="gates"),
    Mutant("one slope for all", SHIFT, "tl.load(slopes + channel, mask", "tl.load(slopes + channel * 0, mask", what="shifts"),
    Mutant("slopes for means", SHIFT, "mean = tl.load(slopes + tl.load(look + words.GROUPS) + channel", "mean = tl.load(slopes + channel", what="shifts"),
    Mutant("a tensor that was not looked at", SHIFT, "if tl.load(entry + words.GATE_AT) >= 0:", "if tl.load(entry + words.GATE_AT) >= -1:", what="shifts"),
    Mutant("a deviation of n, not n - 1", SHIFT, "quotient(squares, length - 1)", "quotient(squares, length)", what="shifts"),
    Mutant("constant channels are shifted", SHIFT, "tl.where(squares <= 0, 0, lam", "tl.where(squares < 0, 0, lam", what="shifts"),
    Mutant("a mean without its origin", SHIFT, "channel, origin + average, there)", "channel, average, there)", what="shifts"),
    Mutant("an origin that nobody leaves", SHIFT, "tile % row_tiles == 0, COMPUTE)", "tile < 0, COMPUTE)", what="shifts"),
    Mutant("an origin that no column leaves", SHIFT, "is_top & (col < cols)", "is_top & (col < 0)", what="shifts"),
    Mutant("distances that are not squared", SHIFT, "tl.sum(distance * distance), tile >= 0", "tl.sum(distance), tile >= 0", what="shifts"),
    Mutant("columns that are not squared", SHIFT, "tl.sum(distance * distance, axis=0)", "tl.sum(distance, axis=0)", what="shifts"),
    Mutant("an origin of zero", SHIFT, "origin, distances, total = first, ", "origin, distances, total = first * 0, ", what="shifts"),
    Mutant("the term without lam * mu", RULES, "(w - mean) + lam * mean)", "(w - mean))", what="shifts"),
)  # fmt: skip
UNBROKEN = Mutant("nothing", KERNELS, "", "", what="")


class Control:
    """Copies of the package, each with one fault, run two at a time."""

    def __init__(self, folder: Path, mutants: list[Mutant]) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(2)
        self.verdicts: dict[Mutant, Future[str]] = {m: self.pool.submit(self._run, m) for m in mutants}

    def _run(self, mutant: Mutant) -> str:
        copy = self.folder / mutant.name.replace(" ", "_")
        shutil.copytree(ROOT / "fastwrs", copy / "fastwrs", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        for library in (ROOT / "fastwrs").glob("_C*.so"):
            (copy / "fastwrs" / library.name).symlink_to(library)
        if mutant.old:
            path = copy / mutant.file
            text = path.read_text(encoding="utf-8")
            assert text.count(mutant.old) == 1, f"{mutant.name}: {text.count(mutant.old)} places in {mutant.file}"
            path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
        said = interpreted_copy.run(copy, mutant.what)
        shutil.rmtree(copy)
        return said


@pytest.fixture(scope="module")
def control(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    selected = [getattr(item, "callspec", None) for item in request.session.items]
    mutants = [spec.params["mutant"] for spec in selected if spec and "mutant" in spec.params]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # for the processes
        control = Control(tmp_path_factory.mktemp("interpreted").resolve(), mutants)
        yield control
        control.pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("mutant", [UNBROKEN], ids=lambda mutant: mutant.name)
def test_the_unbroken_kernels_pass(control: Control, mutant: Mutant) -> None:
    said = control.verdicts[mutant].result()
    assert PASSED in said and said.endswith("exit status 0"), said


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "_"))
def test_caught(control: Control, mutant: Mutant) -> None:
    said = control.verdicts[mutant].result()
    print("\n".join(said.splitlines()[-40:]))
    assert not said.endswith("exit status 0"), "this mutant survives: the lane has a hole"
    assert said.endswith("exit status 1"), "it did not fail by a test"
    assert mutant.message in said
