"""Lane 5: the Triton kernels in Triton's interpreter against the oracle; bytes and launches, counted.

In processes of its own, since Triton decides when it is imported.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import interpreted
import planned
import projecting
import pytest
import torch
from calls import Call, same
from cases import DTYPES, PROJECTIONS, Case, TensorCase
from tolerances import NORM_BOUND, norm_deviation

import fastwrs
from fastwrs.plan import StepCall

pytestmark = pytest.mark.interpreted
TRITON = interpreted.TRITON


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    interpreted.load()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", interpreted.CASES, ids=lambda case: case.id)
def test_step(case: Case) -> None:
    interpreted.counts()
    interpreted.check(case, every=5 if case.theme in interpreted.LOOKING and len(case.tensors) > 9 else 1)
    assert interpreted.counts().launches > 0 or not case.tensors


@pytest.mark.parametrize("case", interpreted.IN_PARTS, ids=lambda case: case.id)
def test_the_order_of_programs_changes_no_bit(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sums that several programs leave."""
    written = []
    for seed in range(2):
        monkeypatch.setattr(interpreted.WATCH, "seed", seed)
        call = case.build()
        interpreted.run(call)
        written.append(call.written())
    assert all(same(written[0], others) for others in written[1:])


LENGTHS = [7, 1023, 1024, 2049, 4096, 4608, 16384, 16385, 50001]


@pytest.mark.parametrize("length", LENGTHS)
def test_norms_of_equal_elements(length: int) -> None:
    """The worst case for a running sum, also of gradients: they are zero, so that elements stay equal."""
    tensor = TensorCase((2, length), "out", data="const")
    call = Case("norms", "sgd.mom", (tensor,), DTYPES[0], interpreted.RESCALED, measured=False).build()
    for values in (*call.grads, *call.states):
        values.zero_()
    interpreted.run(call)
    assert norm_deviation(call.params[0], (1,), 1.0) <= NORM_BOUND[torch.float32]


@pytest.mark.parametrize("kinds", [(1, 2), (2, 3), (16, 40)])
def test_norms_through_the_exponents(kinds: tuple[int, int]) -> None:
    """Shrinking with a power that is no whole number, from tiny norms to huge ones."""
    power = kinds[0] / kinds[1]
    numbers = (("rate", 0.5), ("power", power), ("lr", 0.05))
    tensors = tuple(TensorCase((6, 33), data=data) for data in ("tiny", "plain", "huge"))
    interpreted.check(Case("power", "sgd", tensors, DTYPES[0], (numbers,)))


def test_functions_by_themselves() -> None:
    interpreted.check_functions()


# ---- bytes ----------------------------------------------------------------------------------------------------------

ADAMW, SGD = "adamw", "sgd.mom"
CONVOLUTIONS = [((16, 64, 3, 3), "out"), ((16, 64, 3, 3), "in"), ((4, 512, 3, 3), "in"), ((64, 256, 1, 1), "out")]
ROWS = [((6, 4608), "out"), ((2, 16384), "out"), ((100, 147), "out"), ((700, 27), "out")]
TWO_PHASES = [((1, 50000), "out"), ((200, 200), "tensor"), ((400, 128), (0,))]
BYTES = {(ADAMW, "s"): (28, 36), (SGD, "s"): (20, 28), (ADAMW, "b"): (14, 18), (SGD, "b"): (10, 14)}
BYTES |= {("project", "s"): (8, 12.2), ("project", "b"): (4, 6.4)}  # the sums of parts count for more


def bytes_per_parameter(option: str, dtypes: tuple[str, str, str], shape: Any, axis: Any, layout: str) -> float:
    tensor = TensorCase(shape, axis, (layout, layout, layout))
    call = Case("bytes", option, (tensor,), dtypes, interpreted.RESCALED, measured=False).build()
    interpreted.counts()
    interpreted.run(call)
    moved = interpreted.counts()
    return (moved.read + moved.written) / tensor.numel


@pytest.mark.parametrize("kind", ["s", "b"])
@pytest.mark.parametrize("option", [ADAMW, SGD, "project"])
def test_bytes_per_parameter(option: str, kind: str) -> None:
    """Counted: with a rescale in every step, each array is read once and written once, the gradient only read."""
    dtypes = DTYPES[0] if kind == "s" else DTYPES[3]
    one_pass, two_phases = BYTES[option, kind]
    for shape, axis in (*CONVOLUTIONS, *ROWS):
        for layout in ("c", "cl") if len(shape) == 4 else ("c",):
            moved = bytes_per_parameter(option, dtypes, shape, axis, layout)
            assert abs(moved / one_pass - 1) < (0.01 if kind == "s" else 0.02), (shape, axis, layout, moved)
    for shape, axis in TWO_PHASES:
        moved = bytes_per_parameter(option, dtypes, shape, axis, "c")
        assert moved < (1.01 if kind == "s" else 1.04) * two_phases, (shape, axis, moved)  # sums are fp32 in both


