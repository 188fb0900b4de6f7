"""``WeightRescaler``: weight rescaling after each step of any torch optimizer."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fastwrs.measuring import Scope
from fastwrs.optim.base import FusedOptimizer
from fastwrs.options import Rescale
from fastwrs.plan import FLAT, LAZY, is_flat, label, overlapping, why_not, why_not_dtype
from fastwrs.spec import RULES
from fastwrs.wrapper import unwrapped

_ndim_of = attrgetter("ndim")
_params_of = itemgetter("params")


class WeightRescaler:
    """Weight rescaling (WRS) for optimizers that do not have it: ``w <- w * target / |w|`` after their step.

    The norms and the projection of all parameters are one pass over memory (8 bytes per fp32 parameter). It is for
    Muon, Adafactor, optimizers of your own and whatever else is a ``torch.optim.Optimizer``; those of fastwrs rescale
    in the pass of their update, which is cheaper.

    After a step of the optimizer each of its parameters that has a gradient then takes a step of the rescaler, which
    counts them by itself, parameter by parameter and from 1: ``every``, ``start`` and ``stop`` mean these counts, which
    begin when the rescaler is made. (An optimizer that frees gradients in its step leaves nothing to rescale.) A step
    that a ``GradScaler`` skips is none here either, nor is one in which all learning rates are 0, as
    ``torch.distributed.checkpoint`` takes; a group whose learning rate is 0 is not rescaled. Param groups that are
    added later are looked at too. A group whose norm is 0 or not finite stays as it is. To begin with rescaled weights,
    call :func:`fastwrs.rescale_` once.

    It wraps the ``step`` of this optimizer, as learning rate schedulers do. A resumed training needs :meth:`state_dict`
    beside that of the optimizer. Optimizers leave such wrappers behind when they are copied or pickled: copy or pickle
    the rescaler, and it brings its optimizer along.

    Args:
        optimizer: any ``torch.optim.Optimizer``, or the wrapper that a training framework has put around one; what it
            does to weights outside of ``step`` is not seen.
        rescale: when, over which dimensions and to what norm.
        params: parameters of the optimizer. None: all of its parameters that are real and have at least 2 dimensions,
            those of groups that come later included.
        backend: as for the optimizers of fastwrs.

    Raises:
        TypeError, ValueError: an argument is not allowed, or a parameter does not have the axis; the message names it.

    Example:
        >>> optimizer = torch.optim.Muon([model.fc.weight], lr=0.02)
        >>> rescaler = fastwrs.WeightRescaler(optimizer, fastwrs.Rescale(every=4))
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     loss_fn(model(x), y).backward()
        ...     optimizer.step()  # and every fourth time the norms are set

    Source: Liu et al., *Weight Rescaling*, Algorithm 1, lines 8 to 17.
    """

    optimizer: Optimizer
    _params: list[Tensor] | None
    _wrapper: Any = None
    """What takes the place of the optimizer's ``step``; None once the rescaler is removed."""
    _replaced: Any = None
    """A ``step`` that the optimizer itself had before, and not its class."""

    def __init__(
        self,
        optimizer: Optimizer,
        rescale: Rescale,
        params: Tensor | Iterable[Tensor] | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        optimizer = unwrapped(optimizer)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"WeightRescaler: optimizer must be an Optimizer, got {type(optimizer).__name__}")
        if not isinstance(rescale, Rescale):
            raise TypeError(f"WeightRescaler: rescale must be a fastwrs.Rescale, got {rescale!r}")
        self.optimizer = optimizer
        self._params = None if params is None else _listed(optimizer, params)
        self._projector = _Projector(rescale, backend)
        self._follow()
        if not any(group["params"] for group in self._projector.param_groups):
            why = "no parameter has 2 dimensions or more" if params is None else "params is empty"
            raise ValueError(f"WeightRescaler: there is nothing to rescale, {why}")
        self._attach()

    def remove(self) -> None:
        """Leaves the optimizer alone from now on."""
        if self._wrapper is not None and vars(self.optimizer).get("step") is self._wrapper:
            del self.optimizer.step  # otherwise others have wrapped it since, and find a wrapper that does nothing
            if self._replaced is not None:
                self.optimizer.step = self._replaced
        self._wrapper = self._replaced = None

    def state_dict(self) -> dict[str, Any]:
        """The options and the step counts, in the form of an optimizer's state dict."""
        self._follow()
        return self._projector.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict; the saved options win.

        Raises:
            ValueError, TypeError: the dict does not fit. The message says where; nothing has changed.
        """
        self._follow()
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"WeightRescaler: a state dict must be a mapping, got {state_dict!r}")
        groups = state_dict.get("param_groups", ())
        if any(isinstance(group, Mapping) and group.get("rescale", "") is None for group in groups):
            raise ValueError("WeightRescaler: a param group of the state dict is not rescaled (rescale is None)")
        self._projector.load_state_dict(dict(state_dict))

    def __copy__(self) -> Any:
        raise TypeError("WeightRescaler: a shallow copy would rescale the same optimizer once more; use copy.deepcopy")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_wrapper": self._wrapper is not None, "_replaced": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _wrapper=None)
        if state["_wrapper"]:
            self._attach()

    def __repr__(self) -> str:
        found = list(dict.fromkeys(group["rescale"] for group in self._projector.param_groups))
        return f"WeightRescaler({type(self.optimizer).__name__}, {found[0] if len(found) == 1 else found})"

    def _attach(self) -> None:
        # Not PyTorch's hooks: they run once for each class whose `step` calls that of its base, and some optimizers
        # have none. Groups are looked at before, so that what cannot be rescaled is refused while nothing has changed.
        inner = self.optimizer.step

        @functools.wraps(inner)
        def step(optimizer: Optimizer, *args: Any, **options: Any) -> Any:
            if optimizer is not self.optimizer:  # a copy that has taken the wrapper along
                return type(optimizer).step(optimizer, *args, **options)
            if self._wrapper is None:
                return inner(*args, **options)
            self._follow()
            result = inner(*args, **options)
            self._project()
            return result

        self._replaced = vars(self.optimizer).get("step")
        self._wrapper = MethodType(step, self.optimizer)  # schedulers take a bound method
        self.optimizer.step = self._wrapper

    @_disable_dynamo
    def _follow(self) -> None:
        """Gives the projector the param groups of the optimizer as they are now."""
        theirs = self.optimizer.param_groups
        if not self._projector.knows(theirs):
            self._warn_of_strangers()
            self._projector.follow(theirs, [self._places(group, g) for g, group in enumerate(theirs)])
        for mine, group in zip(self._projector.param_groups, theirs, strict=True):
            lr = group.get("lr")
            # Whether it is 0 is all that counts, and not every optimizer has a number there. To look at one on a device
            # would wait for that.
            mine["lr"] = lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(bool(lr != 0))

    def _warn_of_strangers(self) -> None:
        """Of parameters that were asked for and that the optimizer has no longer, or others in their place."""
        here = {id(param) for group in self.optimizer.param_groups for param in group["params"]}
        for k, param in enumerate(self._params or ()):
            if id(param) not in here:
                warnings.warn(
                    f"WeightRescaler: params[{k}] (shape {tuple(param.shape)}) is none of the optimizer's any "
                    "more, and is not rescaled",
                    stacklevel=4,
                )

    def _places(self, group: Mapping[str, Any], g: int) -> list[int]:
        """Which parameters of a group are rescaled."""
        if group.get("differentiable"):
            raise ValueError(f"WeightRescaler: param_groups[{g}] is differentiable, which a step in place is not")
        if self._params is not None:
            chosen = set(map(id, self._params))
            return [i for i, param in enumerate(group["params"]) if id(param) in chosen]
        for i, param in enumerate(group["params"]):
            if is_flat(param):
                raise ValueError(f"WeightRescaler: {label(group, g, i)}: it is {FLAT}")
            if is_lazy(param):
                raise ValueError(f"WeightRescaler: {label(group, g, i)} {LAZY}")
        return [i for i, param in enumerate(group["params"]) if param.ndim >= 2 and param.is_floating_point()]

    @_disable_dynamo
    def _project(self) -> None:
        if all(isinstance(group["lr"], float) and group["lr"] == 0 for group in self._projector.param_groups):
            return
        # A GradScaler gives it to optimizers that skip steps by themselves; for others it does not call step at all.
        self._projector.project(getattr(self.optimizer, "found_inf", None))


def _listed(optimizer: Optimizer, params: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The parameters as a list, each of which the optimizer has."""
    if not isinstance(params, Iterable):
        raise TypeError(f"WeightRescaler: params must be tensors, got {type(params).__name__}")
    listed = [params] if isinstance(params, Tensor) else list(params)
    known = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for k, param in enumerate(listed):
        if not isinstance(param, Tensor):
            raise TypeError(f"WeightRescaler: params[{k}] must be a tensor, got {type(param).__name__}")
        if id(param) not in known:
            raise ValueError(f"WeightRescaler: params[{k}] (shape {tuple(param.shape)}) is none of the optimizer's")
    return listed


