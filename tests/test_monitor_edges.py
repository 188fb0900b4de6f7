"""The monitor where runs go back, param groups change, losses are odd, and where other libraries take steps."""

from __future__ import annotations

import gc
import math
import random
import tracemalloc
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastwrs
from fastwrs import library
from fastwrs.measuring import Measured, Rows, Scope
from fastwrs.spec import MEASURED

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("backend")]


def parameter(*shape: int, fill: float = 1.0) -> nn.Parameter:
    """A parameter with a gradient of ones."""
    param = nn.Parameter(torch.full(shape, fill))
    param.grad = torch.ones(shape)
    return param


def watched(*params: nn.Parameter, every: int = 1, **options: Any) -> tuple[Any, fastwrs.Monitor]:
    optimizer = fastwrs.SGD(params, lr=0.0)
    return optimizer, fastwrs.Monitor(optimizer, every, **options)


def steps_of(monitor: fastwrs.Monitor) -> list[int]:
    return [step for step, _ in monitor.curve("norm_after")["params[0][0]"]]


# ---- going back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [0, 1, 16])
def test_a_run_that_goes_back_has_each_step_once(channels: int) -> None:
    optimizer, monitor = watched(parameter(3, 4), channels=channels)
    for _ in range(3):
        monitor.log_loss(1.0)
        optimizer.step()
    saved = monitor.state_dict()
    for _ in range(3):
        monitor.log_loss(2.0)
        optimizer.step()
    monitor.load_state_dict(saved)
    assert steps_of(monitor) == [1, 2, 3]
    for _ in range(2):
        monitor.log_loss(4.0)
        optimizer.step()
    assert steps_of(monitor) == [1, 2, 3, 4, 5]
    found = monitor.gradient_over_loss()
    assert [record["loss"] for record in found] == [1, 1, 1, 4, 4]
    assert [record["squared_gradient_norm"] for record in found] == pytest.approx([12] * 5)
    monitor.load_state_dict({"steps": 9})
    assert steps_of(monitor) == [1, 2, 3, 4, 5]
    monitor.load_state_dict({"steps": 0})
    assert monitor.layers() == [] and monitor.latest() == {}


def test_the_loss_of_a_run_that_goes_back_is_not_that_of_its_next_step() -> None:
    optimizer, monitor = watched(parameter(3))
    monitor.log_loss(5.0)
    monitor.load_state_dict({"steps": 0})
    optimizer.step(lambda: 7.0)
    assert [record["loss"] for record in monitor.gradient_over_loss()] == [7]


# ---- names and layouts ----------------------------------------------------------------------------------------------


def test_a_parameter_without_a_name_in_a_group_with_names() -> None:
    named, late = parameter(3, 4), parameter(2, 2)
    optimizer = fastwrs.SGD([("w", named)], lr=0.1)
    monitor = fastwrs.Monitor(optimizer)
    optimizer.param_groups[0]["params"].append(late)
    optimizer.step()
    assert set(monitor.latest()) == {"w", "params[0][1]"} and monitor.steps == 1


