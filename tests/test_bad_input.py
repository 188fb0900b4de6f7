"""What users may get wrong is a clear error that names what is at fault, before anything has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastwrs
from fastwrs import dispatch
from fastwrs.plan import lacks_memory
from fastwrs.spec import DTYPE_TRIPLES

pytestmark = [pytest.mark.cpu, pytest.mark.bad_input]
SHAPE = (3, 4)
HUGE = 10**400  # an int that no float holds


class Odd(nn.Parameter):
    """A parameter whose gradient may be anything: torch checks what is assigned, not what becomes of it later."""

    odd: Tensor | None = None

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        return self.odd

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        self.odd = value


# ------------------------------------------------------------------------------------------------------- construction


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(SHAPE))


OPTIONS: list[tuple[str, dict[str, Any], str]] = [
    *((name, {"lr": value}, "learning rate") for name in ("SGD", "Adam", "AdamW") for value in (-0.1, float("nan"))),
    ("SGD", {"lr": float("inf")}, "Invalid learning rate: inf"),
    ("SGD", {"lr": HUGE}, "Invalid learning rate: too large"),
    ("SGD", {"lr": "0.1"}, "learning rate.*must be a number"),
    ("AdamW", {"lr": torch.tensor(-0.5)}, "Invalid learning rate: -0.5"),
    ("AdamW", {"lr": torch.tensor([0.1, 0.1])}, "Tensor lr must be 1-element"),
    ("SGD", {"momentum": -0.5}, "Invalid momentum value: -0.5.*finite and >= 0"),
    ("SGD", {"weight_decay": -0.5}, "Invalid weight_decay value: -0.5"),
    ("SGD", {"dampening": float("nan"), "momentum": 0.9}, "Invalid dampening value"),
    ("SGD", {"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "Nesterov momentum requires"),
    ("Adam", {"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
    ("Adam", {"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
    ("AdamW", {"betas": (0.9,)}, "betas must be two numbers"),
    ("AdamW", {"betas": (0.9, torch.tensor(0.99))}, "betas must be either both floats or both Tensors"),
    ("AdamW", {"betas": (torch.tensor(0.9, device="meta"), torch.tensor(0.99))}, "Tensor beta1 must be on the CPU"),
    ("AdamW", {"betas": (torch.tensor([0.9, 0.9]), torch.tensor(0.99))}, "Tensor beta1 must be 1-element"),
    ("Adam", {"eps": -1e-8}, "Invalid epsilon value"),
    ("AdamW", {"weight_decay": -1}, "Invalid weight_decay value: -1"),
    ("AdamW", {"maximize": 2}, "Invalid maximize value: 2"),
    ("AdamP", {"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
    ("AdamP", {"betas": 0.9}, "betas must be two numbers"),
    ("AdamP", {"lr": -0.1}, "Invalid learning rate: -0.1"),
    ("SGDP", {"momentum": 1.0}, r"Invalid momentum value: 1.0.*in \[0, 1\)"),
    ("SGDP", {"momentum": -0.1}, "Invalid momentum value: -0.1"),
    ("SGDP", {"dampening": float("inf")}, "Invalid dampening value: inf"),
    ("SGDP", {"project_momentum": 0.5}, "Invalid project_momentum value: 0.5.*True or False"),
    *(
        (name, {option: value}, message)
        for name in ("AdamP", "SGDP")
        for option, value, message in (
            ("eps", -1e-8, "Invalid epsilon value: -1e-08"),
            ("delta", float("nan"), "Invalid delta value: nan: delta must be finite"),
            ("delta", HUGE, "Invalid delta value: too large"),
            ("wd_ratio", -0.1, "Invalid wd_ratio value: -0.1.*>= 0"),
            ("wd_ratio", None, "Invalid wd_ratio value: None: it must be a number"),
            ("nesterov", 2, "Invalid nesterov value: 2.*True or False"),
            ("weight_decay", -1, "Invalid weight_decay value: -1"),
            ("differentiable", True, "differentiable=True is not supported"),
        )
    ),
    ("SGD", {"differentiable": True}, "differentiable=True is not supported"),
    ("SGD", {"state_dtype": torch.float16}, "state_dtype must be None or torch.bfloat16"),
    ("SGD", {"state_dtype": torch.bfloat16}, r"params\[0\]\[0\].*state_dtype.*bfloat16 parameters only"),
    ("SGD", {"backend": "nonsense"}, "no such backend; allowed: 'auto', 'cuda', 'triton', 'cpu', 'reference'"),
    (
        "SGD",
        {"rescale": fastwrs.Rescale(axis="out"), "shrink": fastwrs.Shrink(0.1, axis="in")},
        "need the same axis, got 'out' and 'in'",
    ),
    ("SGD", {"rescale": fastwrs.Rescale(axis=2)}, r"params\[0\]\[0\] \(shape \(3, 4\)\).*dimension 2.*param_groups"),
    ("SGD", {"shrink": fastwrs.Shrink(0.1, axis=(0, -2))}, "names a dimension twice"),
]


@pytest.mark.parametrize(("name", "options", "message"), OPTIONS, ids=lambda value: str(value))
def test_options_are_refused_at_construction(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(fastwrs, name)([weight()], **({"lr": 0.1} | options))


def test_options_of_another_type() -> None:
    for options in ({"rescale": True}, {"rescale": fastwrs.Shrink(0.1)}, {"shrink": 0.1}):
        with pytest.raises(TypeError, match="must be None or fastwrs"):
            fastwrs.SGD([weight()], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["backend", "state_dtype"])
def test_options_of_the_whole_optimizer_are_refused_in_a_group(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} is an option of the whole optimizer"):
        fastwrs.SGD([{"params": [weight()], key: None}])


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("option", ["rescale", "shrink"])
def test_vectors_have_no_channels(axis: str, option: str) -> None:
    value = fastwrs.Rescale(axis=axis) if option == "rescale" else fastwrs.Shrink(0.1, axis=axis)
    bias = nn.Parameter(torch.ones(5))
    options: dict[str, Any] = {option: value}
    with pytest.raises(ValueError, match=r"parameter params\[0\]\[1\] \(shape \(5,\)\).*fastwrs.param_groups"):
        fastwrs.SGD([weight(), bias], **options)
    with pytest.raises(ValueError, match=r"parameter 'layer.bias' \(shape \(5,\)\)"):
        fastwrs.SGD([("layer.weight", weight()), ("layer.bias", bias)], **options)


def test_complex_parameters_are_not_rescaled() -> None:
    with pytest.raises(ValueError, match=r"params\[0\]\[0\].*complex parameters are not rescaled"):
        fastwrs.SGD([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))], rescale=fastwrs.Rescale())


def test_a_refused_group_is_not_added() -> None:
    optimizer = fastwrs.SGD([weight()])
    for options in ({"lr": -1.0}, {"rescale": fastwrs.Rescale(axis=5)}):
        with pytest.raises(ValueError, match=r"params\[1\]|param group 1"):
            optimizer.add_param_group({"params": [weight()], **options})
    assert len(optimizer.param_groups) == 1


BAD_RESCALE: list[tuple[dict[str, Any], str]] = [
    ({"every": 0}, "every must be >= 1"),
    ({"every": -2}, "every must be >= 1"),
    ({"every": True}, "every must be an int"),
    ({"every": 1.5}, "every must be an int"),
    ({"axis": "rows"}, "axis must be one of"),
    ({"axis": True}, "axis must be one of"),
    ({"axis": (1, True)}, "axis must be one of"),
    ({"axis": None}, "axis must be one of"),
    ({"axis": ()}, "axis must name at least one dimension"),
    ({"axis": (1, 1)}, "axis names a dimension twice"),
    ({"axis": (0.5,)}, "axis must be one of"),
    ({"target": 0.0}, "target must be > 0"),
    ({"target": -1.0}, "target must be > 0"),
    ({"target": float("nan")}, "target must be finite"),
    ({"target": float("inf")}, "target must be finite"),
    ({"target": "1"}, "target must be a number"),
    ({"start": -1}, "start must be >= 0"),
    ({"start": False}, "start must be an int"),
    ({"stop": 2.0}, "stop must be an int"),
    ({"every": HUGE}, "every is too large"),
    ({"start": HUGE}, "start is too large"),
    ({"stop": HUGE}, "stop is too large"),
    ({"target": HUGE}, "target must be finite"),
]
BAD_SHRINK: list[tuple[dict[str, Any], str]] = [
    ({"rate": -0.1}, "rate must be >= 0"),
    ({"rate": float("inf")}, "rate must be finite"),
    ({"rate": None}, "rate must be a number"),
    ({"rate": 0.1, "power": float("nan")}, "power must be finite"),
    ({"rate": 0.1, "axis": "columns"}, "axis must be one of"),
    ({"rate": HUGE}, "rate must be finite"),
    ({"rate": 0.1, "power": -HUGE}, "power must be finite"),
]


@pytest.mark.parametrize(("options", "message"), BAD_RESCALE, ids=str)
def test_rescale_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"Rescale: {message}"):
        fastwrs.Rescale(**options)


@pytest.mark.parametrize(("options", "message"), BAD_SHRINK, ids=str)
def test_shrink_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"Shrink: {message}"):
        fastwrs.Shrink(**options)


# -------------------------------------------------------------------------------------------------------- in the step


def fault_sparse(p: Odd, _optimizer: Any) -> None:
    p.grad = torch.ones(SHAPE).to_sparse()


def fault_complex_grad(p: Odd, _optimizer: Any) -> None:
    p.grad = torch.ones(SHAPE, dtype=torch.complex64)


def fault_shape(p: Odd, _optimizer: Any) -> None:
    p.grad = torch.ones(4, 3)


def fault_device(p: Odd, _optimizer: Any) -> None:
    p.grad = torch.ones(SHAPE, device="meta")


def fault_triple(p: Odd, _optimizer: Any) -> None:
    p.grad = torch.ones(SHAPE, dtype=torch.float16)


def fault_integer(p: Odd, _optimizer: Any) -> None:
    p.requires_grad_(False)
    p.data = torch.ones(SHAPE, dtype=torch.int32)


def fault_complex(p: Odd, _optimizer: Any) -> None:
    p.data = torch.ones(SHAPE, dtype=torch.complex64)


def fault_expanded(p: Odd, _optimizer: Any) -> None:
    p.data = torch.ones(3, 1).expand(SHAPE)


def fault_unscaled_expanded(p: Odd, optimizer: Any) -> None:
    p.grad = torch.ones(3, 1).expand(SHAPE)
    optimizer.grad_scale = torch.tensor(2.0)


def fault_storage(p: Odd, _optimizer: Any) -> None:
    p.data = torch.ones(SHAPE)
    p.data.untyped_storage().resize_(0)


def fault_grad_storage(p: Odd, _optimizer: Any) -> None:
    p.grad = torch.ones(SHAPE)
    p.grad.untyped_storage().resize_(p.grad.untyped_storage().nbytes() - 1)


def fault_state_storage(p: Odd, optimizer: Any) -> None:
    optimizer.state[p]["exp_avg"].untyped_storage().resize_(0)


def fault_step_storage(p: Odd, optimizer: Any) -> None:
    optimizer.state[p]["step"].untyped_storage().resize_(0)


def fault_negative(p: Odd, _optimizer: Any) -> None:
    p.data = torch.ones(SHAPE, dtype=torch.complex64).conj().imag


def fault_negative_grad(p: Odd, _optimizer: Any) -> None:
    p.grad = torch.ones(SHAPE, dtype=torch.complex64).conj().imag


def fault_zero_grad(p: Odd, _optimizer: Any) -> None:
    p.grad = torch._efficientzerotensor(SHAPE)  # type: ignore[attr-defined]


def fault_dimensions(p: Odd, _optimizer: Any) -> None:
    p.data, p.grad = torch.ones((1,) * 64), torch.ones((1,) * 64)


def fault_lr(p: Odd, optimizer: Any) -> None:
    group_of(p, optimizer)["lr"] = -1.0


def fault_lr_tensor(p: Odd, optimizer: Any) -> None:
    group_of(p, optimizer)["lr"] = torch.tensor(float("nan"))


def fault_betas(p: Odd, optimizer: Any) -> None:
    group_of(p, optimizer)["betas"] = (0.9, 1.0)


def fault_axis(p: Odd, optimizer: Any) -> None:
    group_of(p, optimizer)["rescale"] = fastwrs.Rescale(axis=3)


def fault_two_axes(p: Odd, optimizer: Any) -> None:
    group_of(p, optimizer).update(rescale=fastwrs.Rescale(axis=0), shrink=fastwrs.Shrink(0.1, axis=1))


# What may happen only to a parameter that has a state already.
def fault_state_shape(p: Odd, optimizer: Any) -> None:
    optimizer.state[p]["exp_avg_sq"] = torch.ones(4, 3)


def fault_state_dtype(p: Odd, optimizer: Any) -> None:
    optimizer.state[p]["exp_avg_sq"] = torch.ones(SHAPE, dtype=torch.float16)


def fault_state_expanded(p: Odd, optimizer: Any) -> None:
    optimizer.state[p]["exp_avg"] = torch.ones(1, 4).expand(SHAPE)


def fault_state_missing(p: Odd, optimizer: Any) -> None:
    del optimizer.state[p]["exp_avg"]


def fault_step(p: Odd, optimizer: Any) -> None:
    optimizer.state[p]["step"] = torch.tensor([2.0, 2.0])


FAULTS: list[tuple[Callable[[Odd, Any], None], str]] = [
    (fault_sparse, "its gradient is sparse"),
    (fault_complex_grad, "its gradient is complex"),
    (fault_shape, r"its gradient has the shape \(4, 3\)"),
    (fault_device, "its gradient is on meta, the parameter on cpu"),
    (fault_triple, r"\(float32, float16, float32\); allowed: " + r"\(" + ", ".join(DTYPE_TRIPLES[0]) + r"\)"),
    (fault_integer, "the parameter has the integer dtype torch.int32"),
    (fault_complex, "the parameter is complex"),
    (fault_expanded, "its memory overlaps itself"),
    (fault_unscaled_expanded, "its gradient is to be unscaled, and overlaps itself"),
    (fault_axis, "there are 2 dimensions"),
]
LATE_FAULTS: list[tuple[Callable[[Odd, Any], None], str]] = [
    (fault_state_shape, r"its state 'exp_avg_sq' has the shape \(4, 3\)"),
    (fault_state_dtype, "dtypes .*; allowed: "),
    (fault_state_expanded, "its state 'exp_avg' overlaps itself"),
    (fault_state_missing, "its state lacks exp_avg"),
    (fault_step, "its state 'step' must be a 0-d fp32 tensor"),
]
MEMORY_FAULTS: list[tuple[Callable[[Odd, Any], None], str]] = [
    (fault_storage, r"the parameter has a storage of 0 bytes, too small for the shape \(3, 4\)"),
    (fault_grad_storage, "its gradient has a storage of 47 bytes, too small"),
    (fault_state_storage, "its state 'exp_avg' cannot be used: it has a storage of 0 bytes"),
    (fault_step_storage, "its state 'step' cannot be used: it has a storage of 0 bytes"),
    (fault_negative, "the parameter is a view with the negative bit set"),
    (fault_negative_grad, "its gradient is a view with the negative bit set"),
    (fault_zero_grad, "its gradient is a zero tensor without memory"),
    (fault_dimensions, "the parameter has 64 dimensions; at most 63"),
]
OPTION_FAULTS: list[tuple[Callable[[Odd, Any], None], str]] = [
    (fault_lr, "Invalid learning rate: -1.0"),
    (fault_lr_tensor, "Invalid learning rate: nan"),
    (fault_betas, "Invalid beta parameter at index 1: 1.0"),
    (fault_two_axes, "need the same axis"),
]


def group_of(p: Tensor, optimizer: Any) -> dict[str, Any]:
    return next(group for group in optimizer.param_groups if any(p is other for other in group["params"]))


def raw(tensor: Tensor) -> Any:
    """What a tensor is, to the byte."""
    kind = (tensor.dtype, tuple(tensor.shape), tensor.stride() if tensor.layout == torch.strided else None)
    short = tensor.layout == torch.strided and lacks_memory(tensor)
    if tensor.device.type == "meta" or short or tensor._is_zerotensor():
        return kind, tensor.untyped_storage().nbytes()
    tensor = tensor.resolve_neg()
    dense = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    return kind, bytes(dense.contiguous().flatten().view(torch.uint8).tolist())


def everything(optimizer: Any, params: list[Any]) -> Any:
    """All bytes that a step may write, and which states there are."""
    return (
        [raw(param) for param in params],
        [None if param.grad is None else raw(param.grad) for param in params],
        [(id(p), {key: raw(value) for key, value in state.items()}) for p, state in optimizer.state.items()],
        [(group["lr"], group["rescale"], group["shrink"]) for group in optimizer.param_groups],
    )


def build(place: int, started: bool, groups: bool) -> tuple[list[Odd], Any]:
    """Three parameters, one of them to become faulty, and a fourth that never has a gradient."""
    torch.manual_seed(place)
    params = [Odd(torch.randn(SHAPE)) for _ in range(4)]
    named = [(f"layer{k}", param) for k, param in enumerate(params)]
    optimizer: Any = fastwrs.AdamW([{"params": [item]} for item in named] if groups else named, lr=0.1)
    for _ in range(2 if started else 0):
        for param in params[:3]:
            param.grad = torch.randn(SHAPE)
        optimizer.step()
    for param in params[:3]:
        param.grad = torch.randn(SHAPE)
    return params, optimizer


def scenarios() -> Iterator[Any]:
    for place in (0, 1, 2):
        where = ("first", "middle", "last")[place]
        for started in (False, True):
            when = "later" if started else "at once"
            for fault, message in (*FAULTS, *OPTION_FAULTS, *(LATE_FAULTS if started else ())):
                name = fault.__name__.removeprefix("fault_")
                yield pytest.param(place, started, fault, message, id=f"{name}-{where}-{when}")


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("place", "started", "fault", "message"), list(scenarios()))
def test_a_refused_step_changes_no_byte(
    place: int, started: bool, fault: Callable[[Odd, Any], None], message: str
) -> None:
    by_option = any(fault is other for other, _ in OPTION_FAULTS) or fault is fault_axis
    params, optimizer = build(place, started, groups=by_option)
    fault(params[place], optimizer)
    before = everything(optimizer, params)
    names = f"param group {place}" if by_option and fault is not fault_axis else f"parameter 'layer{place}'"
    for _ in range(2):  # the second time there is no plan left to be wrong
        with pytest.raises((ValueError, RuntimeError), match=message) as caught:
            optimizer.step()
        assert names in str(caught.value)
        assert everything(optimizer, params) == before


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize(("fault", "message"), MEMORY_FAULTS)
def test_memory_that_cannot_be_used_changes_no_byte(
    fault: Callable[[Odd, Any], None], message: str, planned: bool, backend: str
) -> None:
    """A plan that is in use does not look again; then the backend does where it would read what is not there."""
    params, optimizer = build(1, started=True, groups=False)
    fault(params[1], optimizer)
    if not (planned and backend == "reference" and "storage" in fault.__name__):
        optimizer._plans = ()
    before = everything(optimizer, params)
    with pytest.raises(RuntimeError, match=message) as caught:
        optimizer.step()
    assert "parameter 'layer1'" in str(caught.value)
    assert everything(optimizer, params) == before


def fault_step_infinite(p: Odd, optimizer: Any) -> None:
    optimizer.state[p]["step"].fill_(float("inf"))


def fault_state_inference(p: Odd, optimizer: Any) -> None:
    with torch.inference_mode():
        optimizer.state[p]["exp_avg"] = torch.ones(SHAPE, dtype=p.dtype)


def fault_state_in_place(p: Odd, optimizer: Any) -> None:
    """Such that neither the plan nor torch sees it: only the kernels' own checks do."""
    optimizer.state[p]["exp_avg"].data = torch.ones(2, dtype=p.dtype)


