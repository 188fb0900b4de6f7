"""What takes turns: fastwrs with each backend, and what people use today, all on parameters alike.

A side makes its optimizer on a ``Work``: parameters and gradients that any side makes the same, from seeds. After two
steps it has to have the weights that the oracle has, or nothing is reported: a fast step that is wrong is no figure.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastwrs
from fastwrs.benchmark.lists import NORM, PLAIN, WEIGHT, Param
from fastwrs.benchmark.turns import Step

LR = 2e-2  # large, so that a step that does not happen shows in bf16 too
OPTIONS: dict[str, dict[str, Any]] = {"AdamW": {"lr": LR}, "SGD": {"lr": LR, "momentum": 0.9}}
SLOTS = {"AdamW": 2, "SGD": 1}
DECAY = 1e-2
TIMM = "timm"


class Precision(NamedTuple):
    """Dtypes of a comparison; ``states`` is what fastwrs is asked for."""

    params: torch.dtype
    states: torch.dtype | None


PRECISIONS = {
    "float32": Precision(torch.float32, None),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16),
    "bfloat16, fp32 states": Precision(torch.bfloat16, None),
}


def bytes_per_element(rule: str, precision: Precision) -> int:
    """What a step has to move: read parameter, gradient and states, write all but the gradient."""
    param = precision.params.itemsize
    state = 4 if precision.states is None else precision.states.itemsize
    return 3 * param + 2 * SLOTS[rule] * state


@dataclass
class Work:
    """The parameters of one side, with gradients that all sides share."""

    rule: str
    precision: Precision
    roles: list[str]
    params: list[nn.Parameter]
    grads: list[Tensor]

    @classmethod
    def new(cls, rule: str, precision: Precision, given: list[Param], grads: list[Tensor]) -> Work:
        """Parameters as at the start."""
        work = cls(rule, precision, [param.role for param in given], [], grads)
        for k, grad in enumerate(grads):
            work.params.append(nn.Parameter(values(k, grad)))
            work.params[-1].grad = grad
        return work

    def of(self, *roles: str) -> list[nn.Parameter]:
        """The parameters that have one of the roles."""
        return [param for param, role in zip(self.params, self.roles, strict=True) if role in roles]


def make_grads(given: list[Param], dtype: torch.dtype, device: str, channels_last: bool = False) -> list[Tensor]:
    """Gradients for all sides of a comparison, in the layout of the parameters."""
    grads = []
    for k, param in enumerate(given):
        layout = torch.channels_last if channels_last and len(param.shape) == 4 else torch.contiguous_format
        empty = torch.empty(param.shape, dtype=dtype, device=device, memory_format=layout)
        grads.append(empty.normal_(generator=_seeded(2 * k + 1, device)))
    return grads


def values(k: int, like: Tensor) -> Tensor:
    """The weights that parameter k begins with."""
    return torch.empty_like(like).normal_(0, 0.1, generator=_seeded(2 * k, like.device))


def _seeded(seed: int, device: torch.device | str) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


# ---- the sides ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One contender. ``axis`` is how it rescales the weights in every step, None if it does not."""

    name: str
    make: Callable[[Work], Step]
    axis: str | None = None
    decays: tuple[str, ...] = (WEIGHT, NORM, PLAIN)
    """The roles whose parameters it decays."""
    own_grads: bool = False
    """Whether it writes the gradients, and so gets some of its own."""
    formula: bool = True
    """Whether its weights have to be the oracle's. Another algorithm's have to be finite, and to move in every step."""
    any_layout: bool = True
    """Whether it is right for weights in channels_last too."""
    spare: float = 0.0
    """Device memory that it takes for a moment, in sizes of all parameters."""
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    rules: tuple[str, ...] = tuple(OPTIONS)

    @property
    def ours(self) -> bool:
        """Whether there is nothing to report where this side is wrong: ours, and what all are compared with."""
        return self.name.startswith(("fastwrs ", "torch fused")) and " + " not in self.name

    def fits(self, rule: str, precision: str, channels_last: bool = False) -> bool:
        """Whether it exists for a rule, a precision and a layout."""
        return rule in self.rules and precision in self.precisions and (self.any_layout or not channels_last)