@pytest.mark.parametrize("extension", [True, False])
def test_a_default_device_is_not_where_the_monitor_works(extension: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not extension:
        monkeypatch.setattr("fastwrs.monitor_store.library", types.SimpleNamespace(why_not=lambda: "none"))
    params = parameter(3, 4), parameter(5)
    with torch.device("meta"):
        optimizer, monitor = watched(*params, channels=1)
        optimizer.step()
        optimizer.step()
        monitor.log_loss(1.0)
        optimizer.step()
        found = monitor.curve("norm_after"), monitor.minimum_norm(), monitor.latest(), monitor.gradient_over_loss()
    assert found[0]["params[0][1]"] == [(step, pytest.approx(5**0.5)) for step in (1, 2, 3)]
    assert len(found[1]) == 3 and len(found[3]) == 1
    assert {figure.device.type for figures in found[2].values() for figure in figures.values()} == {"cpu"}


def test_both_ways_to_reduce_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.why_not() is None, "one of them is in the extension"
    optimizer, monitor = watched(parameter(3, 4, fill=2.0), parameter(5), channels=4)
    optimizer.step()
    by_op = monitor.layers()
    monkeypatch.setattr("fastwrs.monitor_store.library", types.SimpleNamespace(why_not=lambda: "none"))
    by_torch = monitor.layers()
    assert [record.keys() for record in by_op] == [record.keys() for record in by_torch]
    for mine, other in zip(by_op, by_torch, strict=True):
        figures = [key for key in mine if "." in key]
        assert [mine[key] for key in figures] == pytest.approx([other[key] for key in figures], rel=2**-22)


def test_sets_of_parameters_that_went_by_leave_nothing() -> None:
    """Every step has another set of gradients, so that no plan and no layout is ever used again."""
    params = [parameter(2, 2) for _ in range(40)]
    optimizer, monitor = watched(*params, channels=1, layers=0)
    rng = random.Random(0)

    def steps(count: int) -> None:
        for _ in range(count):
            for param in params:
                param.grad = torch.ones(2, 2) if rng.random() < 0.5 else None
            optimizer.step()
        gc.collect()  # Python keeps the memory of some tuples until then

    tracemalloc.start()
    try:
        steps(40)
        before = tracemalloc.take_snapshot()
        steps(60)
        filters = [tracemalloc.Filter(True, f"*{name}.py") for name in ("monitor", "monitor_store")]
        grown = tracemalloc.take_snapshot().filter_traces(filters).compare_to(before.filter_traces(filters), "filename")
    finally:
        tracemalloc.stop()
    assert sum(entry.size_diff for entry in grown) < 60 * 50  # a layout of 20 parameters takes more than 500 bytes
    assert len(monitor._layouts) <= 16
    monitor.clear()
    assert len(monitor._layouts) == 0


def test_the_counts_on_a_device_go_with_the_rows_they_are_of() -> None:
    """The meta device stands for one: what lies there is brought there once for a launch, before anybody asks."""
    weight = parameter(4, 3)
    _, monitor = watched(weight, channels=1)
    rows = Rows([weight], [4])
    for _ in range(2):
        monitor.before_step()
        monitor.after_step([Measured(rows, torch.empty(4, len(MEASURED), device="meta"))], None)
    full, reduced = monitor._store.all()[1].parts[0], monitor._store.all()[0].parts[0]
    assert full.lengths is not None and full.lengths.device.type == "meta" and reduced.lengths is None
    assert full.lengths is monitor._layouts[rows][1]
    del rows
    assert len(monitor._layouts) == 0


def test_a_buffer_is_written_again_where_nobody_keeps_it() -> None:
    """Figures that are reduced at once leave their memory to the next step; those that are kept do not."""
    weight = parameter(3, 4)
    optimizer = fastwrs.SGD([weight], lr=0.5)
    places: list[int] = []

    class Reader:
        keeps = False

        def before_step(self) -> Scope:
            return Scope.EVERYTHING

        def after_step(self, measured: list[Measured], loss: object) -> None:  # noqa: ARG002
            places.append(measured[0].values.data_ptr())

    optimizer.watch(Reader())
    with fastwrs.Monitor(optimizer, channels=0) as short:
        for _ in range(3):
            optimizer.step()
    assert len(set(places)) == 1
    with fastwrs.Monitor(optimizer, channels=2) as full:
        for _ in range(3):
            optimizer.step()
    assert len(set(places[3:])) == 3, "who keeps one has it for itself"
    norms = [values for _, values in short.curve("norm_after")["params[0][0]"]]
    norms += [values for _, values in full.curve("norm_after")["params[0][0]"]]
    assert norms == [2 * abs(1 - 0.5 * step) for step in range(1, 7)]


def test_a_skipped_step_leaves_nan_in_memory_that_was_written_before() -> None:
    weight = parameter(3, 4)
    optimizer, monitor = watched(weight, channels=0)
    optimizer.step()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    optimizer.found_inf = None
    optimizer.step()
    assert monitor.steps == 3 and steps_of(monitor) == [1, 3], "figures of the step before pass for its own"


def test_a_step_in_inference_mode_leaves_no_memory_to_others() -> None:
    """A step outside may not write into it, and would be refused when the weights have changed."""
    for found_inf in (None, torch.tensor(0.0)):
        optimizer: Any = fastwrs.SGD([parameter(3, 4)], lr=0.0)
        optimizer.step()  # states of inference mode are refused later
        monitor = fastwrs.Monitor(optimizer, channels=0)
        with torch.inference_mode():
            optimizer.step()
        optimizer.found_inf = found_inf
        optimizer.step()
        assert steps_of(monitor) == [1, 2]


def test_a_weight_of_another_size_has_memory_of_its_size() -> None:
    weight = parameter(3, 4)
    _, monitor = watched(weight, channels=0)
    monitor.optimizer.step()
    weight.data, weight.grad = torch.full((5, 4), 3.0), torch.ones(5, 4)
    monitor.optimizer.step()
    assert [norm for _, norm in monitor.curve("norm_after", "max")["params[0][0]"]] == [2.0, 6.0]


# ---- losses and numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [np.int64(2), np.int32(2), np.uint8(2)], ids=repr)
def test_integers_of_other_libraries(every: Any) -> None:
    optimizer, monitor = watched(parameter(3), every=every, channels=every, layers=every)
    monitor.load_state_dict({"steps": every})  # type: ignore[dict-item]
    for _ in range(2):
        optimizer.step()
    assert steps_of(monitor) == [4]
    assert type(monitor.steps) is int and type(monitor.every) is int


@pytest.mark.parametrize("every", [np.float32(2), np.bool_(True), "2", 2.5, None], ids=repr)
def test_what_is_no_integer_is_refused(every: Any) -> None:
    optimizer = fastwrs.SGD([parameter(3)], lr=0.1)
    with pytest.raises(TypeError, match="every must be an int"):
        fastwrs.Monitor(optimizer, every=every)


@pytest.mark.parametrize("loss", [np.float32(2), np.float64(2), np.int64(2), 2, torch.tensor([2.0])], ids=repr)
def test_losses_of_other_libraries(loss: Any) -> None:
    optimizer, monitor = watched(parameter(3))
    monitor.log_loss(loss)
    optimizer.step()
    optimizer.step(lambda: loss)
    assert [record["ratio"] for record in monitor.gradient_over_loss()] == pytest.approx([1.5, 1.5])


HUGE = pytest.param(10**400, id="beyond all floats")


@pytest.mark.parametrize("loss", [True, np.bool_(True), "2", b"2", 2j, np.complex64(2), [2.0], HUGE], ids=repr)
def test_what_is_no_real_number_is_no_loss(loss: Any) -> None:
    optimizer, monitor = watched(parameter(3))
    with pytest.raises(ValueError, match="log_loss: loss must be one number"):
        monitor.log_loss(loss)
    optimizer.step(lambda: loss)
    assert monitor.steps == 1
    with pytest.raises(RuntimeError, match="no measured step has a loss"):
        monitor.gradient_over_loss()


@pytest.mark.parametrize("again", [None, 3.0])
def test_a_step_that_is_refused_takes_its_loss_along(again: float | None) -> None:
    optimizer, monitor = watched(parameter(3))
    monitor.log_loss(123.0)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="learning rate"):
        optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.1
    if again is not None:
        monitor.log_loss(again)
    optimizer.step(lambda: torch.tensor(7.0))
    assert [record["loss"] for record in monitor.gradient_over_loss()] == [again or 7.0]


