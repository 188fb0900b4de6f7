"""PyTorch's own inputs and error inputs for its optimizers, handed to ours: handled as torch handles them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from parity import assert_close_to_torch, parameters, run
from torch import nn

import fastwrs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what torch's module imports
    from torch.testing._internal import common_optimizers

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("backend")]

NAMES = ("SGD", "Adam", "AdamW")
INFOS = {info.name: info for info in common_optimizers.optim_db if info.name in NAMES}


def inputs(name: str) -> list[Any]:
    """Those for the CPU, and those that torch has only for GPUs (capturable, tensor betas)."""
    of_cpu = INFOS[name].optim_inputs_func(device="cpu", dtype=torch.float32)
    of_gpu = INFOS[name].optim_inputs_func(device="cuda", dtype=torch.float32)
    known = {entry.desc for entry in of_cpu}
    return [*of_cpu, *(entry for entry in of_gpu if entry.desc not in known)]


def error_inputs(name: str) -> list[Any]:
    make: Any = INFOS[name].optim_error_inputs_func
    return make(device="cpu", dtype=torch.float32)


def described(value: Any) -> str:
    entry = getattr(value, "optimizer_error_input", value)
    return str(getattr(entry, "desc", entry))


def test_torch_still_has_the_inputs_that_are_meant() -> None:
    assert set(INFOS) == set(NAMES)
    assert all(len(inputs(name)) >= 9 and len(error_inputs(name)) >= 7 for name in NAMES)
    assert all(INFOS[name].scheduler_inputs for name in NAMES)


@pytest.mark.parametrize(("name", "entry"), [(name, entry) for name in NAMES for entry in inputs(name)], ids=described)
@pytest.mark.parametrize("flag", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_inputs(name: str, entry: Any, flag: dict[str, bool]) -> None:
    """Every one, with every flag, against torch's for-loop (which takes no capturable without a GPU)."""
    ours, theirs = parameters(), parameters()
    a = run(getattr(fastwrs, name)(ours, **entry.kwargs, **flag), ours, range(12))
    plain = {key: value for key, value in entry.kwargs.items() if key != "capturable"}
    b = run(getattr(torch.optim, name)(theirs, **plain, foreach=False), theirs, range(12))
    assert_close_to_torch(a, b)


@pytest.mark.parametrize(
    ("name", "entry"), [(name, entry) for name in NAMES for entry in error_inputs(name)], ids=described
)
def test_error_inputs(name: str, entry: Any) -> None:
    """The type and the message that torch's own tests expect."""
    wrong = entry.optimizer_error_input
    params = [nn.Parameter(torch.randn(2, 3))] if wrong.params is None else wrong.params
    make = getattr(fastwrs, name)
    if wrong.kwargs.get("foreach"):  # what torch's own foreach code cannot do, ours can
        optimizer = make(params, **wrong.kwargs)
        before = params[0].detach().clone()
        params[0].grad = torch.ones_like(before)
        optimizer.step()
        assert not torch.equal(params[0], before)
    elif issubclass(entry.error_type, Warning):
        with pytest.warns(entry.error_type, match=entry.error_regex):
            make(params, **wrong.kwargs)
    else:
        assert entry.error_on is common_optimizers.OptimizerErrorEnum.CONSTRUCTION_ERROR
        with pytest.raises(entry.error_type, match=entry.error_regex):
            make(params, **wrong.kwargs)


@pytest.mark.parametrize(
    ("name", "chain"), [(name, chain) for name in NAMES for chain in range(len(INFOS[name].scheduler_inputs))]
)
def test_scheduler_inputs(name: str, chain: int) -> None:
    """The schedulers that PyTorch's own tests run with each optimizer."""
    results = []
    for module, options in ((fastwrs, {}), (torch.optim, {"foreach": False})):
        params = parameters()
        optimizer = getattr(module, name)(params, lr=0.01, **options)
        schedulers = [make(optimizer) for make in INFOS[name].scheduler_inputs[chain]]
        history = []
        for step in range(15):
            history += run(optimizer, params, range(step, step + 1))
            for scheduler in schedulers:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([1.0] if plateau else []))
        results.append(history)
    assert_close_to_torch(*results)
