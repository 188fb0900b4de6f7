"""The monitor: its figures are the oracle's, a step stays what it is, and nothing is read before somebody asks."""

from __future__ import annotations

import copy
import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tolerances
import torch
from calls import one_thread, place
from tolerances import Inputs
from torch import Tensor, nn

import fastwrs
from fastwrs import library
from fastwrs.measuring import Measured, Rows, Scope
from fastwrs.optim.records import read
from fastwrs.options import reduced_dims
from fastwrs.spec import MEASURED

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("backend")]

RESCALE, SHRINK = fastwrs.Rescale, fastwrs.Shrink
GROUPS: list[tuple[list[tuple[int, ...]], dict[str, Any], list[str]]] = [
    ([(8, 5, 3, 3), (13, 29), (5, 2, 3, 3), (2, 0, 3, 3)], {"rescale": RESCALE(target=0.7)}, ["c", "cl", "gap", "tr"]),
    ([(6, 4, 3, 3), (12, 10, 1, 1)], {"rescale": RESCALE(axis="in", every=2)}, ["cl", "c"]),
    ([(9, 17), (4, 600)], {"shrink": SHRINK(0.3, axis="tensor")}, ["two", "c"]),
    ([(7, 11, 13)], {"rescale": RESCALE(axis=(0, 2), every=3), "shrink": SHRINK(0.2, axis=(0, 2))}, ["c"]),
    ([(6, 5, 3, 3), (17, 31), (33_000,), (33,), (), (0,), (0, 3)], {}, ["cl", "off", "c", "two", "c", "c", "c"]),
]
STEPS = 4


