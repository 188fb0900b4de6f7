"""The paired t-test of Table I."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple


class Paired(NamedTuple):
    """A two-sided paired t-test: the mean of a - b, t, its degrees of freedom, p."""

    difference: float
    t: float
    df: int
    p: float


def paired_t(a: Sequence[float], b: Sequence[float]) -> Paired:
    """``t = mean(d) / (s(d) / sqrt(n))`` with d = a - b and s the sample standard deviation, as in the paper's Table I.

    Raises:
        ValueError: the sequences are not of the same length, or shorter than 2.
    """
    from scipy import stats

    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a paired test needs two sequences of the same length >= 2, got {len(a)} and {len(b)}")
    difference = statistics.mean(x - y for x, y in zip(a, b, strict=True))
    found: Any = stats.ttest_rel(a, b)
    return Paired(difference, float(found.statistic), len(a) - 1, float(found.pvalue))
