"""Lane 3: the CUDA kernels, compiled by g++ and run by an emulator, against the oracle; bytes and launches, counted.

The same source that nvcc compiles, behind tests/emulation/. Run by ``tests/run_lanes.py emulated``, which builds the
extension for it, plain and with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import emulated
import planned
import projecting
import pytest
import torch
from cases import CASES, DTYPES, PROJECTIONS, Case, TensorCase, select
from tolerances import NORM_BOUND

import fastwrs
from fastwrs import dispatch
from fastwrs.plan import StepCall

pytestmark = pytest.mark.emulated
CUDA: Any = dispatch._MODULES["cuda"]
KIB = 1024


@pytest.fixture(scope="module", autouse=True)
def _extension() -> Iterator[None]:
    emulated.load()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_step(case: Case) -> None:
    emulated.check(case)
    assert emulated.counts().launches > 0 or not case.tensors


# What a GPU has decides how tensors are cut: those with little shared memory take other ways through the kernels.
GPUS = {"7.5": (64, 64), "8.0": (163, 164), "8.6": (99, 100), "10.0": (227, 228)}


@pytest.mark.parametrize("gpu", GPUS)
def test_step_on_other_gpus(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block, multiprocessor = GPUS[gpu]
    monkeypatch.setenv("EMULATED_SHARED_PER_BLOCK", str(block * KIB))
    monkeypatch.setenv("EMULATED_SHARED_PER_MULTIPROCESSOR", str(multiprocessor * KIB))
    cases = [case for case in CASES if case.theme in ("long", "columns", "layout") or max_row(case) > 2000]
    for case in cases[::3]:
        emulated.check(case)
    assert len(cases) > 60
    rows_of_one = (TensorCase((1022, 1)), TensorCase((70001, 1), "in"))
    for option in ("adamp.open", "shifted.mom"):
        emulated.check(Case("look", option, rows_of_one, DTYPES[1], (tuple(PROJECTIONS["rescale"].items()),)))


def max_row(case: Case) -> int:
    return max((math.prod(tensor.shape[1:]) for tensor in case.tensors), default=0)


@pytest.mark.parametrize("threads", [32, 128])
def test_step_with_other_blocks(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMULATED_THREADS", str(threads))
    cases = select(20000, every=7)
    for case in cases:
        emulated.check(case)
    assert len(cases) > 50


@pytest.mark.parametrize("length", [7, 1023, 4608, 28672, 28673, 300001])
def test_norms_of_equal_elements(length: int) -> None:
    assert emulated.norm_error(length) <= NORM_BOUND[torch.float32]


# Lists that fill the parameters of a launch to the last byte, with records and strides behind the table.
FULL = [
    ("sgd", 510, 1, "c"),
    ("sgd.mom.wd", 451, 4, "c"),
    ("adamw.ams", 367, 5, "c"),
    ("adamw", 500, 1, "tr"),
    ("sgd", 900, 7, "gap"),
    ("shifted.mom", 420, 5, "c"),
]


@pytest.mark.parametrize(("option", "count", "records", "layout"), FULL)
@pytest.mark.parametrize("measured", [False, True])
def test_full_launches(option: str, count: int, records: int, layout: str, measured: bool) -> None:
    layouts = (layout, layout, layout)
    tensors = tuple(TensorCase((2, 3 + k % 3), layouts=layouts, row=k % records) for k in range(count))
    rows = tuple((("every", 1), ("target", 1.0 + 0.1 * k), ("lr", 0.01 * (k + 1))) for k in range(records))
    emulated.check(Case("full", option, tensors, DTYPES[0], rows, measured=measured), every=59)
    assert emulated.counts().launches > 0


# ---- bytes ----------------------------------------------------------------------------------------------------------

ADAMW, SGD = "adamw", "sgd.mom"
GATED_BYTES = {  # two passes: states, then weights; the gradient twice with nesterov, the projected buffer once more
    "adamp": 40,
    "adamp.open": 40,
    "adamp.nesterov": 44,
    "sgdp.open": 32,
    "sgdp.apart": 28,
    "sgdp.nesterov": 32,
}
ONE_PASS = [((64, 64, 3, 3), "out"), ((64, 64, 3, 3), "in"), ((64, 256, 1, 1), "out"), ((64, 256, 1, 1), "in")]
ROWS = [((32, 4608), "out"), ((8, 28672), "out"), ((300, 640), (0,)), ((4096, 27), "out")]
TWO_PHASES = [((4, 200000), "out"), ((300, 300), "tensor"), ((4000, 512), (0,))]
BYTES = {(ADAMW, "s"): (28, 36), (SGD, "s"): (20, 28), (ADAMW, "b"): (14, 18), (SGD, "b"): (10, 14)}
BYTES |= {("project", "s"): (8, 12.2), ("project", "b"): (4, 6.4)}  # the sums of parts count for more


SHIFTED_BYTES = {"shifted": 16, "shifted.mom": 24, "shifted.lam0": 20}  # the weights once more than without the term


def bytes_per_parameter(option: str, dtypes: tuple[str, str, str], shape: Any, axis: Any, layout: str) -> float:
    tensor = TensorCase(shape, axis, (layout, layout, layout))
    case = Case("bytes", option, (tensor,), dtypes, (tuple(PROJECTIONS["rescale"].items()),), measured=False)
    call = case.build()
    emulated.counts()
    emulated.run(call)
    moved = emulated.counts()
    return (moved.read + moved.written) / tensor.numel


@pytest.mark.parametrize("kind", ["s", "b"])
@pytest.mark.parametrize("option", [ADAMW, SGD, "project"])
def test_bytes_per_parameter(option: str, kind: str) -> None:
    """Counted: with a rescale in every step, each array is read once and written once, the gradient only read."""
    dtypes = DTYPES[0] if kind == "s" else DTYPES[3]
    one_pass, two_phases = BYTES[option, kind]
    for shape, axis in (*ONE_PASS, *ROWS):
        for layout in ("c", "cl") if len(shape) == 4 else ("c",):
            moved = bytes_per_parameter(option, dtypes, shape, axis, layout)
            assert abs(moved / one_pass - 1) < 0.01, (shape, axis, layout, moved)
    for shape, axis in TWO_PHASES:
        moved = bytes_per_parameter(option, dtypes, shape, axis, "c")
        assert moved < (1.01 if kind == "s" else 1.02) * two_phases, (shape, axis, moved)  # sums are fp32 in both


@pytest.mark.parametrize("option", GATED_BYTES)
def test_bytes_of_rules_with_a_gate(option: str) -> None:
    """Counted, with a rescale in every step. The sums of short rows are more than those of long ones."""
    for kind, share in (("s", 1.0), ("b", 0.5)):
        dtypes = DTYPES[0] if kind == "s" else DTYPES[3]
        for shape, axis in [*ONE_PASS, *ROWS[:2]]:
            for layout in ("c", "cl") if len(shape) == 4 else ("c",):
                moved = bytes_per_parameter(option, dtypes, shape, axis, layout)
                sums = 4 * 13 * shape[0] / math.prod(shape)  # written, read, read for the answer, written, read
                assert abs(moved - share * GATED_BYTES[option]) < 0.01 * moved + sums, (shape, axis, layout, moved)


@pytest.mark.parametrize("option", SHIFTED_BYTES)
def test_bytes_of_shifted_l2(option: str) -> None:
    """Counted, with a rescale in every step; what is told of a channel is read by each of its tiles."""
    for kind, share in (("s", 1.0), ("b", 0.5)):
        dtypes = DTYPES[0] if kind == "s" else DTYPES[3]
        for shape, axis in [*ONE_PASS, *ROWS]:
            for layout in ("c", "cl") if len(shape) == 4 else ("c",):
                moved = bytes_per_parameter(option, dtypes, shape, axis, layout)
                told = 4 * 5 * shape[0] / math.prod(shape)
                assert abs(moved - share * SHIFTED_BYTES[option]) < 0.005 * moved + told, (shape, axis, layout, moved)


# ---- launches -------------------------------------------------------------------------------------------------------


def launches(name: str, option: str, axis: Any) -> int:
    _, arguments = planned.step_over(name, option, axis)
    _, count = torch.ops.fastwrs.step_plan(*arguments, None, None, None, None)
    return count


@pytest.mark.parametrize("option", [ADAMW, SGD, "project"])
def test_launches(option: str) -> None:
    assert launches("resnet50", option, "out") == 1
    assert launches("resnet50", option, "in") == 1
    assert launches("resnet50", option, None) == 1
    assert launches("llama_1b", option, "out") == 1
    assert launches("llama_3b", option, "out") == 1
    assert launches("vgg16_bn", option, "out") == 2  # its longest rows have blocks of their own
    assert launches("tiny", option, "out") <= 5


@pytest.mark.parametrize("option", ["adamp", "adamp.nesterov", "sgdp.open"])
def test_launches_of_rules_with_a_gate(option: str) -> None:
    """The states, then the weights."""
    for axis in ("out", "in", None):
        assert launches("resnet50", option, axis) == 2
    assert launches("llama_1b", option, "out") == 2
    # What fits no tile takes a third one; larger lists are cut so that it finds the weights in the cache.
    assert launches("resnet50", option, "tensor") == launches("resnet50", ADAMW, "tensor") + 1
    tensors = (TensorCase((300, 300), "tensor"), TensorCase((2, 70000), "tensor"))
    call = Case(
        "launches", option, tensors, DTYPES[0], (tuple(PROJECTIONS["rescale"].items()),), measured=False
    ).build()
    assert torch.ops.fastwrs.step_plan(*call.args())[1] == 3


def test_launches_of_shifted_l2() -> None:
    """A look at the weights of all tensors that have channels, then the step; without lam the step alone."""
    for axis in ("out", "in", None):
        assert launches("resnet50", "shifted.mom", axis) == 2
        assert launches("resnet50", "shifted.lam0", axis) == 1
    assert launches("llama_1b", "shifted", "out") == 2
    assert launches("resnet50", "shifted", "tensor") == launches("resnet50", SGD, "tensor") + 1


def test_a_group_per_parameter_is_one_launch_too() -> None:
    """Records ride beside the tensors."""
    params = [torch.nn.Parameter(torch.randn(4, 5)) for _ in range(161)]
    for param in params:
        param.grad = torch.randn(4, 5)
    seen = []

    def count(_backend: Any, call: StepCall, dry_run: bool = False) -> None:
        _, launched = torch.ops.fastwrs.step_plan(*call.arguments(), dry_run)
        seen.append(launched)

    optimizer = fastwrs.AdamW([{"params": [param], "lr": 0.1 / (k + 1)} for k, param in enumerate(params)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "launch", count)
        optimizer.step()
    assert seen == [1]


# ---- through the optimizer ------------------------------------------------------------------------------------------


def optimizers(name: str, backend: str, patch: pytest.MonkeyPatch) -> tuple[Any, list[torch.nn.Parameter]]:
    """A script's optimizer on one of the backends; the emulated kernels stand for a GPU's."""
    patch.setattr(CUDA, "why_not", lambda *_: None)
    torch.manual_seed(3)
    shapes = ((40, 50), (8, 3, 3, 3), (3, 70001), (17,), (0, 4))
    params = [torch.nn.Parameter(torch.randn(shape).mul_(0.1)) for shape in shapes]
    rescale = fastwrs.Rescale(every=2, target=1.5)
    groups = [{"params": params[:3], "rescale": rescale}, {"params": params[3:], "lr": torch.tensor(0.02)}]
    return getattr(fastwrs, name)(groups, lr=0.05, backend=backend), params


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_an_optimizer_on_this_backend(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the reference, with a skipped step among the others; the workspace is made once and kept."""
    runs = []
    for backend in ("cuda", "reference"):
        optimizer, params = optimizers(name, backend, monkeypatch)
        kept = set()
        for step in range(5):
            torch.manual_seed(step)
            for param in params:
                param.grad = torch.randn(param.shape)
            optimizer.found_inf = torch.tensor(float(step == 2))
            optimizer.step()
            kept |= set(optimizer._workspaces.get(torch.device("cpu"), []))
        assert [state["step"].item() for state in optimizer.state.values()] == [4.0] * len(params)
        assert len(kept) == (backend == "cuda")
        runs.append(params)
    for ours, expected in zip(*runs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_the_projection_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in projecting.FLOATS.values():
        projecting.check_rescale(CUDA.rescale_, dtype)
        projecting.check_norms(CUDA.channel_norms, dtype)
    monkeypatch.setattr(CUDA, "why_not", lambda *_: None)
    projecting.check_rescaler("cuda")


def test_a_workspace_that_has_become_too_small_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, params = optimizers("AdamW", "cuda", monkeypatch)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(param.shape)
        optimizer.step()
    kept = optimizer._workspaces[torch.device("cpu")]
    (first,) = kept
    kept[0] = torch.zeros(4)  # as of a smaller model
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert [workspace.numel() for workspace in kept] == [4, first.numel()]  # a graph may go on using the old one
    assert not any(map(torch.equal, before[:4], params[:4]))
    assert optimizer.state[params[0]]["step"].item() == 3
    optimizer.zero_grad()
    optimizer.step()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, 4))]})
    assert len(kept) == 2  # other plans use the same