@pytest.fixture(autouse=True)
def _on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def parameters(dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Param groups with every kind of axis, layout and number of dimensions, and gradients."""
    generator = torch.Generator().manual_seed(3)
    groups = []
    for g, (shapes, options, layouts) in enumerate(GROUPS):
        params = []
        for shape, layout in zip(shapes, layouts, strict=True):
            values = torch.randn(shape, generator=generator, dtype=torch.float64)
            layout = layout if shape and (layout != "cl" or len(shape) == 4) else "c"
            params.append(nn.Parameter(place(values, layout, dtype, "cpu")[1]))
        names = [f"{g}.{i}" for i in range(len(params))]
        groups.append({"params": params, "param_names": names, **options})
    return groups


def set_gradients(groups: list[dict[str, Any]], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for group in groups:
        for param in group["params"]:
            grad = torch.randn(param.shape, generator=generator, dtype=torch.float64) * 0.3 * scale
            param.grad = torch.empty_like(param).copy_(grad)


def make(name: str, groups: list[dict[str, Any]], **options: Any) -> Any:
    defaults: dict[str, dict[str, Any]] = {
        "AdamW": {"lr": 0.02, "weight_decay": 0.1},
        "SGD": {"lr": 0.05, "momentum": 0.8},
    }
    defaults |= {"AdamP": {**defaults["AdamW"], "delta": 5.0}, "SGDP": {**defaults["SGD"], "delta": 5.0}}
    defaults["SGD shifted"] = {**defaults["SGD"], "shifted_l2": (0.2, 0.3)}
    kind = getattr(fastwrs, name.split()[0])
    return kind([dict(group) for group in groups], **defaults[name], **options)


def snapshot(optimizer: Any, step: int, grad_scale: float | None = None) -> dict[str, Inputs]:
    """What the oracle needs of the step to come, by name of the parameter."""
    found = {}
    for group in optimizer.param_groups:
        rule = optimizer.rule_for(optimizer.param_groups)
        numbers = read(rule, group, optimizer.numbers(group))
        hyper = {known.name: value for known, value in zip(rule.record, numbers, strict=True)}
        option = group["rescale"] or group["shrink"]
        for name, param in zip(group["param_names"], group["params"], strict=True):
            states = {slot: optimizer.state[param][slot].clone() for slot in rule.slots_for(group)}
            axis = option.axis if option else "out" if param.ndim >= 2 else "tensor"
            found[name] = Inputs(
                rule.name, param.detach().clone(), param.grad.clone(), states, t=step, first=step == 1,
                lr=group["lr"], hyper=hyper, dims=reduced_dims(axis, param.ndim), grad_scale=grad_scale,
            )  # fmt: skip
    return found


def check(optimizer: Any, before: dict[str, Inputs], figures: dict[str, dict[str, Tensor]]) -> None:
    """Parameters, states and figures are the oracle's, within the tolerance; every group has a row."""
    after = {
        n: p for group in optimizer.param_groups for n, p in zip(group["param_names"], group["params"], strict=True)
    }
    for name, inputs in before.items():
        got = {"param": after[name].detach(), "grad": after[name].grad}
        got |= {slot: optimizer.state[after[name]][slot] for slot in inputs.states}
        truth = inputs.run(torch.float64).measured
        assert truth is not None
        if len(truth):
            got["measured"] = torch.stack([figures[name][figure] for figure in MEASURED], dim=1)
        else:
            assert name not in figures
        tolerances.check_soon(inputs, got, f"{name} {tuple(inputs.param.shape)}: ")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("SGD", torch.float32),
        ("SGD", torch.bfloat16),
        *(("AdamW", d) for d in (torch.float32, torch.float64, torch.half)),
        *((name, d) for name in ("AdamP", "SGDP", "SGD shifted") for d in (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
def test_the_figures_are_the_oracles(name: str, dtype: torch.dtype) -> None:
    groups = parameters(dtype)
    optimizer = make(name, groups)
    set_gradients(groups, 0)
    optimizer.step()  # not seen by the monitor, and the states are there
    monitor = fastwrs.Monitor(optimizer, every=2)
    for step in (2, 3):
        set_gradients(groups, step)
        before = snapshot(optimizer, step)
        optimizer.step()
        if step == 3:
            check(optimizer, before, monitor.latest())
    assert {record["step"] for record in monitor.channels()} == {2}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("SGD", torch.bfloat16),
        ("AdamW", torch.float32),
        ("AdamW", torch.float64),
        ("AdamP", torch.float32),
        ("SGDP", torch.bfloat16),
        ("SGD shifted", torch.float32),
    ],
    ids=str,
)
def test_a_measured_step_changes_no_bit(name: str, dtype: torch.dtype) -> None:
    results = []
    for watched in (False, True):
        groups = parameters(dtype)
        optimizer = make(name, groups)
        monitor = fastwrs.Monitor(optimizer, every=2) if watched else None
        for step in range(STEPS):
            set_gradients(groups, step)
            optimizer.step()
        assert monitor is None or len(monitor.curve("norm_after")["0.0"]) == STEPS // 2
        params = [param for group in groups for param in group["params"]]
        states = [state for param in params for state in optimizer.state[param].values()]
        results.append([param.detach() for param in params] + states)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_grad_scaler_and_skipped_steps() -> None:
    groups = parameters()
    optimizer = make("SGD", groups)
    monitor = fastwrs.Monitor(optimizer)
    set_gradients(groups, 0, 8.0)
    optimizer.step()
    set_gradients(groups, 1, 8.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    weights = groups[0]["params"][0].detach().clone()
    optimizer.step()
    assert torch.equal(weights, groups[0]["params"][0])
    assert all(bool(rows.isnan().all()) for figures in monitor.latest().values() for rows in figures.values())

    optimizer.found_inf = torch.tensor(0.0)
    before = snapshot(optimizer, 2, grad_scale=8.0)
    optimizer.step()
    check(optimizer, before, monitor.latest())

    taken = [(record["step"], record["taken"]) for record in monitor.layers() if record["name"] == "0.0"]
    assert taken == [(1, True), (2, False), (3, True)]
    assert [step for step, _ in monitor.curve("norm_after")["0.0"]] == [1, 3]
    assert all(r[figure] is None for r in monitor.channels() if r["step"] == 2 for figure in MEASURED)
    assert [record["step"] for record in monitor.minimum_norm()] == [1, 3]


def test_with_torchs_grad_scaler() -> None:
    weight = nn.Parameter(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)))
    optimizer = fastwrs.SGD([weight], lr=0.1)
    monitor = fastwrs.Monitor(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)  # type: ignore[attr-defined]
    for factor in (1.0, float("inf"), 2.0):
        optimizer.zero_grad()
        scaler.scale((factor * weight).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert [step for step, _ in monitor.curve("grad_norm")["params[0][0]"]] == [1, 3]
    assert monitor.curve("grad_norm", "total")["params[0][0]"] == [
        (1, pytest.approx(20**0.5)),
        (3, pytest.approx(80**0.5)),
    ]


def test_reductions_are_those_of_the_channels() -> None:
    groups = parameters()
    optimizer = make("AdamW", groups)
    full, reduced = fastwrs.Monitor(optimizer, channels=STEPS), fastwrs.Monitor(optimizer, channels=1, layers=2)
    for step in range(STEPS):
        set_gradients(groups, step)
        optimizer.step()
    rows: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for record in full.channels():
        rows.setdefault((record["step"], record["name"]), []).append(record)
    layers = {(record["step"], record["name"]): record for record in full.layers()}
    assert layers.keys() == rows.keys()
    for key, of in rows.items():
        assert [record["group"] for record in of] == list(range(layers[key]["groups"]))
        for figure in MEASURED:
            values = torch.tensor([record[figure] for record in of], dtype=torch.float64)
            got = [layers[key][f"{figure}.{statistic}"] for statistic in ("min", "mean", "max")]
            assert got == pytest.approx([float(values.min()), float(values.mean()), float(values.max())], rel=1e-6)
        total = layers[key]["grad_norm.total"]
        assert total == pytest.approx(sum(record["grad_norm"] ** 2 for record in of) ** 0.5, rel=1e-6)
    assert sorted({record["step"] for record in reduced.layers()}) == [2, 3, 4]  # 2 and 3 are kept reduced, 4 in full
    assert reduced.layers() == [record for record in full.layers() if record["step"] > 1]
    assert {record["step"] for record in reduced.channels()} == {STEPS}


def test_the_derived_curves() -> None:
    wide, small = nn.Parameter(torch.full((2, 4), 3.0)), nn.Parameter(torch.tensor([[0.3, 0.4], [6.0, 8.0]]))
    bias = nn.Parameter(torch.zeros(3))
    empty = nn.Parameter(torch.empty(4, 0))
    optimizer = fastwrs.SGD([{"params": [wide, empty, small]}, {"params": [bias]}], lr=0.0)
    names = {"wide": wide, "small": small, "bias": bias, "empty": empty}
    monitor = fastwrs.Monitor(optimizer, every=2, names=names)
    for step in range(1, 5):
        for param in names.values():
            param.grad = torch.full_like(param, float(step))
        monitor.log_loss(torch.tensor(step / 2))
        optimizer.step()
    # 8 + 4 + 3 elements of the size of the step. Norms of 0 that do not count: that of a bias, which is no weight
    # vector, and those of weights without elements.
    assert [monitor.latest()[name]["norm_after"].tolist() for name in ("bias", "empty")] == [[0], [0] * 4]
    least = {"minimum_norm": pytest.approx(0.5), "name": "small"}
    assert monitor.minimum_norm() == [{"step": 2, **least}, {"step": 4, **least}]
    found = monitor.gradient_over_loss()
    assert [record["step"] for record in found] == [2, 4]
    assert [record["squared_gradient_norm"] for record in found] == pytest.approx([60, 240])
    assert [record["ratio"] for record in found] == pytest.approx([60, 120])
    assert monitor.curve("norm_before", "total")["wide"] == [(2, pytest.approx(72**0.5)), (4, pytest.approx(72**0.5))]


def test_closures_give_the_loss() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = fastwrs.SGD([weight], lr=0.1)
    monitor = fastwrs.Monitor(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert monitor.gradient_over_loss() == [
        {"step": 1, "squared_gradient_norm": pytest.approx(16), "loss": 4.0, "ratio": pytest.approx(4)}
    ]


def test_late_parameters_groups_and_names() -> None:
    first, late, added = (nn.Parameter(torch.ones(shape)) for shape in ((2, 3), (4, 3), (5,)))
    optimizer = fastwrs.SGD([("first", first), ("late", late)], lr=0.1)
    monitor = fastwrs.Monitor(optimizer, names=[("mine", late)])
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert set(monitor.latest()) == {"first"}
    late.grad = torch.ones_like(late)
    added.grad = torch.ones_like(added)
    optimizer.add_param_group({"params": [("first", added)]})
    optimizer.step()
    assert set(monitor.latest()) == {"first", "mine", "first (params[1][0])"}
    assert len(monitor.latest()["mine"]["norm_after"]) == 4
    assert [step for step, _ in monitor.curve("norm_after")["first"]] == [1, 2]
    assert [step for step, _ in monitor.curve("norm_after")["mine"]] == [2]


def test_changed_options_change_the_groups() -> None:
    weight = nn.Parameter(torch.ones(2, 3, 2, 2))
    optimizer = fastwrs.SGD([weight], lr=0.1)
    monitor = fastwrs.Monitor(optimizer, names={"w": weight})
    counts = []
    for rescale in (None, RESCALE(axis="in"), None, RESCALE(axis="tensor")):
        optimizer.param_groups[0]["rescale"] = rescale
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        counts.append(len(monitor.latest()["w"]["norm_after"]))
    assert counts == [2, 8, 2, 1]


def test_removed_and_resumed() -> None:
    groups = parameters()
    optimizer = make("SGD", groups)
    set_gradients(groups, 0)
    with fastwrs.Monitor(optimizer, every=3) as monitor:
        for _ in range(4):
            optimizer.step()
    optimizer.step()
    monitor.remove()
    assert monitor.steps == 4
    assert {record["step"] for record in monitor.layers()} == {3}
    resumed = fastwrs.Monitor(optimizer, every=3)
    resumed.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    for _ in range(3):
        optimizer.step()
    assert {record["step"] for record in resumed.layers()} == {6}
    resumed.clear()
    assert resumed.layers() == [] and resumed.latest() == {} and resumed.steps == 7


def test_a_refused_step_is_not_counted() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = fastwrs.SGD([weight], lr=0.1)
    monitor = fastwrs.Monitor(optimizer)
    weight.grad = torch.ones_like(weight)
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="learning rate"):
        optimizer.step()
    assert monitor.steps == 0 and monitor.layers() == []


def test_copies_of_the_optimizer_are_not_watched() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = fastwrs.SGD([weight], lr=0.1)
    monitor = fastwrs.Monitor(optimizer)
    other = copy.deepcopy(optimizer)
    other.param_groups[0]["params"][0].grad = torch.ones(2, 3)
    other.step()
    assert monitor.steps == 0
    optimizer.load_state_dict(optimizer.state_dict())
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert monitor.steps == 1 and set(monitor.latest()) == {"params[0][0]"}


def test_a_step_reads_nothing_back() -> None:
    """What was measured lies on the meta device, where reading a number is an error."""
    weight = nn.Parameter(torch.ones(4, 3))
    monitor = fastwrs.Monitor(fastwrs.SGD([weight], lr=0.1), channels=2)
    values = torch.empty(4, len(MEASURED), device="meta")
    loss = torch.empty((), device="meta")
    for _ in range(2):
        assert monitor.before_step() is Scope.EVERYTHING
        monitor.log_loss(loss)
        monitor.after_step([Measured(Rows([weight], [4]), values)], None)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        monitor.channels()


# ---- exports --------------------------------------------------------------------------------------------------------


@pytest.fixture
def monitor() -> fastwrs.Monitor:
    """Three steps on a weight and a bias; the second one skipped, a NaN in the bias."""
    weight, bias = nn.Parameter(torch.eye(2, 3)), nn.Parameter(torch.tensor([1.0, float("nan")]))
    optimizer: Any = fastwrs.SGD([{"params": [weight], "rescale": RESCALE()}, {"params": [bias]}], lr=0.1)
    watching = fastwrs.Monitor(optimizer, names=[("w", weight), ("b", bias)])
    for found in (0.0, 1.0, 0.0):
        optimizer.found_inf = torch.tensor(found)
        weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
        watching.log_loss(2.0)
        optimizer.step()
    return watching


def test_json_lines(monitor: fastwrs.Monitor, tmp_path: Path) -> None:
    for detail, records in (("layers", monitor.layers()), ("channels", monitor.channels())):
        path = tmp_path / f"{detail}.jsonl"
        monitor.to_jsonl(path, detail)
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == records
        assert "NaN" not in "".join(lines)
    by = {(r["step"], r["name"], r["group"]): r for r in monitor.channels()}
    assert by[1, "w", 1]["norm_after"] == pytest.approx(1, abs=3e-7)
    assert by[1, "b", 0]["taken"] and by[1, "b", 0]["norm_after"] is None and by[1, "b", 0]["grad_norm"] is not None
    assert not by[2, "w", 0]["taken"]


def test_pandas(monitor: fastwrs.Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    frame = types.SimpleNamespace(from_records=lambda records: seen.append(records) or "frame")
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=frame))
    assert monitor.to_pandas() == "frame"
    assert monitor.to_pandas("channels") == "frame"
    assert seen == [monitor.layers(), monitor.channels()]


