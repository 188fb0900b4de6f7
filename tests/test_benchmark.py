"""``python -m fastwrs bench`` and bench/compare.py: what they say, and that they refuse to report what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import compare
import pytest
import tables
import torch
from torch import nn

import fastwrs
from fastwrs import __main__, library
from fastwrs.benchmark import command, lists, measure, sides, turns
from fastwrs.benchmark.lists import NORM, PLAIN, WEIGHT, Param

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).resolve().parents[1]
SMALL = [Param((16, 3, 3, 3), WEIGHT), Param((16,), NORM), Param((10, 16), WEIGHT), Param((10,), PLAIN)]


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16, 10))


def bench(*options: str) -> int:
    return __main__.main(["bench", "--rounds", "3", *options])


def test_a_model_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_networks.py").write_text("from test_benchmark import network\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    plot, record = tmp_path / "plot.png", tmp_path / "record.jsonl"
    assert bench("--model", "my_networks:network", "--plot", str(plot), "--record", str(record)) == 0
    said = capsys.readouterr().out
    assert "my_networks:network: 5 tensors, 634 parameters, of which 592 are rescaled; AdamW, float32, cpu" in said
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    names = [line["side"] for line in lines]
    assert names[0] == "torch fused" and {"fastwrs cpu WRS", "fastwrs cpu WRS(IC)", "fastwrs cpu plain"} < set(names)
    assert {"torch foreach", "torch fused + loop", "torch fused + in-place loop", "torch fused + foreach"} < set(names)
    for line in lines:
        assert line["to_fused"]["low"] <= line["to_fused"]["median"] <= line["to_fused"]["high"]
        assert min(line["seconds"], line["gb_per_s"], line["share_of_copy"], line["host_seconds"]) > 0
        assert f"{1e3 * line['seconds']:.3f}" in said and line["torch"] == torch.__version__
    assert lines[0]["to_fused"]["median"] == 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not [change.verdict for change in compare.of_records(record, record) if change.verdict]


def test_roles_are_those_of_param_groups() -> None:
    roles = [param.role for param in lists.of_model(network())]
    assert roles == [WEIGHT, NORM, NORM, WEIGHT, PLAIN]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("no_such", "--model no_such: torchvision is not installed, timm is not installed; package.module:function"),
        ("no_such_module:make", "--model no_such_module:make: ModuleNotFoundError"),
        ("math:pi", "--model math:pi: TypeError"),
        ("builtins:object", "--model builtins:object: it is object, neither a model nor its parameters"),
        ("sys:exit", "--model sys:exit: SystemExit"),
        ("builtins:list", "--model builtins:list: it has no parameters that are trained"),
    ],
)
def test_models_that_are_not_there(
    model: str, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda _: None)
    assert bench("--model", model) == 1
    assert says in capsys.readouterr().err


def test_a_name_is_looked_up_in_torchvision_and_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed, and what the parameters are where neither is."""
    made: list[str] = []

    def fake(name: str) -> nn.Module:
        made.append(name)
        if name == "small":
            return network()
        raise RuntimeError(f"unknown model ({name})")  # as timm says it

    timm = ModuleType("timm")
    timm.create_model = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: name == "timm" or None)
    assert [param.shape for param in command.parameters("small")][:2] == [(16, 3, 3, 3), (16,)]
    assert command.parameters("resnet50") == lists.LISTS["resnet50"].params() and made == ["small", "resnet50"]
    with pytest.raises(ValueError, match="torchvision is not installed, timm has none of this name"):
        command.parameters("huge")


def test_nothing_is_reported_of_a_step_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = sides.ours

    def late(backend: str, axis: str | None) -> sides.Side:
        """Rescales only in the third step: everything else about it is right."""
        rescale = fastwrs.Rescale(start=3) if axis else None
        return replace(real(backend, axis), make=lambda work: sides._fastwrs(work, backend, rescale))

    monkeypatch.setattr(sides, "ours", late)
    monkeypatch.setattr(command, "parameters", lambda _: SMALL)
    assert bench() == 1
    said = capsys.readouterr()
    assert said.out == "" and "nothing to report: fastwrs cpu WRS: parameter 0 has norms that are off by" in said.err


def test_another_packages_failure_is_a_line() -> None:
    def fails(work: sides.Work) -> turns.Step:
        raise OSError(f"no {work.rule} today")

    found = list(measure.compare(SMALL, "SGD", [sides.FUSED, sides.Side("other", fails)], rounds=3))
    assert found[0] == "other: OSError: no SGD today"
    assert isinstance(found[1], measure.Figures) and found[1].side == "torch fused" and len(found) == 2


def only_once(work: sides.Work) -> turns.Step:
    steps = [torch.optim.SGD(work.params, lr=sides.LR).step, lambda: None, lambda: None]
    return lambda: steps.pop(0)()


def takes_gradients(work: sides.Work) -> turns.Step:
    optimizer = torch.optim.SGD(work.params, lr=sides.LR)
    return lambda: (optimizer.step(), optimizer.zero_grad())


