"""What goes wrong elsewhere and must not go wrong here: one test for each row of the table in docs/contract.md.

Some rows are proven where their subject is tested; the table says where.
"""

from __future__ import annotations

import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from cases import ALL_OPTIONS, DATA
from parity import assert_close_to_torch, gradients, parameters, run
from tolerances import NORM_BOUND, norm_deviation
from torch import Tensor, nn

import fastwrs
from fastwrs import dispatch
from fastwrs.spec import RULES

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("backend")]
ROOT = Path(__file__).resolve().parents[1]
CONV = (4, 3, 5, 2)


def test_f1_a_skipped_first_step_leaves_nothing_that_a_later_step_reads() -> None:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.4}
    params, expected = parameters(), parameters()
    optimizer: Any = fastwrs.SGD(params, **options)
    optimizer.found_inf = torch.tensor(1.0)
    before, after = run(optimizer, params, range(1), late=0)
    assert all(map(torch.equal, before, after))
    del optimizer.found_inf
    for state in optimizer.state.values():
        if "momentum_buffer" in state:
            state["momentum_buffer"].fill_(float("nan"))  # whatever is there: the first step that counts is a first one
    run(optimizer, params, range(1, 4), late=0)
    run(fastwrs.SGD(expected, **options), expected, range(1, 4), late=0)
    assert all(map(torch.equal, params, expected))


