"""What became slower between two records, or between two revisions of the source.

    python bench/compare.py OLD.jsonl NEW.jsonl             lines of the same name in two records
    python bench/compare.py REVISION REVISION [--rule ...]  builds both side by side and lets their steps take turns

A record is what `make bench BENCH=--record` or `python -m fastwrs bench --record` writes. Its lines are ratios to a
side of the same turns, so that records of different days can be compared; of revisions the ratio is that of the new one
to the old one, round by round. Slower is what has its quartiles above those of the old record (of revisions: above 1);
of peak memory, which has no spread, what is a tenth above it. What the new record refused to measure counts as slower.
Exit code: 0 nothing became slower, 1 something did, 2 there is nothing to compare, or no way to.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_record

from fastwrs.benchmark.lists import LISTS
from fastwrs.benchmark.sides import OPTIONS
from fastwrs.benchmark.turns import Ratio, in_turns

ROOT = Path(__file__).resolve().parents[1]
WORKER = """
import sys
from fastwrs.benchmark import turns
from fastwrs.benchmark.lists import LISTS
from fastwrs.benchmark.sides import PRECISIONS, Work, make_grads, ours
import torch
name, rule, axis = sys.argv[1:]
params = LISTS[name].params()
work = Work.new(rule, PRECISIONS["float32"], params, make_grads(params, torch.float32, "cpu"))
step = ours("cpu", axis or None).make(work)
print("ready", flush=True)
for line in sys.stdin:
    print(turns.timed(step, int(line)), flush=True)
