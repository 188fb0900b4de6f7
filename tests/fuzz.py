"""Lives of an optimizer, drawn by hypothesis: whatever users do to one through the public API, against the oracle.

Each step is compared by itself. The oracle takes the weights, gradients and states that are there before it, but knows
by itself what it is to do with them: options, step counts, which states there are and which start late are kept here,
from what was done to the optimizer, and never read from it. What a step or another action is not to change is compared
bit by bit, the memory around the tensors too.

What hypothesis prints of a life that fails can be pasted into a test as ``live(Life(...))``.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
from calls import bits, one_thread
from cases import dims_of
from life import (
    Add,
    Bad,
    Change,
    Copy,
    Group,
    Life,
    Options,
    Rebind,
    Reload,
    Scalar,
    Step,
    Watch,
    Weight,
    ZeroGrad,
    gradient,
    laid,
    lifted,
    scale,
    settled,
    weights,
)
from tolerances import Inputs, check_soon
from torch import Tensor, nn

import fastwrs
from fastwrs import dispatch
from fastwrs.reference import rescale_due
from fastwrs.reference.rules import gate
from fastwrs.spec import MEASURED, NO_STOP, RULES

kept = dispatch.cpu.kept
LONG = 2000
TAMED = {("sgd", "huge"): "large", ("sgd_shifted", "huge"): "large", ("adamp", "huge"): "large"}
TAMED |= {("sgdp", "huge"): "large", ("sgdp", "sparse"): "plain"}
"""Gradients for which another takes the place: what is left of huge momentum, once it is rescaled or removed, is all
rounding; and of a projection that is all but 0, where momentum is 0."""
GATE_MARGIN = 1e-3
"""How far, relative, the threshold of a gate is to be from the cosines, so that no rounding decides."""


def live(life: Life) -> None:
    """Lives the life; AssertionError where the optimizer does what it should not, or not what it should.

    With an odd number of actions, C++ keeps the shortest of lists from one step to the next.
    """
    with one_thread(), mock.patch.object(kept, "FEWEST", 1 if len(life.actions) % 2 else kept.FEWEST):
        _Living(life).run()


# ---- options --------------------------------------------------------------------------------------------------------


def _made(options: Options) -> Options:
    """The options as an optimizer takes them, with tensors of their own."""

    def made(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(made, value))
        return value.tensor() if isinstance(value, Scalar) else value

    return {name: made(value) for name, value in options.items()}


def _number(value: Any) -> float:
    return float(value.tensor()) if isinstance(value, Scalar) else float(value)


def _fits(options: Options, shapes: list[tuple[int, ...]]) -> bool:
    """Whether parameters of these shapes have the norm groups that the options ask for."""
    axes = {option.axis for option in (options["rescale"], options["shrink"]) if option is not None}
    for axis in axes:
        named = [axis] if isinstance(axis, int) else axis
        for ndim in map(len, shapes):
            if axis in ("out", "in") and ndim < 2:
                return False
            if not isinstance(named, str) and len({dim % ndim for dim in named if -ndim <= dim < ndim}) < len(named):
                return False
    return len(axes) <= 1


def _dims(options: Options, ndim: int, measuring: bool) -> tuple[int, ...] | None:
    """The reduced dimensions; a tensor without norm groups is measured by its output channels, or as a whole."""
    option = options["rescale"] or options["shrink"]
    if option is None:
        return dims_of("out" if ndim >= 2 else "tensor", ndim) if measuring else None
    return dims_of((option.axis,) if isinstance(option.axis, int) else option.axis, ndim)


def _hyper(rule: str, options: Options) -> dict[str, float]:
    """The numbers of the oracle."""
    numbers: Options = {"lr_tensor": -1, "every": 0, "start": 0, "stop": NO_STOP, "target": 1, "rate": 0, "power": 1}
    if (rescale := options["rescale"]) is not None:
        numbers |= {name: getattr(rescale, name) for name in ("every", "start", "target")}
        numbers["stop"] = NO_STOP if rescale.stop is None else rescale.stop
    if (shrink := options["shrink"]) is not None:
        numbers |= {"rate": shrink.rate, "power": shrink.power}
    if "betas" in options:
        numbers |= dict(zip(("beta1", "beta2"), options["betas"], strict=True))
    if rule == "sgd_shifted":
        numbers |= dict(zip(("shifted_l2_lam", "shifted_l2_eps"), options["shifted_l2"] or (0, 0), strict=True))
    return {hyper.name: _number({**options, **numbers}[hyper.name]) for hyper in RULES[rule].record}


# ---- a life ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Tracked:
    """A parameter, and what is known of it."""

    name: str
    weight: Weight
    param: nn.Parameter
    buffer: Tensor | None
    grad_buffer: Tensor | None = None
    t: int = 0
    slots: set[str] = field(default_factory=set)

    @property
    def grad_dtype(self) -> torch.dtype:
        return getattr(torch, self.weight.grad_dtype or self.weight.dtype)

    def memory_is_intact(self) -> bool:
        for buffer, tensor in ((self.buffer, self.param), (self.grad_buffer, self.param.grad)):
            if buffer is not None and tensor is not None:
                around = buffer.clone()
                around.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).zero_()
                if int((~around.isnan()).sum()) != tensor.numel():
                    return False
        return True


class _Living:
    """A life while it is lived."""

    def __init__(self, life: Life) -> None:
        self.life, self.kind = life, getattr(fastwrs, life.kind)
        self.monitor: fastwrs.Monitor | None = None
        self.monitored = 0
        self.left: list[tuple[_Living, Any]] = []
        """Those that copies were made of, and what they were then."""
        self.tracked: list[list[_Tracked]] = [self.parameters(g, group) for g, group in enumerate(life.groups)]
        self.construct([group.options for group in life.groups], life.options)

    def run(self) -> None:
        for action in self.life.actions:
            getattr(self, f"on_{type(action).__name__.lower()}")(action)
            assert self.options_are_those_known()
            assert all(tracked.memory_is_intact() for tracked in self.every())
        assert all(original.memory() == before for original, before in self.left), "a copy shares something"

    # ---- what there is ----

    def every(self) -> Iterator[_Tracked]:
        for group in self.tracked:
            yield from group

    def parameters(self, g: int, group: Group) -> list[_Tracked]:
        """The parameters of group number ``g``."""
        made = []
        for i, weight in enumerate(group.weights):
            values = weights(weight, 1000 * g + i)
            buffer, tensor = laid(values, weight.layout, getattr(torch, weight.dtype))
            name = f"layer{g}.{i}" if self.life.named else f"params[{g}][{i}]"
            made.append(_Tracked(name, weight, nn.Parameter(tensor), buffer))
        return made

    def construct(self, given: list[Options], options: Options) -> None:
        """Makes the optimizer, with these options of the groups and of the whole."""
        signature = inspect.signature(self.kind).parameters.values()
        ours = {p.name: p.default for p in signature if p.name not in ("params", "state_dtype", "backend")}
        if self.life.kind == "AdamW":
            ours["decoupled_weight_decay"] = True
        self.defaults: Options = ours | options
        self.known = [self.defaults | of_group for of_group in given]
        groups = [self.entry(group, of_group) for group, of_group in zip(self.tracked, given, strict=True)]
        more = {"state_dtype": getattr(torch, self.life.state_dtype)} if self.life.state_dtype else {}
        self.optimizer = self.kind(groups, **_made(options), **more, backend="cpu")

    def entry(self, group: list[_Tracked], options: Options) -> Options:
        """A param group as the optimizer takes it."""
        named = [(tracked.name, tracked.param) for tracked in group]
        return {"params": named if self.life.named else [param for _, param in named], **_made(options)}

    @property
    def rule(self) -> str:
        if self.life.kind == "SGD" and any(options["shifted_l2"] is not None for options in self.known):
            return "sgd_shifted"
        return self.kind.rule.name

    def options_are_those_known(self) -> bool:
        def same(ours: Any, known: Any) -> bool:
            if isinstance(known, tuple):
                return len(ours) == len(known) and all(map(same, ours, known))
            if isinstance(known, Scalar):
                return isinstance(ours, Tensor) and torch.equal(ours, known.tensor())
            return ours == known

        groups = self.optimizer.param_groups
        assert len(groups) == len(self.known)
        for group, known, tracked in zip(groups, self.known, self.tracked, strict=True):
            assert [*map(id, group["params"])] == [id(one.param) for one in tracked]
            assert all(same(group[name], value) for name, value in known.items()), f"{group} is not {known}"
        return True

    def state(self, tracked: _Tracked) -> dict[str, Tensor]:
        """The states of a parameter. Skipped steps may have made some, in which there has to be nothing."""
        state = dict(self.optimizer.state.get(tracked.param, {}))
        # A momentum buffer of zeros has begun, once there is a count; a maximum of zeros has not.
        begun = {"step", *tracked.slots} if tracked.t else set()
        for name in state.keys() - begun if tracked.t == 0 else {"max_exp_avg_sq"} - begun:
            assert name not in state or not bool(state.pop(name).any()), f"a skipped step has left its {name}"
        if not tracked.t:
            return {}
        assert state.keys() == {"step", *tracked.slots}, f"states are {[*state]}, {sorted(tracked.slots)} are known"
        assert state["step"].item() == tracked.t, f"{state['step'].item()} steps were counted, {tracked.t} taken"
        return state

    def memory(self, without: set[_Tracked] = frozenset()) -> list[Any]:  # type: ignore[assignment]
        """All that can be seen of the optimizer, but for these parameters: bytes."""

        def bytes_of(tensor: Tensor | None) -> Any:
            return None if tensor is None else (tensor.dtype, bits(tensor).numpy().tobytes())

        def plain(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(plain, value))
            return bytes_of(value) if isinstance(value, Tensor) else value

        groups = self.optimizer.param_groups
        found: list[Any] = [[(name, plain(group[name])) for name in group if name != "params"] for group in groups]
        for tracked in self.every():
            if tracked not in without:
                tensors = {"param": tracked.param, "grad": tracked.param.grad, **self.state(tracked)}
                found.append({name: bytes_of(tensor) for name, tensor in tensors.items()})
        return found

    @contextmanager
    def refused(self, *errors: type[Exception]) -> Iterator[None]:
        """What is done meanwhile is refused, and nothing changes."""
        before = self.memory()
        with pytest.raises(errors) as found:
            yield
        assert len(str(found.value)) > 20, "an error without words"
        assert self.memory() == before, "what was refused has changed something"

    # ---- steps ----

    def on_step(self, step: Step) -> None:
        self.settle()
        gradients = self.gradients(step)

        def give() -> None:
            for tracked, (buffer, grad) in gradients.items():
                tracked.grad_buffer, tracked.param.grad = buffer, None
                if grad is not None:
                    tracked.param.grad = torch.zeros_like(tracked.param)
                    tracked.param.grad.data = grad  # of another dtype than the parameter, and as strided as it is

        def closure() -> Tensor:
            assert torch.is_grad_enabled()
            give()
            return loss

        loss = torch.tensor(float(step.seed))
        give()  # before a closure too: here they are needed now
        scaled = step.grad_scale is not None
        for name in ("grad_scale", "found_inf"):
            if (value := getattr(step, name)) is not None:
                setattr(self.optimizer, name, torch.tensor(value))
        try:
            if scaled and any(map(_overlaps, (tracked.param.grad for tracked in self.every()))):
                with self.refused(RuntimeError):
                    self.optimizer.step()
            else:
                self.take(step, (closure,) if step.closure else (), loss)
        finally:
            for name in ("grad_scale", "found_inf"):
                if hasattr(self.optimizer, name):
                    delattr(self.optimizer, name)

    def take(self, step: Step, closure: tuple[Any, ...], loss: Tensor) -> None:
        """Takes a step that is not refused."""
        due = self.monitor is not None and (self.monitored + 1) % self.monitor.every == 0
        skipped = bool(step.found_inf)
        moving = {} if skipped else self.inputs(step.grad_scale, due)
        before = self.memory(set(moving))
        versions = {tracked: tracked.param._version for tracked in self.every()}
        returned = self.optimizer.step(*closure)
        assert returned is (loss if closure else None)
        self.monitored += self.monitor is not None
        for tracked, inputs in moving.items():
            tracked.t, tracked.slots = inputs.t, tracked.slots | set(inputs.states)
        assert self.memory(set(moving)) == before, "what was to stay has changed"
        figures = self.monitor.latest() if self.monitor is not None and due else {}
        for tracked, inputs in moving.items():
            state = self.state(tracked)
            got = {"param": tracked.param.detach(), "grad": tracked.param.grad}
            got |= {name: state[name] for name in inputs.states}
            if RULES[inputs.rule].gated and self.life.state_dtype:
                pass  # figures of a step that is made of two rounded states: the bounds on norms are for one
            elif tracked.name in figures:
                got["measured"] = torch.stack([figures[tracked.name][name] for name in MEASURED], dim=1)
            else:
                assert not (due and _groups(inputs)), "it was to be measured"
            if _is_promised(inputs):
                check_soon(inputs, got, f"{tracked.name}, step {tracked.t}: ")  # type: ignore[arg-type]
        for tracked, version in versions.items():
            assert (tracked.param._version > version) == (tracked in moving), "the version counter is wrong"

    def settle(self) -> None:
        """Lifts weights as a user may do it, see ``settled``; and momentum that SGDP projects.

        Its projection is all but 0 once it is orthogonal to the weights, and so only a rounding where it is 0 itself.
        """
        with torch.no_grad():
            for tracked in self.every():
                values, state = tracked.param.double(), self.state(tracked)
                momentum = state.get("exp_avg", state.get("momentum_buffer", torch.tensor(0.0)))
                new = settled(values, momentum != 0, scale(tracked.weight), self.rule == "sgd_shifted")
                if not torch.equal(new, values):
                    tracked.param.copy_(new)
                if self.rule == "sgdp" and tracked.t and tracked.param.numel():
                    momentum.copy_(lifted(momentum.double(), torch.tensor(True)))

    def gradients(self, step: Step) -> dict[_Tracked, tuple[Tensor | None, Tensor | None]]:
        """The gradients of a step, with the buffers that they lie in; of those that keep theirs there is none."""
        found: dict[_Tracked, tuple[Tensor | None, Tensor | None]] = {}
        for k, tracked in enumerate(self.every()):
            grad = step.grads[k % len(step.grads)]
            if step.grad_scale and tracked.weight.dtype == "float16" and grad.data in ("kept", "small"):
                grad = replace(grad, data="plain")  # unscaled, they would be below the normal range
            grad = replace(grad, data=TAMED.get((self.rule, grad.data), grad.data))
            if grad.data == "missing":
                found[tracked] = None, None
            if grad.data in ("missing", "kept"):
                continue
            for attempt in range(4):
                seed = 10_000_000 * attempt + 1000 * step.seed + k
                values = gradient(tracked.weight, grad, seed) * (step.grad_scale or 1)
                found[tracked] = laid(values, grad.layout, tracked.grad_dtype)
                if not self.is_a_toss_up(tracked, found[tracked][1], step):
                    break
            else:
                found[tracked] = None, None
        for tracked in self.every():
            if tracked not in found and self.is_a_toss_up(tracked, tracked.param.grad, step):
                found[tracked] = None, None
        return found

    def is_a_toss_up(self, tracked: _Tracked, grad: Tensor | None, step: Step) -> bool:
        """Whether a rounding may decide if a gate is open, or is all that is left of a step behind one."""
        if grad is None or not RULES[self.rule].gated:
            return False
        (options,) = (known for known, group in zip(self.known, self.tracked, strict=True) if tracked in group)
        hyper, w = _hyper(self.rule, options), tracked.param.detach().double()
        seen = [
            gate(w, grad.double() / (step.grad_scale or 1), w, hyper | {"delta": hyper["delta"] * (1 + margin)})[0]
            for margin in (-GATE_MARGIN, GATE_MARGIN)
        ]
        if seen[0] is None or seen[1] is None:
            return seen[0] is not seen[1]
        return not torch.equal(seen[0], seen[1]) or tracked.param[0].numel() == 1

    def inputs(self, grad_scale: float | None, measuring: bool) -> dict[_Tracked, Inputs]:
        """What the oracle takes, for each parameter that will move."""
        rule, found = self.rule, {}
        for options, group in zip(self.known, self.tracked, strict=True):
            slots = RULES[rule].slots_for(options)
            for tracked in group:
                param, grad = tracked.param.detach(), tracked.param.grad
                if grad is None:
                    continue
                state, hyper = self.state(tracked), _hyper(rule, options)
                wide = torch.float64 if param.dtype == torch.float64 else torch.float32
                dtype = getattr(torch, self.life.state_dtype) if self.life.state_dtype else wide
                nothing = torch.zeros(param.shape, dtype=dtype)
                states = {slot: state[slot].clone() if slot in state else nothing for slot in slots}
                found[tracked] = Inputs(
                    rule=rule,
                    param=param.clone(),
                    grad=grad.clone(),
                    states=states,
                    t=tracked.t + 1,
                    first=not set(slots) <= tracked.slots,
                    lr=hyper["lr"],
                    hyper=hyper,
                    dims=_dims(options, param.ndim, measuring),
                    grad_scale=grad_scale,
                )
        return found

    # ---- everything else ----

    def on_reload(self, reload: Reload) -> None:
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        before = [{name: bits(tensor) for name, tensor in self.state(tracked).items()} for tracked in self.every()]
        for values in saved["state"].values():
            values["step"] += reload.late * (values["step"] > 0)
        if reload.anew:
            known, self.monitor = self.known, None
            for tracked in self.every():
                tracked.buffer, tensor = laid(tracked.param.detach().double(), reload.layout, tracked.param.dtype)
                tracked.param, tracked.grad_buffer = nn.Parameter(tensor), None
            self.construct([{} for _ in known], {"lr": 0.5})
            self.known = known
        self.optimizer.load_state_dict(saved)
        rates = [options["lr"] for options in self.known]  # the defaults have none of the tensors that are loaded
        self.exchange({id(lr): replace(lr) for lr in rates if isinstance(lr, Scalar)}, self.known)
        for tracked, states in zip(self.every(), before, strict=True):
            tracked.t += reload.late * (tracked.t > 0)
            after = self.state(tracked)
            assert states.keys() == after.keys()
            assert all(torch.equal(states[name], bits(after[name])) for name in states if name != "step")

    def on_copy(self, action: Copy) -> None:
        original, before = copy.copy(self), self.memory()
        original.tracked = [[replace(tracked) for tracked in group] for group in self.tracked]
        original.known = list(self.known)
        self.optimizer = pickle.loads(pickle.dumps(self.optimizer)) if action.pickled else copy.deepcopy(self.optimizer)
        for group, known in zip(self.tracked, self.optimizer.param_groups, strict=True):
            for tracked, param in zip(group, known["params"], strict=True):
                tracked.param, tracked.buffer, tracked.grad_buffer = param, None, None
                param.grad = None
        self.monitor = None
        self.left.append((original, before))
        without_gradients = [{**of, "grad": None} if isinstance(of, dict) else None for of in before]
        assert [of if isinstance(of, dict) else None for of in self.memory()] == without_gradients

    def on_add(self, add: Add) -> None:
        options = self.defaults | add.group.options
        group = self.parameters(len(self.tracked), add.group)
        if not _fits(options, [weight.shape for weight in add.group.weights]):
            with self.refused(ValueError):
                self.optimizer.add_param_group(self.entry(group, add.group.options))
            return
        self.optimizer.add_param_group(self.entry(group, add.group.options))
        self.tracked.append(group)
        self.known.append(options)

    def on_change(self, change: Change) -> None:
        g = change.group % len(self.known)
        options = self.known[g] | change.options
        if not _fits(options, [tracked.weight.shape for tracked in self.tracked[g]]):
            return self.change_is_refused(g, change.options, ValueError)
        group, lr = self.optimizer.param_groups[g], change.options.get("lr")
        group.update({name: value for name, value in _made(change.options).items() if name != "lr"})
        known = self.known[g]["lr"]
        self.known[g] = options
        if isinstance(known, Scalar) and isinstance(lr, float):
            group["lr"].fill_(lr)
            options["lr"] = known
            self.exchange({id(known): replace(known, value=lr)}, [self.defaults, *self.known])
        elif lr is not None:
            group.update(_made({"lr": lr}))
        return None

    def exchange(self, new: dict[int, Scalar], where: list[Options]) -> None:
        """Puts other learning rates in the place of those with these ids: groups may share one with the defaults."""
        for options in where:
            options["lr"] = new.get(id(options["lr"]), options["lr"])

    def change_is_refused(self, g: int, options: Options, *errors: type[Exception]) -> None:
        """A step refuses the options; then the group has its own again."""
        group = self.optimizer.param_groups[g]
        own = dict(group)
        for tracked in self.every():
            tracked.grad_buffer, tracked.param.grad = None, torch.ones_like(tracked.param)
            tracked.param.grad.data = tracked.param.grad.to(tracked.grad_dtype)
        group.update(_made(options))
        with self.refused(*errors):
            self.optimizer.step()
        group.update(own)
        for name in group.keys() - own.keys():
            del group[name]
        self.optimizer.zero_grad()

    def on_zerograd(self, action: ZeroGrad) -> None:
        to_none = action.set_to_none or any(map(_overlaps, (tracked.param.grad for tracked in self.every())))
        self.optimizer.zero_grad(set_to_none=to_none)
        for tracked in self.every():
            grad = tracked.param.grad
            assert grad is None if to_none else grad is None or not bool(grad.any())

    def on_watch(self, watch: Watch) -> None:
        if self.monitor is not None:
            self.monitor.remove()
        self.monitor = None if watch.every is None else fastwrs.Monitor(self.optimizer, watch.every)
        self.monitored = 0

    def on_rebind(self, rebind: Rebind) -> None:
        every = list(self.every())
        tracked = every[rebind.param % len(every)]
        tracked.buffer, tracked.param.data = laid(tracked.param.detach(), rebind.layout, tracked.param.dtype)

    def on_bad(self, bad: Bad) -> None:
        if bad.where == "change":
            for g in range(len(self.known)):
                self.change_is_refused(g, bad.options, TypeError, ValueError)
        elif bad.where == "gradient":
            tracked = next(self.every())
            wrong = torch.float32 if tracked.param.dtype == torch.float64 else torch.float64
            tracked.grad_buffer, tracked.param.grad = None, torch.zeros_like(tracked.param)
            tracked.param.grad.data = tracked.param.grad.to(wrong)
            with self.refused(RuntimeError, ValueError):
                self.optimizer.step()
            tracked.param.grad = None
        elif bad.where == "load":
            saved = self.optimizer.state_dict()
            saved["param_groups"][-1].update(_made(bad.options))
            with self.refused(TypeError, ValueError):
                self.optimizer.load_state_dict(saved)
        else:
            group = self.parameters(len(self.tracked), Group((Weight((3, 4), self.life.state_dtype or "float32"),)))
            with self.refused(TypeError, ValueError):
                if bad.where == "new":
                    self.kind([self.entry(group, {})], **({"lr": 0.1} | _made(bad.options)))
                else:
                    self.optimizer.add_param_group(self.entry(group, bad.options))


def _overlaps(grad: Tensor | None) -> bool:
    """Whether elements of an expanded gradient share memory."""
    if grad is None or not grad.numel():
        return False
    return any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True))


def _is_promised(inputs: Inputs) -> bool:
    """Whether the tolerance holds: norms are 0 or within 1e-15 and 1e15, and those to be set are changed in earnest.

    A rescale that changes nothing costs the formula nothing, and the kernels what the sums of long rows lose. One of a
    group that its update has all but taken away shows what the difference of the two has lost.
    """
    measured = inputs.run(torch.float64).measured
    if measured is None:
        return True
    columns = dict(zip(MEASURED, measured.unbind(1), strict=True))
    norms = torch.cat([values for name, values in columns.items() if "norm" in name and name != "effective_grad_norm"])
    beyond = (norms != 0) & ((norms < 1e-15) | (norms > 1e15))
    if not rescale_due(inputs.hyper, inputs.t, inputs.lr):
        return not bool(beyond.any())
    idle = (columns["rescale_factor"] - 1).abs() < (1e-4 if inputs.param.numel() > LONG else 0)
    terms = columns["norm_before"] + inputs.lr * columns["update_norm"]
    return not bool(torch.cat([beyond, idle, columns["norm_updated"] < terms / 32]).any())


def _groups(inputs: Inputs) -> int:
    """How many norm groups are measured."""
    dims = inputs.dims
    return 0 if dims is None else math.prod(n for dim, n in enumerate(inputs.param.shape) if dim not in dims)