def test_f1_a_skipped_first_step_is_no_beginning_of_momentum_switched_on_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a step is refused in between, which has to put back what it took away."""
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.4}
    params, expected = parameters(), parameters()
    optimizer, twin = (fastwrs.SGD(each, **options) for each in (params, expected))
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    run(optimizer, params, range(1), late=0)
    del optimizer.found_inf  # type: ignore[attr-defined]
    for each in (optimizer, twin):
        each.param_groups[0]["momentum"] = 0.0
    left = [dict(state) for state in optimizer.state.values()]
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "launch", Mock(side_effect=OSError("refused")))
        with pytest.raises(OSError, match="refused"):
            run(optimizer, params, range(1), late=0)
    assert [dict(state) for state in optimizer.state.values()] == left
    for steps, momentum in ((range(1, 3), 0.0), (range(3, 6), 0.9)):
        for each, weights in ((optimizer, params), (twin, expected)):
            each.param_groups[0]["momentum"] = momentum
            run(each, weights, steps, late=0)
    assert all(map(torch.equal, params, expected))


@pytest.mark.parametrize("found", [1.0, 2.0, -1.0, 1e-30, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_f2_any_nonzero_found_inf_skips_parameters_states_and_counters(name: str, found: float) -> None:
    params, expected = parameters(), parameters()
    options = {"momentum": 0.9} if name == "SGD" else {"amsgrad": True}
    optimizer, twin = (getattr(fastwrs, name)(p, lr=0.1, **options) for p in (params, expected))
    for each, weights in ((optimizer, params), (twin, expected)):
        run(each, weights, range(2), late=0)
    optimizer.found_inf = torch.tensor(found)
    before, after = run(optimizer, params, range(2, 3), late=0)
    del optimizer.found_inf
    assert all(map(torch.equal, before, after))
    for mine, theirs in zip(optimizer.state.values(), twin.state.values(), strict=True):
        assert mine["step"].item() == 2
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def of_three_kinds() -> list[nn.Parameter]:
    """Parameters of three dtypes, so that a step takes three launches."""
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float32)
    return [nn.Parameter(param.detach().to(kind)) for param, kind in zip(parameters(), kinds, strict=False)]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_f2_a_skip_and_a_scale_reach_every_launch(name: str) -> None:
    params, expected = of_three_kinds(), of_three_kinds()
    optimizer, plain = (getattr(fastwrs, name)(p, lr=0.1) for p in (params, expected))
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(2.0), torch.tensor(8.0)
    before, after = run(optimizer, params, range(1), late=0)
    assert all(map(torch.equal, before, after))
    assert {state["step"].item() for state in optimizer.state.values()} == {0.0}
    optimizer.found_inf.zero_()
    for param, other, grad in zip(params, expected, gradients(params, 1), strict=True):
        param.grad, other.grad = 8 * grad, grad
    optimizer.step()
    plain.step()
    for param, other in zip(params, expected, strict=True):
        assert torch.equal(param, other) and torch.equal(param.grad, other.grad)  # type: ignore[arg-type]


def test_f2_no_gradient_at_all_is_no_overflow() -> None:
    """GradScaler then hands over the number 0, in scripts with several optimizers."""
    one, other = parameters(shapes=((3, 4), (3, 4)))
    optimizers = [fastwrs.SGD([p], lr=0.1) for p in (one, other)]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # type: ignore[attr-defined]
    start = one.detach().clone()
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(other.sum() + (one.sum() if step else 0)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(one.detach(), start - 0.2)


@pytest.mark.parametrize("first", [1, 4])
def test_f3_first_steps_are_counted_per_tensor(first: int) -> None:
    results = []
    for module, options in ((fastwrs, {}), (torch.optim, {"foreach": False})):
        params = parameters()
        optimizer = module.SGD(params, lr=0.05, momentum=0.9, dampening=0.5, **options)
        results.append(run(optimizer, params, range(8), late=first))
        if module is fastwrs:
            assert [state["step"].item() for state in optimizer.state.values()].count(8 - first) == 1
    assert_close_to_torch(*results)


def stored(values: Tensor, layout: str) -> Tensor:
    """The values in another layout: dense, or a part of something larger."""
    if layout == "channels_last":
        return values.clone(memory_format=torch.channels_last)
    if layout == "reversed":
        return values.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    if layout == "sliced":
        larger = torch.full((*values.shape[:-1], values.shape[-1] + 3), float("nan"), dtype=values.dtype)
        larger[..., : values.shape[-1]] = values
        return larger[..., : values.shape[-1]]
    if layout == "offset":  # as a gradient in a bucket of DDP: off by one element from what vectors like
        return torch.cat([values.new_full((1,), float("nan")), values.flatten()])[1:].view(values.shape)
    return values.contiguous()


LAYOUTS = ("contiguous", "channels_last", "reversed", "sliced", "offset")


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@pytest.mark.parametrize(("of_param", "of_grad", "of_state"), list(product(LAYOUTS, repeat=3)), ids="-".join)
def test_f4_any_mix_of_layouts(name: str, of_param: str, of_grad: str, of_state: str) -> None:
    """The same bits as with everything contiguous; with a rescale, norms are summed in another order."""
    torch.manual_seed(4)
    values, grads = torch.randn(CONV), torch.randn(3, *CONV)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3} if name == "SGD" else {"lr": 0.1, "amsgrad": True}
    for rescale in (None, fastwrs.Rescale(), fastwrs.Rescale(axis="in")):
        param, plain = nn.Parameter(stored(values, of_param)), nn.Parameter(values.clone())
        assert param.stride() == stored(values, of_param).stride()
        for p, layout in ((param, of_grad), (plain, "contiguous")):
            optimizer = getattr(fastwrs, name)([p], **options, rescale=rescale)
            for k, grad in enumerate(grads):
                p.grad = stored(grad, layout)
                optimizer.step()
                if k == 0 and p is param:
                    for key, state in optimizer.state[p].items():
                        optimizer.state[p][key] = state if state.ndim == 0 else stored(state, of_state)
        if rescale is None:
            assert torch.equal(param, plain)
        else:
            dims = (1,) if rescale.axis == "in" else (1, 2, 3)
            assert norm_deviation(param.detach(), dims, 1.0) <= NORM_BOUND[torch.float32]
            torch.testing.assert_close(param, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("where", ["first", "middle", "last", "everywhere"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_f5_empty_tensors_anywhere(name: str, where: str) -> None:
    shapes = [(4, 3), (5, 2, 2, 2), (6, 7)]
    empty = [(0, 3), (4, 0), (2, 0, 3)]
    places = {"first": [0], "middle": [1, 2], "last": [3], "everywhere": [0, 1, 2, 3]}[where]
    full = parameters(shapes=tuple(shapes))
    alone = [nn.Parameter(param.detach().clone()) for param in full]
    mixed: list[nn.Parameter] = []
    for k in range(4):
        mixed += [nn.Parameter(torch.empty(shape)) for shape in empty] if k in places else []
        mixed += full[k : k + 1]
    optimizers = [getattr(fastwrs, name)(p, lr=0.1, rescale=fastwrs.Rescale()) for p in (mixed, alone)]
    for step in range(3):
        for group in (full, alone):
            for param, grad in zip(group, gradients(group, step), strict=True):
                param.grad = grad
        for param in mixed:
            param.grad = torch.empty_like(param) if not param.numel() else param.grad
        for optimizer in optimizers:
            optimizer.step()
    assert all(map(torch.equal, full, alone))
    assert [optimizers[0].state[param]["step"].item() for param in mixed] == [3.0] * len(mixed)


def test_f6_a_dtensor_is_refused_by_name() -> None:
    from torch import distributed
    from torch.distributed import tensor

    assert not distributed.is_initialized(), "this test needs a process group of its own"
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        for name in ("SGD", "AdamW"):
            sharded = nn.Parameter(tensor.distribute_tensor(torch.ones(3, 4), mesh, [tensor.Shard(0)]))
            plain = nn.Parameter(torch.ones(3, 4))
            plain.grad, sharded.grad = torch.ones(3, 4), torch.ones_like(sharded)
            optimizer = getattr(fastwrs, name)([("plain", plain), ("sharded", sharded)])
            with pytest.raises(RuntimeError, match=r"parameter 'sharded' .* is a DTensor"):
                optimizer.step()
            assert torch.equal(plain, torch.ones(3, 4))
            assert not optimizer.state
    finally:
        distributed.destroy_process_group()


def test_f9_every_index_has_64_bits(tmp_path: Path) -> None:
    """Geometry, work items and block map of the kernels, with made-up sizes above 2^31."""
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    program = tmp_path / "large_sizes"
    sources = [ROOT / "tests" / "cpp" / "large_sizes.cpp", ROOT / "csrc" / "norms" / "geometry.cpp"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover"]
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (done.stdout + done.stderr, done.returncode) == ("", 0)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_f9_elements_more_than_2_to_the_31_apart(name: str, tmp_path: Path) -> None:
    """Rows that lie 4 GB apart, in a sparse file: the addresses of real kernels, at the cost of a few pages."""
    apart = 2**31 + 5
    file = tmp_path / "sparse"
    with file.open("wb") as handle:
        handle.truncate(2 * (apart + 4))
    far = torch.from_file(str(file), shared=True, size=apart + 4, dtype=torch.bfloat16).as_strided((2, 4), (apart, 1))
    near = torch.randn(2, 4, dtype=torch.bfloat16)
    far.copy_(near)
    params = [nn.Parameter(far), nn.Parameter(near)]
    for param in params:
        optimizer = getattr(fastwrs, name)([param], lr=0.1, rescale=fastwrs.Rescale())
        for grad in (torch.arange(8.0).view(2, 4), torch.ones(2, 4)):
            param.grad = grad.to(torch.bfloat16)
            optimizer.step()
    assert params[0].stride() == (apart, 1)
    assert torch.equal(*params)
    assert norm_deviation(near.detach(), (1,), 1.0) <= NORM_BOUND[torch.bfloat16]


OFF_DEFAULT: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.7, "dampening": 0.2, "weight_decay": 0.3, "maximize": True}),
    ("SGD", {"momentum": 0.7, "nesterov": True, "weight_decay": 0.3}),
    ("Adam", {"betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.3, "amsgrad": True, "maximize": True}),
    ("AdamW", {"betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.3, "amsgrad": True}),
]


@pytest.mark.parametrize(("name", "options"), OFF_DEFAULT, ids=str)
def test_f12_backends_agree_with_torch_off_the_defaults(name: str, options: dict[str, Any]) -> None:
    """Decay of 0.3 at a rate of 0.1: before or after the update is a difference of percents."""
    ours, theirs = parameters(), parameters()
    a = run(getattr(fastwrs, name)(ours, lr=0.1, **options), ours, range(10))
    b = run(getattr(torch.optim, name)(theirs, lr=0.1, **options, foreach=False), theirs, range(10))
    assert_close_to_torch(a, b)


def test_f12_the_cases_of_the_kernels_are_off_the_defaults() -> None:
    """The list that all backends run has every hyperparameter of every rule away from its neutral value."""
    for rule in RULES.values():
        options = [option.hyper for option in ALL_OPTIONS.values() if option.rule == rule.name]
        for hyper in rule.hypers:
            assert len({values.get(hyper.name, 0) for values in options}) > 1, f"{rule.name}: {hyper.name}"
    assert {"const", "zero_row", "nan", "inf"} <= set(DATA)


def test_f15_experts_are_normalised_one_by_one_or_not_at_all() -> None:
    """Weights of shape (experts, out, in): the axis says what is one norm, and what it cannot say is refused."""
    torch.manual_seed(1)
    experts = nn.Parameter(torch.randn(3, 4, 5))
    experts.grad = torch.randn(3, 4, 5)
    for axis, dims in ((-1, (2,)), (2, (2,)), ((1, 2), (1, 2)), ("out", (1, 2)), ("in", (1,)), ("tensor", (0, 1, 2))):
        fastwrs.AdamW([experts], rescale=fastwrs.Rescale(axis=axis)).step()
        assert norm_deviation(experts.detach(), dims, 1.0) <= NORM_BOUND[torch.float32]
        others = [other for other in ((0,), (1,), (2,), (1, 2), (0, 1, 2)) if other != dims]
        assert all(norm_deviation(experts.detach(), other, 1.0) > 0.01 for other in others)
    with pytest.raises(ValueError, match=r"parameter 'moe.w' \(shape \(3, 4, 5\)\): axis 3 has dimension 3"):
        fastwrs.AdamW([("moe.w", experts)], rescale=fastwrs.Rescale(axis=3))
    with pytest.raises(ValueError, match=r"parameter 'bias' \(shape \(5,\)\): axis 'out' needs at least 2 dimensions"):
        fastwrs.AdamW([("moe.w", experts), ("bias", nn.Parameter(torch.ones(5)))], rescale=fastwrs.Rescale())


def test_f16_version_counters_of_everything_that_was_written() -> None:
    params = of_three_kinds()
    optimizer: Any = fastwrs.Adam(params, amsgrad=True)
    run(optimizer, params, range(1), late=0)
    written = [t for param in params for t in (param, *optimizer.state[param].values())]
    before = [tensor._version for tensor in written]
    saved = params[0] * params[0]
    optimizer.step()
    assert all(tensor._version > version for tensor, version in zip(written, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
    grads = [param.grad for param in params if param.grad is not None]
    versions = [grad._version for grad in grads]
    optimizer.step()
    assert [grad._version for grad in grads] == versions
    optimizer.grad_scale = torch.tensor(2.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert all(grad._version > version for grad, version in zip(grads, versions, strict=True))