def test_clear_forgets_the_loss_too() -> None:
    optimizer, monitor = watched(parameter(3))
    monitor.log_loss(5.0)
    monitor.clear()
    optimizer.step()
    with pytest.raises(RuntimeError, match="no measured step has a loss"):
        monitor.gradient_over_loss()


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_what_latest_gives_may_be_written_to() -> None:
    optimizer, monitor = watched(parameter(3, 4), parameter(1))
    other = fastwrs.Monitor(optimizer)
    optimizer.step()
    before = monitor.layers()
    for figures in monitor.latest().values():
        for figure in figures.values():
            figure.zero_()
    assert monitor.layers() == before == other.layers()


class Writer:
    """What TensorBoard's writer is told."""

    def __init__(self) -> None:
        self.written: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.written[tag, step] = value


def test_a_nan_shows_in_the_minimum_norm(tmp_path: Path) -> None:
    good, bad, worse = parameter(2, 4, fill=3.0), parameter(2, 4, fill=9.0), parameter(2, 4, fill=math.inf)
    optimizer, monitor = watched(good, bad, worse)
    optimizer.step()
    with torch.no_grad():
        bad[1, 2] = math.nan
    optimizer.step()
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()  # skipped: nothing was measured, which is no NaN
    first, second = monitor.minimum_norm()
    assert first == {"step": 1, "minimum_norm": pytest.approx(6), "name": "params[0][0]"}
    assert second == {"step": 2, "minimum_norm": pytest.approx(math.nan, nan_ok=True), "name": "params[0][1]"}
    writer = Writer()
    monitor.to_tensorboard(writer)
    assert math.isnan(writer.written["minimum_norm", 2]) and ("minimum_norm", 3) not in writer.written
    monitor.plot(tmp_path / "norms.png")
    assert (tmp_path / "norms.png").stat().st_size > 0


