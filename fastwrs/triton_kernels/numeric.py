"""Scalar arithmetic of the Triton kernels: what ``csrc/core/numeric.h`` is to the C++ kernels.

fp32 stays fp32 (an fp64 instruction in a fp32 kernel would cost more than all others), and everything has the same
rounding compiled and interpreted, but for ``exp2`` and ``log2``, which GPUs approximate.
"""

# Triton reads these functions as a language of its own, with other types than Python's.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def quotient(a, b):
    """A correctly rounded division; ``/`` is approximate in fp32."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a + tl.zeros_like(b), b)


@triton.jit
def square_root(x):
    """A correctly rounded root."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def is_finite(x):
    """Neither infinite nor NaN."""
    return x - x == 0


@triton.jit
def compensated(total, lost, x):
    """``total + x``, and what rounding has added to it; of an infinite sum nothing."""
    x = x - lost
    new = total + x
    return new, tl.where(is_finite(new), (new - total) - x, 0)


@triton.jit
def one_minus_power(log_base, n):
    """``1 - base**n`` as ``-expm1(n * log(base))``, without the cancellation where the power is near 1.

    Near 0 the Taylor series in Horner's form: 10 terms leave 1e-10 of the result at 0.5, 18 leave 1e-21. In fp64 the
    power is rounded all the same: enough is left, and this is what torch and the C++ kernels compute.
    """
    x = n * log_base
    terms: tl.constexpr = 18 if log_base.dtype == tl.float64 else 10
    series = tl.zeros_like(x) + 1
    for k in tl.static_range(terms, 1, -1):
        series = 1 + series * x * (1.0 / k)
    result = tl.where(x > -0.5, -x * series, 1 - tl.exp(x))
    return 1 - (1 - result) if log_base.dtype == tl.float64 else result


@triton.jit
def raise_to(base, exponent):
    """``base**exponent`` for a positive base.

    The base's own exponent is multiplied apart: as part of the logarithm it would cost a norm of 1e15 six bits.
    """
    if base.dtype == tl.float64:
        bits = base.to(tl.int64, bitcast=True)
        power = ((bits >> 52) & 0x7FF) - 1023
        mantissa = ((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).to(tl.float64, bitcast=True)
        coarse = ((exponent.to(tl.int64, bitcast=True) >> 27) << 27).to(tl.float64, bitcast=True)
    else:
        bits = base.to(tl.int32, bitcast=True)
        power = ((bits >> 23) & 0xFF) - 127
        mantissa = ((bits & 0x7FFFFF) | (127 << 23)).to(tl.float32, bitcast=True)
        coarse = ((exponent.to(tl.int32, bitcast=True) >> 12) << 12).to(tl.float32, bitcast=True)
    power = power.to(base.dtype)
    whole = coarse * power  # exact: few bits times few bits
    rest = (exponent - coarse) * power + exponent * tl.log2(mantissa)
    steps = tl.floor(whole + rest)  # of the result: that of `whole` alone may be far from it
    return tl.exp2(steps) * tl.exp2((whole - steps) + rest)


@triton.jit
def float_of(bits):
    """The value of a double in fp32, by integers. Below fp32's normal numbers: 0."""
    sign = ((bits >> 32) & 0x80000000).to(tl.int32)
    magnitude = bits & 0x7FFFFFFFFFFFFFFF
    rounded = ((magnitude - (896 << 52) + 0xFFFFFFF + ((magnitude >> 29) & 1)) >> 29).to(tl.int32)
    special = tl.where(magnitude > (0x7FF << 52), 0x7FC00000, 0x7F800000)
    value = tl.where(magnitude < (897 << 52), 0, tl.where(magnitude >= (1151 << 52), special, rounded))
    return (sign | value).to(tl.float32, bitcast=True)
