"""Lane 6: the host side of Triton: what the device's table holds, what is allocated and when, and who may ask for it.

The device is a second memory on the CPU. Kernels are not run: what they would read is compared with what they should.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from cases import DTYPES, PROJECTIONS, Case, TensorCase
from test_triton_compilations import Driver
from torch import Tensor, nn

import fastwrs
from fastwrs import dispatch, library

pytestmark = pytest.mark.triton_compiled
TRITON: Any = dispatch._MODULES["triton"]
CPU = torch.device("cpu")
RESCALED = (tuple(PROJECTIONS["rescale"].items()),)


class Device:
    """Stands for a GPU: counts launches, refuses memory while a graph is captured, compares tables."""

    def __init__(self) -> None:
        self.capturing = self.full = False
        self.launched: list[Tensor] = []
        self.allocations = 0
        self._hosts: dict[int, Any] = {}
        self._new_table, self._page_locked = TRITON._new_table, TRITON._page_locked

    def page_locked(self, words: int, device: torch.device) -> Tensor:
        assert not self.capturing, "pinned memory was allocated while a graph was captured"
        if self.full:
            raise RuntimeError("no more pinned memory")
        self.allocations += 1
        return self._page_locked(words, device)

    def new_table(self, words: int, device: torch.device, pinned: bool = False) -> Any:
        assert not (self.capturing and words), "a table was allocated while a graph was captured"
        table = self._new_table(words, device, pinned)
        table.device.fill_(-7)
        self._hosts[id(table.device)] = table.host, table.device
        return table

    def launch(self, _variant: Any, table: Tensor, _tiles: Any) -> None:
        from fastwrs.triton_kernels.table import HEADER

        host = self._hosts[id(table)][0]
        last, programs = (int(host[HEADER.index(word)]) for word in ("gate_map", "gate_tiles"))
        used = last + (programs + 1) // 2
        stale = (table[:used] != host[:used]).nonzero().flatten().tolist()
        assert not stale, f"launch {len(self.launched)}: the device's table is stale at words {stale[:8]} of {used}"
        self.launched.append(table)

    @contextmanager
    def capture(self) -> Iterator[None]:
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    library.load()
    from fastwrs.triton_kernels import launch

    made = Device()
    monkeypatch.setattr(TRITON, "why_not", lambda *_: None)
    monkeypatch.setattr(TRITON, "_on_gpu", lambda _device: True)
    monkeypatch.setattr(TRITON, "_stream_of", lambda _device: 0)
    monkeypatch.setattr(TRITON, "_new_table", made.new_table)
    monkeypatch.setattr(TRITON, "_page_locked", made.page_locked)
    for module in ("fastwrs.backends.triton", "fastwrs.backends.workspace"):
        monkeypatch.setattr(sys.modules[module], "is_captured", lambda _call: made.capturing)
    monkeypatch.setattr(launch, "compile_once", lambda *_: None)
    monkeypatch.setattr(launch, "launch", made.launch)
    return made


def params_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def strided() -> nn.Parameter:
    """One that is walked by strides."""
    param = nn.Parameter(torch.randn(4, 5, 6).transpose(0, 2)[:, :, :3])
    param.grad = torch.randn(param.shape)
    return param


def sgd(params: Any, **more: Any) -> Any:
    return fastwrs.SGD(params, **({"lr": 0.1, "momentum": 0.9, "backend": "triton"} | more))


def adamp(params: Any, **more: Any) -> Any:
    return fastwrs.AdamP(params, **({"lr": 0.1, "backend": "triton"} | more))


def shifted(params: Any, **more: Any) -> Any:
    return sgd(params, shifted_l2=(0.1, 0.2), **more)


def memory_of(optimizer: Any) -> Any:
    return TRITON._memories[optimizer._workspaces[CPU][-1]]


# ---- the table on the device ----------------------------------------------------------------------------------------

SHAPES = ((40, 50), (8, 3, 3, 3), (2, 5000), (2, 20001), (2, 600, 3, 3), (64, 9))
AXES = ("out", "in", "tensor")


def measure(monkeypatch: pytest.MonkeyPatch, wanted: Callable[[], bool]) -> None:
    """Has steps measured, which no optimizer asks for: other kernels, and more sums in the workspace."""
    measured, plain = torch.zeros(40000, 8), dispatch.launch

    def launch(backend: Any, call: Any, dry_run: bool = False) -> None:
        call.measured = measured if wanted() else None
        plain(backend, call, dry_run=dry_run)

    monkeypatch.setattr(dispatch, "launch", launch)


def test_a_table_that_was_written_twice_is_brought_whole(device: Device) -> None:
    """What needs a larger workspace is laid out once for the small one, and again for the large one."""
    params = params_of((2, 20001), *[(40, 50)] * 40)  # so many that the table itself need not grow
    optimizer = sgd(params)
    optimizer.step()
    (table,) = memory_of(optimizer).tables.values()
    host = table.host
    optimizer.param_groups[0]["rescale"] = fastwrs.Rescale()
    optimizer.step()
    assert len(optimizer._workspaces[CPU]) == 2, "the workspace did not have to grow"
    assert [*memory_of(optimizer).tables.values()] == [table] and table.host is host, "it is another table"
    assert len(device.launched) == 2


def change(optimizer: Any, dice: random.Random) -> None:
    """One of the things that change from step to step."""
    group = dice.choice(optimizer.param_groups)
    param = dice.choice(group["params"])
    axis = dice.choice(AXES)
    what = dice.randrange(9)
    if what == 0:
        group["rescale"], group["shrink"] = dice.choice([None, fastwrs.Rescale(axis=axis)]), None
    elif what == 1:
        group["shrink"], group["rescale"] = dice.choice([None, fastwrs.Shrink(0.1, axis=axis)]), None
    elif what == 2:
        group["lr"] = dice.choice([0.1, torch.tensor(0.2)])
    elif what == 3:
        param.data = param.data.clone()
    elif what == 4:
        optimizer.found_inf = dice.choice([None, torch.tensor(0.0)])
    elif what == 5 and dice.random() < 0.3:
        shape = (param.shape[0] * dice.choice([1, 2]), *param.shape[1:])
        param.data = torch.randn(shape, dtype=param.dtype)
        param.grad = None
        optimizer.state.pop(param, None)
    elif what == 6:
        group["weight_decay"] = 0.1 * dice.randrange(2)
    for param in (param for each in optimizer.param_groups for param in each["params"]):
        if param.grad is None or dice.random() < 0.3:
            param.grad = None if dice.random() < 0.1 else torch.randn_like(param)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", [sgd, adamp, shifted])
def test_the_device_has_what_the_host_has(
    device: Device, kind: Callable[..., Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each launch, whatever has changed; of optimizers with several bundles, some steps measured."""
    dice, measuring = random.Random(seed), False
    measure(monkeypatch, lambda: measuring)
    dtypes = torch.float32, torch.float32, torch.float64, torch.bfloat16
    groups = []
    for _ in range(2):
        made = [params_of(dice.choice(SHAPES), dtype=dice.choice(dtypes))[0] for _ in range(dice.randint(1, 4))]
        groups.append({"params": [*made, strided()] if dice.random() < 0.5 else made})
    optimizer = kind(groups)
    for _ in range(25):
        measuring = dice.random() < 0.2
        optimizer.step()
        change(optimizer, dice)
    assert len(device.launched) >= 25


