"""How far a kernel may be from the oracle. This file is the whole policy; no test has a tolerance of its own.

**Derived, not tuned.** The truth is the oracle in fp64, run from the stored inputs. The *loss* of a tensor is the
largest error of its elements in ulps of the type that it is stored in. A kernel may lose twice what the oracle's own
formula loses when it is run in the kernel's compute type with the same final rounding, plus 1.

**Ulps of what.** Of the largest number that an element's result is a sum of: a sum cannot be better than its terms.

- A parameter: ``max(|w before|, |lr * u|)`` times the factor by which the step is rescaled, or ``|w after|``. Not that
  by which it is shrunk: this one is itself a difference, of 1 and another number.
- With a gate (AdamP, SGDP) the step is made of the states as they are stored, so the formula rounds them before.
- What a gate takes out of the step is one more term of u, and of a state that is projected with it. It is itself a sum
  over the row, in which a step across the weights cancels: the sum of the magnitudes counts.
- What shifted L2 adds to the gradient is a sum of w - mu, its part eps / s, and mu: the largest counts.
- A state: ``max(|before|, |after of the magnitudes|)``, where the second is the state that the oracle computes from the
  absolute values of all inputs without ``maximize``. Nothing cancels there, so it bounds every term: in
  ``beta1 * m + (1 - beta1) * g`` the gradient may cancel the moment, and with coupled weight decay ``g`` is itself the
  sum of a gradient and a weight.
- An unscaled gradient: itself. Without ``grad_scale`` it has to be what it was.
- What is measured: norms like the things that they are norms of (see ``_measured_scales``). They get the bound on norms
  of ``NORM_BOUND`` on top, because the oracle's formula sums squares in fp64 and so loses nothing there.

**Luck.** The loss of the formula on a handful of numbers is a matter of luck. It is the largest of those of the inputs
themselves, of a crowd (copies of small tensors, each number moved by up to 3 %, until there are some thousand elements)
and of the same crowd with another learning rate and other decay rates: powers of two lose nothing, and what has few
digits loses nothing against a 16-bit gradient, so that the others are moved by a number without end.

**fp64.** Ulps are scale free: the formula's loss is measured in fp32 on inputs rounded to fp32, and counted in ulps of
fp64. Norms are summed in fp64 by the truth too, which is no better than a kernel there: weights that are rescaled get
the bound on norms on top. NaN and infinities have to be where the truth has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from calls import Call, one_thread
from torch import Tensor

from fastwrs import reference
from fastwrs.reference.norms import spread
from fastwrs.spec import MEASURED, RULES

NORM_BOUND = {torch.float64: 3e-7 * 2.0**-29, torch.float32: 3e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""After a rescale a norm may differ from its target by this much, relative; fp64 has as many ulps as fp32."""
RESCALED_TWICE_ULPS = 6
"""Rescaling what is rescaled already moves no fp32 element by more."""

CROWD, MOST_COPIES, MOST_COPIES_APART, SPREAD = 4096, 1024, 32, 2.0**-5
OFF = 1 - 2**-12 / 3


@dataclass(frozen=True)
class Inputs:
    """One tensor's step, as the oracle takes it."""

    rule: str
    param: Tensor
    grad: Tensor
    states: dict[str, Tensor]
    t: int
    first: bool
    lr: float
    hyper: Mapping[str, float]
    dims: tuple[int, ...] | None
    grad_scale: float | None = None

    def run(self, dtype: torch.dtype, stored: torch.dtype | None = None) -> reference.Result:
        """The oracle's step in this type, where a rule has a gate with states in the type ``stored``."""
        options = {k: v for k, v in vars(self).items() if k not in ("rule", "param", "grad", "states")}
        return reference.step(self.rule, self.param, self.grad, self.states, dtype=dtype, stored=stored, **options)