# Of each option with a gate what it moves: two reads of weights and states, one of the gradient, which Nesterov's step
# reads again; SGDP with project_momentum writes its buffer again where the gate is open.
BYTES_WITH_GATE = {
    "adamp": 40,
    "adamp.open": 40,
    "adamp.nesterov": 44,
    "sgdp": 28,
    "sgdp.apart": 28,
    "sgdp.open": 32,
    "sgdp.nesterov": 32,
}


@pytest.mark.parametrize(
    ("option", "kind"), [*((option, "s") for option in BYTES_WITH_GATE), ("adamp.nesterov", "b"), ("sgdp.open", "b")]
)
def test_bytes_per_parameter_with_a_gate(option: str, kind: str) -> None:
    """Beside them a few sums for each channel and tile, in fp32 in both."""
    dtypes = DTYPES[0] if kind == "s" else DTYPES[3]
    one_pass = BYTES_WITH_GATE[option] / (1 if kind == "s" else 2)
    two_phases = one_pass + (8 if kind == "s" else 4)
    for bytes_, shapes in ((one_pass, [CONVOLUTIONS[0], ROWS[1]]), (two_phases, TWO_PHASES[1:2])):
        for shape, axis in shapes:
            moved = bytes_per_parameter(option, dtypes, shape, axis, "c")
            numel = math.prod(shape)
            assert 0 <= moved - bytes_ < 96 * (shape[0] + numel / 2048) / numel, (shape, axis, moved)


@pytest.mark.parametrize(("option", "bytes_"), [("shifted", 16), ("shifted.mom", 24), ("shifted.lam0", 20)])
@pytest.mark.parametrize("kind", ["s", "b"])
def test_bytes_per_parameter_with_shifted_l2(option: str, bytes_: int, kind: str) -> None:
    """The weights once more, without lam not even that. Beside them a few sums for each channel and tile."""
    dtypes, share = (DTYPES[0], 1) if kind == "s" else (DTYPES[3], 2)
    for shape, axis, more in ((*CONVOLUTIONS[0], 0), (*ROWS[1], 0), (*ROWS[3], 0), (*TWO_PHASES[1], 8)):
        moved = bytes_per_parameter(option, dtypes, shape, axis, "c")
        numel = math.prod(shape)
        most = 96 * (shape[0] + numel / 2048) / numel
        assert 0 <= moved - (bytes_ + more) / share < most, (shape, axis, moved)


# ---- launches -------------------------------------------------------------------------------------------------------


def launches(name: str, option: str, axis: Any) -> tuple[int, int]:
    """Of a list's step, and how many of its tensors are walked by strides."""
    from fastwrs.triton_kernels import launch

    case, arguments = planned.step_over(name, option, axis)
    constants = [number for row in range(2) for number in launch.constants_of(case.rule, case.hyper(row))]
    sizes = list(launch.Variant(case.rule, len(case.slots), DTYPES[0], False, False).blocks)
    _, _, _, _, project, gate, _, walked, _ = torch.ops.fastwrs.triton_table(
        *arguments, None, None, None, None, False, constants, sizes, False, torch.empty(0, dtype=torch.int64)
    )
    return bool(gate) + 1 + bool(project), walked


@pytest.mark.parametrize("option", [ADAMW, SGD, "project"])
def test_launches(option: str) -> None:
    assert launches("resnet50", option, "out") == (1, 0)
    assert launches("resnet50", option, "in") == (1, 0)
    assert launches("llama_1b", option, "out") == (1, 0)
    assert launches("llama_3b", option, "out") == (1, 0)
    assert launches("tiny", option, "out") == (1, 0)
    assert launches("vgg16_bn", option, "out") == (2, 0)  # rows of 25,088
    assert launches("resnet50", option, "tensor") == launches("resnet50", option, (0,)) == (2, 0)


@pytest.mark.parametrize("option", ["adamp", "sgdp"])
def test_launches_of_rules_with_a_gate(option: str) -> None:
    """One more."""
    assert launches("resnet50", option, "out") == launches("llama_1b", option, None) == (2, 0)
    for axis in ("tensor", (0,)):
        assert launches("resnet50", option, axis) == (3, 0)
    assert launches("vgg16_bn", option, "out") == (3, 0)