# ---- memory for graphs ----------------------------------------------------------------------------------------------


def test_spares_do_not_pile_up(device: Device) -> None:
    """Parameters that take turns in having a gradient have many plans, whose tables come and go."""
    dice = random.Random(0)
    params = params_of(*[(4, 5)] * 12)
    optimizer = sgd(params, momentum=0.0)
    most = 0
    for _ in range(400):
        for param in params:
            param.grad = torch.ones(4, 5) if dice.random() < 0.6 else None
        optimizer.step()
        memory = memory_of(optimizer)
        assert len(memory.tables) <= TRITON.TABLES and not memory.reserved
        assert len(memory.spares) == TRITON.SPARES * len(memory.tables)
        sizes = {id(spare): table.host.numel() for table in memory.tables.values() for spare in table.spares}
        assert all(spare.host.numel() == sizes[id(spare)] for spare in memory.spares)
        most = max(most, len(memory.spares))
    assert most == TRITON.SPARES * TRITON.TABLES
    assert device.launched


def test_plans_that_take_turns_keep_their_tables(device: Device) -> None:
    """Eight plans of several bundles: once each has been there, nothing is allocated any more."""
    optimizer = several_bundles("dtypes")
    params = [param for group in optimizer.param_groups for param in group["params"]]
    grads = [param.grad for param in params]
    for turn in range(24):
        for k, param in enumerate(params):
            param.grad = None if k == turn % 4 else grads[k]
        before = device.allocations
        optimizer.step()
        assert turn < 8 or device.allocations == before


