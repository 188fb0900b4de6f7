"""Which backend runs, and the reasons why others cannot."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastwrs
from fastwrs import dispatch, library

pytestmark = pytest.mark.cpu
CUDA: Any = dispatch._MODULES["cuda"]
TRITON: Any = dispatch._MODULES["triton"]


@pytest.fixture
def triton_reason(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str | None]]:
    """Asks anew why Triton cannot run, outside of its interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def ask() -> str | None:
        TRITON._why_not_here.cache_clear()
        return fastwrs.backends()["triton"]

    yield ask
    TRITON._why_not_here.cache_clear()


def test_backends_that_cannot_run_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TRITON, "_why_not_here", lambda: "PyTorch finds no GPU")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run: triton: PyTorch finds no GPU"):
        fastwrs.SGD([nn.Parameter(torch.ones(3, 4))], backend="triton")
    monkeypatch.setenv("FASTWRS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="FASTWRS_BACKEND=nonsense: no such backend"):
        fastwrs.SGD([nn.Parameter(torch.ones(3, 4))])


def test_cuda_without_a_gpu_fails_with_its_reason_before_anything_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    CUDA._why_not_here.cache_clear()
    try:
        param = nn.Parameter(torch.ones(3, 4))
        with pytest.raises(RuntimeError, match="backend='cuda' cannot run: cuda: this torch was built without CUDA"):
            fastwrs.AdamW([param], backend="cuda")
        assert fastwrs.backends()["cuda"] == "this torch was built without CUDA"
        assert CUDA.why_not("cpu") == "its tensors must be on a CUDA device, not on cpu"
        assert torch.equal(param, torch.ones(3, 4))
    finally:
        CUDA._why_not_here.cache_clear()


def test_the_extension_says_why_cuda_cannot_run() -> None:
    """Built with nvcc or not, without a GPU there is a reason in words."""
    library.load()
    if not torch.cuda.is_available():
        reason = torch.ops.fastwrs.cuda_why_not()
        assert reason in ("there is no CUDA driver", "there is no CUDA device") or "without CUDA" in reason, reason
    assert CUDA.NAME == "cuda"


def test_triton_says_what_it_lacks(triton_reason: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton itself, a GPU of a kind that it knows, a C compiler for its launcher: named in this order."""
    assert TRITON.why_not("cpu") == "its tensors must be on a GPU, not on cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert triton_reason() == "PyTorch finds no GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, device))
    assert "the compute capability of cuda:0 is 7.0" in (triton_reason() or "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 6))
    assert triton_reason() is None
    assert "no kernel for (param, grad, state) dtypes" in TRITON.why_not("cuda", ("float16", "float32", "float32"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    assert "a C compiler" in (triton_reason() or "")
    monkeypatch.setattr(library, "why_not", lambda: "the extension is not there")
    assert triton_reason() == "the extension is not there"
    monkeypatch.setattr("triton.__version__", "3.5.1")
    assert triton_reason() == "triton 3.5.1 is too old; 3.6 is the first that will do"
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert triton_reason() == "triton is not installed (pip install 'fastwrs[triton]')"


def test_auto_takes_triton_where_the_cuda_kernels_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CUDA, "_why_not_here", lambda: "it was not built for the compute capability of any device here")
    monkeypatch.setattr(TRITON, "_why_not_here", lambda: None)
    assert dispatch.choose("auto", "cuda", ("float32", "float32", "float32")) is TRITON
    monkeypatch.setattr(CUDA, "_why_not_here", lambda: None)
    assert dispatch.choose("auto", "cuda", ("float32", "float32", "float32")) is CUDA
    assert dispatch.choose("auto", "cpu", ("float32", "float32", "float32")).NAME == "cpu"


def test_auto_does_not_start_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has asked for a GPU cannot fork workers that use one: not for a model on the CPU."""

    def asked() -> str:
        raise AssertionError("the driver was asked")

    monkeypatch.setattr(CUDA, "_why_not_here", asked)
    monkeypatch.setattr(TRITON, "_why_not_here", asked)
    param = nn.Parameter(torch.ones(3, 4))
    param.grad = torch.ones(3, 4)
    fastwrs.AdamW([param]).step()
    fastwrs.rescale_(param.detach())
    assert not torch.equal(param, torch.ones(3, 4))


def test_symbols_of_libraries_that_are_not_in_the_global_scope_are_found() -> None:
    """As torch's CUDA library is: torch loads it like libtorch_python, which every torch has."""
    library.load()
    extension = ctypes.CDLL(sys.modules["fastwrs._C"].__file__)
    extension.fastwrs_find_symbol.restype = ctypes.c_void_p
    name = b"THPVariable_Wrap"
    mangled = next(
        symbol for symbol in exported(Path(torch.__file__).parent / "lib" / "libtorch_python.so") if name in symbol
    )
    assert extension.fastwrs_find_symbol(b"libtorch_python.so", mangled)
    assert not extension.fastwrs_find_symbol(b"libtorch_python.so", b"no_such_function")
    assert not extension.fastwrs_find_symbol(b"no_such_library.so", mangled)


def exported(file: Path) -> list[bytes]:
    nm = shutil.which("nm")
    assert nm is not None, "nm is missing (on Debian: apt-get install binutils)"
    listed = subprocess.run([nm, "-D", "--defined-only", file], capture_output=True, check=True).stdout
    return [line.split()[-1].split(b"@")[0] for line in listed.splitlines()]
