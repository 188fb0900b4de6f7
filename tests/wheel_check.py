"""Tries an installed wheel: contents, versions, steps, checkpoints. Needs torch and the wheel, and nothing else.

    python -I wheel_check.py fastwrs-....whl cpu|cuda

tests/wheels.py runs it with every Python, from a copy outside of the tree, so it imports nothing of the tests. The
suite says whether the kernels are right; here it is whether the wheel has all that it needs, and works with this Python
and this torch. Numbers are compared with the tolerances of ``torch.testing``.
"""

from __future__ import annotations

import email
import importlib.metadata
import platform
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fastwrs

EXTENSION = "fastwrs/_C.abi3.so"
OURS = re.compile(rf"fastwrs/(\w+/)*\w+\.py|fastwrs/py\.typed|{re.escape(EXTENSION)}")
SOURCE_PATH = re.compile(rb"\0(/[\w.+/-]+\.(?:h|hpp|cpp|cu|cuh))\0")
WITHOUT_CUDA = "built without CUDA"
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "Adam": {"amsgrad": True},
    "AdamW": {"weight_decay": 0.1},
}
"""What is trained with, beside the defaults, where those leave something out."""


def content_faults(wheel: Path) -> list[str]:
    """What is wrong with the name, the files and the metadata of a wheel that has the extension."""
    name, version, *_, python, abi, system = wheel.name.removesuffix(".whl").split("-")
    folder = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        names = {entry for entry in archive.namelist() if not entry.endswith("/")}
        wanted = {EXTENSION, "fastwrs/__init__.py", "fastwrs/py.typed", f"{folder}/licenses/LICENSE"}
        wanted |= {f"{folder}/METADATA", f"{folder}/WHEEL"}
        if wanted - names:
            return [f"it lacks {missing}" for missing in sorted(wanted - names)]
        others = [entry for entry in names if not (OURS.fullmatch(entry) or entry.startswith(f"{folder}/"))]
        metadata = email.message_from_bytes(archive.read(f"{folder}/METADATA"))
        tags = email.message_from_bytes(archive.read(f"{folder}/WHEEL"))
        licence = archive.read(f"{folder}/licenses/LICENSE").decode()
        paths = SOURCE_PATH.findall(archive.read(EXTENSION))
    faults = [f"it has {entry}" for entry in sorted(others)]
    faults += [f"the extension names {path.decode()}, of the machine that built it" for path in sorted(set(paths))]
    if (python, abi) != ("cp310", "abi3"):
        faults.append(f"it is for {python}-{abi}, not for cp310-abi3")
    for one in system.split("."):
        if not re.fullmatch(rf"(manylinux\w+|linux)_{platform.machine()}", one):
            faults.append(f"it is for {one}, built on Linux {platform.machine()}")
    expected = {f"{python}-{abi}-{one}" for one in system.split(".")}
    if set(tags.get_all("Tag", ())) != expected or tags["Root-Is-Purelib"] != "false":
        faults.append(f"its WHEEL has other tags than its name, or calls it pure: {tags.get_all('Tag')}")
    if metadata["Version"] != version:
        faults.append(f"its metadata has version {metadata['Version']}, its name {version}")
    if metadata["License-Expression"] != "Apache-2.0" or "Apache License" not in licence:
        faults.append("its licence is not Apache-2.0")
    needed = [one for one in metadata.get_all("Requires-Dist", ()) if "extra ==" not in one]
    if len(needed) != 1 or not re.match(r"torch\b", needed[0]):
        faults.append(f"it needs {needed}, not torch alone")
    return faults


