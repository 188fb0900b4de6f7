"""What a monitor costs: steps on the CPU that are measured against the same steps that are not, in turns: `make bench`.

The monitor keeps nothing in full, so that each measured step pays for its reduction too, as it does in a long run.
"""

from __future__ import annotations

import math

import pairs
import pytest
from test_step import Comparison

import fastwrs
from fastwrs.benchmark import lists
from fastwrs.benchmark.turns import Ratio, timed

COMPARISONS = [
    (every, Comparison(f"resnet50 {rule}+WRS, measured {words} / not", rule, lists.resnet50, target=goal, repeat=every))
    for rule in ("AdamW", "SGD")
    for every, words, goal in ((1, "every step", 1.07), (10, "1 step in 10", 1.015))
]


@pytest.mark.parametrize(("every", "case"), COMPARISONS, ids=[case.name for _, case in COMPARISONS])
def test_monitor(every: int, case: Comparison, benchmark, record, rounds):
    kind, options = getattr(fastwrs, case.rule), pairs.OPTIONS[case.rule]
    # One optimizer with the monitor on and off: two would not share what is in the cache.
    params = pairs.make_params(case.shapes())
    optimizer = kind(pairs.groups(params, case.axis), backend="cpu", **options)
    monitor = fastwrs.Monitor(optimizer, every=every, channels=0)

    def measured() -> None:
        for _ in range(every):
            optimizer.step()

    def plain() -> None:
        optimizer.unwatch(monitor)
        measured()
        optimizer.watch(monitor)

    plain_times: list[float] = []
    benchmark.pedantic(
        measured,
        setup=lambda: plain_times.append(timed(plain, 1) / every),
        rounds=rounds,
        warmup_rounds=3,
    )
    times = [seconds / every for seconds in benchmark.stats.stats.data]
    steps = every * (len(times) + 3)
    assert monitor.steps == steps
    norms = monitor.curve("norm_after", "max")["params[0][0]"]
    assert len(norms) == len(times) + 3
    assert max(abs(norm - 1) for _, norm in norms) < 3e-7, "what was measured is wrong"
    plain_times = plain_times[-len(times) :]
    elements = sum(map(math.prod, case.shapes()))
    record(case, Ratio.of(times, plain_times), times, plain_times, bytes_per_step=pairs.step_bytes(case.rule, elements))