def _fastwrs(work: Work, backend: str, rescale: fastwrs.Rescale | None) -> Step:
    groups = [
        {"params": work.of(WEIGHT), "rescale": rescale, "weight_decay": 0.0},
        {"params": work.of(NORM), "weight_decay": DECAY},
        {"params": work.of(PLAIN), "weight_decay": 0.0},
    ]
    kind = getattr(fastwrs, work.rule)
    states = work.precision.states
    return kind([g for g in groups if g["params"]], backend=backend, state_dtype=states, **OPTIONS[work.rule]).step


def ours(backend: str, axis: str | None) -> Side:
    """Ours on a backend, with WRS in every step or without."""
    name = {None: "plain", "out": "WRS", "in": "WRS(IC)"}[axis]
    rescale = None if axis is None else fastwrs.Rescale(axis=axis)
    return Side(f"fastwrs {backend} {name}", lambda work: _fastwrs(work, backend, rescale), axis, decays=(NORM,))


def looking(backend: str) -> tuple[Side, ...]:
    """Ours that look at whole tensors first: with a gate, beside which timm's stand, and with shifted L2."""

    def make(kind: type[fastwrs.AdamP | fastwrs.SGDP | fastwrs.SGD], **options: Any) -> Callable[[Work], Step]:
        def step_of(work: Work) -> Step:
            more: dict[str, Any] = {"lr": OPTIONS[work.rule]["lr"], "weight_decay": DECAY} | options
            return kind(work.params, backend=backend, state_dtype=work.precision.states, **more).step

        return step_of

    return (
        Side(f"fastwrs {backend} AdamP", make(fastwrs.AdamP), rules=("AdamW",), formula=False),
        Side(f"fastwrs {backend} SGDP", make(fastwrs.SGDP, momentum=0.9), rules=("SGD",), formula=False),
        Side(
            f"fastwrs {backend} SGD, shifted L2",
            make(fastwrs.SGD, momentum=0.9, shifted_l2=(1e-4, 1e-3)),
            rules=("SGD",),
            formula=False,
        ),
    )


def made(side: Side, work: Work) -> Step:
    """The step of a side on a work."""
    if side.own_grads:
        work.grads = [grad.clone() for grad in work.grads]
        for param, grad in zip(work.params, work.grads, strict=True):
            param.grad = grad
    return side.make(work)


def _torch(work: Work, **options: bool) -> Step:
    kind = getattr(torch.optim, work.rule)
    return kind(work.params, weight_decay=DECAY, **OPTIONS[work.rule], **options).step


def replaces_fused(rule: str, dtype: torch.dtype, device: str) -> bool:
    """Whether foreach stands in: torch 2.13's fused SGD for the CPU gives wrong weights in bf16, as the check found."""
    return rule == "SGD" and device == "cpu" and dtype != torch.float32


def _fused(work: Work) -> Step:
    foreach = replaces_fused(work.rule, work.params[0].dtype, work.params[0].device.type)
    return _torch(work, foreach=True) if foreach else _torch(work, fused=True)


def norms(weight: Tensor) -> Tensor:
    """The norm of every channel, as a loop gets it."""
    return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)


def replaced(weights: Iterable[Tensor]) -> None:
    """As nGPT and Algorithm 1 of the WRS paper have it: ``W = W / |W|``."""
    for weight in weights:
        weight.copy_(weight / norms(weight))


def divided(weights: Iterable[Tensor]) -> None:
    """As somebody writes it who counts bytes: in place."""
    for weight in weights:
        weight.div_(norms(weight))


