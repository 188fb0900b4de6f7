"""Planning: once while nothing changes, again when something does; and the seam in front of the launch."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
import torch
from tolerances import NORM_BOUND, norm_deviation
from torch import nn

import fastwrs
from fastwrs import dispatch
from fastwrs import plan as planning
from fastwrs.optim import base
from fastwrs.plan import StepCall, overlapping, overlaps_itself

pytestmark = pytest.mark.cpu


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry per plan that was built."""
    made: list[Any] = []

    def counted(*args: Any) -> Any:
        made.append(build(*args))
        return made[-1]

    build = base.build
    monkeypatch.setattr(base, "build", counted)
    return made


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[StepCall, bool]]:
    """Stubs the launch; one entry per call."""
    seen: list[tuple[StepCall, bool]] = []
    monkeypatch.setattr(dispatch, "launch", lambda _, call, dry_run=False: seen.append((call, dry_run)))
    return seen


def model(count: int = 4, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(3, 4, dtype=dtype)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(3, 4, dtype=dtype)
    return params


@pytest.mark.usefixtures("backend")
def test_f11_one_plan_serves_many_steps(builds: list[Any]) -> None:
    params = model()
    optimizer = fastwrs.AdamW(params, rescale=fastwrs.Rescale())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(5):
        for param in params:
            param.grad = torch.randn(3, 4)
        optimizer.step()
        scheduler.step()
    assert len(builds) == 1
    assert optimizer.state[params[0]]["step"].item() == 5


def drop_a_gradient(_optimizer: Any, params: list[nn.Parameter]) -> None:
    params[1].grad = None


def change_momentum(optimizer: Any, _params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["momentum"] = 0.0


def change_rescale(optimizer: Any, _params: list[nn.Parameter]) -> None:
    optimizer.param_groups[0]["rescale"] = fastwrs.Rescale(axis="tensor")


def replace_state_dict(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.state[params[1]] = {"step": torch.tensor(7.0), "momentum_buffer": torch.ones(3, 4)}


def drop_states(optimizer: Any, _params: list[nn.Parameter]) -> None:
    optimizer.state.clear()


def drop_one_state(optimizer: Any, params: list[nn.Parameter]) -> None:
    del optimizer.state[params[2]]["momentum_buffer"]


def replace_parameter(optimizer: Any, params: list[nn.Parameter]) -> None:
    params[1] = optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.ones(3, 4))
    params[1].grad = torch.ones(3, 4)


def add_group(optimizer: Any, params: list[nn.Parameter]) -> None:
    extra = nn.Parameter(torch.ones(5))
    extra.grad = torch.ones(5)
    params.append(extra)
    optimizer.add_param_group({"params": [extra]})


def move_to_another_group(optimizer: Any, params: list[nn.Parameter]) -> None:
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [], "lr": 0.7})
    for param in params:
        param.grad = torch.ones(3, 4)
    optimizer.step()
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())


CHANGES = [
    move_to_another_group,
    drop_a_gradient,
    change_momentum,
    change_rescale,
    replace_state_dict,
    drop_states,
    drop_one_state,
    replace_parameter,
    add_group,
]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen_and_acted_upon(change: Any, builds: list[Any]) -> None:
    """After the change the step does what an optimizer does that has never had another plan."""
    params = model()
    optimizer = fastwrs.SGD(params, lr=0.1, momentum=0.9, dampening=0.3)
    optimizer.step()
    optimizer.step()
    change(optimizer, params)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    for twin, param in zip(twins, params, strict=True):
        twin.grad = None if param.grad is None else param.grad.clone()
    mapped: dict[torch.Tensor, nn.Parameter] = dict(zip(params, twins, strict=True))
    other = fastwrs.SGD([{**group, "params": [mapped[p] for p in group["params"]]} for group in optimizer.param_groups])
    for param, state in optimizer.state.items():
        if param in mapped:  # a replaced one is not
            other.state[mapped[param]] = {key: value.clone() for key, value in state.items()}
    seen = len(builds)
    optimizer.step()
    assert len(builds) == seen + 1
    other.step()
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(param, twin)
        assert optimizer.state[param].keys() == other.state[twin].keys()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("axis", ["out", -1, "tensor"])
