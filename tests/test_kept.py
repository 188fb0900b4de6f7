"""Lists that C++ keeps from step to step: the same steps whatever is done to the tensors, and nothing lives longer."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastwrs
from fastwrs import dispatch

pytestmark = pytest.mark.cpu

kept = dispatch.cpu.kept
COUNT = kept.FEWEST + 4
KINDS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "AdamW": lambda params: fastwrs.AdamW(params, lr=0.1, rescale=fastwrs.Rescale(every=2), backend="cpu"),
    "SGD": lambda params: fastwrs.SGD(params, lr=0.1, momentum=0.9, backend="cpu"),
    "AdamP": lambda params: fastwrs.AdamP(params, lr=0.1, backend="cpu"),
}


def made(count: int = COUNT, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(count)
    params = [nn.Parameter(torch.randn(3, 5, generator=generator).to(dtype)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(3, 5, generator=generator).to(dtype)
    return params


def numbers(optimizer: Any) -> dict[str, int]:
    """The numbers of the lists that are kept, of an optimizer with one bundle."""
    (bundle,) = optimizer._plans[0].bundles
    return {name: found.number for name, found in (bundle.kept or {}).items() if found is not None}


def is_kept(number: int) -> bool:
    """Whether a list of this number is still kept."""
    try:
        torch.ops.fastwrs.step("sgd", [torch.ones(1)], *[[] for _ in range(8)], *[None] * 4, True, number, 0)
    except RuntimeError as error:
        return "no such list is kept" not in str(error)
    return True


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Switches keeping off, from a call on."""
    return lambda: monkeypatch.setattr(kept, "FEWEST", 1 << 60)


def exchanged(optimizer: Any, params: list[nn.Parameter]) -> None:
    """Another tensor takes the place of a state, another that of a step count."""
    state = optimizer.state[params[2]]
    name = next(name for name in state if name != "step")
    state[name] = state[name] * 0.5
    optimizer.state[params[3]]["step"] = torch.tensor(7.0)


def moved(optimizer: Any, params: list[nn.Parameter]) -> None:
    """A state is the same tensor in other memory, strided another way."""
    for name, state in optimizer.state[params[1]].items():
        if name != "step":
            state.data = (state * 2).t().contiguous().t()


def written(optimizer: Any, params: list[nn.Parameter]) -> None:
    for state in optimizer.state[params[0]].values():
        state.mul_(3)


def loaded(optimizer: Any, params: list[nn.Parameter]) -> None:
    for param in params:
        del optimizer.state[param]["step"]
    for param in params:
        optimizer.state[param]["step"] = torch.tensor(4.0)
    optimizer.load_state_dict(optimizer.state_dict())


def turns(optimizer: Any, params: list[nn.Parameter]) -> None:
    """A parameter takes no part any more."""
    assert optimizer is not None
    params[4].grad = None


def alternated(optimizer: Any, params: list[nn.Parameter]) -> None:
    """A parameter takes part in every other step."""
    grad = params[4].grad
    params[4].grad = None
    optimizer.step()
    params[4].grad = grad
    optimizer.step()


CHANGES = {change.__name__: change for change in (exchanged, moved, written, loaded, turns, alternated)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES)
def test_steps_are_the_same(kind: str, change: str, handed_over: Callable[[], None]) -> None:
    """With lists that are kept and without, bit for bit, before and after something has changed."""
    results = []
    for keeps in (True, False):
        params = made()
        optimizer = KINDS[kind](params)
        for k in range(9):
            if k in (3, 6):
                CHANGES[change](optimizer, params)
            optimizer.step()
            if k == 1:
                assert set(numbers(optimizer)) == ({"states", "steps"} if keeps else set())
        states = [tensor for param in params for tensor in optimizer.state[param].values()]
        results.append([*params, *states])
        handed_over()
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_what_changes_is_not_kept_again_by_the_same_plan() -> None:
    params = made()
    optimizer = KINDS["AdamW"](params)
    optimizer.step()
    before = numbers(optimizer)
    exchanged(optimizer, params)
    optimizer.step()
    assert numbers(optimizer) == {}
    assert len(before) == 2 and not any(map(is_kept, before.values()))


def test_exchanged_states_are_freed_by_the_next_step() -> None:
    params = made()
    optimizer = KINDS["AdamW"](params)
    optimizer.step()
    state = optimizer.state[params[0]]
    old = weakref.ref(state["exp_avg"])
    state["exp_avg"] = state["exp_avg"].clone()
    optimizer.step()
    gc.collect()
    assert old() is None


def test_a_plan_that_is_not_in_use_keeps_nothing() -> None:
    params = made()
    optimizer = KINDS["AdamW"](params)
    optimizer.step()
    first = numbers(optimizer)
    params[0].grad = None
    optimizer.step()
    second = numbers(optimizer)
    assert len(second) == 2 and not any(map(is_kept, first.values()))
    params[0].grad = torch.ones(3, 5)
    optimizer.step()
    assert len(optimizer._plans) == 2
    assert numbers(optimizer) == {} and not any(map(is_kept, second.values()))


def test_a_state_that_becomes_a_negative_view_is_refused() -> None:
    params = made()
    optimizer = KINDS["AdamW"](params)
    optimizer.step()
    state = optimizer.state[params[2]]["exp_avg"]
    state.data = torch.complex(torch.zeros(3, 5), -state.clone()).conj().imag
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match=r"params\[0\]\[2\].*'exp_avg'.*view with the negative bit set"):
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(params, before, strict=True))