def test_a_place_that_becomes_a_weight_counts_from_then_on() -> None:
    vector, matrix = parameter(3), parameter(3, 4)
    optimizer, monitor = watched(vector)
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = matrix
    optimizer.step()
    assert [record["step"] for record in monitor.minimum_norm()] == [2]


def test_plot_takes_the_name_of_one_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    drawn: list[list[str]] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, _: drawn.append([axes.get_title() for axes in self.axes]))
    optimizer, monitor = watched(parameter(3, 4))
    optimizer.step()
    monitor.plot(tmp_path / "x", figures="norm_after")
    monitor.plot(tmp_path / "x", figures=["norm_after"])
    assert drawn[0] == drawn[1] and len(drawn[0]) == 2 and drawn[0][0].startswith("norm_after")
    with pytest.raises(ValueError, match="no figure 'norm'; allowed: norm_before"):
        monitor.plot(tmp_path / "x", figures="norm")


def test_json_lines_are_not_all_in_memory(tmp_path: Path) -> None:
    optimizer, monitor = watched(*(parameter(2, 2) for _ in range(30)))
    for _ in range(40):
        optimizer.step()
    tracemalloc.start()
    try:
        monitor.to_jsonl(tmp_path / "layers")
        peak = tracemalloc.get_traced_memory()[1]
        monitor.to_jsonl(tmp_path / "channels", "channels")
    finally:
        tracemalloc.stop()
    assert len((tmp_path / "layers").read_text(encoding="utf-8").splitlines()) == 40 * 30
    assert peak < (tmp_path / "layers").stat().st_size / 4


def test_a_file_is_left_alone_where_the_device_fails(tmp_path: Path) -> None:
    weight = parameter(4, 3)
    _, monitor = watched(weight)
    monitor.before_step()
    monitor.after_step([Measured(Rows([weight], [4]), torch.empty(4, len(MEASURED), device="meta"))], None)
    (tmp_path / "x").write_text("old", encoding="utf-8")
    for detail in ("layers", "channels"):
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            monitor.to_jsonl(tmp_path / "x", detail)
    assert (tmp_path / "x").read_text(encoding="utf-8") == "old"


def test_a_plot_walks_what_is_kept_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    optimizer, monitor = watched(parameter(3, 4))
    monitor.log_loss(1.0)
    optimizer.step()
    walks = []
    reduced = monitor._store.reduced
    monkeypatch.setattr(monitor._store, "reduced", lambda: walks.append(0) or reduced())
    monitor.plot(tmp_path / "norms.png")
    assert len(walks) == 1
    monitor.to_tensorboard(Writer())
    assert len(walks) == 2


# ---- torch.distributed.checkpoint -----------------------------------------------------------------------------------


def test_a_first_step_without_a_learning_rate_is_a_step() -> None:
    """As in a warm-up from 0. torch.distributed.checkpoint makes states by just such a step, which nobody can tell."""
    weight = parameter(3, 4)
    optimizer: Any = fastwrs.AdamW([weight], lr=1.0)
    monitor = fastwrs.Monitor(optimizer)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    for _ in range(3):
        optimizer.step()
        warm_up.step()
    assert steps_of(monitor) == [1, 2, 3] and float(optimizer.state[weight]["step"]) == 3


def test_resuming_with_torchs_distributed_checkpoint_as_documented() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def step(model: nn.Module, optimizer: Any) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()

    model = nn.Linear(3, 4)
    optimizer = fastwrs.AdamW(model.parameters(), lr=0.1)
    monitor = fastwrs.Monitor(optimizer, every=2)
    for _ in range(5):
        step(model, optimizer)
    saved, counted = get_optimizer_state_dict(model, optimizer), monitor.state_dict()

    model = nn.Linear(3, 4)
    optimizer = fastwrs.AdamW(model.parameters(), lr=0.1)
    early = fastwrs.Monitor(optimizer)
    set_optimizer_state_dict(model, optimizer, saved)
    assert early.steps == 1  # the step that made the states
    monitor = fastwrs.Monitor(optimizer, every=2)
    monitor.load_state_dict(counted)
    early.clear()
    early.load_state_dict(counted)
    step(model, optimizer)
    assert steps_of(monitor) == steps_of(early) == [6] and monitor.steps == early.steps == 6
