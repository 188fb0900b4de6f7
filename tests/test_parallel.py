"""Data parallel training: replicas keep equal bits, and are those of one process with the whole batch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import parallel
import pytest
import torch
from torch import nn

import fastwrs

pytestmark = pytest.mark.cpu
by_training = pytest.mark.parametrize(("rule", "kind"), parallel.TRAININGS)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the processes had at the end."""
    folder = tmp_path_factory.mktemp("parallel")
    subprocess.run([sys.executable, parallel.__file__, folder], check=True, timeout=300)
    return [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(parallel.PROCESSES)]


@by_dtype
@by_training
def test_replicas_are_equal_and_those_of_one_process(
    found: list[dict[str, Any]], rule: str, kind: str, dtype: torch.dtype
) -> None:
    """The mean of two gradients is that of the whole batch up to rounding: told apart from a fault in fp64."""
    one, other = (part[f"{rule} {kind} {dtype}"] for part in found)
    assert all(torch.equal(one[name], other[name]) for name in one)
    if dtype != torch.float64:
        return
    model = parallel.network(dtype)
    make, options = parallel.RULES[rule]
    parallel.train(model, make(parallel.groups(model), **options), slice(None), dtype)
    for name, p in model.named_parameters():
        torch.testing.assert_close(one[name], p.detach(), rtol=1e-12, atol=1e-12)


@by_dtype
@pytest.mark.parametrize("rule", parallel.RULES)
def test_each_process_of_zero_has_a_part_of_the_states(
    found: list[dict[str, Any]], rule: str, dtype: torch.dtype
) -> None:
    (held, whole), (other, _) = (part[f"{rule} zero {dtype} states"] for part in found)
    assert held > 0 and other > 0
    assert whole == len(list(parallel.network(dtype).parameters()))


def flat(parameter: nn.Parameter) -> nn.Parameter:
    """As FSDP1 marks the parameters that it has put together."""
    parameter._is_flat_param = True  # type: ignore[attr-defined]
    return parameter


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("AdamW", {"rescale": fastwrs.Rescale(axis="tensor")}),
        ("SGD", {"shrink": fastwrs.Shrink(0.1, axis="tensor")}),
        ("AdamP", {}),
        ("SGDP", {}),
        ("SGD", {"shifted_l2": (0.1, 0.1)}),
    ],
)
def test_flat_parameters_of_fsdp1_have_no_channels(rule: str, options: dict[str, Any]) -> None:
    """Part of one, or of several weights one behind the other: norms and channels of that mean nothing."""
    param = flat(nn.Parameter(torch.randn(64)))
    param.grad = torch.randn(64)
    before = param.detach().clone()
    with pytest.raises((ValueError, RuntimeError), match=r"params\[0\]\[0\].*flat parameter of FSDP1.*use_orig_params"):
        getattr(fastwrs, rule)([param], lr=0.1, **options).step()
    assert torch.equal(param.detach(), before)


def test_flat_parameters_are_updated_where_nothing_else_is_asked_for() -> None:
    params = [nn.Parameter(torch.ones(64)), flat(nn.Parameter(torch.ones(64)))]
    for param in params:
        param.grad = torch.full_like(param, 0.5)
        fastwrs.AdamW([param], lr=0.1).step()
    assert torch.equal(*params)