def test_data_with_other_dimensions_gets_its_own_axis(axis: Any) -> None:
    param = nn.Parameter(torch.randn(4, 6))
    optimizer = fastwrs.SGD([param], lr=0.1, rescale=fastwrs.Rescale(axis=axis))
    param.grad = torch.randn(4, 6)
    optimizer.step()
    param.grad = None
    param.data = torch.randn(4, 3, 2)
    param.grad = torch.randn(4, 3, 2)
    optimizer.step()
    dims = {"out": (1, 2), -1: (2,), "tensor": (0, 1, 2)}[axis]
    assert norm_deviation(param.detach(), dims, 1.0) <= NORM_BOUND[torch.float32]


@pytest.mark.usefixtures("backend")
def test_a_group_put_in_by_hand_gets_the_defaults() -> None:
    results = []
    for module in (fastwrs, torch.optim):
        torch.manual_seed(0)
        one, other = model(2)
        optimizer = module.SGD([one], lr=0.1, momentum=0.5)
        optimizer.step()
        keys = torch.optim.SGD([other], lr=0.3, momentum=0.5).param_groups[0]
        optimizer.param_groups.append(dict(keys))
        optimizer.step()
        results.append((one, other))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.usefixtures("backend")
def test_a_gradient_that_appears_is_seen(builds: list[Any]) -> None:
    params = model()
    params[2].grad = None
    optimizer = fastwrs.AdamW(params)
    optimizer.step()
    optimizer.step()
    assert len(builds) == 1
    assert params[2] not in optimizer.state
    params[2].grad = torch.ones(3, 4)
    optimizer.step()
    assert len(builds) == 2
    assert [optimizer.state[param]["step"].item() for param in params] == [3, 3, 1, 3]


def turns(optimizer: Any, params: list[nn.Parameter], idle: list[int]) -> None:
    """One step for each entry, in which this parameter has no gradient."""
    for step, k in enumerate(idle):
        for i, param in enumerate(params):
            param.grad = None if i == k else torch.full((3, 4), 1.0 + step)
        optimizer.step()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_parameters_that_take_turns_do_not_cost_a_plan_each_time(momentum: float, builds: list[Any]) -> None:
    params = model()
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    optimizer = fastwrs.SGD(params, lr=0.1, momentum=momentum)
    other = torch.optim.SGD(twins, lr=0.1, momentum=momentum, foreach=False)
    order = [0, 1, 2, 0, 1, 2, -1, 2, -1, 0]
    turns(optimizer, params, order)
    turns(other, twins, order)
    assert len(builds) == 4
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin)
    optimizer.param_groups[0]["rescale"] = fastwrs.Rescale(axis="tensor")
    turns(optimizer, params, [0, 1, 0, 1])
    assert len(builds) == 6  # none of the old ones is used


@pytest.mark.usefixtures("backend")
def test_the_plan_that_was_not_used_for_longest_is_dropped(builds: list[Any]) -> None:
    params = model(base.PLANS + 1)
    optimizer = fastwrs.AdamW(params)
    everyone = list(range(base.PLANS + 1))
    turns(optimizer, params, everyone)
    assert len(builds) == base.PLANS + 1
    turns(optimizer, params, everyone[1:])
    assert len(builds) == base.PLANS + 1
    turns(optimizer, params, [0, 2])
    assert len(builds) == base.PLANS + 2
    turns(optimizer, params, [1])
    assert len(builds) == base.PLANS + 3
    assert len(optimizer._plans) == base.PLANS


