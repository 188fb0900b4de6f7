"""torch.distributed.checkpoint: state dicts by parameter name, in memory and through a folder, nested and flat."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import fastwrs

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.usefixtures("backend"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]
OF_TORCH: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "momentum": 0.9}),
    ("Adam", {"lr": 0.02, "betas": (0.8, 0.9), "amsgrad": True}),
    ("AdamW", {"lr": 0.02, "betas": (0.8, 0.9)}),
]
WITH_A_GATE: list[tuple[str, dict[str, Any]]] = [
    ("AdamP", {"lr": 0.02, "betas": (0.8, 0.9), "delta": 0.5, "nesterov": True}),
    ("SGDP", {"lr": 0.05, "momentum": 0.9, "delta": 0.5}),
]


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def optimizer_for(network: nn.Module, name: str, options: dict[str, Any], every: int) -> Any:
    groups = fastwrs.param_groups(network, rescale=fastwrs.Rescale(every=every, target=1.5), weight_decay=0.1)
    return getattr(fastwrs, name)(groups, **options)


def train(network: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        network(torch.randn(8, 3, 4, 4)).square().mean().backward()
        optimizer.step()


def through_folder(saved: dict[str, Any], wanted: dict[str, Any], folder: Path, planner: Any = None) -> dict[str, Any]:
    """Saves, and loads into what another process has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save(saved, checkpoint_id=folder)  # type: ignore[attr-defined]
        checkpoint.load(wanted, checkpoint_id=folder, planner=planner)  # type: ignore[attr-defined]
    return wanted


@pytest.mark.parametrize(("name", "options"), OF_TORCH + WITH_A_GATE, ids=str)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("medium", ["memory", "folder"])
def test_resuming_continues_bit_for_bit(
    name: str, options: dict[str, Any], flat: bool, medium: str, tmp_path: Path
) -> None:
    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    network = model()
    optimizer = optimizer_for(network, name, options, every=2)
    train(network, optimizer, range(3))
    saved = {
        "model": get_model_state_dict(network),
        "optimizer": get_optimizer_state_dict(network, optimizer, options=how),
    }

    other_network = model(seed=1)
    other = optimizer_for(other_network, name, {**options, "lr": 0.5}, every=1)
    if medium == "folder":
        # Here the other optimizer makes its states, by a step with lr 0: it moves no weight, and rescales none.
        before = [param.detach().clone() for param in other_network.parameters()]
        wanted = {
            "model": get_model_state_dict(other_network),
            "optimizer": get_optimizer_state_dict(other_network, other, options=how),
        }
        assert all(map(torch.equal, before, other_network.parameters()))
        saved = through_folder(saved, wanted, tmp_path)
    set_model_state_dict(other_network, saved["model"])
    set_optimizer_state_dict(other_network, other, saved["optimizer"], options=how)

    assert other.param_groups[0]["rescale"] == fastwrs.Rescale(every=2, target=1.5)
    assert [group["lr"] for group in other.param_groups] == [options["lr"]] * 3
    assert {state["step"].item() for state in other.state.values()} == {3.0}
    train(network, optimizer, range(3, 7))
    train(other_network, other, range(3, 7))
    assert all(map(torch.equal, network.parameters(), other_network.parameters()))


@pytest.mark.parametrize(("name", "options"), OF_TORCH, ids=str)
@pytest.mark.parametrize("medium", ["memory", "folder"])
def test_what_torch_saved_loads(name: str, options: dict[str, Any], medium: str, tmp_path: Path) -> None:
    """By name, from an optimizer of torch with one group into ours with one."""
    network = model()
    theirs = getattr(torch.optim, name)(network.parameters(), **options)
    train(network, theirs, range(3))
    other_network = model(seed=1)
    ours = getattr(fastwrs, name)(other_network.parameters(), **{**options, "lr": 0.5})
    set_model_state_dict(other_network, get_model_state_dict(network))
    saved = get_optimizer_state_dict(network, theirs)
    if medium == "folder":  # the file lacks rescale, shrink, and SGD's step, which the loader has to be told to accept
        wanted = get_optimizer_state_dict(other_network, ours)
        saved = through_folder(saved, wanted, tmp_path, DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(other_network, ours, saved)
    train(network, theirs, range(3, 6))
    train(other_network, ours, range(3, 6))
    mine, others = dict(other_network.named_parameters()), dict(network.named_parameters())
    torch.testing.assert_close(mine, others, rtol=1e-4, atol=1e-5)