# ---- what is refused ------------------------------------------------------------------------------------------------


def simple(**more: Any) -> Any:
    tensors = TensorCase((40, 50)), TensorCase((3, 70001), "out")
    return Case("simple", ADAMW, tensors, DTYPES[0], (tuple(PROJECTIONS["rescale"].items()),), **more).build()


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_workspace_that_is_too_small_is_refused_before_anything_is_written(dry_run: bool) -> None:
    call = simple()
    size, _ = torch.ops.fastwrs.step_plan(*call.args())
    before = call.written()
    emulated.counts()
    for elements in (0, 3, (size - 1) // 4):
        call.workspace = torch.zeros(elements)
        with pytest.raises(RuntimeError, match=f"the workspace has {4 * elements} bytes, the step needs {size}"):
            torch.ops.fastwrs.step(*call.args(), dry_run)
    assert all(map(torch.equal, call.written(), before))
    assert emulated.counts().launches == 0


def test_a_dry_run_launches_nothing() -> None:
    call = simple()
    size, _ = torch.ops.fastwrs.step_plan(*call.args())
    call.workspace = torch.zeros((size + 3) // 4)
    before = call.written()
    emulated.counts()
    torch.ops.fastwrs.step(*call.args(), True)
    assert emulated.counts().launches == 0
    assert all(map(torch.equal, call.written(), before))


@pytest.mark.parametrize("found", [1.0, 2.0, -1.0, 1e-30, math.inf, math.nan])
def test_any_found_inf_skips_everything(found: float) -> None:
    call = simple(found_inf=found, grad_scale=8.0)
    before = call.written()
    emulated.run(call)
    assert all(map(torch.equal, call.written(), before))


def test_the_schedule_follows_the_steps_on_the_device() -> None:
    """As in a replayed graph: the very same arguments, five times; the kernel sees from the step what is due."""
    tensors = TensorCase((40, 50), t=1), TensorCase((3, 70001), "out", t=1)
    rescale = tuple(PROJECTIONS["every3"].items())
    call = Case("replay", "sgd", tensors, DTYPES[0], (rescale,), measured=False).build()
    hits = []
    for _ in range(7):
        emulated.run(call)
        worst = max(float((p.double().norm(dim=1) / 0.7 - 1).abs().max()) for p in call.params)
        hits.append(worst < 3e-7)
    assert hits == [False, False, True, False, False, True, False]
    assert [float(step) for step in call.steps] == [7.0, 7.0]


def test_the_emulator_runs_what_is_said() -> None:
    """Self-test: an extension with other kernels would count nothing."""
    emulated.counts()
    emulated.run(simple())
    seen = emulated.counts()
    assert seen.launches == 3 and seen.read > 20 * (2000 + 210003) > seen.written