def snapshot(call: Call) -> list[Inputs]:
    """Copies of everything that a call is about to change, one entry per tensor."""
    inputs = []
    for i, tensor in enumerate(call.case.tensors):
        hyper = call.case.hyper(tensor.row)
        inputs.append(
            Inputs(
                rule=call.rule,
                param=call.params[i].clone(),
                grad=call.grads[i].clone(),
                states={name: state.clone() for name, state in call.states_of(i).items()},
                t=tensor.t,
                first=tensor.t == 1 or tensor.fresh,
                lr=float(call.lrs[tensor.row]) if call.lrs else hyper["lr"],
                hyper=hyper,
                dims=tensor.dims,
                grad_scale=None if call.grad_scale is None else float(call.grad_scale),
            )
        )
    return inputs


def outputs(call: Call, i: int) -> dict[str, Tensor]:
    """What the call has left in tensor i, as ``check`` takes it."""
    measured = call.measured_of(i)
    found = {"param": call.params[i], "grad": call.grads[i], **call.states_of(i)}
    return found if measured is None else found | {"measured": measured}


def check_call(before: list[Inputs], call: Call) -> None:
    """Checks every tensor of a call."""
    for i, inputs in enumerate(before):
        check_soon(inputs, outputs(call, i), f"tensor {i}: ")


@one_thread()
def check(inputs: Inputs, got: Mapping[str, Tensor], where: str = "") -> float:
    """Raises AssertionError unless param, grad, states and measured (if given) are within the budget.

    Returns the largest loss as a share of its budget.
    """
    truth, losses, slacks = _found(inputs, got, where)
    budgets = _budgets(inputs)
    worst = 0.0
    for name, loss in losses.items():
        tensor, allowed = got[name], budgets[name] + slacks[name]
        share = loss / allowed
        place = int(share.argmax())
        worst = max(worst, float(share.flatten()[place]))
        if not float(share.flatten()[place]) <= 1:
            index = tuple(int(k) for k in torch.unravel_index(torch.tensor(place), tensor.shape))
            column = f" ({MEASURED[index[1]]})" if name == "measured" else ""
            raise AssertionError(
                f"{where}{name}{list(index)}{column} is {float(loss[index]):.3g} ulps off, "
                f"{float(allowed[index]):.3g} are allowed: got {float(tensor[index])!r}, the truth is "
                f"{float(truth[name][index])!r}; {int((~(share <= 1)).sum())} of {tensor.numel()} are wrong"
            )
    return worst


@one_thread()
def check_soon(inputs: Inputs, got: Mapping[str, Tensor], where: str = "") -> None:
    """What :func:`check` says, for those who have no use for the share, in a fraction of the time.

    A budget is at least 1 ulp and grows with every crowd: what is within it already needs no more of them.
    """
    _, losses, slacks = _found(inputs, got, where)
    budgets = dict.fromkeys(losses, 1.0)

    def exceeding() -> list[str]:
        return [name for name, loss in losses.items() if not bool((loss <= budgets[name] + slacks[name]).all())]

    if not exceeding():
        return
    for crowd in _crowds(inputs):
        _enlarge(budgets, crowd)
        if not exceeding():
            return
    check(inputs, got, where)  # it has the words


