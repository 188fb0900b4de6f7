"""Functions of the Triton kernels by themselves, where whole cases would take too many programs or too many numbers."""

# Triton reads these functions as a language of its own, with other types than Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from itertools import product

import interpreted
import numpy as np
import torch
import triton
import triton.language as tl
from tolerances import NORM_BOUND
from torch import Tensor

from fastwrs.triton_kernels import table
from fastwrs.triton_kernels.kernels import _compensated_sum
from fastwrs.triton_kernels.numeric import float_of, one_minus_power, raise_to


@triton.jit
def _sums(words, entry, out, cols, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    col = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    sums = _compensated_sum(words, entry, 0, 0, col, col < cols, HEIGHT, WIDTH, tl.float32)
    tl.store(out + col, sums, col < cols)


@triton.jit
def _floats(bits, out, count, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, float_of(tl.load(bits + at, at < count, other=0)), at < count)


@triton.jit
def _powers(bases, exponents, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, raise_to(tl.load(bases + at), tl.load(exponents + at)))


@triton.jit
def _corrections(logs, counts, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, one_minus_power(tl.load(logs + at), tl.load(counts + at)))


def _added_up(parts: Tensor, height: int, width: int) -> Tensor:
    """What a step adds partial sums up to, a row for each part and a column for each norm group."""
    words = torch.zeros(table.HEADER_WORDS.value + table.ENTRY_WORDS.value, dtype=torch.int64)
    entry, (rows, cols) = words[table.HEADER_WORDS.value :], parts.shape
    words[table.WORKSPACE.value] = parts.data_ptr()
    entry[table.ROW_TILES.value], entry[table.COLS.value], entry[table.PER_SUM.value] = rows, cols, rows * cols
    out = torch.full((cols,), torch.nan)
    interpreted.WATCH.register([parts, out], words)
    _sums[(triton.cdiv(cols, width),)](words, entry, out, cols, height, width)
    return out


def check_partial_sums() -> None:
    """Many rounds of partial sums: each is added once, rounding does not pile up, an infinite one stays one."""
    for rows, cols in ((1, 1), (127, 1), (2048, 1), (5000, 1), (129, 5), (300, 17), (1, 40)):
        for height, width in ((64, 32), (4, 2)):
            parts = torch.rand(rows, cols, generator=torch.Generator().manual_seed(rows)) + 0.1
            error = _added_up(parts, height, width).double() / parts.double().sum(0) - 1
            assert float(error.abs().max()) < 2**-22, f"{rows} x {cols}: sums are off by {float(error.abs().max()):.2g}"
    # Equal numbers are rounded the same way again and again.
    equal = torch.full((400, 1), 1.1)
    error = abs(float(_added_up(equal, 1, 1)) / float(equal.double().sum()) - 1)
    assert error < NORM_BOUND[torch.float32] / 4, f"a sum of equal parts is off by {error:.2g}"
    equal[7] = torch.inf
    assert float(_added_up(equal, 4, 2)) == torch.inf, "an infinite part is lost"


def check_floats() -> None:
    """A learning rate in fp64, rounded by integers to fp32 as the CPU does; below its normal numbers it is 0."""
    plain = torch.rand(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scaled = torch.ldexp(plain, torch.arange(300) - 150)
    ties = 1 + torch.arange(16, dtype=torch.float64) * 2.0**-25
    edges = [0.0, 1e-3, 3.4028235677973366e38, 3.4028234e38, 1e300, 2.0**-126, 2.0**-127, 5e-324, torch.inf, torch.nan]
    values = torch.cat([plain, scaled, ties, torch.tensor(edges, dtype=torch.float64)])
    values = torch.cat([values, -values])
    expected = values.float()
    expected[(expected.abs() < 2.0**-126) & (expected == expected)] = 0
    bits, out = values.view(torch.int64), torch.empty_like(expected)
    interpreted.WATCH.register([bits, out], torch.zeros(1))
    _floats[(1,)](bits, out, len(values), 2048)
    wrong = ~torch.isclose(out, expected, rtol=0, atol=0, equal_nan=True)
    assert not bool(wrong.any()), f"{values[wrong].tolist()} become {out[wrong].tolist()}: not what is right"


def check_powers() -> None:
    """Norms to large powers: also where the base's own exponent, raised, is beyond the range and the result is not."""
    for dtype, bits in ((torch.float32, 24), (torch.float64, 53)):
        bases = torch.tensor([0.999, 1.001, 0.5, 2.0, 1e-15, 1e15, 3.0, 1 / 3, 0.99, 1.01, 0.75, 1.5, 1, 7, 0.1, 10])
        exponents = torch.tensor([300.0, -300, 120, -120, 0.5, 0.5, -1.5, 70, 4000, -4000, 200, 200, 1e4, 40, 30, -30])
        bases, exponents, out = bases.to(dtype), exponents.to(dtype), torch.empty(16, dtype=dtype)
        interpreted.WATCH.register([bases, exponents, out], torch.zeros(1))
        _powers[(1,)](bases, exponents, out, 16)
        truth = bases.numpy().astype(np.longdouble) ** exponents.numpy().astype(np.longdouble)
        # log2 is right to an ulp of 1 (it is between 0 and 1), which the exponent multiplies.
        allowed = (4 + 2 * exponents.abs().numpy()) * 2.0**-bits
        error = np.abs(out.numpy() / truth - 1)
        assert bool((error <= allowed).all()), f"{dtype}: {error} where {allowed} are allowed"


def check_bias_corrections() -> None:
    """1 - beta**t: in fp64 what torch computes, to one rounding of the power; in fp32 without what cancels there."""
    pairs = list(product((0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 0.9999), (1, 2, 3, 10, 30, 100, 1000, 5000)))
    counts = torch.tensor([float(n) for _, n in pairs], dtype=torch.float64)
    logs = torch.tensor([math.log(beta) for beta, _ in pairs], dtype=torch.float64)
    of_torch = torch.tensor([1 - beta**n for beta, n in pairs], dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        narrow, steps, out = logs.to(dtype), counts.to(dtype), torch.empty(64, dtype=dtype)
        interpreted.WATCH.register([narrow, steps, out], torch.zeros(1))
        _corrections[(1,)](narrow, steps, out, 64)
        error = (out.double() - of_torch).abs()
        if dtype == torch.float64:
            early = counts * logs > -0.07  # others may be so close to a tie that they are rounded to its other side
            assert torch.equal(out[early], of_torch[early]), "early bias corrections are not those of torch"
            assert float(error.max()) <= 2.0**-53
        else:
            assert float((error / of_torch).max()) < 2.0**-22, "bias corrections in fp32 have lost digits"


CHECKS = (check_partial_sums, check_floats, check_powers, check_bias_corrections)