def test_steps_that_are_measured_have_a_table_of_their_own(device: Device) -> None:
    """So that neither is laid out anew when they take turns."""
    optimizer = sgd(params_of((40, 50), (7, 9)), rescale=fastwrs.Rescale())
    with fastwrs.Monitor(optimizer, every=2):
        for _ in range(6):
            optimizer.step()
    assert len(memory_of(optimizer).tables) == 2
    assert [id(table) for table in device.launched[:2]] * 3 == [id(table) for table in device.launched]


def test_a_traced_step_finds_its_memory_again(device: Device) -> None:
    """The op gets other lists in every call, and cannot hand back a workspace."""
    call = Case("traced", "sgd.mom", (TensorCase((4, 5)), TensorCase((2, 20001))), DTYPES[0], RESCALED).build()
    allocations = []
    for _ in range(4):
        arguments = [list(a) if isinstance(a, list) else a for a in call.args()]
        torch.ops.fastwrs.triton_step(*arguments)
        allocations.append(device.allocations)
    memory = TRITON._memories[TRITON._workspaces[call.steps[0]]]
    assert len(memory.tables) == 1 and len(set(allocations[1:])) == 1
    assert len({id(table) for table in device.launched[1:]}) == 1


def several_bundles(kind: str) -> Any:
    params = params_of((40, 50), (8, 3, 3, 3))
    if kind == "dtypes":
        params += params_of((4, 5), (3, 20001), dtype=torch.bfloat16) + params_of((9, 9), dtype=torch.float64)
    elif kind == "slots":
        groups = [{"params": params}, {"params": params_of((2, 20001)), "momentum": 0.0}]
        return sgd(groups, rescale=fastwrs.Rescale(axis="tensor"))
    elif kind == "walked":
        params = [*params, strided(), *params_of((4, 5), dtype=torch.float64)]
    elif kind == "walked alone":
        params = [strided()]
    return sgd(params, rescale=fastwrs.Rescale())


@pytest.mark.parametrize("kind", ["one", "dtypes", "slots", "walked", "walked alone"])
def test_every_bundle_can_be_captured_after_one_step(device: Device, kind: str) -> None:
    """Without an allocation, as often as one step lays in memory for; then a step lays in some more."""
    optimizer = several_bundles(kind)
    optimizer.step()
    tables = len(device.launched)
    assert tables == {"one": 1, "dtypes": 3, "slots": 2, "walked": 3, "walked alone": 1}[kind]
    for _ in range(2):
        for _ in range(TRITON.SPARES):
            with device.capture():
                optimizer.step()
        launched = len(device.launched)
        with device.capture(), pytest.raises(RuntimeError, match="take a step before"):
            optimizer.step()
        assert len(device.launched) == launched, "some bundles were launched, and others refused"
        optimizer.step()
    captured = memory_of(optimizer).captured
    assert len(captured) == 2 * TRITON.SPARES * tables
    assert len({table.device.data_ptr() for table in captured}) == len(captured)
    assert all(table.pinned for table in captured)


def test_a_table_of_a_graph_stays_as_it_is(device: Device) -> None:
    """It is read again at each replay, so that no later step may write into it."""
    optimizer = several_bundles("dtypes")
    optimizer.step()
    with device.capture():
        optimizer.step()
    before = [table.host.clone() for table in memory_of(optimizer).captured]
    for _ in range(3):
        optimizer.param_groups[0]["lr"] *= 0.5
        optimizer.step()
        with device.capture():
            optimizer.step()
    assert all(map(torch.equal, before, (table.host for table in memory_of(optimizer).captured)))


def test_a_refused_capture_costs_no_spares(device: Device) -> None:
    """What the dry runs have reserved, the next capture takes."""
    optimizer = several_bundles("dtypes")
    optimizer.step()
    memory = memory_of(optimizer)
    last = optimizer._plans[0].bundles[-1].params
    (owner,) = (table for key, table in memory.tables.items() if id(last[0]) in key)
    taken, owner.spares = memory.spares, []  # of the last bundle: others are too small
    small = [spare for spare in taken if spare.host.numel() < owner.host.numel()]
    for table in memory.tables.values():
        table.spares = [spare for spare in table.spares if spare in small]
    with device.capture(), pytest.raises(RuntimeError, match="take a step before"):
        optimizer.step()
    assert len(memory.reserved) <= 3 and not memory.captured
    optimizer.step()
    with device.capture():
        optimizer.step()


