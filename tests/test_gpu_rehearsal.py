"""What `make gpu` does on a machine with a GPU, gone through without one. Nothing is compiled."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import gpu_parts
import gpu_record
import gpu_reduced
import on_gpu
import pytest
import torch
from cases import CASES, select

import fastwrs
from fastwrs.benchmark import lists, sides

ROOT = Path(__file__).resolve().parents[1]


def records(file: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in gpu_record.read(file) if line["kind"] == kind]


def rehearse(out: Path, *more: str) -> int:
    threads = torch.get_num_threads()
    try:
        return gpu.main(["--rehearse", "--out", str(out), *more])
    finally:
        torch.set_num_threads(threads)


# ---- the lists ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", lists.LISTS)
def test_lists_have_the_published_counts(name: str) -> None:
    params = lists.LISTS[name].params()
    counts = {"resnet50": 25_557_032, "vgg16_bn": 138_365_992, "vit_l": 304_326_632, "llama_1b": 1_235_814_400,
              "llama_3b": 3_212_749_824, "tiny": 256_102, "billion": 1_000_013_824,
              "wrn_28_10": 36_479_194, "vit_s": 22_050_664}  # fmt: skip
    assert sum(math.prod(param.shape) for param in params) == counts[name]
    assert {param.role for param in params} <= set(lists.ROLES)
    assert all(len(param.shape) >= 2 for param in params if param.role == lists.WEIGHT)
    assert max(len(param.shape) for param in lists.shrunk(params)) == max(len(param.shape) for param in params)


# ---- the parts ------------------------------------------------------------------------------------------------------


def test_parts_run_one_by_one_and_are_not_run_twice(tmp_path: Path) -> None:
    command = (sys.executable, "bench/gpu_parts.py", "--rehearse", "--no-build", "--out", str(tmp_path))
    parts = ["build", *gpu_parts.TESTS, "memcheck-triton"]
    done = subprocess.run([*command, "--part", *parts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = gpu_record.read(tmp_path / "parts.jsonl")
    assert [(line["part"], line["verdict"], line["rehearsal"]) for line in verdicts] == [(p, "ok", True) for p in parts]
    counts = {line["part"]: int(line["note"].split()[0]) for line in verdicts[1:]}
    assert counts["tests"] > len(CASES) + 30
    assert counts["tests-triton"] > len(CASES) and counts["tests-triton-training"] > 50
    assert counts["memcheck-triton"] >= gpu_reduced.FEWEST
    assert "REHEARSAL" not in (tmp_path / "summary.md").read_text()  # nothing was measured
    assert "pytest" in (tmp_path / "log.txt").read_text()


def test_every_part_ends_in_time_and_is_documented() -> None:
    assert gpu_parts.LONGEST < 9 * 60
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    assert [name for name in gpu_parts.PARTS if f"`{name}`" not in text] == []
    assert {f"bench-{name}" for name in gpu.PARTS} <= set(gpu_parts.PARTS)
    assert all(comparison.list_name in lists.LISTS for part in gpu.PARTS.values() for comparison in part)
    assert {goal[0] for goal in gpu_record.GOALS} <= set(gpu.COMPARISONS)
    assert {comparison for comparison, _ in gpu_parts.PROFILED} <= set(gpu.COMPARISONS)
    assert all((ROOT / file).is_file() for files, _ in gpu_parts.TESTS.values() for file in files)
    assert gpu_parts.KERNELS == on_gpu.NAMES
    sources = [path for suffix in ("cu", "cuh", "h") for path in ROOT.glob(f"csrc/**/*.{suffix}")]
    sources += (ROOT / "fastwrs" / "triton_kernels").glob("*.py")
    text = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert all(f"def {name}(" in text for name in on_gpu.NAMES["triton"])
    assert all(f"namespace {name}" in text for name in on_gpu.NAMES["cuda"])


def fake_session(tmp_path: Path, answers: list[tuple[int, str]]) -> gpu_parts.Session:
    """A session whose programs end as they are told, in order."""
    session = gpu_parts.Session(tmp_path, rehearsal=False, until=math.inf, where={"capability": "9.0"})
    session.commands = []  # type: ignore[attr-defined]

    def call(*command: str | Path, **_: object) -> tuple[int, str]:
        session.commands.append([str(part) for part in command])  # type: ignore[attr-defined]
        return answers.pop(0)

    session.call = call  # type: ignore[method-assign]
    return session


def test_tests_go_on_where_one_has_broken_the_context(tmp_path: Path) -> None:
    first = "tests/test_gpu.py::test_a[x-1] PASSED [ 1%]\ntests/test_gpu.py::test_b FAILED [ 2%]\n"
    answers = [(on_gpu.LOST, first), (0, "tests/test_gpu.py::test_c PASSED [100%]\n")]
    session = fake_session(tmp_path, answers)
    with pytest.raises(gpu_parts.BrokenError, match=r"1 of 3 tests failed .*test_b"):
        gpu_parts.tests("tests")(session)
    left_out = [part for part in session.commands[1] if part.startswith("--deselect")]  # type: ignore[attr-defined]
    assert left_out == ["--deselect=tests/test_gpu.py::test_a[x-1]", "--deselect=tests/test_gpu.py::test_b"]
    assert gpu_parts.LOST == on_gpu.LOST


@pytest.mark.parametrize("backend", on_gpu.BACKENDS)
@pytest.mark.parametrize("tool", gpu_parts.PLANTED)
def test_a_sanitizer_is_believed_only_if_it_finds_the_planted_fault(
    tool: str, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_record, "tool", lambda name: name)
    none, one = "========= ERROR SUMMARY: 0 errors", "========= ERROR SUMMARY: 1 error"
    if tool == "racecheck":
        none, one = (f"========= RACECHECK SUMMARY: {n} hazards displayed (0 errors, 0 warnings)" for n in (0, 1))
    options = [] if tool == "initcheck" else [(0, "  --kernel-regex arg")]
    passed = (0, f"40 of 90 cases passed\n{none}")
    good = [(0, ""), (0, none), (0, one), *options, passed]
    session = fake_session(tmp_path, [*good])
    assert gpu_parts.sanitizer(tool, backend)(session).startswith("40 of 90 cases passed")
    command = session.commands[-1]  # type: ignore[attr-defined]
    assert command[command.index("--backend") + 1] == backend
    for name in on_gpu.NAMES[backend]:
        assert (f"kns={name}" in command) == (tool != "initcheck")
    for k, answer in ((1, (0, one)), (2, (0, none)), (2, (1, "Device not supported")), (-1, (0, one)), (-1, (1, none))):
        answers = [*good]
        answers[k] = answer
        with pytest.raises(gpu_parts.BrokenError):
            gpu_parts.sanitizer(tool, backend)(fake_session(tmp_path, answers))
    planted = (ROOT / "tests/cpp/planted_faults.cu").read_text(encoding="utf-8")
    assert f'"{gpu_parts.PLANTED[tool]}"' in planted and '"none"' in planted


def test_a_program_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    session = gpu_parts.Session(tmp_path, rehearsal=True, until=gpu_parts.time.monotonic() + 1)
    with pytest.raises(gpu_parts.BrokenError, match="took too long"):
        session.call(sys.executable, "-c", "import time; time.sleep(60)")
    assert session.left < 1


# ---- the lane -------------------------------------------------------------------------------------------------------


def test_without_a_gpu_the_lane_fails_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(pytest.fail.Exception, match=r"lane gpu needs a GPU.*finds no CUDA device"):
        on_gpu.require()
    with pytest.raises(SystemExit, match="finds no CUDA device"):
        gpu.main(["--out", str(tmp_path / "gpu.jsonl")])
    with pytest.raises(SystemExit, match="finds no CUDA device"):
        gpu_reduced.main([])


def test_cases_go_to_a_device_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "DEVICE", "cpu")
    for case in select(3000, every=40):
        on_gpu.check_case(case)
    call = CASES[0].build("cpu")
    call.params[0].view(-1)[0] += 1
    moved = on_gpu.on_cpu(call)
    assert moved.params[0].stride() == call.params[0].stride()
    assert moved.params[0].data_ptr() != call.params[0].data_ptr()
    assert torch.equal(moved.params[0], call.params[0])


def test_the_reduced_set_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(gpu_reduced.time, "monotonic", lambda: next(ticks))
    for tool in gpu_reduced.LARGEST:
        assert gpu_reduced.main(["--device", "cpu", "--tool", tool, "--seconds", "25"]) == 0
        assert capsys.readouterr().out.startswith("24 of ")
    first = gpu_reduced.reduced(20_000)[:54]
    assert len({(case.rule, case.dtypes) for case in first}) == 36, "every rule and triple comes early"


# ---- the benchmark --------------------------------------------------------------------------------------------------


def test_the_benchmark_measures_once_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu.PARTS, "others", gpu.PARTS["others"][:2])
    out = tmp_path / "gpu.jsonl"
    assert rehearse(out, "--part", "others") == 0
    steps = records(out, "step")
    assert {line["comparison"] for line in steps} == {comparison.key for comparison in gpu.PARTS["others"]}
    assert {line["side"] for line in steps} >= {"torch fused", "fastwrs cpu WRS"}
    assert all(line["rehearsal"] and line["gpu"] is None and line["source"] for line in steps)
    size = out.stat().st_size
    assert rehearse(out, "--part", "others") == 0
    assert out.stat().st_size == size
    assert rehearse(tmp_path / "more.jsonl", "--part", "others", "--done", str(out)) == 0
    assert records(tmp_path / "more.jsonl", "step") == []
    assert rehearse(tmp_path / "late.jsonl", "--part", "others", "--seconds", "0") == gpu.MORE_TO_DO
    capsys.readouterr()
    assert gpu.main(["--summary", str(out)]) == 0
    said = capsys.readouterr().out
    assert "REHEARSAL" in said and "| resnet50/float32/AdamW/others | fastwrs cpu WRS |" in said


def test_all_sides_pass_their_check_and_one_that_is_wrong_is_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, setup = "resnet50/float32/AdamW/main", gpu.Setup("cpu", ["cpu"], 2)
    found = list(gpu.compare(gpu.COMPARISONS[key], setup, gpu.HostClock()))
    names = [line["side"] for line in found]
    assert {line["kind"] for line in found} == {"copy", "step"}
    assert len(names) == len(set(names)) == 10
    # Not compiled in earnest, which would take longer than all of this.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    compiled = list(gpu.compare(gpu.Comparison("vit_l", "bfloat16", "AdamW", "compiled"), setup, gpu.HostClock()))
    assert [line["kind"] for line in compiled] == ["copy", "step", "step", "step"]

    real = sides.ours

    def lazy(backend: str, axis: str | None) -> sides.Side:
        """Rescales only in the third step: everything else about it is right."""
        side = real(backend, axis)
        rescale = fastwrs.Rescale(start=3) if axis else None
        return replace(side, make=lambda work: sides._fastwrs(work, backend, rescale))

    monkeypatch.setattr(sides, "ours", lazy)
    out = tmp_path / "gpu.jsonl"
    monkeypatch.setitem(gpu.PARTS, "billion", [gpu.COMPARISONS[key]])
    assert rehearse(out, "--part", "billion") == 1
    assert records(out, "step") == [] and records(out, "done") == []
    assert {line["side"] for line in records(out, "refused")} == {"fastwrs cpu WRS", "fastwrs cpu WRS(IC)"}


def test_triton_is_measured_against_our_cuda_kernels(tmp_path: Path) -> None:
    """In its interpreter, in a process of its own; the kernels for the CPU stand in for those for CUDA."""
    code = """