"""
"""Takes steps when it is told to. It runs this tree's benchmark on the other tree's optimizers."""


@dataclass(frozen=True)
class Change:
    """One line of the verdict: the ratios of the old and of the new record."""

    name: str
    old: Ratio
    new: Ratio

    @property
    def verdict(self) -> str:
        """In a word: what lies apart by more than the quartiles."""
        if self.new.low > self.old.high or (math.isnan(self.new.median) and not math.isnan(self.old.median)):
            return "SLOWER"
        return "faster" if self.new.high < self.old.low else ""


def read(lines: list[dict[str, Any]]) -> dict[str, Ratio]:
    """The ratios of a record by name: the last line of each, as ours over another side.

    Not a number where a side was refused; MB where it is memory.
    """
    found = {}
    for line in lines:
        where = [] if line.get("device", "cpu") == "cpu" else [line["device"]]
        if "to_fused" in line:
            name = "/".join([*where, line["list"], line["precision"], line["rule"], line["side"]])
            found[name] = Ratio(**line["to_fused"])
        elif "why" in line:
            side = line["why"].partition(":")[0]
            found["/".join([*where, line["list"], line["precision"], line["rule"], side])] = Ratio(*[math.nan] * 3)
        elif "bytes_above_states" in line:
            size = line["bytes_above_states"] / 1e6
            found["/".join([line["list"], line["rule"], line["side"], "MB"])] = Ratio(size, 0.95 * size, 1.05 * size)
        elif "ratio" in line:
            low, high = line["quartiles"]
            ratio = Ratio(line["ratio"], low, high)
            if inverse(line):
                ratio = Ratio(1 / ratio.median, 1 / ratio.high, 1 / ratio.low)
            found[line["name"]] = ratio
    return found


def inverse(line: dict[str, Any]) -> bool:
    """Whether the ratio of a line is theirs over ours. Where it does not say so, by the times."""
    mine, theirs = line["ours_ms"], line["theirs_ms"]
    return line.get("inverse", abs(theirs / mine - line["ratio"]) < abs(mine / theirs - line["ratio"]))


def of_records(old: Path, new: Path) -> list[Change]:
    """The lines that both records have. What else tells them apart is printed."""
    lines = gpu_record.read(old), gpu_record.read(new)
    before, after = map(read, lines)
    if missing := [name for name in before if name not in after]:
        print(f"not in {new}: {', '.join(missing)}")
    for key in ("cpu", "gpu", "isa", "threads", "torch", "elements"):
        one, other = (sorted({str(line[key]) for line in record if key in line}) for record in lines)
        if one != other:
            print(f"another {key}: {', '.join(one)} before, {', '.join(other)} now")
    return [Change(name, before[name], after[name]) for name in before if name in after]


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A checkout of a revision with its kernels built, which goes away afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", tree, revision], cwd=ROOT, check=True)
        try:
            print(f"building {revision} ...", flush=True)
            environment = {**os.environ, "FASTWRS_CUDA": "0", "FASTWRS_CPU": "1"}
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
            overlay = tree / "fastwrs" / "benchmark"  # an old revision has none, or another one
            shutil.rmtree(overlay, ignore_errors=True)
            shutil.copytree(ROOT / "fastwrs" / "benchmark", overlay)
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=True)


class Worker:
    """A process that takes steps of one revision."""

    def __init__(self, tree: Path, name: str, rule: str, axis: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, name, rule, axis],
            cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.said()

    def said(self) -> str:
        """The next line of the process."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the steps of a revision failed with exit status {self.process.wait()}")
        return line

    def seconds(self, steps: int) -> float:
        """Takes some steps; seconds per step."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return float(self.said())

    def close(self) -> None:
        """Ends the process."""
        with self.process:  # which closes its pipes and waits
            self.process.kill()


def of_trees(old: Path, new: Path, names: list[str], rules: list[str], rounds: int) -> Iterator[Change]:
    """Steps of two builds in turns; their ratio is that of the new one, against 1."""
    axes = {"": "plain", "out": "WRS", "in": "WRS(IC)"}
    for name, rule, axis in itertools.product(names, rules, axes):
        if axis == "in" and not LISTS[name].convolutions:
            continue
        repeat = max(1, 10**7 // LISTS[name].elements)  # a time of some milliseconds
        with closing(Worker(old, name, rule, axis)) as one, closing(Worker(new, name, rule, axis)) as other:
            times = in_turns({"old": one, "new": other}, rounds, repeat=repeat, clock=Worker.seconds)
        yield Change(f"{name} {rule} {axes[axis]}", Ratio(1.0, 1.0, 1.0), Ratio.of(times["new"], times["old"]))


def report(changes: list[Change]) -> int:
    """Prints the table; the exit code."""
    if not changes:
        print("nothing to compare: the records have no line in common", file=sys.stderr)
        return 2
    width = max(len(change.name) for change in changes) + 2
    print(f"{'':<{width}}{'old':>8}  {'(quartiles)':<20}{'new':>8}  (quartiles)")
    for change in changes:
        columns = [f"{r.median:>8.3f}  {f'({r.low:.3f} to {r.high:.3f})':<20}" for r in (change.old, change.new)]
        print(f"{change.name:<{width}}{''.join(columns)}{change.verdict}".rstrip())
    slower = [change.name for change in changes if change.verdict == "SLOWER"]
    print(f"slower by more than the spread: {', '.join(slower) or 'nothing'}")
    return int(bool(slower))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a record, or a git revision")
    parser.add_argument("new", help="the same of the later one")
    parser.add_argument("--list", choices=list(LISTS), action="append", help="for revisions; default: resnet50, tiny")
    parser.add_argument("--rule", choices=list(OPTIONS), action="append", help="for revisions; default: all")
    parser.add_argument("--rounds", type=int, default=30, help="for revisions, 5 at least")
    options = parser.parse_args(arguments)
    if options.rounds < 5:
        parser.error(f"--rounds is {options.rounds}; of less than 5 the quartiles say nothing")
    try:
        return compared(options, parser)
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        print(f"nothing to compare: {error}", file=sys.stderr)
        return 2


def compared(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """The comparison that was asked for."""
    paths = [Path(options.old), Path(options.new)]
    records = [path.is_file() for path in paths]
    if all(records):
        return report(of_records(*paths))
    if any(records):
        parser.error("a record is compared with a record, a revision with a revision")
    for name in (options.old, options.new):
        command = ["git", "rev-parse", "-q", "--verify", f"{name}^{{commit}}"]
        if subprocess.run(command, cwd=ROOT, check=False, capture_output=True).returncode:
            parser.error(f"{name} is neither a record nor a git revision")
    with worktree(options.old) as old, worktree(options.new) as new:
        names, rules = options.list or ["resnet50", "tiny"], options.rule or list(OPTIONS)
        return report(list(of_trees(old, new, names, rules, options.rounds)))


if __name__ == "__main__":
    sys.exit(main())
