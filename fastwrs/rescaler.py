"""``WeightRescaler``: weight rescaling after each step of any torch optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from fastwrs.measuring import Scope
from fastwrs.optim.base import FusedOptimizer
from fastwrs.options import Rescale
from fastwrs.plan import label, why_not
from fastwrs.spec import RULES
from fastwrs.wrapper import unwrapped

_NAMES = "param_names"


class WeightRescaler:
    """Weight rescaling (WRS) for optimizers that do not have it: ``w <- w * target / |w|`` after their step.

    The norms and the projection of all parameters are one pass over memory (8 bytes per fp32 parameter). It is for
    Muon, Adafactor, optimizers of your own and whatever else is a ``torch.optim.Optimizer``; those of fastwrs rescale
    in the pass of their update, which is cheaper. ::

        optimizer = torch.optim.Muon(matrices, lr=0.02)
        rescaler = fastwrs.WeightRescaler(optimizer, fastwrs.Rescale(every=4))
        for x, y in loader:
            ...
            optimizer.step()  # and every fourth time the norms are set

    After a step of the optimizer each of its parameters that has a gradient takes a step of the rescaler, which counts
    them by itself, parameter by parameter and from 1: ``every``, ``start`` and ``stop`` mean these counts, which begin
    when the rescaler is made. A step that a ``GradScaler`` skips is none here either, nor does one rescale while the
    learning rate of the parameter's group is 0. Param groups that are added later are looked at too. A group whose norm
    is 0 or not finite stays as it is. To begin with rescaled weights, call :func:`fastwrs.rescale_` once.

    A resumed training needs :meth:`state_dict` beside that of the optimizer. Optimizers drop their hooks when they are
    copied or pickled, and so the rescaler: copy or pickle it, and it brings its optimizer along.

    Args:
        optimizer: any ``torch.optim.Optimizer``, or the wrapper that a training framework has put around one; what it
            does to weights outside of ``step`` is not seen.
        rescale: when, over which dimensions and to what norm.
        params: parameters of the optimizer. None: all of its parameters that are real and have at least 2 dimensions,
            those of groups that come later included.
        backend: as for the optimizers of fastwrs.

    Raises:
        TypeError, ValueError: an argument is not allowed, or a parameter does not have the axis; the message names it.

    Source: Liu et al., *Weight Rescaling*, Algorithm 1, lines 8 to 17.
    """

    rule = RULES["project"]
    optimizer: Optimizer
    _params: list[Tensor] | None
    _chosen: set[int]
    _hooks: tuple[Any, ...] = ()

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
        self._chosen = set(map(id, self._params or ()))
        self._projector = _Projector(rescale, backend)
        self._follow()
        if not any(group["params"] for group in self._projector.param_groups):
            raise ValueError("WeightRescaler: there is nothing to rescale, no parameter has 2 dimensions or more")
        self._attach()

    def remove(self) -> None:
        """Leaves the optimizer alone from now on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def state_dict(self) -> dict[str, Any]:
        """The options and the step counts, in the form of an optimizer's state dict."""
        return self._projector.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict; the saved options win.

        Raises:
            ValueError, TypeError: the dict does not fit. The message says where; nothing has changed.
        """
        self._follow()
        self._projector.load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_hooks": len(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _hooks=())
        self._chosen = set(map(id, self._params or ()))  # copies have other ids
        if state["_hooks"]:
            self._attach()

    def __repr__(self) -> str:
        found = list(dict.fromkeys(group["rescale"] for group in self._projector.param_groups))
        return f"WeightRescaler({type(self.optimizer).__name__}, {found[0] if len(found) == 1 else found})"

    def _attach(self) -> None:
        # Groups are looked at before the step, so that what cannot be rescaled is refused before anything has changed.
        self._hooks = (
            self.optimizer.register_step_pre_hook(lambda *_: self._follow()),
            self.optimizer.register_step_post_hook(lambda *_: self._project()),
        )

    @_disable_dynamo
    def _follow(self) -> None:
        """Gives the projector the param groups of the optimizer as they are now."""
        theirs = self.optimizer.param_groups
        if not self._projector.knows(theirs):
            self._projector.follow(theirs, [self._places(group, g) for g, group in enumerate(theirs)])
        for mine, group in zip(self._projector.param_groups, theirs, strict=True):
            lr = group.get("lr")
            # Whether it is 0 is all that counts, and not every optimizer has a number there.
            mine["lr"] = lr if isinstance(lr, Tensor) else float(lr != 0)

    def _places(self, group: Mapping[str, Any], g: int) -> list[int]:
        """Which parameters of a group are rescaled."""
        if self._params is not None:
            return [i for i, param in enumerate(group["params"]) if id(param) in self._chosen]
        for i, param in enumerate(group["params"]):
            if is_lazy(param):
                raise ValueError(f"WeightRescaler: {label(group, g, i)} has no shape yet: run the model once before")
        return [i for i, param in enumerate(group["params"]) if param.ndim >= 2 and param.is_floating_point()]

    @_disable_dynamo
    def _project(self) -> None:
        # A GradScaler gives it to optimizers that skip steps by themselves; for others it does not call step at all.
        self._projector.project(getattr(self.optimizer, "found_inf", None))


def _listed(optimizer: Optimizer, params: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The parameters as a list, each of which the optimizer has."""
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

    def __init__(self, rescale: Rescale, backend: str) -> None:
        defaults = {"lr": 1.0, "maximize": False, "differentiable": False}
        super().__init__([{"params": []}], defaults, rescale=rescale, shrink=None, state_dtype=None, backend=backend)
        self.param_groups.clear()

    def knows(self, theirs: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the groups have the parameters that they had when it followed last."""
        return len(theirs) == len(self._theirs) and all(
            len(group["params"]) == len(known) and all(map(is_, group["params"], known))
            for group, known in zip(theirs, self._theirs, strict=True)
        )

    def follow(self, theirs: Sequence[Mapping[str, Any]], places: list[list[int]]) -> None:
        """Takes over the parameters at these places of all groups, or on an error of none; its own options stay."""
        groups = []
        for g, (group, chosen) in enumerate(zip(theirs, places, strict=True)):
            own = self.param_groups[g] if g < len(self.param_groups) else self.defaults
            groups.append({**own, "params": [group["params"][i] for i in chosen]})
            if "param_names" in group:
                groups[g]["param_names"] = [group["param_names"][i] for i in chosen]
            try:
                self._check(groups[g], g)
            except ValueError as error:
                raise ValueError(f"WeightRescaler: {error}") from None
        self.param_groups[:] = groups
        self._theirs = tuple(tuple(group["params"]) for group in theirs)
        left = {id(param) for group in groups for param in group["params"]}
        for param in [param for param in self.state if id(param) not in left]:
            del self.state[param]

    def _check(self, group: dict[str, Any], g: int) -> None:
        self.check_group(group, g)
        for i, param in enumerate(group["params"]):
            if why := why_not(self.rule, param, param, {}, ()):
                raise ValueError(f"{label(group, g, i)}: {why}")

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
