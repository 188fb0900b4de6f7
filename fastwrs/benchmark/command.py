"""``python -m fastwrs bench``: what a step costs here, with the parameters of your own model."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastwrs import __version__, dispatch, library
from fastwrs.benchmark import lists, measure
from fastwrs.benchmark import plot as drawing
from fastwrs.benchmark.lists import LISTS, Param
from fastwrs.benchmark.measure import Figures
from fastwrs.benchmark.plot import Panel
from fastwrs.benchmark.sides import OPTIONS, PRECISIONS, bytes_per_element, replaces_fused, sides

DEFAULT_LIST = "resnet50"
PLOT = Path("fastwrs-bench.png")
KNOWN_HERE = object()
"""In the place of a model of which the parameters alone are known."""
SECONDS = 40.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--model", help="name of a model of torchvision or timm, or package.module:function that returns one, or its "
        f"parameters. Built in: the parameters of {', '.join(LISTS)} (default: {DEFAULT_LIST})",
    )  # fmt: skip
    parser.add_argument("--optimizer", choices=list(OPTIONS), default="AdamW")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
    parser.add_argument("--dtype", choices=list(PRECISIONS), default="float32")
    parser.add_argument("--rounds", type=int, default=30, help="rounds in which all sides take turns (default: 30)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of rounds, at most (default: {SECONDS:g})")
    parser.add_argument("--plot", type=Path, help="default: fastwrs-bench.png, if matplotlib is there")
    parser.add_argument("--record", type=Path, help="appends the figures to a file as JSON lines")


def run(options: argparse.Namespace) -> int:
    """Measures, prints the table and writes the plot. 0: done; 1: something is wrong, and why was printed."""
    if why := why_not_written(options):
        print(f"nothing was measured: {why}", file=sys.stderr)
        return 1
    try:
        params = parameters(options.model)
        backend = dispatch.choose("auto", torch.device(options.device).type).NAME
        found = list(
            measure.compare(
                params,
                options.optimizer,
                sides("main", [backend], any(len(param.shape) > 2 for param in params)),
                device=options.device,
                precision=options.dtype,
                rounds=max(2, options.rounds),
                seconds=options.seconds,
            )
        )
    except (ValueError, RuntimeError) as error:  # an unknown model or device, or a step that is wrong
        print(f"nothing to report: {error}", file=sys.stderr)
        return 1
    measured = [line for line in found if isinstance(line, Figures)]
    print("\n".join(table(options, params, found)))
    if options.record:
        record(options, params, measured)
    return plot(options, measured)


def why_not_written(options: argparse.Namespace) -> str:
    """What stands against the files that were asked for; empty if nothing does."""
    try:
        if options.record:
            options.record.parent.mkdir(parents=True, exist_ok=True)
            options.record.open("a", encoding="utf-8").close()
        if options.plot:
            if why := drawing.why_not(options.plot):
                return f"--plot {options.plot}: {why}"
            options.plot.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return str(error)
    return ""


def parameters(model: str | None) -> list[Param]:
    """The parameters of a model by its name, with their roles.

    Raises:
        ValueError: there is no such model, or it cannot be made; the message says where was looked.
    """
    if model is None:
        return LISTS[DEFAULT_LIST].params()
    made = _by_path(model) if ":" in model else _by_name(model)
    if made is KNOWN_HERE:
        return LISTS[model].params()
    if isinstance(made, nn.Module):
        found = lists.of_model(made)
    else:
        try:
            given = [made] if isinstance(made, torch.Tensor) else list(made)
        except Exception as error:
            kind = type(made).__name__
            raise ValueError(f"--model {model}: it is {kind}, neither a model nor its parameters ({error})") from error
        tensors = [t for t in given if isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex())]
        # without modules nobody knows what they are
        found = [Param(lists.real_shape(t), lists.WEIGHT if t.ndim > 1 else lists.PLAIN) for t in tensors]
    if not sum(math.prod(param.shape) for param in found):
        raise ValueError(f"--model {model}: it has no parameters that are trained")
    return found


def _by_path(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)()
    except (Exception, SystemExit) as error:
        raise ValueError(f"--model {path}: {type(error).__name__}: {error}") from error


def _by_name(name: str) -> Any:
    """The model, or KNOWN_HERE."""
    looked = []
    for package, make in (("torchvision.models", "get_model"), ("timm", "create_model")):
        top = package.partition(".")[0]
        if importlib.util.find_spec(top) is None:
            looked.append(f"{top} is not installed")
            continue
        try:
            made = getattr(importlib.import_module(package), make)
        except Exception as error:  # timm with a torchvision that was built for another torch
            looked.append(f"{top} cannot be imported ({type(error).__name__}: {error})")
            continue
        try:
            return _made(made, name)
        except Exception as error:
            why = "has none of this name" if _unknown(error) else f"cannot make it ({type(error).__name__}: {error})"
            looked.append(f"{top} {why}")
    if name in LISTS:
        return KNOWN_HERE
    raise ValueError(
        f"--model {name}: {', '.join(looked)}; package.module:function names a function that returns your model"
    )


def _made(make: Callable[[str], nn.Module], name: str) -> nn.Module:
    """The model without memory for its weights, where it can be made so."""
    try:
        with torch.device("meta"):
            return make(name)
    except Exception as error:
        if _unknown(error):
            raise
    return make(name)  # some count their layers with tensors


def _unknown(error: Exception) -> bool:
    return "unknown model" in str(error).lower()  # torchvision, and timm


def table(options: argparse.Namespace, params: list[Param], found: list[Figures | str]) -> list[str]:
    """The lines that are printed."""
    elements = sum(math.prod(param.shape) for param in params)
    rescaled = sum(math.prod(param.shape) for param in params if param.role == lists.WEIGHT)
    size = bytes_per_element(options.optimizer, PRECISIONS[options.dtype])
    measured = [line for line in found if isinstance(line, Figures)]
    stands_in = replaces_fused(options.optimizer, PRECISIONS[options.dtype].params, options.device)
    width = max(len(line.side) for line in measured) + 2
    lines = [
        f"{options.model or DEFAULT_LIST}: {len(params):,} tensors, {elements:,} parameters, of which {rescaled:,} are "
        f"rescaled; {options.optimizer}, {options.dtype}, {options.device}",
        ", ".join(f"{key} {value}" for key, value in environment().items()),
        "",
        f"{'':<{width}}{'ms':>9}  {'(quartiles)':<22}{'to torch fused':<24}{'GB/s':>7}{'of copy':>9}{'host ms':>9}",
    ]
    for line in measured:
        low, high = (1e3 * bound for bound in line.quartiles)
        ratio = f"{line.to_fused.median:.3f} ({line.to_fused.low:.3f} to {line.to_fused.high:.3f})"
        lines.append(
            f"{line.side:<{width}}{1e3 * line.seconds:>9.3f}  {f'({low:.3f} to {high:.3f})':<22}{ratio:<24}"
            f"{line.gb_per_s:>7.1f}{line.share_of_copy:>9.2f}{1e3 * line.host_seconds:>9.3f}"
        )
    return [
        *lines,
        "",
        f"Medians of {measured[0].rounds} rounds in turns. GB/s: the {size} bytes per parameter that a step cannot do "
        "without, over its time.",
        "Host: the same step on as many tensors of one element. torch fused and fastwrs plain rescale nothing.",
        *["torch fused is foreach here, for torch's fused SGD gives wrong weights in bf16 on the CPU."] * stands_in,
        *(f"not measured: {line}" for line in found if isinstance(line, str)),
    ]


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    names = []
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": names[0] if names else platform.processor(),
        "isa": library.cpu_isa() if library.why_not() is None else None,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "fastwrs": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def record(options: argparse.Namespace, params: list[Param], measured: list[Figures]) -> None:
    """Appends a JSON line for each side, with the environment in it."""
    common = {
        "kind": "side",
        "list": options.model or DEFAULT_LIST,
        "rule": options.optimizer,
        "precision": options.dtype,
        "device": options.device,
        "tensors": len(params),
        "elements": sum(math.prod(param.shape) for param in params),
        **environment(),
    }
    with options.record.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps({**common, **asdict(line)}) + "\n" for line in measured)


def plot(options: argparse.Namespace, measured: list[Figures]) -> int:
    """Draws each side's bytes per second. 1 if a plot was asked for and cannot be made."""
    path = options.plot or PLOT
    if why := drawing.why_not(path):
        print(f"no plot: {why}")
        return int(options.plot is not None)
    title = f"{options.optimizer}, {options.model or DEFAULT_LIST}, {options.dtype}, {options.device}"
    panel = Panel({line.side: line.gb_per_s for line in measured}, measured[0].gb_per_s / measured[0].share_of_copy)
    drawing.draw({title: panel}, path)
    print(f"plot: {path}")
    return 0