def test_tensorboard(monitor: fastwrs.Monitor) -> None:
    written: dict[tuple[str, int], float] = {}
    writer = types.SimpleNamespace(add_scalar=lambda tag, value, step: written.update({(tag, step): value}))
    monitor.to_tensorboard(writer, "min")
    assert written["norm_after.min/w", 1] == pytest.approx(1, abs=3e-7)
    assert written["minimum_norm", 3] == pytest.approx(1, abs=3e-7)
    assert written["gradient_over_loss", 3] == pytest.approx(4)
    assert not any(step == 2 for _, step in written)
    assert ("norm_after.min/b", 1) not in written  # NaN
    assert ("grad_norm.min/b", 1) in written
    written.clear()
    monitor.to_tensorboard(writer, "total")
    assert ("grad_norm.total/w", 1) in written and ("rescale_factor.total/w", 1) not in written


def test_plot(monitor: fastwrs.Monitor, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    drawn: list[list[str]] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **options: Any) -> None:
        drawn.append([axes.get_title() for axes in figure.axes])
        save(figure, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        monitor.plot(tmp_path / "norms.png")
        monitor.plot(tmp_path / "factors.svg", figures=["rescale_factor"])
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "factors.svg").read_text(encoding="utf-8")
    assert [len(titles) for titles in drawn] == [5, 3]
    assert drawn[1][0].startswith("rescale_factor")