def uphill(work: sides.Work) -> turns.Step:
    return torch.optim.SGD(work.params, lr=sides.LR, maximize=True).step


def small_ones_only(work: sides.Work) -> turns.Step:
    weights = [weight for weight in work.of(WEIGHT) if weight.numel() < 10_000]
    return sides.one_after_another(torch.optim.SGD(work.params, lr=sides.LR).step, sides.divided, weights)


@pytest.mark.parametrize(
    ("make", "axis", "says"),
    [
        (only_once, None, "parameter 0 has not moved in a step"),
        (takes_gradients, None, "the gradient of parameter 0, which all sides share, has been changed"),
        (uphill, None, "the first step goes along the gradients"),
        (small_ones_only, "out", "parameter 2 has norms that are off by up to"),
    ],
)
def test_another_algorithm_is_not_reported_where_it_cannot_be_right(make: Any, axis: str | None, says: str) -> None:
    """Its weights have no oracle, but it has to do what all do: on the real list, not only on a small one."""
    params = [*SMALL[:2], Param((300, 300), WEIGHT)]
    other = sides.Side("other", make, axis, formula=False)
    found = list(measure.compare(params, "SGD", [sides.FUSED, other], rounds=3))
    assert str(found[0]).startswith(f"other: {says}") and len(found) == 2
    sound = replace(sides.followed(sides.FOREACH, "loop", sides.divided), name="other", formula=False)
    assert len([f for f in measure.compare(params, "SGD", [sides.FUSED, sound], rounds=3) if isinstance(f, str)]) == 0


def test_models_with_odd_parameters() -> None:
    odd = [Param((), PLAIN), Param((0, 5), WEIGHT), Param((0,), PLAIN), Param((3, 4), WEIGHT)]
    assert all(isinstance(line, measure.Figures) for line in measure.compare(odd, "AdamW", [sides.FUSED], rounds=3))
    frozen = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    frozen[0].requires_grad_(False)
    assert [param.shape for param in lists.of_model(frozen)] == [(2, 3), (2,)]
    assert lists.real_shape(torch.zeros(2, 3, dtype=torch.complex64)) == (2, 3, 2)


@pytest.mark.parametrize("option", [("--plot", "there/x.nothing"), ("--record", "/dev/null/x")])
def test_files_that_cannot_be_written_are_known_before(option: tuple[str, str], capsys: Any) -> None:
    assert bench(*option) == 1
    said = capsys.readouterr()
    assert said.out == "" and "nothing was measured" in said.err


def test_turns() -> None:
    said: list[str] = []
    times = turns.in_turns({name: lambda name=name: said.append(name) for name in "abc"}, rounds=4)
    rounds = [said[k : k + 3] for k in range(0, 21, 3)]
    assert all(sorted(turn) == list("abc") for turn in rounds)
    assert all(after == before[::-1] for before, after in zip(rounds[1::2], rounds[2::2], strict=True))
    assert len({"".join(turn) for turn in rounds}) > 2
    assert {len(found) for found in times.values()} == {4}
    assert len(turns.in_turns({"a": int, "b": int}, 99, seconds=0.0, least=5)["a"]) == 5
    assert turns.Ratio.of([2.0, 4.0, 6.0], [1.0, 1.0, 2.0]) == turns.Ratio(3.0, 2.0, 4.0)


def line(name: str, ratio: float, spread: float = 0.01, goal: str = "") -> str:
    quartiles = [ratio - spread, ratio + spread]
    inverse = goal.startswith(">=")
    return json.dumps(
        {"name": name, "ratio": ratio, "quartiles": quartiles, "inverse": inverse, "ours_ms": 1.0, "theirs_ms": 1.0}
    )


def test_records_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text(
        "\n".join([line("same", 1.0), line("slow", 1.0), line("loop / ours", 1.5, goal=">= 1.50"), line("gone", 1.0)])
    )
    new.write_text("\n".join([line("same", 1.015), line("slow", 1.03), line("loop / ours", 1.6, goal=">= 1.50")]))
    assert compare.main([str(old), str(new)]) == 1
    said = capsys.readouterr().out
    assert "slower by more than the spread: slow\n" in said and "faster" in said and "new.jsonl: gone\n" in said
    assert compare.main([str(new), str(old)]) == 1  # what was faster has become slower
    assert "slower by more than the spread: loop / ours\n" in capsys.readouterr().out
    assert compare.main([str(old), str(old)]) == 0
    # without a goal, too: what says so, or what the times say
    assert compare.inverse({"ratio": 1.3, "ours_ms": 10.0, "theirs_ms": 13.1})
    assert not compare.inverse({"ratio": 0.76, "ours_ms": 10.0, "theirs_ms": 13.1})
    assert compare.inverse({"ratio": 0.76, "ours_ms": 10.0, "theirs_ms": 13.1, "inverse": True})
    new.write_text(line("other", 1.0))
    assert compare.main([str(old), str(new)]) == 2
    with pytest.raises(SystemExit):
        compare.main([str(old), "no-such-revision"])