def check_what_is_installed(wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    assert fastwrs.__version__ == version == importlib.metadata.version("fastwrs"), fastwrs.__version__
    assert Path(fastwrs.__file__).is_relative_to(sys.prefix), fastwrs.__file__


def check_info() -> None:
    command = [sys.executable, "-I", "-m", "fastwrs", "info"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout + done.stderr, end="")
    assert done.returncode == 0
    assert re.search(rf"^fastwrs +{re.escape(fastwrs.__version__)}$", done.stdout, re.M)
    assert re.search(r"^backend +cpu +can run$", done.stdout, re.M)


def check_kind(kind: str) -> None:
    """The CUDA kernels are in one kind of wheel; without a GPU they say that there is none."""
    assert fastwrs.backends()["cpu"] is None, fastwrs.backends()["cpu"]
    why = torch.ops.fastwrs.cuda_why_not()
    assert (WITHOUT_CUDA in why) == (kind == "cpu"), why


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.Flatten(), nn.Linear(32, 5)
    return nn.Sequential(*layers).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 1) -> list[Tensor]:
    """The weights after some steps."""
    generator = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    for _ in range(steps):
        images = torch.randn(16, 3, 6, 6, generator=generator, dtype=torch.float64).to(like)
        labels = torch.randint(5, (16,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def optimizers() -> list[str]:
    """The names of all that there are."""
    public = {name: getattr(fastwrs, name) for name in fastwrs.__all__}
    return [name for name, kind in public.items() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)]


def check_against_reference() -> None:
    """Every optimizer takes the steps of the reference backend, and rescales."""
    assert {"SGD", "Adam", "AdamW", "AdamP", "SGDP"} <= set(optimizers())
    for name in optimizers():
        for dtype in (torch.float32, torch.float64):
            results = []
            for backend in ("cpu", "reference"):
                model = network(dtype)
                groups = fastwrs.param_groups(model, rescale=fastwrs.Rescale(target=2.0))
                kind = getattr(fastwrs, name)
                results.append(train(model, kind(groups, lr=0.05, backend=backend, **OPTIONS.get(name, {}))))
            assert_close(*results, msg=lambda text, name=name: f"{name}, cpu and reference: {text}")
            assert_close(results[0][0].flatten(1).norm(dim=1), torch.full((8,), 2.0, dtype=dtype))


def check_against_torch() -> None:
    """Without rescaling the steps are those of torch.optim."""
    for name, options in OPTIONS.items():
        results = []
        for library in (fastwrs, torch.optim):
            model = network()
            results.append(train(model, getattr(library, name)(model.parameters(), lr=0.05, **options)))
        assert_close(*results, msg=lambda text, name=name: f"{name}, ours and torch's: {text}")


def check_checkpoint() -> None:
    """A training that was saved and loaded goes on with the same bits."""
    for name in optimizers():
        model = network()
        optimizer = getattr(fastwrs, name)(fastwrs.param_groups(model), lr=0.05)
        train(model, optimizer)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "checkpoint.pt"
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            saved = torch.load(file, weights_only=True)
        again = network()
        again.load_state_dict(saved["model"])
        resumed = getattr(fastwrs, name)(fastwrs.param_groups(again), lr=0.5)
        resumed.load_state_dict(saved["optimizer"])
        pairs = zip(train(model, optimizer, seed=2), train(again, resumed, seed=2), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs), name


def check_rescaler() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    rescaler = fastwrs.WeightRescaler(optimizer, fastwrs.Rescale(target=3.0))
    weights = train(model, optimizer)
    for norms in fastwrs.channel_norms([weight for weight in weights if weight.ndim >= 2]):
        assert_close(norms, torch.full_like(norms, 3.0))
    rescaler.remove()


def check_projection() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(6, 4, 3, 3), torch.randn(5, 7, dtype=torch.float64)]
    fastwrs.rescale_(tensors, axis="in", target=0.5)
    for tensor in tensors:
        norms = tensor.norm(dim=1)
        assert_close(norms, torch.full_like(norms, 0.5))


WORKS = (check_against_reference, check_against_torch, check_checkpoint, check_rescaler, check_projection)


def main(arguments: Sequence[str]) -> int:
    wheel, kind = Path(arguments[0]), arguments[1]
    warnings.filterwarnings("error", module="fastwrs")
    if faults := content_faults(wheel):
        print(*(f"{wheel.name}: {fault}" for fault in faults), sep="\n")
        return 1
    check_what_is_installed(wheel)
    check_info()
    check_kind(kind)
    for check in WORKS:
        check()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