@pytest.mark.parametrize(("module", "method"), [("pandas", "to_pandas"), ("matplotlib.figure", "plot")])
def test_a_package_that_is_missing_is_named(
    monitor: fastwrs.Monitor, module: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    arguments = ("out.png",) if method == "plot" else ()
    with pytest.raises(ImportError, match=f"monitor.{method} needs {module.split('.')[0]}: pip install"):
        getattr(monitor, method)(*arguments)


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"every": 0}, ValueError, "every must be >= 1, got 0"),
        ({"every": 2.0}, TypeError, "every must be an int, got 2.0"),
        ({"every": True}, TypeError, "every must be an int, got True"),
        ({"channels": -1}, ValueError, "channels must be >= 0, got -1"),
        ({"layers": None}, TypeError, "layers must be an int, got None"),
        ({"names": 3}, TypeError, "names must be model.named_parameters"),
        ({"names": ["w"]}, TypeError, "names must be model.named_parameters"),
        ({"names": [(1, torch.ones(1))]}, TypeError, "names must be model.named_parameters"),
        ({"names": [("w", torch.ones(1)), ("w", torch.ones(1))]}, ValueError, "'w' to several parameters"),
    ],
)
def test_arguments_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    optimizer = fastwrs.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    with pytest.raises(kind, match=message):
        fastwrs.Monitor(optimizer, **options)
    assert optimizer._watchers == ()