import sys, gpu
gpu.PARTS["billion"] = gpu.PARTS["billion"][:1]
sys.exit(gpu.main(["--rehearse", "--out", sys.argv[1], "--part", "billion"]))
"""
    out = tmp_path / "gpu.jsonl"
    path = os.pathsep.join([str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, **gpu_parts.INTERPRETED, "PYTHONPATH": path}
    command = [sys.executable, "-c", code, str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ratios = {line["side"]: line.get("device_to_cuda") for line in records(out, "step")}
    triton = {side for side in ratios if side.startswith("fastwrs triton")}
    assert gpu_record.TRITON in triton
    assert {side for side, ratio in ratios.items() if ratio is not None} == triton
    said = gpu_record.summary(gpu_record.read(out))
    assert re.search(r"Triton / our CUDA kernel: [\d.]+, (met|MISSED) \(goal: <= 1.1\)", said)
    assert gpu.main(["--summary", str(out), "--plot", str(tmp_path / "roofline.png")]) == 0
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    ((title, panel),) = gpu.panels(gpu_record.read(out)).items()
    assert title == "billion/float32/AdamW/main" and set(panel.bars) == set(ratios) and panel.copy > 0


def test_sides_that_do_not_fit_into_memory_together_are_measured_apart() -> None:
    contenders = [sides.Side(name, lambda work: work.params.clear) for name in "fabcd"]
    sizes = dict.fromkeys("fabcd", 10.0) | {"b": 30.0}
    parts = [[side.name for side in chunk] for chunk in gpu.chunks(contenders, sizes, 35.0)]
    assert parts == [["f", "a"], ["f", "b"], ["f", "c", "d"]]
    assert [len(chunk) for chunk in gpu.chunks(contenders[:1], sizes, 35.0)] == [1]


def test_launches_and_single_steps_can_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "LAUNCHES", gpu.LAUNCHES[:1])
    assert rehearse(tmp_path / "gpu.jsonl", "--launches") == 0
    assert records(tmp_path / "gpu.jsonl", "launches")[0]["launches"] == 0  # a CPU launches nothing
    assert gpu.main(["--rehearse", "--once", "resnet50/float32/AdamW/main", "torch fused"]) == 0


def test_the_device_is_timed_behind_a_queue_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of calls, with stand-ins for torch.cuda: flush, wait, event, step, event."""
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("event")

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, _: Event) -> float:
            return 50.0  # milliseconds

    class Flush:
        def zero_(self) -> None:
            said.append("flush")

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=64))
    monkeypatch.setattr(cuda, "Event", Event)
    monkeypatch.setattr(cuda, "_sleep", lambda cycles: said.append(f"sleep {cycles}"))
    monkeypatch.setattr(cuda, "synchronize", lambda: said.append("wait"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Flush())
    clock = gpu.CudaClock()
    assert clock.cycles_per_second == 2e9
    said.clear()
    assert clock.device(lambda: said.append("step"), 1e-3) == 0.05
    assert said == ["flush", "sleep 2000000", "event", "step", "event", "wait"]
    said.clear()
    host, whole = clock.host(lambda: said.append("step"))
    assert said == ["flush", "wait", "step", "wait"]
    assert 0 < host <= whole


def test_the_summary_says_which_goals_are_met() -> None:
    line = {"kind": "step", "comparison": "billion/float32/AdamW/main", "side": gpu_record.CUDA, "gb_per_s": 1.0,
            "device_us": [1, 2, 3], "host_us": [1, 2, 3], "whole_us": [1, 2, 3], "share_of_copy": 0.91,
            "device_to_fused": [0.9, 0.99, 1.1], "whole_to_fused": [0.9, 1.0, 1.1]}  # fmt: skip
    said = gpu_record.summary([json.loads(json.dumps(line))])
    assert "0.990, met" in said and "0.910, MISSED" in said and "not measured" in said
    assert "REHEARSAL" not in said
    other = line | {"side": gpu_record.TRITON, "device_to_cuda": [1.0, 1.05, 1.2]}
    assert "1.050, met (goal: <= 1.1)" in gpu_record.summary([line, other])
    refused = {"kind": "refused", "comparison": "x", "side": "y", "why": "wrong"}
    assert "REFUSED, the check failed: x: y: wrong" in gpu_record.summary([line, refused])
    assert gpu_record.latest([line, line | {"gb_per_s": 2.0}]) == [line | {"gb_per_s": 2.0}]