# ---- what fails, fails before anything was launched -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["one", "dtypes", "walked"])
@pytest.mark.parametrize("steps", [0, 1])
def test_without_pinned_memory_nothing_is_launched(device: Device, kind: str, steps: int) -> None:
    """Spares and the memory that copies come from: a step that fails for it can be taken again."""
    optimizer = several_bundles(kind)
    for _ in range(steps):
        optimizer.step()
    launched = len(device.launched)
    optimizer.param_groups[0]["lr"] = 0.05
    device.full = True
    with pytest.raises(RuntimeError, match="no more pinned memory"):
        optimizer.step()
    assert len(device.launched) == launched
    device.full = False
    optimizer.step()
    assert len(device.launched) > launched


@pytest.mark.parametrize("what", ["options", "strides"])
def test_nothing_is_allocated_between_launches(device: Device, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the last bundle needs a larger workspace, whose address is in the tables of the others."""
    last = params_of((2, 3000), dtype=torch.float64)
    first = params_of((40, 50)) + params_of((40, 50), dtype=torch.bfloat16)
    optimizer = sgd([{"params": first}, {"params": last}], rescale=fastwrs.Rescale())
    optimizer.step()
    if what == "options":
        optimizer.param_groups[1]["rescale"] = fastwrs.Rescale(axis="tensor")
    else:  # nothing that the other bundles would notice
        last[0].grad = torch.randn(3000, 2, dtype=torch.float64).t()
    at_launch: list[int] = []
    compare = device.launch

    def launch(*arguments: Any) -> None:
        at_launch.append(device.allocations)
        compare(*arguments)

    from fastwrs.triton_kernels import launch as module

    monkeypatch.setattr(module, "launch", launch)
    before = device.allocations
    optimizer.step()
    assert len(optimizer._workspaces[CPU]) > 1, "the workspace did not have to grow"
    assert len(at_launch) == 3 and before < at_launch[0] == at_launch[-1] == device.allocations


# ---- compilation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sgdp", "sgd_shifted"])
def test_what_was_compiled_before_is_what_is_launched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rule: str
) -> None:
    """The warm-up compiles with the key that the launch asks for: on another table, it compiles nothing more."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    library.load()
    from triton.runtime import driver

    from fastwrs.triton_kernels import gate, kernels, launch, shift

    first = gate.gate_kernel if rule == "sgdp" else shift.shift_kernel
    every_kernel: Any = (first, kernels.step_kernel, kernels.project_kernel)

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in every_kernel for caches in kernel.device_caches.values())

    def launched(kernel: Any, programs: int, table: Tensor, constants: dict[str, Any]) -> None:
        kernel[(programs,)](table, **constants, **launch.OPTIONS)

    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(launch, "_compiled", set())
    for kernel in every_kernel:
        kernel.device_caches.clear()
    variant = launch.Variant(rule, 1, ("float32", "float32", "float32"), False, False)
    tables = [torch.zeros(words, dtype=torch.int64) for words in (64, 1000)]
    launch.compile_once(variant, tables[0], launch.Programs(5, 3, 2))
    assert compiled() == len(every_kernel)
    keys: list[Any] = []
    for kernel in every_kernel:  # what the launch finds is not run, for there is no GPU
        for caches in kernel.device_caches.values():
            for key in caches[0]:
                caches[0][key] = SimpleNamespace(
                    run=lambda *_, key=key: keys.append(key),
                    launch_metadata=lambda *_: None,
                    function=None,
                    packed_metadata=None,
                )
    for table in tables:
        launch.launch(variant, table, launch.Programs(7, 4, 3))
    assert compiled() == len(every_kernel), "the launch has compiled something"
    assert len(keys) == 2 * len(every_kernel)
    for kernel in every_kernel:
        kernel.device_caches.clear()


