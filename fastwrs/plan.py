"""Splits param groups into bundles, checks every tensor that takes part, and says when that still holds.

A bundle is what one launch covers: the parameters with the same state slots, device and dtypes. Building a plan looks
at everything, in pure Python and without writing anything; using it again costs a few C-speed passes over lists. The
tensors themselves are not kept: gradients and states are gathered anew for each step, so one that was exchanged is
simply used, and the kernels check sizes, dtypes and devices of what they get before they write.
"""

from __future__ import annotations

import functools
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain, repeat
from operator import attrgetter, is_, is_not, itemgetter
from typing import Any

import torch
from torch import Tensor

from fastwrs.options import ALL_DIMS, Axis, axis_mask, common_axis, measured_mask
from fastwrs.spec import DTYPE_TRIPLES, Rule

Triple = tuple[str, str, str]
Group = Mapping[str, Any]
State = dict[str, Any]

STEP = "step"
MAX_DIMS = 63
"""The dimensions that an axis can name: a bitmask of them is a signed 64-bit integer."""
_USUAL = (Tensor, torch.nn.Parameter)
_PLAIN_DISPATCH = getattr(Tensor, "__torch_dispatch__", None)
LAZY = "has no shape yet: run the model once before"
FLAT = (
    "a flat parameter of FSDP1, weights one behind the other without channels; use_orig_params=True keeps their shapes "
    "where nothing is sharded (ShardingStrategy.NO_SHARD)"
)
_grad_of, _ndim_of = attrgetter("grad"), attrgetter("ndim")


@dataclass(slots=True)
class StepCall:
    """The arguments of the op ``fastwrs::step``, in its order."""

    rule: str
    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor]
    steps: list[Tensor]
    hyper: list[float]
    groups: list[int]
    axes: list[int]
    fresh: list[int]
    lrs: list[Tensor]
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    measured: Tensor | None = None
    workspace: Tensor | None = None
    kept: dict[str, Any] | None = None
    """No argument: where a backend keeps what it has of these lists, for the next call of the same bundle."""

    def arguments(self) -> tuple[object, ...]:
        """In the order of the op, which is that of the fields."""
        return _all_arguments(self)


_all_arguments = attrgetter(*(field.name for field in fields(StepCall) if field.name != "kept"))


