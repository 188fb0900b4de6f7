"""What the C++ compiler makes of the loops that update and sum rows: whole vectors, for every rule and dtype.

Slightly other source makes it fall back to single elements or to short vectors: the same numbers, several times slower.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from fastwrs import library

pytestmark = pytest.mark.compiled

FUNCTION = re.compile(r"[0-9a-f]+ <(.*)>:")
INSTRUCTION = re.compile(r"\s*([0-9a-f]+):\t(\S+)\s*(.*)")
OF_MANY = re.compile(r"v?(?:mul|add|sub|div|sqrt)p[sd] ")
OF_ONE = re.compile(r"v?(?:mul|add|sub|div|sqrt)s[sd] |v?p(?:extr|insr)[bw] |mov[zs][bw][lq] |vinsertps ")
WIDEST = {"avx512": "%zmm", "avx2": "%ymm"}
SUMMING = re.compile(r"cpu::(avx\w+)::.*(row<|advance<|distances_from_origin<)")
# SGDP, all in bfloat16, measured: a buffer that may stay as it is, and AVX2 has no masked stores of 16 bits.
KNOWN = {"avx2": 1}


class Loop(NamedTuple):
    """The innermost loop of a function that asks for memory ahead."""

    function: str
    isa: str
    instructions: list[str]


def _functions(listing: str) -> Iterator[tuple[str, list[tuple[int, str, str]]]]:
    name, body = "", []
    for line in listing.splitlines():
        if begins := FUNCTION.fullmatch(line):
            if name:
                yield name, body
            name, body = begins[1], []
        elif found := INSTRUCTION.match(line):
            body.append((int(found[1], 16), found[2], found[3]))
    yield name, body


def _address(operand: str) -> int:
    """Where a jump goes."""
    found = re.match(r"[0-9a-f]+(?= <)", operand)
    return int(found[0], 16) if found else 1 << 64


@functools.cache
def loops() -> list[Loop]:
    """All loops that sum rows, of the extension that is installed."""
    objdump = shutil.which("objdump")
    assert objdump is not None, "objdump is missing (on Debian: apt-get install binutils)"
    library.load()
    command = [objdump, "-d", "-C", "--no-show-raw-insn", "-j", ".text", library.extension().__file__]
    found = []
    for name, body in _functions(subprocess.run(command, capture_output=True, text=True, check=True).stdout):
        summing = SUMMING.search(name)
        if not summing:
            continue
        jumps = [(to, at) for at, op, rest in body if op[0] == "j" and (to := _address(rest)) < at]
        for begin, end in sorted(jumps, key=lambda jump: jump[1] - jump[0]):
            inside = [f"{op} {rest}" for at, op, rest in body if begin <= at <= end]
            if any(op.startswith("prefetch") for op in inside):
                found.append(Loop(name, summing[1], inside))
                break
    return found


def _is_vectorised(loop: Loop) -> bool:
    many = [text for text in loop.instructions if OF_MANY.match(text)]
    return (
        bool(many) and all(WIDEST[loop.isa] in text for text in many) and not any(map(OF_ONE.match, loop.instructions))
    )


@pytest.mark.parametrize("isa", [isa for isa in library.cpu_features() if isa != "plain"])
def test_rows_are_updated_and_summed_by_vectors(isa: str) -> None:
    mine = [loop for loop in loops() if loop.isa == isa]
    assert len(mine) > 150, "the loops are not found"
    slow = {loop.function for loop in mine if not _is_vectorised(loop)}
    assert len(slow) <= KNOWN.get(isa, 0), "\n".join(slow)
