"""What all optimizers share: the step, the checks before it, GradScaler support, checkpoints and pickling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from fastwrs import dispatch
from fastwrs.measuring import Measured, Scope, Watcher, buffer_for, give_back, rows_of
from fastwrs.optim import checkpoint
from fastwrs.optim.records import Records, on, read
from fastwrs.options import Rescale, Shrink, common_axis
from fastwrs.plan import Bundle, Plan, StepCall, Triple, build, checked_mask, label, state_dtype_for
from fastwrs.spec import Rule

Launches = list[tuple[Bundle, StepCall]]

PLANS = 8
"""How many plans an optimizer keeps: parameters may take turns in having a gradient."""


class FusedOptimizer(Optimizer):
    """The base of all fastwrs optimizers. A subclass names its rule and gives its hyperparameters."""

    rule: ClassVar[Rule]
    _plans: tuple[Plan, ...] = ()  # all for the same options, parameters and state dicts; the last one used comes first
    _records: Records | None = None
    _watchers: tuple[Watcher, ...] = ()  # who wants to know what a step measures; a copy of the optimizer has none
    _workspaces: dict[torch.device, list[Tensor]]  # of the backends' launches; the last one is in use

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        rescale: Rescale | None,
        shrink: Shrink | None,
        state_dtype: torch.dtype | None,
        backend: str,
    ) -> None:
        dispatch.check(backend)  # an unknown or unusable one is refused here and now
        if state_dtype not in (None, torch.bfloat16):
            raise ValueError(f"state_dtype must be None or torch.bfloat16, got {state_dtype!r}")
        self.backend, self.state_dtype, self._workspaces = backend, state_dtype, {}
        defaults |= {"rescale": rescale, "shrink": shrink}
        read(self.rule_for([defaults]), defaults, self.numbers(defaults))
        super().__init__(params, defaults)
        self.register_state_dict_post_hook(checkpoint.options_to_plain)

    def rule_for(self, groups: Sequence[Mapping[str, Any]]) -> Rule:  # noqa: ARG002
        """The rule of a step with these param groups."""
        return self.rule

    def numbers(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The rule's own hyperparameters of a param group, by the names of the record."""
        return {hyper.name: group[hyper.name] for hyper in self.rule.hypers}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler hands `grad_scale` and `found_inf` to the step, instead of unscaling and skipping itself.

        With ``fused=False`` it does not, as in torch: what looks at gradients between the two, or at whether a step was
        taken, needs that (Lightning's gradient clipping, Accelerate's schedulers).
        """
        return self.defaults.get("fused") is not False  # a WeightRescaler's projector has no such option

    # ------------------------------------------------------------------------------------------------------- the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step for every parameter that has a gradient; returns what the closure returns, if there is one.

        Everything is checked before anything is written: on an error parameters, gradients, states and step counts
        are as they were.

        Raises:
            ValueError, RuntimeError: an option or a tensor is not as it must be; the message names the parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        watchers = self._watchers
        scope = Scope.NOTHING
        for watcher in watchers:
            scope = max(scope, watcher.before_step())
        # In a function that is compiled a step is one graph break, without guards that a new learning rate would fail.
        launches = self._opaque_step(scope) if torch.compiler.is_compiling() else self._take_step(scope)
        if watchers:
            measured = [
                Measured(bundle.rows[scope], call.measured) for bundle, call in launches if call.measured is not None
            ]
            for watcher in watchers:
                watcher.after_step(measured, loss)
            if not any(watcher.keeps for watcher in watchers):
                give_back(measured)
        return loss

    def watch(self, watcher: Watcher) -> None:
        """From the next step on, asks ``watcher`` what to measure and tells it what was measured."""
        self._watchers = (*self._watchers, watcher)

    def unwatch(self, watcher: Watcher) -> None:
        """Undoes :meth:`watch`; nothing if that has been done."""
        self._watchers = tuple(known for known in self._watchers if known is not watcher)

    def _take_step(self, scope: Scope) -> Launches:
        """Plans, launches, and returns what was launched."""
        try:
            records = self._refreshed()
        except KeyError:  # of a group that was put into the list by hand
            self._fill_defaults()
            records = self._refreshed()

        failed, refused = None, None
        if self._plans and not self._plans[0].fits(self.param_groups, records.shapes, self.state):
            self._plans = ()
        for place, plan in enumerate(self._plans):
            launches = self._launches(plan, records, scope) if plan.idles() else None
            if launches is None:
                continue
            refused = self._launch(launches)
            if refused is None:
                if place > 0:
                    for other in self._plans[:place]:
                        other.release()
                    self._plans = (plan, *self._others(plan))
                return launches
            failed, self._plans = plan.signature(), ()
            break

        unscaling = self._amp()[0] is not None
        plan = build(records.rule, self.param_groups, self.state, self.state_dtype, self._choose, unscaling)
        if refused is not None and plan.signature() == failed:
            raise refused  # nothing has changed that a new plan could see
        plan.install(self.state)
        launches: Launches | None = None
        try:
            launches = self._launches(plan, records, scope)
            assert launches is not None, "a plan that was just built holds"
            refused = self._launch(launches)
        except Exception as error:
            refused = error
        fresh = any(bundle.fresh for bundle in plan.bundles)
        if refused is not None or (fresh and self._skipped()):
            plan.uninstall(self.state)  # a buffer that starts late is still to be started
            self._plans = ()
        elif fresh:
            self._plans = ()
        else:
            others = self._others(plan)
            for other in others:
                other.owners, other.owned = plan.owners, plan.owned  # new states are of parameters that idled there
                other.release()
            self._plans = (plan, *others)[:PLANS]
            plan.created, plan.unused = [], []  # whoever exchanges a state has its memory back
        if refused is not None:
            raise refused
        assert launches is not None
        return launches

    # Not torch.compiler.disable, which imports the compiler at once: that takes seconds.
    _opaque_step = _disable_dynamo(_take_step)

    def _refreshed(self) -> Records:
        """The records of the param groups as they are now."""
        rule = self.rule_for(self.param_groups)
        if self._records is None or self._records.rule is not rule:
            names = [name for name in self.defaults if name not in ("lr", "foreach", "fused", "capturable")]
            self._records = Records(rule, names)
        self._records.refresh(self.param_groups, self.numbers)
        return self._records

    def _others(self, plan: Plan) -> list[Plan]:
        """The plans for other sets of parameters with gradients."""
        idle = set(map(id, plan.idle))
        return [other for other in self._plans if set(map(id, other.idle)) != idle]

    def _choose(self, device_type: str, dtypes: Triple) -> dispatch.Backend:
        return dispatch.choose(self.backend, device_type, dtypes)

    def _skipped(self) -> bool:
        found_inf = self._amp()[1]
        return found_inf is not None and bool(found_inf != 0)

    def _amp(self) -> tuple[Tensor | None, Tensor | None]:
        """What GradScaler has left: the scale and ``found_inf``. The latter is the number 0 if no gradient was seen."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is not None and not isinstance(scale, Tensor):
            scale = torch.tensor(float(scale), dtype=torch.float32, device="cpu")
        if found_inf is not None and not isinstance(found_inf, Tensor):
            found_inf = None if found_inf == 0 else torch.tensor(float(found_inf), dtype=torch.float32, device="cpu")
        return scale, found_inf

    def _launches(self, plan: Plan, records: Records, scope: Scope) -> Launches | None:
        """One call per bundle with the tensors as they are now; None if the plan is not for them."""
        grad_scale, found_inf = self._amp()
        launches = []
        for bundle in plan.bundles:
            tensors = bundle.gather(unscaling=grad_scale is not None)
            if tensors is None:
                return None
            device = bundle.device
            hyper, lrs = records.on(device)
            axes = bundle.measured_axes if scope is Scope.EVERYTHING else bundle.axes
            measured = None
            if scope:
                rows = bundle.rows[scope] = rows_of(bundle.params, axes, bundle.rows.get(scope))
                measured = buffer_for(rows, device, may_skip=found_inf is not None)
            call = StepCall(
                records.rule.name,
                *tensors,
                hyper,
                bundle.groups,
                axes,
                bundle.fresh,
                lrs,
                on(grad_scale, device),
                on(found_inf, device),
                measured=measured,
                kept=bundle.kept,
            )
            launches.append((bundle, call))
        return launches

    def _launch(self, launches: Launches) -> Exception | None:
        """Runs the calls, all or none. Returns the error of a call that was refused before anything was written."""
        try:
            if len(launches) > 1:
                for bundle, call in launches:
                    self._run(bundle, call, dry_run=True)
            for bundle, call in launches[:1]:
                self._run(bundle, call)
        except Exception as error:
            return error
        for bundle, call in launches[1:]:
            self._run(bundle, call)
        found_inf = self._amp()[1]
        if found_inf is not None and found_inf.device.type == "cpu" and bool(found_inf != 0):
            return None  # skipped: nothing was written. One on a device is not looked at, which would wait for it.
        for _, call in launches:
            # The kernels write behind autograd's back; it has to be told.
            for written in (call.params, call.states, call.steps, call.grads if call.grad_scale is not None else ()):
                increment_version(written)
        return None

    def _run(self, bundle: Bundle, call: StepCall, dry_run: bool = False) -> None:
        """One call, with the workspace that those before it have made or enlarged: all on a device use the same.

        What a backend allocates is kept, and nothing given back: a captured graph may go on using it.
        """
        kept = self._workspaces.setdefault(bundle.device, [])
        call.workspace = kept[-1] if kept else None
        try:
            dispatch.launch(bundle.backend, call, dry_run=dry_run)
        finally:
            if call.workspace is not None and not any(call.workspace is known for known in kept):
                kept.append(call.workspace)

    # ----------------------------------------------------------------------------------------------------- the checks

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as in torch.optim, after checking its options against its parameters.

        Raises:
            TypeError, ValueError: an option is not allowed, or a parameter does not have the group's axis.
        """
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1], len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise

    def check_group(self, group: Mapping[str, Any], g: int) -> None:
        """Refuses a param group whose options are out of bounds or do not fit its parameters."""
        for name in ("backend", "state_dtype"):
            if name in group:
                raise ValueError(f"{name} is an option of the whole optimizer, not of a param group")
        read(self.rule_for([group]), group, self.numbers(group), g)
        axis = common_axis(group["rescale"], group["shrink"])
        for i, param in enumerate(group["params"]):
            checked_mask(group, g, i, axis)
            if param.requires_grad:
                try:
                    state_dtype_for(param, self.state_dtype)
                except ValueError as error:
                    raise ValueError(f"{label(group, g, i)}: {error}") from None

    # ---------------------------------------------------------------------------------------- checkpoints and pickling

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this optimizer, or of its counterpart in torch.optim.

        States get the dtype of the policy (``state_dtype``), the memory layout of their parameter, and memory of
        their own. The saved options win; one that the dict lacks keeps its current value.
        A momentum buffer without a step count gets step 1.

        Raises:
            ValueError, TypeError: the dict does not fit. The message says where; the optimizer stays as it was.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        groups, state = checkpoint.converted(self, state_dict)
        self.__setstate__({"state": state, "param_groups": groups})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend, "state_dtype": self.state_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if checkpoint.options_to_plain not in self._optimizer_state_dict_post_hooks.values():
            self.register_state_dict_post_hook(checkpoint.options_to_plain)
        self._fill_defaults()
        self._plans, self._records, self._workspaces = (), None, {}

    def _fill_defaults(self) -> None:
        """Gives every group the options that it lacks."""
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