def by_weight_norm(weights: list[Tensor]) -> None:
    """Torch's kernel for weight_norm, norm and quotient in one, on each weight; then one copy of them all."""
    ones = [torch.ones_like(weight[(slice(None), *[slice(1)] * (weight.ndim - 1))]) for weight in weights]
    pairs = zip(weights, ones, strict=True)
    new = [torch._weight_norm_interface(w, g)[0] for w, g in pairs]  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_copy_(weights, new)  # pyright: ignore[reportPrivateImportUsage]


def divided_by_foreach(weights: list[Tensor]) -> None:
    """One norm per weight, then one call for all quotients."""
    quotients = [norms(weight) for weight in weights]
    torch._foreach_div_(weights, quotients)  # pyright: ignore[reportPrivateImportUsage]


def and_then(
    rescale: Callable[[list[Tensor]], object], first: Callable[[Work], Step] = _fused
) -> Callable[[Work], Step]:
    """A step of another optimizer, torch's fused one by default, then ``rescale`` on the weights."""
    return lambda work: one_after_another(first(work), rescale, work.of(WEIGHT))


def one_after_another(update: Step, rescale: Callable[[list[Tensor]], object], params: Iterable[Tensor]) -> Step:
    """A step, then ``rescale`` on the weights."""
    weights = [param.detach() for param in params]

    @torch.no_grad()
    def step() -> None:
        update()
        rescale(weights)

    return step


def _compiled(work: Work, compiler: str | None = None) -> Step:
    torch._dynamo.reset()  # what was compiled for another list, and its counts of recompilations
    compiler = compiler or ("inductor" if work.params[0].is_cuda else "eager")  # in a rehearsal
    return and_then(torch.compile(divided, backend=compiler, dynamic=False, fullgraph=True))(work)


def _compiled_optimizer(work: Work) -> Step:
    torch._dynamo.reset()
    return torch.compile(_torch(work, foreach=True), backend="inductor", fullgraph=False)


def _from_package(package: str, name: str, **options: object) -> Callable[[Work], Step]:
    def make(work: Work) -> Step:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what packages say of themselves when they are imported
            kind = timm_optimizer(name) if package == TIMM else getattr(importlib.import_module(package), name)
            return kind(work.params, lr=OPTIONS[work.rule]["lr"], weight_decay=DECAY, **options).step

    return make


def timm_optimizer(name: str) -> Any:
    """The class of timm. Its module is imported by itself: the whole package wants a torchvision that fits torch."""
    found = importlib.util.find_spec(TIMM)
    assert found is not None
    assert found.submodule_search_locations is not None
    package = ModuleType("timm_optim")
    package.__path__ = [str(Path(found.submodule_search_locations[0]) / "optim")]
    sys.modules["timm_optim"] = package
    return getattr(importlib.import_module(f"timm_optim.{name.lower()}"), name)


def _others(
    package: str,
    adamw: str | None,
    sgd: str | None,
    momentum: str = "momentum",
    writes_grads: str | None = None,
    **options: object,
) -> tuple[Side, ...]:
    """Optimizers of a package that take the place of AdamW and of SGD with momentum. They are other algorithms."""
    found = [("AdamW", adamw, options), ("SGD", sgd, {momentum: 0.9, **options})]
    return tuple(
        Side(
            f"{package} {name}",
            _from_package(package, name, **more),
            rules=(rule,),
            formula=False,
            spare=3,
            own_grads=name == writes_grads,
        )
        for rule, name, more in found
        if name
    )


def followed(side: Side, word: str, rescale: Callable[[list[Tensor]], object]) -> Side:
    """A side with a rescaling loop after its step."""
    return replace(
        side, name=f"{side.name} + {word}", make=and_then(rescale, side.make), axis="out", spare=side.spare + 1
    )


