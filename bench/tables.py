"""Writes the tables of docs/benchmarks.md from the record, so that no figure is copied by hand.

    python bench/tables.py            every table between its two markers is made anew

The last line of each name in bench/results/step.jsonl counts. What is around the tables is written by people.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gpu_record
from compare import inverse

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "bench/results/step.jsonl", ROOT / "docs/benchmarks.md"
MARKED = re.compile(r"(<!-- table (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
Line = dict[str, Any]


def read(path: Path) -> list[Line]:
    """The last line of each name, in the order of the last run."""
    found: dict[tuple[Any, ...], Line] = {}
    for line in gpu_record.read(path):
        key = tuple(line.get(part) for part in ("kind", "list", "rule", "precision", "device", "side", "name", "why"))
        found.pop(key, None)
        found[key] = line
    return list(found.values())


def markdown(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table; all columns but the first are numbers."""
    titles = list(titles)
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *map(list, rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def where(lines: list[Line]) -> str:
    """When and on what the lines were measured."""
    found = dict.fromkeys(
        f"{line['date'][:10]}, {line['cpu']}, {line['isa']}, {line['threads']} threads, torch {line['torch']}, Python "
        f"{line['python']}, commit {line['commit']}" for line in lines
    )  # fmt: skip
    return f"\n*{'; '.join(found)}.*\n"


def sides(lines: list[Line], list_name: str, rule: str) -> str:
    """All sides on one list."""
    mine = [line for line in lines if line.get("kind") == "side" and (line["list"], line["rule"]) == (list_name, rule)]
    last = mine[-1]["date"]
    mine = [line for line in mine if line["date"] == last]  # one run: its sides took turns
    measured = sorted((line for line in mine if "why" not in line), key=lambda line: line["seconds"])
    titles = ["", "ms (quartiles)", "to torch fused (quartiles)", "GB/s", "of a copy", "host ms"]
    table = markdown(
        titles,
        (
            [
                f"**{line['side']}**" if line["side"].startswith("fastwrs") else line["side"],
                f"{1e3 * line['seconds']:.2f} ({1e3 * line['quartiles'][0]:.2f} to {1e3 * line['quartiles'][1]:.2f})",
                "{median:.3f} ({low:.3f} to {high:.3f})".format(**line["to_fused"]),
                f"{line['gb_per_s']:.1f}",
                f"{line['share_of_copy']:.2f}",
                f"{1e3 * line['host_seconds']:.2f}",
            ]
            for line in measured
        ),
    )
    failed = "".join(f"\nNot measured: {line['why']}\n" for line in mine if "why" in line)
    return table + failed + where(mine)


def ratios(lines: list[Line], pattern: str) -> str:
    """Comparisons of two sides whose name fits a pattern."""
    mine = [line for line in lines if "ratio" in line and re.search(pattern, line["name"])]
    table = markdown(
        ["", "ratio (quartiles)", "goal", "first ms", "second ms"],
        (
            [
                line["name"],
                f"{line['ratio']:.3f} ({line['quartiles'][0]:.3f} to {line['quartiles'][1]:.3f})",
                f"{line['goal']}{'' if line['met'] else ', missed'}" if line["goal"] else "",
                *(
                    f"{line[key]:.3f}"
                    for key in (("theirs_ms", "ours_ms") if inverse(line) else ("ours_ms", "theirs_ms"))
                ),
            ]
            for line in mine
        ),
    )
    return table + where(mine)


def memory(lines: list[Line]) -> str:
    """What steps take beside parameters, gradients and states."""
    mine = [line for line in lines if line.get("kind") == "memory"]
    rows = (
        [f"{line['list']}, {line['rule']}: {line['side']}", f"{line['bytes_above_states'] / 1e6:.2f}"] for line in mine
    )
    return markdown(["", "MB above the states"], rows) + where(mine)


TABLES: dict[str, Callable[..., str]] = {"sides": sides, "ratios": ratios, "memory": memory}


def written(page: str, lines: list[Line]) -> str:
    """The page with its tables made anew."""

    def table(found: re.Match[str]) -> str:
        kind, *arguments = found[2].split(" ", 1 if found[2].startswith("ratios") else -1)
        return f"{found[1]}{TABLES[kind](lines, *arguments)}{found[3]}"

    return MARKED.sub(table, page)


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(written(text, read(RECORD)), encoding="utf-8")
    sys.exit(0)
