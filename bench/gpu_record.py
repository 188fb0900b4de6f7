"""The record of GPU measurements: JSON lines with the environment in each, and the tables made of them.

``python bench/gpu_record.py`` prints what this machine is, and why which backend cannot run on it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Line = dict[str, Any]
BILLION, CUDA, TRITON = "billion/float32/AdamW/main", "fastwrs cuda WRS", "fastwrs triton WRS"
GOALS = (
    # comparison, side, what, the bound, and what that means
    (BILLION, CUDA, "device_to_fused", "<=", 1.0, "a billion in fp32, AdamW: WRS / torch fused without"),
    (BILLION, CUDA, "share_of_copy", ">=", 0.92, "a billion in fp32, AdamW: WRS / speed of a copy"),
    (
        "resnet50/float32/AdamW/main",
        CUDA,
        "whole_to_fused",
        "<=",
        0.5,
        "ResNet-50, whole step: WRS / torch fused without",
    ),
    (BILLION, TRITON, "device_to_cuda", "<=", 1.1, "a billion in fp32, AdamW, WRS: Triton / our CUDA kernel"),
)


def tool(name: str) -> str | None:
    """Where a program of the CUDA toolkit is, on the PATH or in the toolkit."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    folders = [Path(home)] if home else []
    folders += [Path(nvcc).resolve().parents[1]] if nvcc else []
    places = [str(folder / inside) for folder in folders for inside in ("bin", "compute-sanitizer")]
    return shutil.which(name) or next(filter(None, (shutil.which(name, path=place) for place in places)), None)


def said(*command: str) -> str:
    """What a program prints, without its last line break; empty if it cannot run."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def source() -> str:
    """A digest of all that is measured: the sources of the package."""
    digest = hashlib.sha256()
    folders = ("csrc", "fastwrs")
    for path in sorted([ROOT / "setup.py", *(path for name in folders for path in ROOT.glob(f"{name}/**/*"))]):
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def commit() -> str:
    """The commit, or what FASTWRS_COMMIT says where the tree came without its history."""
    if given := os.environ.get("FASTWRS_COMMIT"):
        return given
    found = said("git", "rev-parse", "--short", "HEAD")
    return found + ("+changes" if said("git", "status", "--porcelain") else "") if found else "unknown"


def version(package: str) -> str | None:
    """The version of a Python package, None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def environment() -> Line:
    """What the figures depend on, as it is when this is first called."""
    import torch  # here, so that a machine without torch is told so in words

    where: Line = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit()}
    where |= {"source": source(), "torch": torch.__version__, "cuda": torch.version.cuda, "triton": version("triton")}
    found = re.search(r"release ([\d.]+)", said(tool("nvcc") or "nvcc", "--version"))
    where |= {"nvcc": found[1] if found else None, "python": platform.python_version()}
    if not torch.cuda.is_available():
        return where | {"gpu": None, "driver": None}
    props = torch.cuda.get_device_properties(0)
    driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return where | {
        "gpu": props.name,
        "driver": driver[0] if driver else None,
        "capability": f"{props.major}.{props.minor}",
        "multiprocessors": props.multi_processor_count,
        "l2_bytes": getattr(props, "L2_cache_size", None),
        "memory_bytes": props.total_memory,
    }


def read(*files: Path) -> list[Line]:
    """The lines of records; a last line that was cut off counts for nothing."""
    lines = []
    for file in files:
        for text in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines


def append(file: Path, lines: Iterable[Line]) -> None:
    """Writes lines to the end of a record, all at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write("".join(json.dumps(line) + "\n" for line in lines))


def quartiles(samples: list[float], digits: int = 6) -> list[float]:
    """The first quartile, the median, and the third."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return [float(f"{value:.{digits}g}") for value in (low, median, high)]


# ---- the tables -----------------------------------------------------------------------------------------------------


def latest(lines: list[Line]) -> list[Line]:
    """Of each side in each comparison the line that was written last."""
    found: dict[tuple[str, str], Line] = {}
    for line in lines:
        if line["kind"] == "step":
            key = line["comparison"], line["side"]
            found.pop(key, None)
            found[key] = line
    return list(found.values())


def summary(lines: list[Line]) -> str:
    """The record as one table in Markdown, with the goals and what could not be measured."""
    steps = latest(lines)
    parts = ["REHEARSAL ON THE CPU: these figures say nothing.\n" if any(li.get("rehearsal") for li in lines) else ""]
    names = ("gpu", "driver", "torch", "cuda", "triton", "nvcc", "commit", "source")
    places = sorted({", ".join(f"{name} {line.get(name)}" for name in names) + "\n" for line in steps})
    parts += [*places, _goals(steps), _table(steps), _launches(lines), _complaints(lines)]
    return "\n".join(filter(None, parts))


def _goals(steps: list[Line]) -> str:
    rows = []
    for comparison, side, what, sign, bound, words in GOALS:
        line = next((s for s in steps if s["comparison"] == comparison and s["side"] == side), {})
        value = line.get(what)
        value = value[1] if isinstance(value, list) else value
        met = value is not None and (value <= bound if sign == "<=" else value >= bound)
        verdict = "not measured" if value is None else f"{value:.3f}, {'met' if met else 'MISSED'}"
        rows.append(f"- {words}: {verdict} (goal: {sign} {bound})")
    return "\n".join([*rows, ""])


def _table(steps: list[Line]) -> str:
    head = ["comparison", "side", "device us", "(quartiles)", "host us", "whole us", "GB/s", "of copy"]
    rows = [[*head, "device / fused", "whole / fused", "device / CUDA"], ["---"] * 2 + ["---:"] * 9]
    for line in steps:
        low, device, high = line["device_us"]
        rate = [f"{line['gb_per_s']:.0f}", f"{line['share_of_copy']:.2f}"]
        ratios = [f"{line[name][1]:.3f}" for name in ("device_to_fused", "whole_to_fused")]
        ratios += [f"{line['device_to_cuda'][1]:.3f}" if "device_to_cuda" in line else ""]
        times = [f"{device:.1f}", f"{low:.1f} to {high:.1f}", f"{line['host_us'][1]:.1f}", f"{line['whole_us'][1]:.1f}"]
        rows.append([line["comparison"], line["side"], *times, *rate, *ratios])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n" if steps else ""


def _launches(lines: list[Line]) -> str:
    rows = {(li["comparison"], li["side"]): li["launches"] for li in lines if li["kind"] == "launches"}
    found = [f"- {comparison}, {side}: {count} launches per step" for (comparison, side), count in rows.items()]
    return "\n".join([*found, ""]) if found else ""


def _complaints(lines: list[Line]) -> str:
    words = {"refused": "REFUSED, the check failed", "failed": "FAILED", "absent": "not measured"}
    rows = dict.fromkeys(
        ": ".join(filter(None, ["- " + words[li["kind"]], li.get("comparison"), li.get("side"), li["why"]]))
        for li in lines
        if li["kind"] in words
    )
    return "\n".join([*rows, ""]) if rows else ""


if __name__ == "__main__":
    import fastwrs

    print(json.dumps(environment() | {"backends": fastwrs.backends()}))