def _found(
    inputs: Inputs, got: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The truth; the loss of everything that has elements; and what it may lose beyond its budget. All by name."""
    missing = {"param", "grad", *inputs.states} - set(got)
    assert not missing, f"{where}nothing to check for {sorted(missing)}"
    if inputs.grad_scale is None and not _same(got["grad"], inputs.grad):
        raise AssertionError(f"{where}the gradient was changed though there is no grad_scale")

    truth, scales = _truth(inputs)
    losses, slacks = {}, {}
    for name, tensor in got.items():
        assert tensor.shape == truth[name].shape, f"{where}{name} has shape {tuple(tensor.shape)}"
        if not tensor.numel():
            continue
        losses[name] = _loss(tensor, truth[name], scales[name], tensor.dtype)
        slacks[name] = torch.zeros_like(losses[name])
        if name == "measured":
            slacks[name] += _norm_slack(inputs) * scales[name] / ulp(scales[name], torch.float32)
        rescaled = inputs.dims is not None and reference.rescale_due(inputs.hyper, inputs.t, inputs.lr)
        if name == "param" and tensor.dtype == torch.float64 and rescaled:
            slacks[name] += NORM_BOUND[torch.float64] * scales[name] / ulp(scales[name], torch.float64)
    return truth, losses, slacks


def check_path(got: Tensor, formula: Tensor, truth: Tensor, start: Tensor, where: str = "") -> float:
    """Checks weights at the end of a run of many steps; returns the loss as a share of its budget.

    The policy is that of a single step: twice what the oracle's formula loses in fp32 over the same run, plus 1 ulp of
    the largest magnitude. ``formula`` and ``truth`` are the oracle's runs in fp32 and fp64.
    """
    scale = _largest(start, truth).max()
    budget = 2 * float(_loss(formula, truth, scale, torch.float32).max()) + 1
    loss = float(_loss(got, truth, scale, got.dtype).max())
    assert loss <= budget, f"{where}: {loss:.3g} ulps off at the end of the run, {budget:.3g} are allowed"
    return loss / budget


def norm_deviation(tensor: Tensor, dims: tuple[int, ...], target: float) -> float:
    """The largest relative difference between a group's norm (in fp64) and the target; 0 if there are no groups."""
    norms = tensor.double().square().sum(dim=dims).sqrt()
    return float((norms / target - 1).abs().max()) if norms.numel() else 0.0


def check_norms(got: Tensor, tensor: Tensor, dims: tuple[int, ...]) -> None:
    """Raises AssertionError unless ``got`` are the norms of the tensor, within ``NORM_BOUND`` of the compute type."""
    truth = tensor.double().square().sum(dim=dims).sqrt()
    assert got.shape == truth.shape, f"norms of shape {tuple(got.shape)}, {tuple(truth.shape)} expected"
    error = (got.double() / truth - 1).abs()[truth > 0]
    assert not bool((got[truth == 0] != 0).any()), "the norm of zeros is not zero"
    worst = float(error.max()) if error.numel() else 0.0
    assert worst <= NORM_BOUND[got.dtype], f"a norm is off by {worst:.3g}, {NORM_BOUND[got.dtype]:.3g} are allowed"


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of ``dtype`` at a magnitude, in fp64; that of the subnormal numbers below the normal ones."""
    info = torch.finfo(dtype)
    smallest = max(info.tiny * info.eps, 5e-324)
    _, exponent = torch.frexp(magnitude.double())  # magnitude = mantissa * 2**exponent, mantissa in [0.5, 1)
    spacing = torch.ldexp(torch.full_like(exponent, info.eps, dtype=torch.float64), exponent - 1)
    return torch.where(magnitude == 0, smallest, spacing.clamp(min=smallest))


def _same(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.nan_to_num(nan=-12345.0), right.nan_to_num(nan=-12345.0))


def _loss(got: Tensor, truth: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Errors in ulps of the scale; infinite where only one of the two is finite, or where infinities differ."""
    got = got.double()
    error = (got - truth).abs() / ulp(scale, dtype)
    error = torch.where(got.isfinite() & truth.isfinite(), error, math.inf)
    return torch.where((got == truth) | (got.isnan() & truth.isnan()), 0.0, error)


def _truth(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is right, in fp64, and the magnitudes whose ulps count, by name."""
    right = inputs.run(torch.float64)
    grad, without = inputs.grad.abs(), {None: {}, "gate": {"delta": 0}, "shift": {"shifted_l2_lam": 0}}
    if right.added is not None:  # one more term of the gradient
        grad = grad.double() + right.added * (inputs.grad_scale or 1)
    summed = replace(
        inputs,
        param=inputs.param.abs(),
        grad=grad,
        states={name: state.abs() for name, state in inputs.states.items()},
        hyper={**inputs.hyper, "maximize": 0} | without[RULES[inputs.rule].look],
    ).run(torch.float64)
    removed = torch.zeros_like(right.update) if right.removed_terms is None else right.removed_terms
    before = {"param": inputs.param, **inputs.states}
    truth = {"param": right.param, "grad": right.grad, **right.states}
    in_states = inputs.hyper.get("project_momentum") and not inputs.hyper["nesterov"]
    projected = removed if in_states else torch.zeros_like(removed)
    scales = {name: _largest(before[name], summed.states[name], projected) for name in inputs.states}
    added = torch.zeros_like(removed) if right.added is None else right.added
    terms = (inputs.lr * term for term in (right.update, removed, added))
    factor = _factors(right, inputs.dims)
    scales["param"] = _largest(right.param, *(factor * term for term in (inputs.param.double(), *terms)))
    scales["grad"] = right.grad.abs()
    if right.measured is not None and summed.measured is not None:
        truth["measured"] = right.measured
        summed.measured[:, MEASURED.index("update_norm")] += reference.group_norms(removed, inputs.dims or ()).flatten()
        scales["measured"] = _measured_scales(right.measured, summed.measured, inputs.lr)
    return truth, scales


def _factors(right: reference.Result, dims: tuple[int, ...] | None) -> Tensor:
    """What each weight is rescaled by after the update: what rounding has done before grows with it."""
    if right.measured is None or dims is None:
        return torch.ones((), dtype=torch.float64)
    factors = right.measured[:, MEASURED.index("rescale_factor")]
    ndim = right.param.ndim
    reduced = {dim % ndim for dim in dims}
    kept = [size for dim, size in enumerate(right.param.shape) if dim not in reduced]
    return spread(factors.reshape(kept), dims, ndim)


def _largest(*tensors: Tensor) -> Tensor:
    """The largest magnitude, where a NaN (poison that the step does not read) does not count."""
    largest = tensors[0].double().abs()
    for tensor in tensors[1:]:
        largest = torch.fmax(largest, tensor.double().abs())
    return largest


def _measured_scales(right: Tensor, summed: Tensor, lr: float) -> Tensor:
    """A norm is as good as the numbers that it is a norm of: the update's terms, and weights before and after them."""
    scale = dict(zip(MEASURED, right.unbind(1), strict=True))
    update = summed[:, MEASURED.index("update_norm")]
    weights = _largest(scale["norm_before"], scale["norm_updated"], scale["norm_after"], lr * update)
    scale["rescale_factor"] = scale["rescale_factor"] * (weights / scale["norm_updated"]).nan_to_num(nan=1.0)
    scale["effective_grad_norm"] = update / scale["norm_before"]
    scale |= {"norm_updated": weights, "norm_after": weights, "update_norm": update}
    scale["shrink_factor"] = torch.ones_like(update)
    return torch.stack([scale[name] for name in MEASURED], dim=1).nan_to_num(nan=1.0, posinf=1.0)


def _norm_slack(inputs: Inputs) -> Tensor:
    """Per column: the bound on norms in the compute type, or in that of the stored values where these may be taken."""
    of_weights = ("norm_updated", "norm_after", "rescale_factor")
    rounded: dict[str, torch.dtype] = dict.fromkeys(of_weights, inputs.param.dtype)
    if inputs.grad_scale is not None:  # "as the user sees it"
        rounded["grad_norm"] = inputs.grad.dtype
    if RULES[inputs.rule].gated:  # the step is made when the states have been stored
        (stored,) = {state.dtype for state in inputs.states.values()}
        rounded |= {"update_norm": stored, "effective_grad_norm": stored}
    # what is measured is stored in fp32, for fp64 too
    bounds = [max(NORM_BOUND[torch.float32], NORM_BOUND[rounded.get(name, torch.float32)]) for name in MEASURED]
    return torch.tensor(bounds, dtype=torch.float64)


def _budgets(inputs: Inputs) -> dict[str, float]:
    """Ulps that a kernel may lose, by name: twice the loss of the oracle's formula in the compute type, plus 1."""
    budgets: dict[str, float] = {}
    for crowd in _crowds(inputs):
        _enlarge(budgets, crowd)
    return budgets


def _enlarge(budgets: dict[str, float], crowd: Inputs) -> None:
    for name, loss in _losses(crowd).items():
        budgets[name] = max(budgets.get(name, 0.0), 2 * loss + 1)


def _losses(crowd: Inputs) -> dict[str, float]:
    """What the oracle's formula loses in the compute type, in ulps, by name."""
    kept_in = {state.dtype for state in crowd.states.values()}
    formula = crowd.run(torch.float32, *kept_in)
    truth, scales = _truth(crowd)
    stored = {"param": crowd.param.dtype, "grad": crowd.grad.dtype, "measured": torch.float32}
    stored |= {name: state.dtype for name, state in crowd.states.items()}
    found = {"param": formula.param, "grad": formula.grad, **formula.states}
    unrounded = crowd.run(torch.float32) if RULES[crowd.rule].gated else formula
    if unrounded.measured is not None:  # the bounds on norms know that states are rounded
        found["measured"] = unrounded.measured
    losses = {}
    for name, tensor in found.items():
        loss = _loss(tensor.to(stored[name]), truth[name], scales[name], stored[name])
        losses[name] = float(loss[loss.isfinite()].max() if loss.isfinite().any() else 0.0)
    return losses


def _crowds(inputs: Inputs) -> Iterator[Inputs]:
    """What the loss of the formula is taken over, the cheapest and most telling first."""
    crowd = list(_crowd(inputs, SPREAD))
    yield from crowd
    yield from map(_off_powers_of_two, crowd)
    if inputs.param.numel() < CROWD:
        yield from _crowd(inputs, 0.0)


def _off_powers_of_two(inputs: Inputs) -> Inputs:
    """The same with other factors, near enough to be as well conditioned."""
    moved = {name: number * OFF for name, number in inputs.hyper.items() if name in ("beta1", "beta2", "momentum")}
    return replace(inputs, lr=inputs.lr * OFF, hyper={**inputs.hyper, **moved})


def _crowd(inputs: Inputs, off: float) -> Iterator[Inputs]:
    """Copies of small inputs, each number a little off, along a new first dimension; fp64 becomes fp32.

    With ``off`` 0 the inputs as they are. A look at the whole tensor is one at its dimension 0 too: its copies stay
    apart.
    """
    if inputs.dims == ():  # torch takes no dimensions for all: the copies would share a norm
        one = {name: state.reshape(1) for name, state in inputs.states.items()}
        inputs = replace(inputs, param=inputs.param.reshape(1), grad=inputs.grad.reshape(1), states=one, dims=(0,))
    copies = min(MOST_COPIES, math.ceil(CROWD / max(1, inputs.param.numel()))) if off else 1
    apart = RULES[inputs.rule].look is not None
    copies = min(copies, MOST_COPIES_APART) if apart else copies
    generator = torch.Generator().manual_seed(1)

    def moved(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
        if copies == 1:
            return tensor.unsqueeze(0).to(dtype)
        factors = 1 + off * (2 * torch.rand((copies, *tensor.shape), generator=generator, dtype=torch.float64) - 1)
        return (factors * tensor.double()).to(dtype)

    crowd = replace(
        inputs,
        param=moved(inputs.param),
        grad=moved(inputs.grad),
        states={name: moved(state) for name, state in inputs.states.items()},
        dims=None if inputs.dims is None else tuple(dim + 1 for dim in inputs.dims),
    )
    return (_member(crowd, k, inputs.dims) for k in range(copies)) if apart else iter((crowd,))


def _member(crowd: Inputs, k: int, dims: tuple[int, ...] | None) -> Inputs:
    states = {name: state[k] for name, state in crowd.states.items()}
    return replace(crowd, param=crowd.param[k], grad=crowd.grad[k], states=states, dims=dims)