def test_kernels_are_loaded_when_they_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a GPU cannot hold is an error before the first launch; a table on the CPU has no kernels to load."""
    from fastwrs.triton_kernels import launch

    loaded: list[str] = []

    def kernel(name: str) -> Any:
        compiled = SimpleNamespace(_init_handles=lambda: loaded.append(name))
        return SimpleNamespace(warmup=lambda *_, **__: compiled)

    names = ["step", "project"]
    monkeypatch.setattr(launch, "_compiled", set())
    monkeypatch.setattr(launch, "_current", lambda _device: nullcontext())
    monkeypatch.setattr(launch, "_launches", lambda *_: [(kernel(name), 1, {}) for name in names])
    variant = launch.Variant("sgd", 0, ("float32", "float32", "float32"), False, False)
    for place, expected in (("cpu", []), ("cuda:0", names), ("cuda:0", names), ("cuda:1", names * 2)):
        table: Any = SimpleNamespace(device=torch.device(place))
        launch.compile_once(variant, table, launch.Programs(1, 1))
        assert loaded == expected


def test_triton_still_has_what_loads_a_kernel() -> None:
    from triton.compiler import CompiledKernel

    assert callable(CompiledKernel._init_handles)


# ---- who may ask for it ---------------------------------------------------------------------------------------------


@pytest.fixture
def reason(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str | None]]:
    """Asks anew why Triton cannot run, on a machine with a GPU that will do."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))

    def ask() -> str | None:
        TRITON._why_not_here.cache_clear()
        return fastwrs.backends()["triton"]

    yield ask
    TRITON._why_not_here.cache_clear()


SPELLINGS = ("1", "true", "TRUE", "yes", "Y", "On", "0", "false", "no", "off", "", "2", " 1", "t", "enable")


@pytest.mark.parametrize("value", SPELLINGS)
def test_the_interpreter_is_recognised_as_triton_does(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    from triton import knobs

    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert TRITON.interpreted() == bool(knobs.runtime.interpret)


def test_interpreted_kernels_are_for_the_cpu_and_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    floats = ("float32", "float32", "float32")
    monkeypatch.delenv("FASTWRS_BACKEND", raising=False)
    monkeypatch.setattr(TRITON, "_why_not_here", lambda: None)
    monkeypatch.setattr(dispatch._MODULES["cuda"], "_why_not_here", lambda: "it is not built")
    monkeypatch.setenv("TRITON_INTERPRET", "True")
    assert "for tensors on the CPU, not on cuda" in (TRITON.why_not("cuda") or "")
    assert TRITON.why_not("cpu") is None
    assert dispatch.choose("auto", "cpu", floats).NAME == "cpu"
    assert dispatch.choose("auto", "cuda", floats).NAME == "reference"
    assert dispatch.choose("triton", "cpu", floats) is TRITON
    with pytest.raises(RuntimeError, match="for tensors on the CPU"):
        dispatch.choose("triton", "cuda", floats)
    monkeypatch.setenv("FASTWRS_BACKEND", "triton")
    assert dispatch.choose("auto", "cpu", floats) is TRITON
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert TRITON.why_not("cpu") == "its tensors must be on a GPU, not on cpu"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        *[(good, None) for good in ("3.6", "3.6.0", "3.8rc1", "3.8.0+git1a2b", "3.10.0.dev1", "4")],
        *[(old, "is too old") for old in ("3.5.1", "3.5rc1", "2", "3")],
        *[(odd, "no version that is known") for odd in ("", "unknown", None)],
    ],
)
def test_versions(
    reason: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch, version: Any, expected: str | None
) -> None:
    monkeypatch.setattr("triton.__version__", version)
    found = reason()
    assert found is None if expected is None else expected in (found or "")


def test_an_import_that_breaks_is_a_reason(
    reason: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder that happens to have the name, a module without a spec, a package that fails, kernels that fail."""
    assert reason() is None
    with monkeypatch.context() as patch:
        namespace = ModuleType("triton")
        patch.setitem(sys.modules, "triton", namespace)
        assert "ValueError" in (reason() or ""), "a module without a spec"
        namespace.__spec__ = SimpleNamespace(loader=None)  # type: ignore[assignment]
        assert "no version that is known" in (reason() or "")
    with monkeypatch.context() as patch:
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text("raise OSError('libcuda.so is of another world')\n")
        patch.delitem(sys.modules, "triton")
        patch.syspath_prepend(tmp_path)
        assert reason() == "triton does not load: OSError: libcuda.so is of another world"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fastwrs.triton_kernels.launch", None)
        assert "its kernels do not load with this triton" in (reason() or "")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 0)  # a driver that contradicts itself
        assert "ValueError" in (reason() or "")
    assert reason() is None


def test_one_gpu_that_is_too_old_is_named(reason: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which GPU the tensors are on is not known when the backend is chosen."""
    capabilities = [(9, 0), (7, 5), (8, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    assert "the compute capability of cuda:1 is 7.5; Triton's kernels are for 8.0" in (reason() or "")
    capabilities[1] = (8, 6)
    assert reason() is None
