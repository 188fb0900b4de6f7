"""The demo, as a user runs it, but tiny: it writes its table and its plot, and rescaled channels have norm 1."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from calls import one_thread

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "digits" / "train.py"


def test_a_tiny_run(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--seeds", "1", "--epochs", "1", "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "8/8" in done.stderr  # the progress bar: two optimizers, four methods, one epoch
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.txt").read_text(encoding="utf-8")
    assert table in done.stdout
    runs = {(run["optimizer"], run["method"]): run for run in json.loads((tmp_path / "results.json").read_text())}
    assert len(runs) == 8
    for (optimizer, method), run in runs.items():
        assert any(line.split()[:2] == [optimizer, method] for line in table.splitlines())
        assert 10 < run["accuracy"][-1] <= 100
        before, after = run["norms"]
        if method.startswith("WRS"):
            assert before == pytest.approx([1] * len(before), abs=3e-7)  # projected before the first step
            assert after == pytest.approx([1] * len(after), abs=3e-7)
        else:
            assert max(abs(a - b) for a, b in zip(before, after, strict=True)) > 1e-3


def test_the_effect_on_batchnorm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The script behind the table of docs/batchnorm.md: stale statistics show, and those that follow do not."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    with one_thread():  # which it sets, and which is set back
        runpy.run_path(str(SCRIPT.parent / "batchnorm.py"))["main"](["--epochs", "2"])
    first = capsys.readouterr().out.split("\n\n")[0].splitlines()[-3:]
    (plain,), (stale, moved), (followed, rounding) = (
        [float(word) for word in re.findall(r"[\d.e-]+$|[\d.]+(?= )", line)] for line in first
    )
    assert plain == followed
    assert stale != plain
    assert moved > 1000 * rounding