class _Projector(FusedOptimizer):
    """An optimizer that updates nothing and rescales. Its groups are those of another one, place by place."""

    rule = RULES["project"]
    found_inf: Any = None
    _theirs: tuple[tuple[Tensor, ...], ...] = ()
    _ndims: tuple[int, ...] = ()

    def __init__(self, rescale: Rescale, backend: str) -> None:
        defaults = {"lr": 1.0, "maximize": False, "differentiable": False}
        super().__init__([{"params": []}], defaults, rescale=rescale, shrink=None, state_dtype=None, backend=backend)
        self.param_groups.clear()

    def knows(self, theirs: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the groups have the parameters that they had when it followed last."""
        if len(theirs) != len(self._theirs) or not all(
            len(group["params"]) == len(known) and all(map(is_, group["params"], known))
            for group, known in zip(theirs, self._theirs, strict=True)
        ):
            return False
        return tuple(map(_ndim_of, self._rescaled())) == self._ndims

    def _rescaled(self) -> Iterable[Tensor]:
        return chain.from_iterable(map(_params_of, self.param_groups))

    def follow(self, theirs: Sequence[Mapping[str, Any]], places: list[list[int]]) -> None:
        """Takes over the parameters at these places of all groups, or on an error of none; its own options stay."""
        groups = []
        for g, (group, chosen) in enumerate(zip(theirs, places, strict=True)):
            own = self.param_groups[g] if g < len(self.param_groups) else self._options()
            groups.append({**own, "params": [group["params"][i] for i in chosen]})
            if "param_names" in group:
                groups[g]["param_names"] = [group["param_names"][i] for i in chosen]
            try:
                self._check(groups[g], g)
            except ValueError as error:
                raise ValueError(f"WeightRescaler: {error}") from None
        every = [(group, g, i) for g, group in enumerate(groups) for i in range(len(group["params"]))]
        if clash := overlapping([group["params"][i] for group, _, i in every]):
            one, other = (label(*every[k]) for k in clash)
            raise ValueError(f"WeightRescaler: {one} and {other} share memory")
        self.param_groups[:] = groups
        self._theirs = tuple(tuple(group["params"]) for group in theirs)
        self._ndims = tuple(map(_ndim_of, self._rescaled()))
        left = set(map(id, self._rescaled()))
        for param in [param for param in self.state if id(param) not in left]:
            del self.state[param]

    def _check(self, group: dict[str, Any], g: int) -> None:
        self.check_group(group, g)
        for i, param in enumerate(group["params"]):
            if why := why_not(self.rule, param, param, {}, ()) or why_not_dtype(param):
                raise ValueError(f"{label(group, g, i)}: {why}")

    def _options(self) -> dict[str, Any]:
        """Those of a group that comes: as the others', which may have been loaded."""
        known = self.param_groups[0] if self.param_groups else self.defaults
        return {**self.defaults, "rescale": known["rescale"]}

    @torch.no_grad()
    def project(self, found_inf: Any) -> None:
        """A step, without the hooks that all optimizers of a process may have."""
        self.found_inf = found_inf
        try:
            self._take_step(Scope.NOTHING)
        finally:
            self.found_inf = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._theirs = ()  # a copy has other parameters


_Projector.__name__ = WeightRescaler.__name__  # which is what messages about its state dict are about