def test_what_the_new_record_lacks_or_refused_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def side(name: str, **more: Any) -> dict[str, Any]:
        return {"list": "net", "rule": "SGD", "precision": "float32", "threads": 2, "side": name, **more}

    ratio = {"to_fused": {"median": 1.0, "low": 0.9, "high": 1.1}}
    peak = {"list": "net", "rule": "SGD", "side": "ours", "threads": 2}
    old = [side("kept", **ratio), side("gone", **ratio), side("wrong", **ratio), side("kept", device="cuda", **ratio)]
    old.append({**peak, "bytes_above_states": 1_000_000})
    new = [side("kept", **ratio), {**side("-"), "why": "wrong: OSError: x"}, {**peak, "bytes_above_states": 1_200_000}]
    files = [tmp_path / "old.jsonl", tmp_path / "new.jsonl"]
    for file, lines in zip(files, (old, new), strict=True):
        file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"list": "cut o')
    assert compare.main(list(map(str, files))) == 1
    said = capsys.readouterr().out
    assert "new.jsonl: net/float32/SGD/gone, cuda/net/float32/SGD/kept\n" in said and "another" not in said
    assert "slower by more than the spread: net/float32/SGD/wrong, net/SGD/ours/MB\n" in said
    files[1].write_text(files[1].read_text().replace('"threads": 2', '"threads": 3'))
    compare.main(list(map(str, files)))
    assert "another threads: 2 before, 3 now" in capsys.readouterr().out
    files[1].write_text("nonsense\n" * 3)
    assert compare.main(list(map(str, files))) == 2
    for arguments in ([str(files[0]), "HEAD"], [*map(str, files), "--rounds", "1"]):
        with pytest.raises(SystemExit) as ended:
            compare.main(arguments)
        assert ended.value.code == 2


def test_the_tables_on_the_page_are_those_of_the_record() -> None:
    """`python bench/tables.py` writes them."""
    page = tables.PAGE.read_text(encoding="utf-8")
    assert len(tables.MARKED.findall(page)) > 3
    assert tables.written(page, tables.read(tables.RECORD)) == page


def test_tables_of_sides_and_memory() -> None:
    where = {"date": "2026-01-02T03", "cpu": "C", "isa": "i", "threads": 2, "torch": "t", "python": "p", "commit": "c"}
    common = {"kind": "side", "list": "net", "rule": "SGD", **where}
    figures = {"quartiles": [0.001, 0.003], "to_fused": {"median": 0.5, "low": 0.4, "high": 0.6}, "gb_per_s": 7.0}
    figures |= {"seconds": 0.002, "share_of_copy": 0.9, "host_seconds": 0.0001}
    lines = [
        common | figures | {"side": "slow", "seconds": 0.004},
        common | figures | {"side": "fastwrs cpu WRS"},
        common | {"why": "other: OSError"},
        common | figures | {"side": "older", "date": "2025"},
    ]
    memory = {**where, "kind": "memory", "list": "net", "rule": "SGD", "side": "s", "bytes_above_states": 1_500_000}
    row = "| **fastwrs cpu WRS** | 2.00 (1.00 to 3.00) | 0.500 (0.400 to 0.600) | 7.0 | 0.90 | 0.10 |\n| slow |"
    table = tables.sides([lines[3], *lines[:3]], "net", "SGD")
    assert row in table
    assert "Not measured: other: OSError" in table and "older" not in table and "commit c" in table
    assert "| net, SGD: s | 1.50 |" in tables.memory([memory])


def test_two_builds_take_turns(tmp_path: Path) -> None:
    """Both are copies of what is installed here; one of them takes every step three times.

    Their clock is the count of what they took, so that whatever else the machine does changes nothing.
    """
    assert library.why_not() is None
    old, new = (tmp_path / name for name in ("old", "new"))
    for tree, times in ((old, 1), (new, 3)):
        package = tree / "fastwrs"
        shutil.copytree(ROOT / "fastwrs", package, ignore=shutil.ignore_patterns("__pycache__"))
        step = "    backend.step(call, dry_run)\n"
        replace_once(package / "dispatch.py", step, f"{step}    TAKEN.append(call)\n" * times)
        with (package / "dispatch.py").open("a") as file:
            file.write("\n\nTAKEN = []\n")
        clock = package / "benchmark" / "turns.py"
        clock.write_text(clock.read_text().replace("time.perf_counter()", "len(dispatch.TAKEN)"))
        replace_once(clock, "from typing import Any\n", "from typing import Any\n\nfrom fastwrs import dispatch\n")
    found = list(compare.of_trees(old, new, ["tiny"], ["SGD"], rounds=5))
    assert [change.name for change in found] == ["tiny SGD plain", "tiny SGD WRS"]
    assert [(change.new.low, change.new.high, change.verdict) for change in found] == [(3.0, 3.0, "SLOWER")] * 2
    assert (ROOT / "fastwrs" / "benchmark" / "sides.py").is_file()


def replace_once(file: Path, old: str, new: str) -> None:
    """Edits a copy of the source."""
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))


def test_the_module_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastwrs", "bench", "--help"], capture_output=True, text=True, check=True
    )
    assert "--model" in done.stdout and "--record" in done.stdout
