"""Writes the tables of docs/papers.md anew from the CSV files that the other scripts have left, and takes plots along.

    python examples/paper/report.py [--out examples/paper/out] [--docs docs] [--help]

A table stands between two comments, `<!-- table1 -->` and `<!-- end -->`; the words around it are not touched. Three
plots are copied to docs/figures/.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from common.models import NAMES
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PLOTS = ("fig2.png", "fig3.png", "fig6.png")
Row = dict[str, str]


def read(folder: Path, name: str) -> list[Row]:
    """A CSV file."""
    with (folder / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table."""
    header = list(header)
    rows = [header, ["---"] * len(header), *map(list, lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def number(text: str, digits: int | str = 2) -> str:
    """A number of a CSV file, rounded to so many decimal places or in a format; nothing stays nothing."""
    return format(float(text), f".{digits}f" if isinstance(digits, int) else digits) if text else ""


def with_spread(row: Row, mean: str, deviation: str, digits: int | str = 2) -> str:
    """Mean (standard deviation), by the names of their columns."""
    spread = number(row[deviation], digits)
    return number(row[mean], digits) + (f" ({spread})" if spread else "")


def accuracy(row: Row) -> str:
    """Mean (standard deviation), in percent."""
    return with_spread(row, "test_accuracy", "standard_deviation")


def table1(folder: Path) -> str:
    """Accuracies by method, what was chosen, and the paired tests."""
    rows = read(folder, "table1.csv")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = []
    for network, optimizer in dict.fromkeys((row["network"], row["optimizer"]) for row in rows):
        cells = {r["method"]: r for r in rows if (r["network"], r["optimizer"]) == (network, optimizer)}
        seeds, chosen = cells[methods[0]]["seeds"], ", ".join(cells[method]["weight_decay"] for method in methods)
        lines.append([NAMES[network], optimizer, seeds, *(accuracy(cells[method]) for method in methods), chosen])
    means = [
        sum(float(r["test_accuracy"]) for r in rows if r["method"] == m) * len(methods) / len(rows) for m in methods
    ]
    lines.append(["mean", "", "", *(f"{mean:.2f}" for mean in means), ""])
    tests = [
        f"- {t['comparison']} over {t['pairs']} pairs: {float(t['difference']):+.2f} points, t({t['df']}) = "
        f"{number(t['t'])}, p = {number(t['p'], 3)}"
        for t in read(folder, "table1_tests.csv")
    ]
    table = markdown(["network", "optimizer", "seeds", *methods, "chosen lambda"], lines)
    return "\n".join([table, "", *tests])


def table2(folder: Path) -> str:
    """Accuracies by optimizer and network."""
    rows = read(folder, "table2.csv")
    networks = list(dict.fromkeys(row["network"] for row in rows))
    lines = [
        [name, *(accuracy(row) for row in rows if row["optimizer"] == name)]
        for name in dict.fromkeys(row["optimizer"] for row in rows)
    ]
    seeds = {row["network"]: row["seeds"] for row in rows}
    return markdown(["optimizer", *(f"{NAMES[n]} ({seeds[n]} seed{'s' * (seeds[n] != '1')})" for n in networks)], lines)


def windows(folder: Path, panels: str) -> str:
    """The panels of Figs. 1 and 6 whose names begin so."""
    rows = [row for row in read(folder, "fig1_fig6_summary.csv") if row["panel"].startswith(panels)]
    names = {"all": "all", "early": "until the first division of the learning rate", "late": "after it"}
    lines = [
        [NAMES[r["network"]], r["method"], names[r["window"]], r["seeds"], accuracy(r), number(r["best_minus_final"])]
        for r in rows
    ]
    return markdown(["network", "method", "epochs", "seeds", "test accuracy (%)", "best after that - final"], lines)


def fig2a(folder: Path) -> str:
    """What the effective gradient norm does: without decay, with each lambda, with the tau of the recipe."""
    figures = {"first_epoch": ".3g", "level": ".3g", "growth": 2, "trend": 2}
    lines = []
    for r in read(folder, "fig2a_summary.csv"):
        if r["method"] == "WRS" and r["default"] == "0":
            continue
        method = f"{r['method']} {r['value']}".strip() + (" (recipe)" if r["value"] and r["default"] == "1" else "")
        cells = (with_spread(r, name, f"{name}_standard_deviation", digits) for name, digits in figures.items())
        lines.append([NAMES[r["network"]], r["optimizer"], method, r["seeds"], *cells])
    header = ["in the first epoch", "after the first division", "growth", "correlation with the epoch"]
    return markdown(["network", "optimizer", "method", "seeds", *header], lines)


def fig2b(folder: Path) -> str:
    """The sweeps, and their ranges."""
    rows, lines = read(folder, "fig2b.csv"), []
    for short in read(folder, "fig2b_summary.csv"):
        mine = [r for r in rows if (r["network"], r["optimizer"]) == (short["network"], short["optimizer"])]
        for method, key in (("WD", "wd"), ("WRS", "wrs")):
            some = [r for r in mine if r["method"] == method]
            points = ", ".join(f"{r['value']}: {accuracy(r)}" for r in some)
            cells = [NAMES[short["network"]], short["optimizer"], method, points, number(short[f"range_{key}"])]
            others = ("range_wd_without_greatest", "best_off") if key == "wd" else ()
            lines.append([*cells, *([number(short[name]) for name in others] or ["", ""])])
    header = ["lambda or tau: accuracy", "range", "without the greatest lambda", "no decay"]
    return markdown(["network", "optimizer", "method", *header], lines)


def fig3(folder: Path) -> str:
    """The last step of (a), and norms of (b) at some epochs."""
    last = {row["method"]: row for row in read(folder, "fig3a.csv")}
    lines = [
        [method, row["step"], f"{row['smallest_change']} to {row['greatest_change']}", row["predicted_change"]]
        for method, row in last.items()
    ]
    first = markdown(["(a) MLP", "steps", "relative change of the norms", "predicted"], lines)
    rows = read(folder, "fig3b.csv")
    epochs = sorted({int(row["epoch"]) for row in rows})
    shown = [epochs[round(part * (len(epochs) - 1))] for part in (0, 0.3, 0.6, 1)]
    lines = []
    for method in last:
        norms = [[float(r["norm"]) for r in rows if (r["method"], r["epoch"]) == (method, str(e))] for e in shown]
        lines.append([method, *(f"{sum(n) / len(n):.3f} ({min(n):.3f} to {max(n):.3f})" for n in norms)])
    second = markdown(["(b) VGG16, 2nd convolution", *(f"epoch {epoch}" for epoch in shown)], lines)
    return f"{first}\n\n{second}"


def fig4(folder: Path) -> str:
    """Beta at the end, by layer, method and space."""
    rows = read(folder, "fig4.csv")
    last = str(max(int(row["epoch"]) for row in rows))
    rows = [row for row in rows if row["epoch"] == last]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    lines = [
        [space, method, *(number(r["beta"]) for r in rows if (r["space"], r["method"]) == (space, method))]
        for space in dict.fromkeys(row["space"] for row in rows)
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    return markdown(["space", "method", *layers], lines)


def fig5(folder: Path) -> str:
    """Beta of the 6th convolution after ISP, by method and epoch."""
    rows = [row for row in read(folder, "fig4.csv") if (row["layer"], row["space"]) == ("6", "ISP")]
    epochs = list(dict.fromkeys(row["epoch"] for row in rows))
    lines = [
        [method, *(number(r["beta"]) for r in rows if r["method"] == method)]
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    return markdown(["method", *(f"epoch {epoch}" for epoch in epochs)], lines)


def weight_norm(folder: Path) -> str:
    """First and last figures of each curve."""
    lines = [
        [
            r["figure"], r["width"], f"{number(r['minimum_norm_first'], 4)} to {number(r['minimum_norm_last'], 4)}",
            f"{float(r['ratio_first']):.3g} to {float(r['ratio_last']):.3g}", f"{float(r['greatest_ratio']):.3g}",
        ]
        for r in read(folder, "weight_norm_summary.csv")
    ]  # fmt: skip
    header = ["figure", "m", "least norm, first to last", "gradient^2 / loss, first to last", "its greatest"]
    return markdown(header, lines)


def finetune(folder: Path) -> str:
    """Accuracies after the first evaluation and at the end."""
    rows = read(folder, "finetune_summary.csv")
    lines = [[r["optimizer"], r["method"], r["seeds"], number(r["after_first"]), accuracy(r)] for r in rows]
    header = ["optimizer", "method", "seeds", f"after {rows[0]['first_epoch']} epochs (%)", "at the end (%)"]
    return markdown(header, lines)


TABLES: dict[str, Callable[[Path], str]] = {
    "table1": table1,
    "table2": table2,
    "fig1": lambda folder: windows(folder, "fig1"),
    "fig2a": fig2a,
    "fig2b": fig2b,
    "fig3": fig3,
    "fig4": fig4,
    "fig5": fig5,
    "fig6a": lambda folder: windows(folder, "fig6a"),
    "fig6b": lambda folder: windows(folder, "fig6b"),
    "weight_norm": weight_norm,
    "finetune": finetune,
}


def filled(text: str, folder: Path) -> str:
    """The document with all tables written anew.

    Raises:
        ValueError: a table has no place in the document.
    """
    for name, table in TABLES.items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        if len(place.findall(text)) != 1:
            raise ValueError(f"the document needs <!-- {name} --> and <!-- end --> once")
        found = table(folder)
        text = place.sub(lambda match, found=found: f"{match[1]}\n{found}\n\n{match[2]}", text)
    return text


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "out")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="the folder with papers.md")
    parser.add_argument("--data", default="digits", help="which folder of --out")
    options = parser.parse_args(arguments)
    folder, document = options.out / options.data, options.docs / "papers.md"
    try:
        text = filled(document.read_text(encoding="utf-8"), folder)
        plots = {name: Image.open(folder / name) for name in PLOTS}
    except FileNotFoundError as error:
        parser.error(f"{error.filename} is not there: run `make figures`, or the scripts, first")
    document.write_text(text, encoding="utf-8")
    (options.docs / "figures").mkdir(exist_ok=True)
    for name, plot in plots.items():
        with plot as image:  # 128 colours are enough, and a third of the bytes
            image.convert("RGB").quantize(128).save(options.docs / "figures" / name, optimize=True)
    print(f"wrote {document} and {len(PLOTS)} plots beside it")


if __name__ == "__main__":
    main()