def test_launches_of_shifted_l2() -> None:
    """One more, which walks nothing: it reads the weights alone, and these are dense."""
    assert launches("resnet50", "shifted.mom", "out") == launches("llama_1b", "shifted", None) == (2, 0)
    assert launches("resnet50", "shifted.lam0", "out") == (1, 0)
    assert launches("vgg16_bn", "shifted", "out") == launches("resnet50", "shifted", "tensor") == (3, 0)


# ---- the table ------------------------------------------------------------------------------------------------------


def simple(**more: Any) -> Call:
    tensors = (
        TensorCase((40, 50)),
        TensorCase((8, 3, 3, 3), "in"),
        TensorCase((2, 20001), "out"),
        TensorCase((7,), None),
    )
    return Case("simple", ADAMW, tensors, DTYPES[0], interpreted.RESCALED, **more).build()


def test_only_what_has_changed_is_brought_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing as long as all is the same; the front part when a gradient has moved; no more when numbers change."""
    changed: list[int] = []
    words: list[int] = []
    table_op = torch.ops.fastwrs.triton_table

    def watch(*arguments: Any) -> Any:
        found = table_op(*arguments)
        words.append(found[0])
        changed.append(found[1])
        return found

    call = StepCall(*simple().args())  # type: ignore[arg-type]
    with interpreted.watched(call):
        TRITON.step(call)
        from fastwrs.triton_kernels.table import ENTRY, HEADER

        monkeypatch.setattr(torch.ops.fastwrs, "triton_table", watch)
        TRITON.step(call)
        assert changed == [0]
        call.grads[1] = call.grads[1].clone()
    with interpreted.watched(call):
        TRITON.step(call)
        header, entry = len(HEADER), len(ENTRY)
        assert header + entry < changed[-1] <= header + 2 * entry
        call.hyper[0] *= 0.5
        TRITON.step(call)
        assert header + 4 * entry < changed[-1] < words[-1] - 4
        TRITON.step(call)
        assert changed[-1] == 0


def test_a_table_for_a_graph_is_a_spare_one_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a graph is captured no memory can be had; what it reads when replayed belongs to nobody else."""
    new_table, page_locked = TRITON._new_table, []

    def two_memories(size: int, device: torch.device, pinned: bool = False) -> Any:
        table = new_table(size, device)
        table.device = torch.empty_like(table.host)
        if pinned:
            page_locked.append(table.host)
        return table

    brought = []

    def bring(table: Any) -> None:
        if table.behind:
            brought.append((table, table.behind))
        table.device[: table.behind].copy_(table.host[: table.behind])
        table.behind = 0

    monkeypatch.setattr(TRITON, "_new_table", two_memories)
    monkeypatch.setattr(TRITON, "_bring_to_device", bring)
    monkeypatch.setattr(TRITON, "_on_gpu", lambda _device: True)
    monkeypatch.setattr(TRITON, "_stream_of", lambda _device: 0)
    call = StepCall(*simple().args())  # type: ignore[arg-type]
    capturing = False
    monkeypatch.setattr(TRITON, "is_captured", lambda _call: capturing)
    with interpreted.watched(call):
        TRITON.step(call, dry_run=True)
        assert not brought
        TRITON.step(call)
        eager, _ = brought[-1]
        memory = TRITON._memories[call.workspace]
        assert len(brought) == 1 and len(memory.spares) == TRITON.SPARES
        capturing = True
        for _ in range(TRITON.SPARES):
            TRITON.step(call, dry_run=True)
            TRITON.step(call)
        with pytest.raises(RuntimeError, match="take a step before"):
            TRITON.step(call)
        used = [table for table, _ in brought[1:]]
        assert len(set(map(id, used))) == TRITON.SPARES and eager not in used
        assert {id(table.host) for table in used} == set(map(id, page_locked)) and memory.captured == used
        assert all(count == brought[0][1] for _, count in brought)
        capturing = False
        TRITON.step(call)
        assert len(memory.spares) == TRITON.SPARES and len(brought) == 1 + TRITON.SPARES
    assert [float(step) for step in call.steps] == [float(call.steps[0])] * 4


def test_a_capture_without_a_step_before_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fastwrs.backends.workspace"], "is_captured", lambda _call: True)
    call = simple()
    before = call.written()
    with pytest.raises(RuntimeError, match="take a step before"):
        TRITON.step(StepCall(*call.args()))  # type: ignore[arg-type]
    assert all(map(torch.equal, call.written(), before))