@dataclass(slots=True)
class Bundle:
    """What one launch covers. ``states`` are the state dicts of the parameters, not the tensors in them."""

    backend: Any
    slots: tuple[str, ...]
    device: torch.device
    updates: bool = True
    """Whether gradients are read; if not, the parameters stand in for them."""
    complex: bool = False
    """Whether the parameters are complex. Kernels see them as real tensors with one more dimension, of two."""
    params: list[Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    axes: list[int] = field(default_factory=list)
    measured_axes: list[int] = field(default_factory=list)
    """What takes the place of ``axes`` in a step that measures every tensor; only masks of ``NO_GROUPS`` differ."""
    fresh: list[int] = field(default_factory=list)
    ndims: list[int] = field(default_factory=list)
    rows: dict[int, Any] = field(default_factory=dict)
    """By the scope of what is measured, whose rows these are: kept here, for they hold as long as a bundle."""
    kept: dict[str, Any] | None = field(default_factory=dict)
    """What the backend keeps of the lists that it is given; None if it is to keep nothing."""

    def gather(self, unscaling: bool = False) -> tuple[list[Tensor], ...] | None:
        """The parameters, gradients, states (slot-major) and steps as they are now, for a kernel.

        None if one of them is gone, if a parameter has another number of dimensions than its axis was made for, or if
        gradients that are to be unscaled begin at the same place.
        """
        if list(map(_ndim_of, self.params)) != self.ndims:
            return None
        grads = list(map(_grad_of, self.params))
        if not all(map(is_not, grads, repeat(None))) or (unscaling and not _all_apart(grads)):
            return None
        if not self.updates:
            grads = self.params
        try:
            states = [state for slot in self.slots for state in map(itemgetter(slot), self.states)]
            steps = list(map(itemgetter(STEP), self.states))
            if self.complex:
                if unscaling and any(grad.is_conj() for grad in grads):
                    return None
                grads = [grad.resolve_conj() for grad in grads]  # autograd leaves such views
                params, grads, states = (list(map(_as_real, tensors)) for tensors in (self.params, grads, states))
                return params, grads, states, steps
        except (KeyError, RuntimeError):  # a new plan finds the words
            return None
        return self.params, grads, states, steps


@dataclass(slots=True)
class Plan:
    """The bundles of one optimizer, and what they were derived from."""

    shapes: list[Any]
    """Per param group, the options that shape a plan (see :func:`shape_of`)."""
    sizes: list[int]
    """Per param group, the number of its parameters."""
    params: list[Tensor]
    idle: list[Tensor]
    """The parameters without a gradient: they take no part, as long as that is so."""
    bundles: list[Bundle]
    created: list[tuple[Tensor, str, Tensor]]
    """The states that the parameters lacked: (parameter, key, tensor). Nobody sees them before they are installed."""
    unused: list[tuple[State, str, Tensor]] = field(default_factory=list)
    """What skipped first steps have left of slots that are switched off now; later nobody may take it for a state."""
    owners: list[Tensor] = field(default_factory=list)
    owned: list[State] = field(default_factory=list)

    def fits(self, groups: Sequence[Group], shapes: list[Any], state: Mapping[Tensor, State]) -> bool:
        """Whether the same parameters have the same options and the same state dicts as before."""
        return (
            self.shapes == shapes
            and [len(group["params"]) for group in groups] == self.sizes
            and all(map(is_, chain.from_iterable(map(itemgetter("params"), groups)), self.params))
            and len(state) == len(self.owners)
            and all(map(is_, state, self.owners))
            and all(map(is_, state.values(), self.owned))
        )

    def idles(self) -> bool:
        """Whether those that had no gradient have none now. :meth:`Bundle.gather` sees that the others have one."""
        return all(map(is_, map(_grad_of, self.idle), repeat(None)))

    def install(self, state: defaultdict[Tensor, State]) -> None:
        """Makes the created states visible, and remembers whose state dicts are whose."""
        for param, key, tensor in self.created:
            state[param][key] = tensor
        for mine, key, _ in self.unused:
            del mine[key]
        self.owners, self.owned = list(state), list(state.values())
        for bundle in self.bundles:
            bundle.states = [state[param] for param in bundle.params]

    def uninstall(self, state: defaultdict[Tensor, State]) -> None:
        """Takes the created states away again, as if they had never been."""
        for param, key, _ in self.created:
            del state[param][key]
            if not state[param]:
                del state[param]
        for mine, key, tensor in self.unused:
            mine[key] = tensor

    def release(self) -> None:
        """Keeps no tensors for a next step any more, which another plan takes."""
        for bundle in self.bundles:
            bundle.kept = None

    def signature(self) -> list[Any]:
        """What two plans have in common that would launch the same."""
        return [
            (b.backend, b.slots, b.device, b.complex, [*map(id, b.params)], b.groups, b.axes, b.fresh)
            for b in self.bundles
        ]


def shape_of(rule: Rule, group: Group) -> tuple[Any, ...]:
    """The options of a param group that decide which slots and norm groups its parameters have."""
    return rule.slots_for(group), common_axis(group["rescale"], group["shrink"])


def build(
    rule: Rule,
    groups: Sequence[Group],
    state: Mapping[Tensor, State],
    state_dtype: torch.dtype | None,
    choose: Callable[[str, Triple], Any],
    unscaling: bool = False,
) -> Plan:
    """Checks every parameter that has a gradient, with its gradient and states, and sorts them into bundles.

    Writes nothing: states that are missing come back in ``Plan.created``. With ``unscaling`` the step will write
    the gradients too.

    Raises:
        ValueError, RuntimeError: something is not as it must be; the message names the parameter.
    """
    plan = Plan([shape_of(rule, group) for group in groups], [len(g["params"]) for g in groups], [], [], [], [])
    bundles: dict[Any, Bundle] = {}
    written: list[Tensor] = []
    whose: list[tuple[int, int]] = []
    for g, group in enumerate(groups):
        slots, axis = plan.shapes[g]
        for i, param in enumerate(group["params"]):
            plan.params.append(param)
            if param.grad is None:
                plan.idle.append(param)
                continue
            mine, grad = state.get(param, {}), param.grad if rule.updates else param
            if why := why_not(rule, param, grad, mine, slots):
                raise RuntimeError(f"{label(group, g, i)}: {why}")
            if unscaling and grad.is_conj():
                raise RuntimeError(
                    f"{label(group, g, i)}: its gradient is to be unscaled, and is a view with the conjugate bit set; "
                    "resolve_conj() makes it a plain tensor"
                )
            if unscaling and overlaps_itself(grad):
                raise RuntimeError(
                    f"{label(group, g, i)}: its gradient is to be unscaled, and overlaps itself in memory"
                )
            mask = checked_mask(group, g, i, axis)
            try:
                tensors = _completed(param, mine, slots, state_dtype, plan.created)
                device, triple = param.device, dtypes_of(param, grad, tensors)
            except ValueError as error:
                raise ValueError(f"{label(group, g, i)}: {error}") from None
            key = slots, device, triple, param.is_complex()
            if key not in bundles:
                bundles[key] = Bundle(choose(device.type, triple), slots, device, rule.updates, param.is_complex())
            bundle = bundles[key]
            if bundle.complex:  # what kernels see of it is made anew for each step
                bundle.kept = None
            if slots and STEP in mine and mine.get(slots[0]) is None and bool(mine[STEP] > 0):
                bundle.fresh.append(len(bundle.params))  # momentum was switched on after the first step
            plan.unused += _unused(rule, mine, slots)
            bundle.params.append(param)
            bundle.groups.append(g)
            bundle.axes.append(mask)
            bundle.measured_axes.append(_measured_mask(param, mask))
            bundle.ndims.append(param.ndim)
            tensors += (param, grad) if unscaling else (param,)
            written += tensors
            whose += [(g, i)] * len(tensors)
    if clash := overlapping(written):
        one, other = (label(groups[g], g, i) for g, i in (whose[k] for k in clash))
        raise RuntimeError(f"{one} and {other} share memory, in themselves or in what is written with them")
    plan.bundles = list(bundles.values())
    return plan


def label(group: Group, g: int, i: int) -> str:
    """How errors call a parameter: by its name if the group has names, else by its place; and with its shape."""
    param = group["params"][i]
    name = f"{group['param_names'][i]!r}" if "param_names" in group else f"params[{g}][{i}]"
    shape = "an uninitialized one" if torch.nn.parameter.is_lazy(param) else f"shape {tuple(param.shape)}"
    return f"parameter {name} ({shape})"


def checked_mask(group: Group, g: int, i: int, axis: Axis | None) -> int:
    """The bitmask of the reduced dimensions of a parameter, or a ValueError that names it."""
    param = group["params"][i]
    if axis is None or torch.nn.parameter.is_lazy(param):
        return 0
    if is_flat(param):
        raise ValueError(f"{label(group, g, i)}: it is {FLAT}")
    if group["rescale"] and (why := why_not_target(param, group["rescale"].target)):
        raise ValueError(f"{label(group, g, i)}: {why}")
    try:
        if param.is_complex():
            raise ValueError("complex parameters are not rescaled or shrunk")
        return axis_mask(axis, param.ndim)
    except ValueError as error:
        raise ValueError(
            f"{label(group, g, i)}: {error}. fastwrs.param_groups(model) puts the parameters that can be rescaled "
            "into groups of their own"
        ) from None


def is_flat(param: Tensor) -> bool:
    """Whether FSDP1 has made the parameter of others, one behind the other, or of a part of them."""
    return getattr(param, "_is_flat_param", False)


def state_dtype_for(param: Tensor, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype of the states of a parameter."""
    if wanted is not None and param.dtype != wanted:
        raise ValueError(f"state_dtype={wanted} is for {wanted} parameters only, this one is {param.dtype}")
    if param.is_complex():
        return param.dtype
    return wanted or (torch.float64 if param.dtype == torch.float64 else torch.float32)


def dtypes_of(param: Tensor, grad: Tensor, states: Sequence[Tensor]) -> Triple:
    """The (param, grad, state) dtypes by name, or a ValueError that lists the allowed ones.

    ``states`` ends with the step, which does not count; without other states the type is the one they would have. Of
    complex tensors those of their parts.
    """
    kinds = {tensor.dtype for tensor in states[:-1]} or {state_dtype_for(param, None)}
    triples = [(name_of(param.dtype), name_of(grad.dtype), name_of(kind)) for kind in kinds]
    if len(triples) == 1 and triples[0] in DTYPE_TRIPLES:
        return triples[0]
    given = [tuple(str(dtype).removeprefix("torch.") for dtype in (param.dtype, grad.dtype, kind)) for kind in kinds]
    allowed = "the parts of complex numbers may be" if param.is_complex() else "allowed"
    raise ValueError(f"dtypes (param, grad, state) are {_listed(given)}; {allowed}: {_listed(DTYPE_TRIPLES)}")


PROJECTED: dict[str, Triple] = {triple[0]: triple for triple in DTYPE_TRIPLES if triple[0] == triple[1]}
"""Of a tensor's dtype by name, the triple of a step that reads neither a gradient nor a state."""


def why_not_dtype(tensor: Tensor) -> str | None:
    """Why a tensor of this dtype cannot be rescaled, or None if it can."""
    if str(tensor.dtype).removeprefix("torch.") in PROJECTED:
        return None
    return f"dtype {tensor.dtype} is not supported; allowed: {', '.join(PROJECTED)}"


def why_not_target(tensor: Tensor, target: float) -> str | None:
    """Why no group of a tensor can have this norm, or None if it can."""
    if not tensor.is_floating_point() or target <= (largest := torch.finfo(tensor.dtype).max):
        return None
    return f"a target of {target:g} is beyond {tensor.dtype}, whose largest number is {largest:g}"


@functools.cache
def name_of(dtype: torch.dtype) -> str:
    """A dtype as ``fastwrs.spec`` calls it; of a complex one that of its parts."""
    return str(dtype.to_real() if dtype.is_complex else dtype).removeprefix("torch.")


def _listed(triples: Iterable[Sequence[str]]) -> str:
    return ", ".join(f"({', '.join(triple)})" for triple in triples)


def _completed(
    param: Tensor,
    mine: State,
    slots: tuple[str, ...],
    state_dtype: torch.dtype | None,
    created: list[tuple[Tensor, str, Tensor]],
) -> list[Tensor]:
    """The states of a parameter in the order of its slots, then its step; what is missing is added to ``created``."""
    tensors = []
    for slot in slots:
        tensor = mine.get(slot)
        if tensor is None:
            # Zeros, not uninitialised memory: a first step that is skipped leaves them as they are.
            tensor = torch.zeros_like(plain(param), dtype=state_dtype_for(param, state_dtype), requires_grad=False)
            created.append((param, slot, tensor))
        tensors.append(tensor)
    step = mine.get(STEP)
    if step is None:
        # A momentum buffer without a step count comes from torch.optim.SGD: its first step is over.
        count = float(any(mine.get(slot) is not None for slot in slots))
        step = torch.tensor(count, dtype=torch.float32, device=param.device)
        created.append((param, STEP, step))
    return [*tensors, step]


def why_not(rule: Rule, param: Tensor, grad: Tensor, mine: State, slots: tuple[str, ...]) -> str | None:
    """Why a parameter cannot take a step, or None if it can."""
    turns = param.is_complex()
    if param.is_conj():
        return "the parameter is a view with the conjugate bit set; resolve_conj() makes it a plain tensor"
    if why := why_not_plain(param, "the parameter", turns) or why_not_plain(grad, "its gradient", turns):
        return why
    if turns and (rule.look is not None or not grad.is_complex()):
        what = f"its gradient is real ({grad.dtype})" if not grad.is_complex() else f"the rule {rule.name!r} is not"
        return f"the parameter is complex ({param.dtype}), {what}"
    if rule.look is not None and is_flat(param):
        return f"it is {FLAT}"
    if param.device.type == "meta":
        return "the parameter is on the meta device, where tensors have no memory"
    if overlaps_itself(param):
        return f"its memory overlaps itself (strides {param.stride()}, as after expand)"
    if grad.shape != param.shape:
        return f"its gradient has the shape {tuple(grad.shape)}"
    if grad.device != param.device:
        return f"its gradient is on {grad.device}, the parameter on {param.device}"
    if not mine:
        return None
    if lacking := incomplete(rule, mine):
        return f"its state lacks {lacking}"
    for name in slots:
        if mine.get(name) is not None and (why := _why_not_state(param, mine[name])):
            return f"its state {name!r} {why}"
    return None if mine.get(STEP) is None else _why_not_step(param, mine[STEP])


def _unused(rule: Rule, mine: State, slots: tuple[str, ...]) -> list[tuple[State, str, Tensor]]:
    """The states of slots that are switched off, of a parameter that has not taken a step."""
    names = [
        slot.name for slot in rule.slots if slot.when and slot.name not in slots and mine.get(slot.name) is not None
    ]
    if not names or STEP not in mine or bool(mine[STEP] > 0):
        return []
    return [(mine, name, mine[name]) for name in names]


def incomplete(rule: Rule, mine: Mapping[str, Any]) -> str:
    """What the state of a parameter lacks, given what else is in it; empty if it can be used as it is."""
    needed = [slot.name for slot in rule.slots if slot.when is None]
    needed = [*needed, STEP] if needed and rule.counts else needed
    missing = [name for name in needed if mine.get(name) is None]
    return ", ".join(missing) if len(missing) < len(needed) else ""


def _why_not_state(param: Tensor, tensor: Any) -> str | None:
    if not isinstance(tensor, Tensor):
        return f"must be a tensor, got {tensor!r}"
    if why := why_not_plain(tensor, "it", param.is_complex()):
        return f"cannot be used: {why}"
    if tensor.is_complex() != param.is_complex():
        return f"is {tensor.dtype}, the parameter {param.dtype}"
    if tensor.is_conj():
        return "is a view with the conjugate bit set; resolve_conj() makes it a plain tensor"
    if tensor.shape != param.shape:
        return f"has the shape {tuple(tensor.shape)}"
    if tensor.device != param.device:
        return f"is on {tensor.device}, the parameter on {param.device}"
    return "overlaps itself in memory" if overlaps_itself(tensor) else None


def _why_not_step(param: Tensor, step: Any) -> str | None:
    if isinstance(step, Tensor) and (step.dtype, step.shape, step.device) == (torch.float32, (), param.device):
        why = _why_not_readable(step, "it")
        return why and f"its state 'step' cannot be used: {why}"
    return f"its state 'step' must be a 0-d fp32 tensor on {param.device}, got {step!r}"


def why_not_plain(tensor: Tensor, what: str, complex_too: bool = False) -> str | None:
    """Why a kernel cannot work on this kind of tensor, or None if it can. ``what`` is what the message calls it.

    ``complex_too``: it may be complex, and is looked at as real.
    """
    if type(tensor) in _USUAL and tensor.layout is torch.strided and tensor.is_floating_point():
        return _why_not_readable(tensor, what)
    sharded = sys.modules.get("torch.distributed.tensor")  # not imported: then there is no DTensor
    if sharded is not None and isinstance(tensor, sharded.DTensor):
        return f"{what} is a DTensor; sharded parameters are not supported yet"
    if tensor.layout != torch.strided:
        return f"{what} is sparse ({tensor.layout}); only dense tensors are supported"
    if tensor.is_complex() and not complex_too:
        return f"{what} is complex ({tensor.dtype}); complex tensors are not supported here"
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return f"{what} has the integer dtype {tensor.dtype}; only floating-point tensors are supported"
    if getattr(type(tensor), "__torch_dispatch__", None) is not _PLAIN_DISPATCH:
        return f"{what} is a {type(tensor).__name__}, which stands for other tensors; only plain ones are supported"
    return _why_not_readable(tensor, what)


def _as_real(tensor: Tensor) -> Tensor:
    """The same memory as real numbers."""
    return torch.view_as_real(tensor.detach())


def _measured_mask(param: Tensor, mask: int) -> int:
    """What a step that measures everything reduces of a parameter as the kernel sees it."""
    if not param.is_complex():
        return measured_mask(mask, param.ndim)
    return axis_mask("out", param.ndim + 1) if param.ndim >= 2 else ALL_DIMS


def plain(tensor: Tensor) -> Tensor:
    """The tensor without its class, so that what is made like it has none either."""
    return tensor if type(tensor) in _USUAL else tensor.detach().as_subclass(Tensor)


def _why_not_readable(tensor: Tensor, what: str) -> str | None:
    """Why the memory of a tensor cannot be taken for its elements, or None if it can."""
    if torch.nn.parameter.is_lazy(tensor):
        return None  # it has no shape yet; what else is wrong with it is found elsewhere
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return f"{what} was made in inference mode, and cannot be changed outside of it"
    if tensor._is_zerotensor():
        return f"{what} is a zero tensor without memory (as forward-mode differentiation makes them)"
    if tensor.is_neg():
        return f"{what} is a view with the negative bit set; resolve_neg() makes it a plain tensor"
    if tensor.ndim > MAX_DIMS:
        return f"{what} has {tensor.ndim} dimensions; at most {MAX_DIMS} are supported"
    if lacks_memory(tensor):
        return (
            f"{what} has a storage of {tensor.untyped_storage().nbytes()} bytes, too small for the shape "
            f"{tuple(tensor.shape)} and the strides {tensor.stride()}"
        )
    return None


def lacks_memory(tensor: Tensor) -> bool:
    """Whether the storage of a dense tensor ends before its last element, as after ``untyped_storage().resize_(0)``."""
    if tensor.layout is not torch.strided or not tensor.numel():
        return False
    end = tensor.storage_offset() + _reach(tensor) + 1
    return end * tensor.element_size() > tensor.untyped_storage().nbytes()


def _reach(tensor: Tensor) -> int:
    """How many elements the last one lies behind the first one."""
    return sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements lie in the same place. Strides with gaps are fine, expanded tensors are not."""
    if tensor.is_contiguous() or tensor.numel() < 2:
        return False
    reach, apart = 0, True
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride == 0:
                return True
            apart = apart and stride > reach
            reach += stride * (size - 1)
    if apart or reach + 1 < tensor.numel():
        return not apart
    return torch.unique(_places(tensor)).numel() < tensor.numel()


def overlapping(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Two of the tensors that have an element in common, by index; None if there are none."""
    spans: dict[torch.device, list[tuple[int, int, int]]] = defaultdict(list)
    for k, tensor in enumerate(tensors):
        if elements := tensor.numel():
            if not tensor.is_contiguous():
                elements = 1 + _reach(tensor)
            start = tensor.data_ptr()
            spans[tensor.device].append((start, start + elements * tensor.element_size(), k))
    for device, found in spans.items():
        if device.type == "meta":
            continue
        found.sort()
        end, cluster = 0, []
        for start, stop, k in found:
            if start >= end:
                cluster.clear()
            for other in cluster:
                if _share_an_element(tensors[other], tensors[k]):
                    return min(other, k), max(other, k)
            cluster.append(k)
            end = max(end, stop)
    return None


def _share_an_element(one: Tensor, other: Tensor) -> bool:
    """The exact answer for two tensors whose spans overlap: columns of one matrix, say, share nothing."""
    size = one.element_size()
    behind = other.data_ptr() - one.data_ptr()
    if other.element_size() != size or behind % size:
        return True
    if _in_lanes(_dims(one), _dims(other), behind // size):
        return False
    return bool(torch.isin(_places(one), _places(other)).any())


def _dims(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions along which there is more than one element."""
    return [dim for dim in zip(tensor.stride(), tensor.shape, strict=True) if dim[1] > 1]


def _in_lanes(one: list[tuple[int, int]], other: list[tuple[int, int]], behind: int) -> bool:
    """Whether the strides alone show that two tensors share nothing; ``other`` begins ``behind`` places after ``one``.

    Of two columns or halves of one matrix, each keeps to a range of its own within every period of their largest
    stride. False says nothing.
    """
    period = max(one, default=(0, 0))[0]
    if period == 0 or period != max(other, default=(0, 0))[0]:
        return False
    first = 1 + sum(stride * (size - 1) for stride, size in one if stride != period)
    second = 1 + sum(stride * (size - 1) for stride, size in other if stride != period)
    return first <= behind % period <= period - second


def _places(tensor: Tensor) -> Tensor:
    """Where every element lies, in units of its size. It takes time and memory, so it is the last resort."""
    places = torch.tensor(tensor.data_ptr() // tensor.element_size(), device="cpu")
    for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
        places = places.unsqueeze(-1) + stride * torch.arange(size, device="cpu")
    return places.flatten()


def _all_apart(grads: Sequence[Tensor]) -> bool:
    """Whether the gradients begin at different places; those without elements are nowhere."""
    try:
        places = [place for place in map(Tensor.data_ptr, grads) if place]
    except RuntimeError:  # one is sparse, say: a new plan finds the words
        return False
    return len(set(places)) == len(places)