def test_other_optimizers_are_refused() -> None:
    other: Any = torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    with pytest.raises(TypeError, match="must be one of fastwrs, got SGD"):
        fastwrs.Monitor(other)


def test_wrong_questions_are_refused(monitor: fastwrs.Monitor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no figure 'norm'; allowed: norm_before, "):
        monitor.curve("norm")
    with pytest.raises(ValueError, match="rescale_factor has no statistic 'total'; allowed: min, mean, max"):
        monitor.curve("rescale_factor", "total")
    with pytest.raises(ValueError, match="detail must be 'layers' or 'channels', got 'all'"):
        monitor.to_jsonl(tmp_path / "x", "all")
    assert not (tmp_path / "x").exists()
    with pytest.raises(TypeError, match="writer must have add_scalar"):
        monitor.to_tensorboard(object())
    with pytest.raises(ValueError, match="statistic must be one of min, mean, max, total, got 'median'"):
        monitor.to_tensorboard(types.SimpleNamespace(add_scalar=print), "median")
    for loss, shown in ((torch.ones(2), r"shape \(2,\)"), ("low", "'low'"), (None, "None")):
        with pytest.raises(ValueError, match=f"loss must be one number, got {shown}"):
            monitor.log_loss(loss)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have 'steps'"):
        monitor.load_state_dict({})


def test_a_ratio_without_a_loss_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = fastwrs.SGD([weight], lr=0.1)
    monitor = fastwrs.Monitor(optimizer)
    assert monitor.gradient_over_loss() == []
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="no measured step has a loss"):
        monitor.gradient_over_loss()
    monitor.log_loss(0.0)
    optimizer.step()
    assert monitor.gradient_over_loss()[0]["ratio"] is None