@pytest.mark.usefixtures("backend")
def test_a_late_buffer_starts_once_among_several_plans(builds: list[Any]) -> None:
    params = model(2)
    optimizer = fastwrs.SGD(params, lr=0.1)
    turns(optimizer, params, [-1, 0])
    optimizer.param_groups[0]["momentum"] = 0.5
    turns(optimizer, params, [0, -1, -1, 0, -1])
    fresh = [bool(bundle.fresh) for plan in builds for bundle in plan.bundles]
    assert fresh == [False, False, True, True, False, False]
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], torch.full((3, 4), 0.5 * (0.5 * 2 + 3) + 5))


@pytest.mark.usefixtures("backend")
def test_gradients_to_be_unscaled_are_compared_by_their_memory() -> None:
    params = model(2)
    for param, shape in zip(model(2), ((0, 4), (0, 4)), strict=True):
        param.data = torch.zeros(shape)
        params.append(nn.Parameter(param.detach()))
        params[-1].grad = torch.zeros(shape)
    optimizer: Any = fastwrs.SGD(params)
    optimizer.grad_scale = torch.tensor(2.0)
    optimizer.step()
    optimizer.step()  # gradients without elements lie nowhere, so not in the same place
    shared = torch.ones(3, 4)
    params[0].grad, params[1].grad = shared.view(3, 4), shared.view(3, 4)
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match="share memory"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert torch.equal(shared, torch.ones(3, 4))


@pytest.mark.usefixtures("backend")
def test_rebound_data_and_exchanged_state_are_used(builds: list[Any]) -> None:
    """Tensors are gathered anew in each step, so this needs no new plan."""
    params = model()
    optimizer = fastwrs.SGD(params, lr=0.5, momentum=0.5)
    optimizer.step()
    old = params[1].data
    params[1].data = torch.full((3, 4), 2.0)
    params[1].grad = torch.ones(3, 4)
    optimizer.state[params[1]]["momentum_buffer"] = torch.full((3, 4), 6.0)
    kept = old.clone()
    optimizer.step()
    assert torch.equal(old, kept)
    assert torch.equal(params[1].detach(), torch.full((3, 4), 2.0 - 0.5 * (0.5 * 6 + 1)))
    assert len(builds) == 1


@pytest.mark.usefixtures("backend")
def test_data_of_another_dtype_is_refused_by_the_kernel_and_planned_again(builds: list[Any]) -> None:
    params = model()
    optimizer = fastwrs.AdamW(params)
    optimizer.step()
    params[2].grad = None
    params[2].data = params[2].data.bfloat16()
    params[2].grad = torch.ones(3, 4, dtype=torch.bfloat16)
    optimizer.step()  # bf16 with its fp32 states is a bundle of its own now
    assert len(builds) == 2
    assert len(builds[-1].bundles) == 2
    assert [optimizer.state[param]["step"].item() for param in params] == [2, 2, 2, 2]
    optimizer.step()
    assert len(builds) == 2