# ---- steps ----------------------------------------------------------------------------------------------------------


def test_a_dry_run_launches_nothing() -> None:
    call = simple()
    before = call.written()
    interpreted.counts()
    TRITON.step(StepCall(*call.args()), dry_run=True)  # type: ignore[arg-type]
    assert interpreted.counts().launches == 0
    assert all(map(torch.equal, call.written(), before))


@pytest.mark.parametrize("found", [1.0, -1.0, 1e-30, math.inf, math.nan])
def test_any_found_inf_skips_everything(found: float) -> None:
    call = simple(found_inf=found, grad_scale=8.0)
    before = call.written()
    interpreted.run(call)
    assert all(map(torch.equal, call.written(), before))


def test_the_schedule_follows_the_steps_on_the_device() -> None:
    """As in a replayed graph: the very same arguments, seven times; the kernels see from the step what is due."""
    tensors = TensorCase((40, 50), t=1), TensorCase((2, 20001), "out", t=1)
    call = Case("replay", "sgd", tensors, DTYPES[0], (tuple(PROJECTIONS["every3"].items()),), measured=False).build()
    hits = []
    for _ in range(7):
        interpreted.run(call)
        hits.append(max(norm_deviation(param, (1,), 0.7) for param in call.params) < 3e-7)
    assert hits == [False, False, True, False, False, True, False]
    assert [float(step) for step in call.steps] == [7.0, 7.0]


MOVED: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.5},
    "AdamW": {"betas": (0.5, 0.9), "eps": 1e-3},
    "AdamP": {"nesterov": True, "eps": 1e-3},
    "SGDP": {"momentum": 0.5, "delta": 3.0},
}


@pytest.mark.parametrize("name", MOVED)
def test_an_optimizer_on_this_backend(name: str) -> None:
    """As on the reference, with a skipped step among the others; the workspace is made once and kept."""
    runs = []
    for backend in ("triton", "reference"):
        torch.manual_seed(3)
        shapes = ((40, 50), (8, 3, 3, 3), (2, 20001), (17,), (0, 4))
        params = [torch.nn.Parameter(torch.randn(shape).mul_(0.1)) for shape in shapes]
        rescale = fastwrs.Rescale(every=2, target=1.5)
        groups: Any = [{"params": params[:3], "rescale": rescale}, {"params": params[3:], "lr": torch.tensor(0.02)}]
        optimizer: Any = getattr(fastwrs, name)(groups, lr=0.05, backend=backend)
        kept: set[int] = set()
        for step in range(5):
            torch.manual_seed(step)
            for param in params:
                param.grad = torch.randn(param.shape)
            optimizer.found_inf = torch.tensor(float(step == 2))
            if step == 3:  # what a scheduler or the user changes
                optimizer.param_groups[0].update(weight_decay=0.3, **MOVED[name])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(interpreted.WATCH, "check", lambda *_: 0)  # operands are the optimizer's own
                optimizer.step()
            kept |= {id(memory) for memory in optimizer._workspaces.get(torch.device("cpu"), [])}
        assert [state["step"].item() for state in optimizer.state.values()] == [4.0] * len(params)
        assert len(kept) == (backend == "triton")
        runs.append(params)
    for ours, expected in zip(*runs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_the_projection_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreted.WATCH, "check", lambda *_: 0)  # operands are the backend's own
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        projecting.check_rescale(TRITON.rescale_, dtype, projecting.SMALL)
        projecting.check_norms(TRITON.channel_norms, dtype, projecting.SMALL)
    projecting.check_rescaler("triton")


def test_opcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreted.WATCH, "check", lambda *_: 0)
    call = simple()
    assert call.measured is not None
    call.measured.zero_()  # opcheck compares what is written, and a NaN equals nothing
    plain = [[t.clone() for t in a] if isinstance(a, list) and a and torch.is_tensor(a[0]) else a for a in call.args()]
    torch.library.opcheck(torch.ops.fastwrs.triton_step.default, tuple(plain))


# ---- what the tests see ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["params", "grads", "states", "steps"])
def test_addresses_are_checked(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-test: an operand that is not registered."""
    call = StepCall(*simple().args())  # type: ignore[arg-type]
    missing = getattr(call, kind)[0]
    register = interpreted.WATCH.register

    def without_it(found: list[torch.Tensor], *rest: Any) -> None:
        register([tensor for tensor in found if tensor is not missing], *rest)

    monkeypatch.setattr(interpreted.WATCH, "register", without_it)
    with interpreted.watched(call), pytest.raises(Exception, match="belong to no operand"):
        TRITON.step(call)