def fault_lr_in_place(p: Odd, optimizer: Any) -> None:
    group = next(group for group in optimizer.param_groups if any(p is other for other in group["params"]))
    group["lr"].fill_(float("nan"))


BUNDLE_FAULTS = [fault_step_infinite, fault_state_in_place, fault_lr_in_place, fault_state_dtype, fault_state_inference]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("fault", BUNDLE_FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_one_of_several_launches_changes_no_byte(
    fault: Callable[[Odd, Any], None], place: int, backend: str
) -> None:
    """Three dtypes make three launches; the fault comes when there is a plan, and is seen in a dry run or before."""
    if fault is fault_state_inference and backend == "cpu":
        fault = fault_step_infinite  # to the C++ kernels memory is memory
    params = [Odd(torch.ones(SHAPE, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    optimizer = fastwrs.AdamW([{"params": [p], "lr": torch.tensor(0.1)} for p in params])
    for _ in range(2):
        for param in params:
            param.grad = torch.ones(SHAPE, dtype=param.dtype)
        optimizer.step()
    fault(params[place], optimizer)

    def now() -> Any:
        states = [{key: raw(value) for key, value in state.items()} for state in optimizer.state.values()]
        return [raw(param) for param in params], [raw(param.grad) for param in params if param.grad is not None], states

    before = now()
    for _ in range(2):
        with pytest.raises((ValueError, RuntimeError)):
            optimizer.step()
        assert now() == before


@pytest.mark.usefixtures("backend")
def test_inference_tensors_are_refused_by_name() -> None:
    with torch.inference_mode():
        frozen = torch.ones(SHAPE)
        frozen.grad = torch.ones(SHAPE)
    good = weight()
    good.grad = torch.ones(SHAPE)
    with pytest.raises(RuntimeError, match=r"parameter 'frozen' .* was made in inference mode"):
        fastwrs.AdamW([("good", good), ("frozen", frozen)]).step()
    assert torch.equal(good, torch.ones(SHAPE))


@pytest.mark.usefixtures("backend")
def test_tensors_that_stand_for_others_are_refused_by_name() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    double = nn.Parameter(TwoTensor(torch.ones(SHAPE), torch.ones(SHAPE)))
    double.grad = torch.ones_like(double)
    with pytest.raises(RuntimeError, match=r"parameter 'double' .* is a TwoTensor, which stands for other tensors"):
        fastwrs.SGD([("double", double)]).step()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("what", ["lr on another device", "refused by the kernels"])
def test_a_refused_first_step_leaves_no_states(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    param = weight()
    param.grad = torch.ones(SHAPE)
    optimizer = fastwrs.AdamW([param], lr=torch.tensor(0.1, device="meta") if "lr" in what else 0.1)
    if "kernels" in what:

        def refuse(*_: Any, **__: Any) -> None:
            raise RuntimeError("refused")

        monkeypatch.setattr(dispatch, "launch", refuse)
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(param, torch.ones(SHAPE))


@pytest.mark.usefixtures("backend")
def test_parameters_on_the_meta_device_are_refused() -> None:
    good, bad = weight(), nn.Parameter(torch.ones(SHAPE, device="meta"))
    good.grad, bad.grad = torch.ones(SHAPE), torch.ones(SHAPE, device="meta")
    optimizer = fastwrs.AdamW([("good", good), ("bad", bad)])
    with pytest.raises(RuntimeError, match=r"parameter 'bad' .* on the meta device"):
        optimizer.step()
    assert torch.equal(good, torch.ones(SHAPE))
    assert not optimizer.state


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("what", ["parameters", "states", "steps", "the same parameter", "unscaled gradients"])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_shared_memory_changes_no_byte(what: str, started: bool) -> None:
    memory = torch.arange(24.0)
    params: list[Any] = [nn.Parameter(torch.ones(SHAPE)) for _ in range(3)]
    optimizer: Any = fastwrs.AdamW([*params, *(params[:1] if what == "the same parameter" else ())])
    if what == "the same parameter":
        started = False
    for param in params:
        param.grad = torch.ones(SHAPE)
    if started or what in ("states", "steps"):
        optimizer.step()
    if what == "parameters":
        params[0].data, params[2].data = memory[:12].view(SHAPE), memory[11:23].view(SHAPE)
        optimizer._plans = ()  # the plan looks at memory when it is made
    elif what == "states":
        optimizer.state[params[0]] = {**optimizer.state[params[0]], "exp_avg": optimizer.state[params[2]]["exp_avg"]}
    elif what == "steps":
        optimizer.state[params[0]] = {**optimizer.state[params[0]], "step": optimizer.state[params[2]]["step"]}
    elif what == "unscaled gradients":
        params[0].grad = params[2].grad
        optimizer.grad_scale = torch.tensor(4.0)
    before = everything(optimizer, params)
    other = r"params\[0\]\[3\]" if what == "the same parameter" else r"params\[0\]\[2\]"
    with pytest.raises(RuntimeError, match=rf"params\[0\]\[0\] .*and parameter {other} .*share memory"):
        optimizer.step()
    assert everything(optimizer, params) == before


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_expanded_gradients_are_fine(name: str) -> None:
    results = []
    for expanded in (True, False):
        param = weight()
        grad = torch.arange(3.0)[:, None].expand(SHAPE)
        param.grad = grad if expanded else grad.contiguous()
        getattr(fastwrs, name)([param], lr=0.1).step()
        results.append(param)
    assert torch.equal(*results)