def test_an_error_of_the_launch_is_raised_when_a_new_plan_would_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    params = model()
    optimizer = fastwrs.AdamW(params)
    optimizer.step()
    calls = []

    def failing(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise RuntimeError("the device fell off")

    monkeypatch.setattr(dispatch, "launch", failing)
    with pytest.raises(RuntimeError, match="the device fell off"):
        optimizer.step()
    assert len(calls) == 1


def test_several_bundles_are_all_checked_before_one_is_written(launches: list[tuple[StepCall, bool]]) -> None:
    params = [*model(2), *model(2, torch.float64)]
    optimizer = fastwrs.AdamW(params)
    optimizer.step()
    assert [dry for _, dry in launches] == [True, True, False, False]
    assert [len(call.params) for call, _ in launches] == [2, 2, 2, 2]


def test_groups_with_the_same_slots_share_a_launch(launches: list[tuple[StepCall, bool]]) -> None:
    params = model(6)
    groups = [
        {"params": params[:2], "rescale": fastwrs.Rescale(every=3, axis="in", target=2.0, start=4, stop=9)},
        {"params": params[2:4], "lr": torch.tensor([0.25])},
        {"params": params[4:], "shrink": fastwrs.Shrink(0.2, axis="tensor", power=0.5), "weight_decay": 0.3},
    ]
    optimizer = fastwrs.AdamW(groups, lr=0.1, betas=(0.8, 0.9), eps=1e-6, maximize=True)
    optimizer.step()
    ((call, dry),) = launches
    assert not dry
    assert call.groups == [0, 0, 1, 1, 2, 2]
    assert call.axes == [0b10, 0b10, 0, 0, -1, -1]
    assert [lr.item() for lr in call.lrs] == [0.25]
    assert call.states[0] is optimizer.state[params[0]]["exp_avg"]
    assert call.states[7] is optimizer.state[params[1]]["exp_avg_sq"]
    record = [hyper.name for hyper in fastwrs.AdamW.rule.record]
    rows = [
        dict(zip(record, call.hyper[k : k + len(record)], strict=True)) for k in range(0, len(call.hyper), len(record))
    ]
    rest = {"maximize": 1, "beta1": 0.8, "beta2": 0.9, "eps": 1e-6, "decoupled_weight_decay": 1}
    off = {"every": 0, "start": 0, "stop": float("inf"), "target": 1, "rate": 0, "power": 1}
    window = {"every": 3, "start": 4, "stop": 9, "target": 2}
    assert rows == [
        {**rest, **off, **window, "lr": 0.1, "lr_tensor": -1, "weight_decay": 0.01},
        {**rest, **off, "lr": 0.0, "lr_tensor": 0, "weight_decay": 0.01},
        {**rest, **off, "rate": 0.2, "power": 0.5, "lr": 0.1, "lr_tensor": -1, "weight_decay": 0.3},
    ]


def test_learning_rates_on_the_cpu_go_to_a_device_as_numbers() -> None:
    """A copy to the device would be waited for. One that is there already stays a tensor."""
    optimizer = fastwrs.AdamW(
        [
            {"params": [p], "lr": lr}
            for p, lr in zip(model(3), (0.5, torch.tensor(0.25), torch.tensor(0.125)), strict=True)
        ]
    )
    optimizer.step()
    records = optimizer._records
    assert records is not None
    width = len(optimizer.rule.record)
    here, lrs = records.on(torch.device("cpu"))
    assert [here[k * width : k * width + 2] for k in range(3)] == [[0.5, -1.0], [0.0, 0.0], [0.0, 1.0]]
    assert [lr.item() for lr in lrs] == [0.25, 0.125]
    there, moved = records.on(torch.device("cuda", 0))
    assert [there[k * width : k * width + 2] for k in range(3)] == [[0.5, -1.0], [0.25, -1.0], [0.125, -1.0]]
    assert moved == []
    assert there[2:width] == here[2:width]


def test_nothing_to_do_launches_nothing(launches: list[tuple[StepCall, bool]]) -> None:
    params = model()
    optimizer = fastwrs.AdamW(params)
    optimizer.zero_grad()
    optimizer.step()
    assert not launches
    assert not optimizer.state


@pytest.mark.usefixtures("launches")
def test_options_do_not_make_the_host_side_slower() -> None:
    """The host side with every option set, against none: in steps of the interpreter, which no clock sees."""

    def taken(**options: Any) -> int:
        optimizer = fastwrs.AdamW(model(161), **options)
        optimizer.step()
        seen = []

        def trace(frame: Any, event: str, _arg: Any) -> Any:
            frame.f_trace_opcodes = True
            seen.append(event)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            optimizer.step()
        finally:
            sys.settrace(before)
        return len(seen)

    plain = taken()
    loaded = taken(rescale=fastwrs.Rescale(every=3), shrink=fastwrs.Shrink(0.1), weight_decay=0.3, maximize=True)
    assert loaded < 1.5 * plain


def test_overlapping_finds_shared_elements_only() -> None:
    matrix = torch.zeros(4, 6)
    assert overlapping([matrix[:, :3], matrix[:, 3:], torch.zeros(4)]) is None
    assert overlapping([torch.zeros(4), matrix[:, :4], torch.zeros(2), matrix[:, 3:]]) == (1, 3)
    assert overlapping([matrix[:2], matrix[2:]]) is None
    assert overlapping([matrix, matrix.t()]) == (0, 1)
    assert overlapping([matrix[:0], matrix]) is None


@pytest.fixture
def enumerated(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tensors whose elements were looked at one by one."""
    seen: list[torch.Tensor] = []
    places = planning._places
    monkeypatch.setattr(planning, "_places", lambda tensor: seen.append(tensor) or places(tensor))
    return seen


def test_parts_of_a_matrix_are_told_apart_by_their_strides(enumerated: list[torch.Tensor]) -> None:
    matrix = torch.zeros(2048, 4096)
    assert overlapping([matrix[:, :2048], matrix[:, 2048:]]) is None
    assert overlapping([matrix[:, 2048:], matrix[5:, :2048]]) is None
    wide = torch.zeros(8, 400)
    params = [nn.Parameter(wide[:, k]) for k in range(400)]
    for param in params:
        param.grad = torch.ones(8)
    fastwrs.SGD(params, lr=0.5).step()
    assert torch.equal(wide, torch.full((8, 400), -0.5))
    assert not enumerated
    small = torch.zeros(6, 8)
    assert overlapping([small[:, :5], small[:, 4:]]) == (0, 1)
    assert overlapping([small[:, :4], small[::2, 4:]]) is None
    assert enumerated


def test_strides_never_hide_a_shared_element() -> None:
    """Every pair of small views of one memory, against their elements."""
    memory = torch.arange(40)
    views = [
        memory.as_strided(size, stride, start)
        for size, stride in (((3, 2), (6, 1)), ((3, 2), (6, 2)), ((3,), (6,)), ((2, 2), (6, 6)), ((2, 3), (1, 6)))
        for start in range(14)
    ]
    for one in views:
        for other in views:
            shared = bool(torch.isin(one.flatten(), other.flatten()).any())
            assert (overlapping([one, other]) is not None) == shared


@pytest.mark.parametrize("size", [(3, 2), (2, 3), (4, 2), (2, 2, 2)])
def test_overlaps_itself_exactly(size: tuple[int, ...]) -> None:
    for code in range(7 ** len(size)):
        stride = [code // 7**k % 7 for k in range(len(size))]
        tensor = torch.arange(60).as_strided(size, stride)
        assert overlaps_itself(tensor) == (tensor.unique().numel() < tensor.numel()), stride


def test_interleaved_strides_are_accepted() -> None:
    param = nn.Parameter(torch.zeros(8).as_strided((3, 2), (2, 3)))
    param.grad = torch.arange(6.0).view(3, 2)
    fastwrs.SGD([param], lr=1.0, backend="reference").step()
    assert torch.equal(param, -torch.arange(6.0).view(3, 2))


def test_overlaps_itself() -> None:
    assert overlaps_itself(torch.zeros(1).expand(3))
    assert overlaps_itself(torch.zeros(8).as_strided((3, 3), (2, 1)))
    assert not overlaps_itself(torch.zeros(3, 4)[:, ::2])
    assert not overlaps_itself(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    assert not overlaps_itself(torch.zeros(1, 5).expand(1, 5))


@pytest.mark.parametrize("kind", [fastwrs.SGD, fastwrs.AdamW, fastwrs.AdamP])
def test_an_optimizer_that_nobody_has_is_freed_at_once(kind: Any) -> None:
    """Not when Python's collector comes along, which memory of a GPU does not make it do."""
    gc.collect()
    gc.disable()
    try:
        param = nn.Parameter(torch.ones(3, 4))
        param.grad = torch.ones(3, 4)
        optimizer = kind([param], lr=0.1, rescale=fastwrs.Rescale())
        optimizer.step()
        optimizer.step()
        seen = weakref.ref(optimizer)
        del optimizer
        assert seen() is None
    finally:
        gc.enable()