def test_large_states_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_BYTES", 2 * COUNT * 3 * 5 * 4 - 1)
    params = made()
    optimizer = KINDS["AdamW"](params)
    optimizer.step()
    optimizer.step()
    assert set(numbers(optimizer)) == {"steps"}
    state = optimizer.state[params[0]]
    old = weakref.ref(state["exp_avg"])
    state["exp_avg"] = state["exp_avg"].clone()
    assert old() is None, "it is freed at once"
    optimizer.step()


def test_few_are_handed_over() -> None:
    optimizer = KINDS["AdamW"](made(kept.FEWEST // 2 - 1))
    optimizer.step()
    optimizer.step()
    assert numbers(optimizer) == {}


def test_an_optimizer_is_freed_at_once_with_all_that_was_kept() -> None:
    gc.collect()
    gc.disable()
    try:
        params = made()
        optimizer = KINDS["AdamW"](params)
        optimizer.step()
        seen = [weakref.ref(optimizer), weakref.ref(optimizer.state[params[0]]["exp_avg"])]
        found = numbers(optimizer)
        assert all(map(is_kept, found.values())) and len(found) == 2
        del optimizer
        assert [ref() for ref in seen] == [None, None]
        assert not any(map(is_kept, found.values()))
    finally:
        gc.enable()


def test_a_hook_that_knows_the_optimizer_keeps_nothing_alive() -> None:
    """A cycle through a parameter is seen by Python's collector, since parameters are not kept."""
    params = made()
    optimizer = KINDS["AdamW"](params)
    params[0].register_hook(lambda grad, mine=optimizer: grad if mine else None)
    optimizer.step()
    seen, found = weakref.ref(optimizer), numbers(optimizer)
    del optimizer, params
    gc.collect()
    assert seen() is None
    assert len(found) == 2 and not any(map(is_kept, found.values()))


def test_complex_parameters_are_seen_anew_in_each_step() -> None:
    params = made(dtype=torch.complex64)
    optimizer = fastwrs.AdamW(params, lr=0.1, backend="cpu")
    for _ in range(3):
        optimizer.step()
        assert numbers(optimizer) == {}


def test_versions_count_what_is_kept_too() -> None:
    params = made()
    optimizer = KINDS["AdamW"](params)
    optimizer.step()
    tensors: list[Tensor] = [*params, *(tensor for param in params for tensor in optimizer.state[param].values())]
    before = [tensor._version for tensor in tensors]
    optimizer.step()
    assert all(tensor._version > version for tensor, version in zip(tensors, before, strict=True))


def test_a_rescaler_hands_no_gradients_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not read: a second list of the parameters would be looked at twice."""
    params = made()
    optimizer = torch.optim.SGD(params, lr=0.1)
    fastwrs.WeightRescaler(optimizer, fastwrs.Rescale(), backend="cpu")
    optimizer.step()
    seen: list[Any] = []
    step = torch.ops.fastwrs.step
    monkeypatch.setattr(torch.ops.fastwrs, "step", lambda *args: (seen.append(args), step(*args)))
    optimizer.step()
    ((rule, given, grads, states, steps, *_, states_kept, steps_kept),) = seen
    assert (rule, len(given), grads, states, steps, states_kept) == ("project", COUNT, [], [], [], 0)
    assert steps_kept > 0
    for param in params:
        torch.testing.assert_close(param.norm(dim=1), torch.ones(3))


class _Seen:
    """A part of modes that look at what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, tuple[Any, ...]]] = []

    def look(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes the op, and calls it."""
        self.ops.append((str(func), args))
        return func(*args, **(kwargs or {}))


class _Dispatched(_Seen, TorchDispatchMode):
    __torch_dispatch__: Any = _Seen.look


class _Called(_Seen, TorchFunctionMode):
    __torch_function__: Any = _Seen.look


@pytest.mark.parametrize("mode", [_Dispatched, _Called])
def test_who_looks_at_ops_sees_whole_lists_and_no_end_of_a_list(mode: Any) -> None:
    """Lists end when Python frees an object: in the middle of what torch.compile traces of something else, say."""
    optimizer, gone = KINDS["AdamW"](made()), KINDS["AdamW"](made())
    optimizer.step()
    gone.step()
    ended = numbers(gone)
    with mode() as seen:
        del gone
        optimizer.step()
    assert len(ended) == 2 and not any(map(is_kept, ended.values()))
    steps = [args for name, args in seen.ops if name.startswith("fastwrs")]
    assert len(steps) == 1 and len(steps[0][3]) == 2 * COUNT and len(steps[0][4]) == COUNT
    optimizer.step()
    assert len(numbers(optimizer)) == 2


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_traced_step_does_not_depend_on_what_is_kept(pre_dispatch: bool) -> None:
    params = made()
    optimizer = KINDS["AdamW"](params)
    optimizer.step()

    def take(x: Tensor) -> Tensor:
        optimizer.step()
        return x + 1

    graph = make_fx(take, pre_dispatch=pre_dispatch)(torch.ones(2))
    found = numbers(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert found and not any(map(is_kept, found.values()))
    before = params[0].detach().clone()
    graph(torch.ones(2))
    assert not torch.equal(params[0], before)
