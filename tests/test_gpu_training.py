"""Lane 7: optimizers on a real GPU: against the reference, in streams and graphs, under GradScaler, without waiting."""

from __future__ import annotations

import copy
import io
import json
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import on_gpu
import pytest
import tolerances
import torch
from calls import bits, one_thread, same
from on_gpu import context, gpu, kernels  # noqa: F401 (fixtures)
from parity import gradients
from tolerances import NORM_BOUND, norm_deviation
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fastwrs
from fastwrs.benchmark import lists
from fastwrs.benchmark.lists import NORM, PLAIN, WEIGHT, Param
from fastwrs.spec import MEASURED

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("context", "kernels")]

SHAPES = ((64, 300), (8, 5, 3, 3), (33,), (2, 70001), (), (0, 4))
TALL = (4000, 70)
"""Too tall for a strip that is held on chip: with axis 0, three launches that share the workspace."""
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9, "dampening": 0.2, "weight_decay": 0.01}),
    ("SGD", {"momentum": 0.8, "nesterov": True}),
    ("AdamW", {"betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True}),
    ("AdamP", {"delta": 0.9, "weight_decay": 0.1, "nesterov": True}),  # gates of all kinds
    ("SGD", {"momentum": 0.9, "shifted_l2": (0.3, 0.2)}),
]
SOME = [KINDS[0], *KINDS[2:]]
LONG_ENOUGH = 500_000_000  # cycles that the device is kept busy: about a quarter of a second


def start(shapes: tuple[tuple[int, ...], ...] = SHAPES, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(shape, generator=generator).mul_(0.3).to(dtype) for shape in shapes]


def on_device(tensors: list[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(tensor.to(on_gpu.DEVICE)) for tensor in tensors]


def make(name: str, options: dict[str, Any], params: list[nn.Parameter], rescale: Any = None, **more: Any) -> Any:
    """An optimizer on the kernels that are tested, whose weights are rescaled."""
    weights, rest = [p for p in params if p.ndim >= 2], [p for p in params if p.ndim < 2]
    groups = [{"params": weights, "rescale": rescale}, {"params": rest}]
    more = {"lr": 0.05, "backend": on_gpu.BACKEND} | more
    return getattr(fastwrs, name)([group for group in groups if group["params"]], **options, **more)


def give(params: list[nn.Parameter], step: int, grads: list[Tensor] | None = None) -> None:
    """The gradients of a step, into the memory of those before it."""
    for param, grad in zip(params, grads or gradients(params, step), strict=True):
        if param.grad is None:
            param.grad = torch.empty_like(param)
        param.grad.copy_(grad)


def everything(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters, states and steps, as bytes."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    states = [state for param in params for _, state in sorted(optimizer.state[param].items())]
    return [bits(tensor) for tensor in [*params, *states]]


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where torch waits for the device, and where anything else does: the device is kept busy meanwhile."""
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda._sleep(LONG_ENOUGH)
    busy.record()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode says that it does not see everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not busy.query(), "the step has waited for the device"
    torch.cuda.synchronize()


# ---- against the reference ------------------------------------------------------------------------------------------

RESCALES = {
    "plain": None,
    "every step": fastwrs.Rescale(),
    "every 3, in": fastwrs.Rescale(every=3, axis="in", target=1.5),
    "tensor": fastwrs.Rescale(axis="tensor", start=2, stop=7),
}


def check_against_reference(
    name: str,
    options: dict[str, Any],
    rescale: Any,
    shapes: tuple[tuple[int, ...], ...],
    take: Callable[[list[nn.Parameter], int, list[Tensor]], None],
) -> None:
    """Ten steps on the device and on the reference; ``take`` gives parameters the gradients of a step."""
    runs: list[list[Tensor]] = []
    with one_thread():
        for device, backend, dtype in (
            (on_gpu.DEVICE, on_gpu.BACKEND, torch.float32),
            ("cpu", "reference", torch.float32),
            ("cpu", "reference", torch.float64),
        ):
            params = [nn.Parameter(tensor.to(device, dtype)) for tensor in start(shapes)]
            optimizer = make(name, options, params, rescale, backend=backend)
            for step in range(10):
                # Those of fp32, for all three.
                take(params, step, [*gradients([nn.Parameter(tensor) for tensor in start(shapes)], step)])
                optimizer.step()
            runs.append([param.detach().cpu() for param in params])
            assert {state["step"].device.type for state in optimizer.state.values()} == {torch.device(device).type}
        for k, (got, formula, truth) in enumerate(zip(*runs, strict=True)):
            if got.numel():
                tolerances.check_path(got, formula, truth, start(shapes)[k], f"tensor {k}")


@pytest.mark.parametrize("rescale", RESCALES.values(), ids=[name.replace(" ", "_") for name in RESCALES])
@pytest.mark.parametrize(("name", "options"), KINDS, ids=["SGD", "nesterov", "AdamW", "AdamP", "shifted"])
def test_steps_equal_the_reference(name: str, options: dict[str, Any], rescale: Any) -> None:
    """The second parameter gets its first gradient late."""

    def take(params: list[nn.Parameter], step: int, grads: list[Tensor]) -> None:
        for k, (param, grad) in enumerate(zip(params, grads, strict=True)):
            param.grad = None if k == 1 and step < 3 else grad.to(param)

    check_against_reference(name, options, rescale, SHAPES, take)


@pytest.mark.parametrize(("name", "options"), SOME, ids=["SGD", "AdamW", "AdamP", "shifted"])
def test_gradients_in_buckets(name: str, options: dict[str, Any]) -> None:
    """Views of one flat tensor, as DistributedDataParallel has them: 0, 4, 8 and 12 bytes off a 16-byte boundary."""
    shapes = ((45, 7), (1,), (33,), (63, 300), (7, 11), (8, 5, 3, 3), (1,), (5, 4099))

    def take(params: list[nn.Parameter], step: int, grads: list[Tensor]) -> None:
        if step == 0:
            flat = torch.full((2 + sum(p.numel() for p in params),), math.nan).to(params[0])
            pieces = flat[1:-1].split([param.numel() for param in params])
            for param, piece in zip(params, pieces, strict=True):
                param.grad = piece.view(param.shape)
            found = {param.grad.data_ptr() % 16 for param in params if param.grad is not None}
            assert found == {0, 4, 8, 12} or flat.dtype == torch.float64
        give(params, step, grads)

    check_against_reference(name, options, fastwrs.Rescale(), shapes, take)


def test_parameters_on_several_devices_share_a_group() -> None:
    count = max(1, torch.cuda.device_count())  # with one GPU, both are the same
    devices = [f"{on_gpu.DEVICE}:{k % count}" if on_gpu.DEVICE == "cuda" else on_gpu.DEVICE for k in range(2)]
    params = [nn.Parameter(tensor.to(device)) for tensor, device in zip(start(((64, 300),) * 2), devices, strict=True)]
    alone = on_device(start(((64, 300),) * 2))
    optimizer, other = (make(*KINDS[2], tensors, fastwrs.Rescale()) for tensors in (params, alone))
    for step in range(3):
        for tensors, each in ((params, optimizer), (alone, other)):
            give(tensors, step)
            each.step()
    for param, twin in zip(params, alone, strict=True):
        assert torch.equal(param.cpu(), twin.cpu())
        assert optimizer.state[param]["step"].device == param.device


# ---- streams and graphs ---------------------------------------------------------------------------------------------


def test_a_step_runs_on_the_current_stream() -> None:
    """Its gradients come late, on that stream: a step on any other would be over by then."""
    params, twins = on_device(start()), on_device(start())
    optimizer, other = make(*KINDS[0], params, fastwrs.Rescale()), make(*KINDS[0], twins, fastwrs.Rescale())
    for tensors, each in ((params, optimizer), (twins, other)):
        give(tensors, 0)
        each.step()
    late = [grad.to(on_gpu.DEVICE) for grad in gradients(params, 1)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG_ENOUGH // 4)
        give(params, 1, late)
        optimizer.step()
    stream.synchronize()
    give(twins, 1)
    other.step()
    assert same(everything(optimizer), everything(other))


def test_two_lists_on_two_streams_at_once() -> None:
    """Both take steps in two phases while the other does: what they share of memory, they would spoil."""
    shapes = (TALL, (2, 70001), (64, 300))
    names = ("left", "right", "left alone", "right alone")
    params = {name: on_device(start(shapes)) for name in names}
    optimizers = {name: make(*KINDS[2], params[name], fastwrs.Rescale(axis=(0,))) for name in names}
    for name in names:
        give(params[name], 5 if name.startswith("left") else 6)
        optimizers[name].step()
    torch.cuda.synchronize()
    gate = torch.cuda.Event()
    torch.cuda._sleep(LONG_ENOUGH)
    gate.record()
    streams = {name: torch.cuda.Stream() for name in names[:2]}
    for stream in streams.values():
        stream.wait_event(gate)
    for _ in range(30):
        for name, stream in streams.items():
            with torch.cuda.stream(stream):
                optimizers[name].step()
    torch.cuda.synchronize()
    for name in names[2:]:
        for _ in range(30):
            optimizers[name].step()
    assert same(everything(optimizers["left"]), everything(optimizers["left alone"]))
    assert same(everything(optimizers["right"]), everything(optimizers["right alone"]))


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The graph of a step that has run before. Capturing runs nothing."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("axis", ["out", (0,)], ids=["out", "two_phases"])
@pytest.mark.parametrize(("name", "options"), SOME, ids=["SGD", "AdamW", "AdamP", "shifted"])
def test_a_captured_step_keeps_its_schedule_and_reads_lr(name: str, options: dict[str, Any], axis: Any) -> None:
    """Rescaled in every third step, lr a tensor that changes: 7 replays are 7 eager steps, bit for bit."""
    shapes = (*SHAPES[:3], TALL)
    rates = [torch.tensor(0.05, device=on_gpu.DEVICE) for _ in range(2)]
    params, twins = on_device(start(shapes)), on_device(start(shapes))
    every = fastwrs.Rescale(every=3, axis=axis)
    optimizer, eager = (make(name, options, p, every, lr=lr) for p, lr in zip((params, twins), rates, strict=True))
    for tensors, each in ((params, optimizer), (twins, eager)):
        give(tensors, 0)
        each.step()
    graph = captured(optimizer.step)
    assert same(everything(optimizer), everything(eager)), "capturing has changed something"
    for step in range(1, 8):
        for tensors, rate in zip((params, twins), rates, strict=True):
            give(tensors, step)
            rate.fill_(0.05 / step)
        graph.replay()
        eager.step()
        torch.cuda.synchronize()
        assert same(everything(optimizer), everything(eager)), f"replay {step}"
        t = step + 1
        assert {state["step"].item() for state in optimizer.state.values()} == {t}
        dims = (0,) if axis == (0,) else (1,)
        far = norm_deviation(params[0].detach().cpu(), dims, 1.0)
        assert (far <= NORM_BOUND[torch.float32]) == (t % 3 == 0)


@pytest.mark.parametrize("axis", ["out", (0,)], ids=["out", "two_phases"])
def test_two_graphs_of_one_optimizer(axis: Any) -> None:
    """Captured without a step between them, with other gradients, and replayed in turns with eager steps."""
    shapes = (*SHAPES[:3], TALL)
    params, twins = on_device(start(shapes)), on_device(start(shapes))
    every = fastwrs.Rescale(every=3, axis=axis)
    optimizer, eager = (make(*KINDS[2], tensors, every) for tensors in (params, twins))
    slopes = [[grad.to(on_gpu.DEVICE) for grad in gradients(params, step)] for step in range(3)]

    def let(tensors: list[nn.Parameter], turn: int) -> None:
        for param, grad in zip(tensors, slopes[turn], strict=True):
            param.grad = grad

    for tensors, each in ((params, optimizer), (twins, eager)):
        let(tensors, 0)
        each.step()
    graphs = []
    for turn in (1, 2):
        let(params, turn)
        graphs.append(captured(optimizer.step))
    let(params, 0)
    for turn in (1, 2, 0, 2, 2, 0, 1):
        [optimizer.step, graphs[0].replay, graphs[1].replay][turn]()
        let(twins, turn)
        eager.step()
    torch.cuda.synchronize()
    assert same(everything(optimizer), everything(eager))


def test_graphs_of_two_optimizers_in_any_order() -> None:
    """Captured one after the other, replayed the other way round, with eager steps of a third in between."""
    params = [on_device(start((TALL, (64, 300)))) for _ in range(4)]
    optimizers = [make(*KINDS[2], tensors, fastwrs.Rescale(axis=(0,))) for tensors in params]
    for k, tensors in enumerate(params):
        give(tensors, 1 if k < 2 else 2)
        optimizers[k].step()
    graphs = [captured(optimizers[k].step) for k in (0, 2)]
    for _ in range(3):
        graphs[1].replay()
        optimizers[3].step()
        graphs[0].replay()
        optimizers[1].step()
    torch.cuda.synchronize()
    assert same(everything(optimizers[0]), everything(optimizers[1]))
    assert same(everything(optimizers[2]), everything(optimizers[3]))
    assert all(bool(param.isfinite().all()) for param in params[0])


# ---- mixed precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), SOME, ids=["SGD", "AdamW", "AdamP", "shifted"])
def test_grad_scaler(name: str, options: dict[str, Any]) -> None:
    """As without a scaler, with an overflow in the very first step and in a later one; gradients end up unscaled."""
    params, twins = on_device(start()), on_device(start())
    optimizer, plain = make(name, options, params, fastwrs.Rescale()), make(name, options, twins, fastwrs.Rescale())
    scaler: Any = torch.amp.GradScaler(on_gpu.DEVICE, init_scale=1024.0)  # type: ignore[attr-defined]
    for step in range(6):
        overflow = step in (0, 3)
        optimizer.zero_grad()
        slopes = [grad.to(on_gpu.DEVICE) for grad in gradients(params, step)]
        loss = sum((p * g).sum() for p, g in zip(params, slopes, strict=True))
        scaler.scale(loss * math.inf if overflow else loss).backward()
        before = everything(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if overflow:
            after = everything(optimizer)
            assert same(after[: len(before)], before), "a skipped step has written"
            continue
        give(twins, step)
        plain.step()
        for param, grad in zip(params, slopes, strict=True):
            assert param.grad is not None and torch.equal(param.grad, grad)
    assert same(everything(optimizer), everything(plain))
    assert optimizer.state[params[0]]["step"].item() == 4


@pytest.mark.parametrize("found", [0.0, 1.0, 2.0, math.nan])
@pytest.mark.parametrize(("name", "options"), SOME, ids=["SGD", "AdamW", "AdamP", "shifted"])
def test_nothing_waits_for_the_device(name: str, options: dict[str, Any], found: float) -> None:
    """Whether a step is skipped, rescaled or neither, with lr, scale and found_inf on the device."""
    params = on_device(start((*SHAPES, TALL)))
    lr = torch.tensor(0.05, device=on_gpu.DEVICE)
    optimizer = make(name, options, params, fastwrs.Rescale(every=2, axis="tensor"), lr=lr)
    for step in range(2):
        give(params, step)
        optimizer.step()
    optimizer.grad_scale = torch.tensor(4.0, device=on_gpu.DEVICE)
    optimizer.found_inf = torch.tensor(found, device=on_gpu.DEVICE)
    optimizer.step()  # a first step that unscales
    give(params, 3)
    before = everything(optimizer)
    with no_waiting():
        optimizer.step()
    assert same(everything(optimizer), before) == (found != 0)


@pytest.mark.parametrize(("name", "options"), SOME, ids=["SGD", "AdamW", "AdamP", "shifted"])
def test_a_monitor_waits_for_nothing(name: str, options: dict[str, Any]) -> None:
    """What a step measures stays on the device until somebody reads it; then it is what the reference measures."""
    rows = []
    for device, backend in ((on_gpu.DEVICE, on_gpu.BACKEND), ("cpu", "reference")):
        params = [nn.Parameter(tensor.to(device)) for tensor in start((*SHAPES, TALL))]
        optimizer = make(name, options, params, fastwrs.Rescale(every=2), backend=backend)
        monitor = fastwrs.Monitor(optimizer)
        for step in range(2):
            give(params, step)
            optimizer.step()
        give(params, 2)
        with no_waiting() if device == on_gpu.DEVICE else nullcontext():
            optimizer.step()
        rows.append(monitor.channels())
    for mine, theirs in zip(*rows, strict=True):
        assert mine.keys() == theirs.keys()
        for column in MEASURED:
            torch.testing.assert_close(torch.tensor(mine[column]), torch.tensor(theirs[column]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), SOME, ids=["SGD", "AdamW", "AdamP", "shifted"])
def test_gradients_that_move_in_every_step(name: str, options: dict[str, Any]) -> None:
    """Steps that the host queues ahead of the device find each its own gradients, and nothing waits."""
    shapes = (*SHAPES[:3], TALL)
    params, twins = on_device(start(shapes)), on_device(start(shapes))
    optimizer, other = (make(name, options, p, fastwrs.Rescale(every=2, axis=(0,))) for p in (params, twins))
    slopes = [[grad.to(on_gpu.DEVICE) for grad in gradients(params, step)] for step in range(18)]

    def queue(steps: range) -> None:
        for step in steps:
            for param, grad in zip(params, slopes[step], strict=True):
                param.grad = grad
            optimizer.step()

    queue(range(2))
    torch.cuda._sleep(LONG_ENOUGH)
    queue(range(2, 10))  # whatever memory so many steps need at once, they have from now on
    with no_waiting():
        queue(range(10, 18))
    for step in range(18):
        give(twins, step, slopes[step])
        other.step()
    assert same(everything(optimizer), everything(other))


# ---- memory and launches --------------------------------------------------------------------------------------------


def test_a_step_allocates_nothing() -> None:
    params = on_device(start((*SHAPES, TALL)))
    optimizer = make(*KINDS[2], params, fastwrs.Rescale(axis="tensor"))
    give(params, 0)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    counts = [(torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"])]
    for _ in range(20):
        optimizer.step()
        counts.append((torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]))
    assert len(set(counts)) == 1, "steps allocate memory on the device"
    assert optimizer.state[params[0]]["step"].item() == 23


def split(params: list[Param], most_rows: int) -> list[dict[str, Any]]:
    """A list in the groups of ``param_groups``. Fewer rows change no count of launches: rows decide that."""
    groups = []
    for role, more in ((WEIGHT, {"rescale": fastwrs.Rescale()}), (NORM, {"weight_decay": 0.01}), (PLAIN, {})):
        tensors = []
        for shape in (param.shape for param in params if param.role == role):
            cut = (min(shape[0], most_rows), *shape[1:]) if len(shape) > 1 else shape
            tensors.append(nn.Parameter(torch.rand(cut, device=on_gpu.DEVICE)))
            tensors[-1].grad = torch.rand_like(tensors[-1])
        groups += [{"params": tensors, **more}] if tensors else []
    return groups


def launched(step: Callable[[], object], folder: Path) -> list[str]:
    """What the device does in one step, by the names of the kernels, copies and fills."""
    return [event["name"] for event in traced(step, folder)]


def traced(step: Callable[[], object], folder: Path) -> list[dict[str, Any]]:
    """What the device does in one step, as torch's profiler has it."""
    for _ in range(2):  # the first profile of a process misses launches
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            step()
            torch.cuda.synchronize()
    trace = folder / "trace.json"
    profiled.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]


@pytest.mark.parametrize("name", ["SGD", "AdamW", "AdamP", "SGD shifted"])
@pytest.mark.parametrize(("which", "most"), [("resnet50", 1), ("llama_1b", 1), ("tiny", 5)])
def test_launches_per_step(which: str, most: int, name: str, tmp_path: Path) -> None:
    if name in ("AdamP", "SGD shifted"):  # a look before; and a little more for each tensor of a launch
        most = 2 * most + (most > 1) * 2
    groups = split(lists.LISTS[which].params(), 10**6 if which == "tiny" else 300)
    options: dict[str, Any] = {"momentum": 0.9} if name.startswith("SGD") else {}
    options |= {"shifted_l2": (1e-4, 1e-3)} if "shifted" in name else {}
    optimizer = getattr(fastwrs, name.split()[0])(groups, lr=0.01, backend=on_gpu.BACKEND, **options)
    for _ in range(3):
        optimizer.step()
    names = launched(optimizer.step, tmp_path)
    assert 1 <= len(names) <= most, names
    assert all(any(ours in name for ours in on_gpu.NAMES[on_gpu.BACKEND]) for name in names), names


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [None, "cpu"], ids=["same_device", "through_the_CPU"])
@pytest.mark.parametrize(("name", "options"), SOME, ids=["SGD", "AdamW", "AdamP", "shifted"])
def test_resuming_through_a_file_continues_bit_for_bit(name: str, options: dict[str, Any], place: str | None) -> None:
    params = on_device(start())
    optimizer = make(name, options, params, fastwrs.Rescale(every=3))
    for step in range(4):
        give(params, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save({"weights": params, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True, map_location=place)
    others = on_device([weight.detach() for weight in saved["weights"]])
    resumed = make(name, options, others, fastwrs.Rescale(every=3))
    resumed.load_state_dict(saved["optimizer"])
    for state in resumed.state.values():
        assert (state["step"].device.type, state["step"].dtype) == (torch.device(on_gpu.DEVICE).type, torch.float32)
    twin = copy.deepcopy(optimizer)
    for step in range(4, 8):
        for tensors, each in ((params, optimizer), (others, resumed)):
            give(tensors, step)
            each.step()
    assert same(everything(resumed), everything(optimizer))
    assert {state["step"].item() for state in twin.state.values()} == {4.0}


@pytest.mark.parametrize("states", [None, torch.bfloat16], ids=["fp32_states", "bf16_states"])
def test_bf16_training(states: torch.dtype | None) -> None:
    """A layer and its norm, in bf16 on the device, learn; its rows keep their norms."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 160), nn.LayerNorm(160), nn.Linear(160, 1)).to(on_gpu.DEVICE, torch.bfloat16)
    groups = fastwrs.param_groups(model, weight_decay=0.01)
    optimizer = fastwrs.AdamW(groups, lr=0.02, state_dtype=states, backend=on_gpu.BACKEND)
    x = torch.randn(256, 96, device=on_gpu.DEVICE, dtype=torch.bfloat16)
    y = torch.sin(3 * x[:, :1])
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    weight = next(model.parameters())
    assert norm_deviation(weight.detach().cpu(), (1,), 1.0) <= NORM_BOUND[torch.bfloat16]
    assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {states or torch.float32}
