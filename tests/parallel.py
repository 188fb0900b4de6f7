"""Trainings with two gloo processes, for tests/test_parallel.py: ``python tests/parallel.py FOLDER``.

Each process leaves what it has at the end in ``FOLDER/rank<k>.pt``, by the name of the training.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastwrs

PROCESSES, STEPS, BATCH = 2, 7, 8
RULES: Mapping[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (fastwrs.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (fastwrs.AdamW, {"lr": 0.02}),
    "AdamP": (fastwrs.AdamP, {"lr": 0.02, "delta": 0.5}),
}
TRAININGS = [(rule, kind) for rule in RULES for kind in ("copies", "views", "zero")]
"""DDP with gradients of their own, with views of its buckets, and with ZeRO's shards of the states."""


def network(dtype: torch.dtype) -> nn.Module:
    """Of sizes that put gradients anywhere in a bucket, and parameters of one process."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 7, bias=False), nn.Linear(7, 1)
    return nn.Sequential(*layers).to(dtype)


def batch(step: int) -> torch.Tensor:
    """All images of a step."""
    torch.manual_seed(100 + step)
    return torch.randn(BATCH, 3, 8, 8)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    return fastwrs.param_groups(model, rescale=fastwrs.Rescale(every=3), weight_decay=0.1)


def train(model: nn.Module, optimizer: Any, part: slice, dtype: torch.dtype) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step)[part].to(dtype)).square().mean().backward()
        optimizer.step()


def _process(rank: int, folder: str) -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns when it is imported

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    torch.set_num_threads(1)
    part = slice(rank * BATCH // PROCESSES, (rank + 1) * BATCH // PROCESSES)
    found: dict[str, Any] = {}
    for rule, kind in TRAININGS:
        for dtype in (torch.float32, torch.float64):
            model = network(dtype)
            # Buckets so small that there are several.
            parallel = DistributedDataParallel(model, gradient_as_bucket_view=kind == "views", bucket_cap_mb=0.001)
            make, options = RULES[rule]
            if kind == "zero":
                optimizer = ZeroRedundancyOptimizer(groups(model), optimizer_class=make, **options)
            else:
                optimizer = make(groups(model), **options)
            train(parallel, optimizer, part, dtype)
            found[f"{rule} {kind} {dtype}"] = {name: p.detach().clone() for name, p in model.named_parameters()}
            if kind == "zero":
                held = sum(len(state) for state in optimizer.optim.state.values())
                optimizer.consolidate_state_dict(to=0)
                found[f"{rule} {kind} {dtype} states"] = held, len(optimizer.state_dict()["state"]) if rank == 0 else 0
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(_process, (sys.argv[1],), PROCESSES)  # type: ignore[attr-defined]
