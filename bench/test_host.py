"""The host side of a step alone: everything in front of the kernels, with the launch replaced by nothing.

Measured against the whole step of torch's fused AdamW on as many tensors of 4 elements, in turns: `make bench`. The
goal is half of that; and no option may make the host side slower, since options travel as numbers. For Triton only the
launch itself is replaced: the op that checks a step and lays out its table is counted, and the goal is all of that.
"""

from __future__ import annotations

import importlib
from typing import Any

import pairs
import pytest
import torch
from test_step import Comparison

import fastwrs
from fastwrs import dispatch, library
from fastwrs.benchmark.turns import Ratio, Step, timed

TENSORS, REPEAT = 161, 20
OPTIONS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW, tensor lr": {"lr": torch.tensor(1e-3)},
    "AdamW, WRS": {"rescale": fastwrs.Rescale()},
    "AdamW, every option": {
        "rescale": fastwrs.Rescale(every=3, axis="in", target=2.0, start=5, stop=10**9),
        "shrink": fastwrs.Shrink(0.1, axis="in"),
        "amsgrad": True,
        "maximize": True,
        "weight_decay": 0.3,
    },
    "SGD, momentum": {"momentum": 0.9},
}


def launch_nothing(*_args: object, **_options: object) -> None:
    """Stands for the kernels."""


@pytest.mark.parametrize("name", OPTIONS)
def test_host(name: str, benchmark, record, rounds):
    measure(name, dispatch, "launch", 0.5, benchmark, record, rounds)


@pytest.mark.parametrize("name", ["AdamW", "AdamW, WRS", "AdamW, every option", "SGD, momentum"])
def test_host_of_triton(name: str, benchmark, record, rounds, monkeypatch):
    backend: Any = dispatch._MODULES["triton"]
    library.load()
    monkeypatch.setattr(backend, "why_not", lambda *_: None)
    launch = importlib.import_module("fastwrs.triton_kernels.launch")
    monkeypatch.setattr(launch, "compile_once", launch_nothing)
    monkeypatch.setattr(launch, "run", launch_nothing)
    measure(name, launch, "run", 1.0, benchmark, record, rounds, "triton")


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_host_in_backward(name: str, benchmark, record, rounds):
    """An optimizer for each parameter, as where steps are taken in the backward pass: whole steps, of both sides."""
    ours, theirs = (pairs.make_params([(2, 2)] * TENSORS) for _ in range(2))
    our_steps = [getattr(fastwrs, name)([param], **pairs.OPTIONS[name]).step for param in ours]
    their_steps = [pairs.torch_fused(name, [param]) for param in theirs]
    their_times: list[float] = []

    def all_of(steps: list[Step]) -> None:
        for step in steps:
            step()

    benchmark.pedantic(
        lambda: all_of(our_steps),
        setup=lambda: their_times.append(timed(lambda: all_of(their_steps), 1)),
        rounds=rounds,
        warmup_rounds=3,
    )
    our_times = benchmark.stats.stats.data
    case = Comparison(f"{TENSORS} optimizers of one parameter, {name} / torch fused", name, list, axis=None)
    their_times = their_times[-len(our_times) :]
    record(case, Ratio.of(our_times, their_times), our_times, their_times, bytes_per_step=0)


def measure(name: str, module: Any, seam: str, goal: float, benchmark, record, rounds, backend: str = "auto") -> None:
    ours, theirs = (pairs.make_params([(2, 2)] * TENSORS) for _ in range(2))
    optimizer = getattr(fastwrs, name.split(",")[0])(ours, backend=backend, **OPTIONS[name])
    optimizer.step()
    optimizer.step()
    finished = optimizer.state[ours[0]]["step"].item()
    their_step = pairs.torch_fused("AdamW", theirs)
    their_step()
    kernels, their_times = getattr(module, seam), []

    def our_steps() -> None:
        setattr(module, seam, launch_nothing)
        try:
            for _ in range(REPEAT):
                optimizer.step()
        finally:
            setattr(module, seam, kernels)

    benchmark.pedantic(
        our_steps,
        setup=lambda: their_times.append(timed(their_step, REPEAT)),
        rounds=rounds,
        warmup_rounds=3,
    )
    assert optimizer.state[ours[0]]["step"].item() == finished, "the kernels ran"
    our_times = [seconds / REPEAT for seconds in benchmark.stats.stats.data]
    their_times = their_times[-len(our_times) :]
    kind = "host side" if backend == "auto" else f"host side of {backend}"
    case = Comparison(f"{kind}, {TENSORS} tensors, {name} / torch's AdamW step", "AdamW", list, target=goal)
    record(case, Ratio.of(our_times, their_times), our_times, their_times, bytes_per_step=0)