FUSED = Side("torch fused", _fused)
"""What everything is compared with. It rescales nothing."""
TORCH_ONLY = ("float32", "bfloat16")  # torch keeps states in the type of the parameter
FOREACH = Side("torch foreach", lambda work: _torch(work, foreach=True), spare=3, precisions=TORCH_ONLY)
LOOPS = (
    Side("torch fused + loop", and_then(replaced), "out", spare=1, precisions=TORCH_ONLY),
    Side("torch fused + in-place loop", and_then(divided), "out", precisions=TORCH_ONLY),
    Side("torch fused + foreach", and_then(divided_by_foreach), "out", precisions=TORCH_ONLY),
    Side("torch fused + weight_norm kernel", and_then(by_weight_norm), "out", any_layout=False, spare=1,
         precisions=TORCH_ONLY),
)  # fmt: skip
COMPILED = Side("torch fused + compiled loop", _compiled, "out", precisions=TORCH_ONLY)
_OTHERS = {
    "optimi": _others("optimi", "AdamW", "SGD", writes_grads="SGD"),  # its weight decay
    "timm": (
        Side("timm LAMB", _from_package("timm", "Lamb"), rules=("AdamW",), formula=False, spare=3),
        *_others("timm", "AdamP", "SGDP"),
    ),
    "adamp": _others("adamp", "AdamP", "SGDP"),
    "pytorch_optimizer": _others("pytorch_optimizer", "AdamP", "SGDP"),
    # which else takes the gradients away, and does nothing in the next step
    "heavyball": _others("heavyball", "AdamW", "SGD", momentum="beta", consume_grad=False),
}
SLOW = (
    Side("torch for-loop", lambda work: _torch(work, foreach=False), spare=1, precisions=TORCH_ONLY),
    # inductor rounds in other places: 1.5e-5 off in fp32
    Side("torch compiled", _compiled_optimizer, spare=1, precisions=TORCH_ONLY, formula=False),
)
"""Torch's other ways, which nobody takes for speed on a GPU."""


def sides(group: str, backends: list[str], convolutions: bool) -> list[Side]:
    """The contenders of a comparison, torch fused first: the one that all others are put against."""
    wrs = [ours(backend, "out") for backend in backends]
    if group == "compiled":
        return [FUSED, *wrs, COMPILED]
    if group in ("others", "peers"):
        installed = [package for package in _OTHERS if importlib.util.find_spec(package)]
        ours_too = [side for backend in backends for side in looking(backend)]
        others = [side for package in installed for side in _OTHERS[package]]
        if group == "others":
            return [FUSED, *wrs, *ours_too, *others]
        plain = [ours(backend, None) for backend in backends]
        alone = [FOREACH, *SLOW, *others]
        loops = [followed(side, "in-place loop", divided) for side in alone]
        hand = Side(
            "torch fused + compiled loop", lambda work: _compiled(work, "inductor"), "out", precisions=TORCH_ONLY
        )
        return [FUSED, *wrs, *plain, *ours_too, *LOOPS, hand, *alone, *loops]
    more = [ours(backend, axis) for backend in backends for axis in (["in"] if convolutions else []) + [None]]
    return [FUSED, *wrs, *more, FOREACH, *LOOPS]


def absent(backends: list[str]) -> list[str]:
    """What could have been measured and is not installed or cannot run here."""
    reasons = fastwrs.backends()
    missing = [f"fastwrs {name}: {reasons[name]}" for name in ("cuda", "triton") if name not in backends]
    return missing + [f"{package}: not installed" for package in _OTHERS if not importlib.util.find_spec(package)]


def chunks(sides: list[Side], sizes: dict[str, float], capacity: float) -> Iterator[list[Side]]:
    """Sides that fit into memory together. Torch fused is in each, as the one that the others are compared with."""
    anchor, *others = sides
    chunk, used, first = [anchor], sizes[anchor.name], True
    for side in others:
        if len(chunk) > 1 and used + sizes[side.name] > capacity:
            yield chunk
            chunk, used, first = [anchor], sizes[anchor.name], False
        chunk.append(side)
        used += sizes[side.name]
    if len(chunk) > 1 or first:
        yield chunk
