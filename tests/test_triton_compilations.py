"""Lane 6: how often Triton compiles, counted through optimizers whose launches compile and do not run.

A stand-in for the driver names a target; no memory of the lists is ever touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastwrs
from fastwrs import dispatch, library
from fastwrs.benchmark import lists

pytestmark = pytest.mark.triton_compiled
TRITON: Any = dispatch._MODULES["triton"]


class Driver:
    """What Triton asks before it compiles."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[list[str]]:
    """The names of the kernels that have been compiled, one entry for each time."""
    assert os.environ.get("TRITON_INTERPRET") != "1"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.runtime import driver

    from fastwrs.triton_kernels import gate, kernels, launch, shift

    seen: list[str] = []
    all_kernels: Any = (gate.gate_kernel, shift.shift_kernel, kernels.step_kernel, kernels.project_kernel)
    for kernel in all_kernels:
        kernel.device_caches.clear()

    def compile_only(kernel: Any, programs: int, table: Any, constants: dict[str, Any]) -> None:
        before = size_of_caches()
        kernel.warmup(table, **constants, **launch.OPTIONS, grid=(programs,))
        seen.extend([kernel.fn.__name__] * (size_of_caches() - before))

    def size_of_caches() -> int:
        return sum(len(caches[0]) for kernel in all_kernels for caches in kernel.device_caches.values())

    monkeypatch.setattr(launch, "run", compile_only)
    monkeypatch.setattr(launch, "compile_once", lambda *_: None)
    monkeypatch.setattr(TRITON, "why_not", lambda *_: None)
    monkeypatch.setattr(torch, "zeros_like", torch.empty_like)  # states are of many gigabytes
    library.load()
    monkeypatch.setattr(driver, "_active", Driver())
    yield seen
    for kernel in all_kernels:
        kernel.device_caches.clear()


def groups_of(name: str) -> list[dict[str, Any]]:
    """A list's parameters by role, as ``param_groups`` splits them, with gradients in one shared memory."""
    params = lists.LISTS[name].params()
    shared = torch.empty(1 + max(map(numel, params)))
    groups: dict[str, list[torch.nn.Parameter]] = {role: [] for role in lists.ROLES}
    for param in params:
        made = torch.nn.Parameter(torch.empty(param.shape))
        made.grad = shared[: made.numel()].view(param.shape)
        groups[param.role].append(made)
    options = {lists.WEIGHT: {"rescale": fastwrs.Rescale()}, lists.NORM: {"weight_decay": 0.1}, lists.PLAIN: {}}
    return [{"params": params, **options[role]} for role, params in groups.items() if params]


def numel(param: lists.Param) -> int:
    return torch.Size(param.shape).numel()


@pytest.mark.parametrize("name", ["resnet50", "llama_1b"])
@pytest.mark.parametrize(
    ("rule", "options", "kernels"),
    [
        ("AdamW", {}, ["step_kernel"]),
        ("AdamP", {}, ["gate_kernel", "step_kernel"]),
        ("SGD", {"shifted_l2": (1e-4, 1e-3)}, ["shift_kernel", "step_kernel"]),
    ],
    ids=["AdamW", "AdamP", "shifted"],
)
def test_one_compilation_for_a_list(
    compiled: list[str], name: str, rule: str, options: dict[str, Any], kernels: list[str]
) -> None:
    """Whatever changes from step to step: learning rate, step, decay, where gradients lie, GradScaler's tensors."""
    optimizer: Any = getattr(fastwrs, rule)(groups_of(name), lr=1e-3, weight_decay=0.0, backend="triton", **options)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(6):
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 1e-3 / (step + 2) if step < 3 else torch.tensor(1e-3)
        optimizer.param_groups[0]["weight_decay"] = 0.1 * (step % 2)
        shared = torch.empty(1 + max(param.numel() for param in params))
        for param in params:
            param.grad = shared[step % 2 : param.numel() + step % 2].view(param.shape)  # every other time unaligned
        optimizer.found_inf = torch.tensor(0.0) if step > 2 else None
    assert compiled == kernels


def test_one_compilation_for_each_variant(compiled: list[str]) -> None:
    """A kernel for each rule, number of states and dtypes, and for what has to be walked or scaled apart."""
    kinds: Any = ((fastwrs.SGD, {"momentum": 0.9}), (fastwrs.SGD, {}), (fastwrs.AdamW, {}))
    for kind, options in kinds:
        for _ in range(2):
            params = [torch.nn.Parameter(torch.randn(40, 30)), torch.nn.Parameter(torch.randn(9))]
            for param in params:
                param.grad = torch.randn(param.shape)
            optimizer: Any = kind(params, lr=0.1, backend="triton", **options)
            for _ in range(2):
                optimizer.step()
    assert compiled == ["step_kernel"] * 3
    transposed = torch.nn.Parameter(torch.randn(4, 5, 6).transpose(0, 2)[:, :, :3])
    transposed.grad = torch.randn(transposed.shape)
    fastwrs.SGD([transposed], lr=0.1, backend="triton").step()
    assert compiled == ["step_kernel"] * 4
    whole = torch.nn.Parameter(torch.randn(300, 300))
    whole.grad = torch.randn(300, 300)
    optimizer = fastwrs.SGD([whole], lr=0.1, backend="triton", rescale=fastwrs.Rescale(axis="tensor"))
    optimizer.step()
    optimizer.step()
    assert compiled[4:] == ["project_kernel"]