def test_reductions_are_those_of_the_rows() -> None:
    """Minimum, mean, maximum and root of the sum of squares of each parameter's rows, whoever reduces them."""
    if library.why_not() is not None:
        pytest.skip("the op is in the extension")
    counts = [1, 7, 2, 300, 1]
    values = torch.randn(sum(counts), len(MEASURED), generator=torch.Generator().manual_seed(0))
    values[3, 2], values[9, :] = math.inf, math.nan
    out = torch.empty(len(counts), 4, len(MEASURED))
    torch.ops.fastwrs.reduce_measured(values, counts, out)
    for rows, found in zip(values.double().split(counts), out, strict=True):
        want = rows.amin(0), rows.mean(0), rows.amax(0), rows.square().sum(0).sqrt()
        torch.testing.assert_close(found, torch.stack(want).float(), rtol=2**-23, atol=0, equal_nan=True)
    torch.library.opcheck(torch.ops.fastwrs.reduce_measured.default, (values[:8].clone(), [1, 7], torch.zeros(2, 4, 8)))


@pytest.mark.parametrize(
    ("counts", "out", "why"),
    [([3, 0], (2, 4, 8), r"counts\[1\] must be > 0, got 0"), ([4], (1, 4, 8), "measured"), ([3], (1, 2, 8), "out")],
)
def test_a_reduction_of_other_sizes_is_refused(counts: list[int], out: tuple[int, ...], why: str) -> None:
    if library.why_not() is not None:
        pytest.skip("the op is in the extension")
    found = torch.zeros(out)
    with pytest.raises(RuntimeError, match=why):
        torch.ops.fastwrs.reduce_measured(torch.ones(3, 8), counts, found)
    assert not found.any()
