"""The backend that runs everywhere: the oracle, applied in place. Slow, and meant to be obviously right.

It refuses what the kernels refuse, and like them it writes only after everything has been checked and computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastwrs import reference
from fastwrs.options import masked_dims
from fastwrs.plan import StepCall, dtypes_of, lacks_memory, overlaps_itself
from fastwrs.spec import RULES

NAME = "reference"


def why_not(
    device_type: str | None = None,
    dtypes: tuple[str, str, str] | None = None,
) -> None:
    """It runs on whatever PyTorch runs on, so there is never a reason."""


def step(call: StepCall, dry_run: bool = False) -> None:
    """One step of every tensor in the call: all of them, or on an error none."""
    _check(call)
    if dry_run or (call.found_inf is not None and bool(call.found_inf != 0)):
        return
    results = [_result(call, i) for i in range(len(call.params))]
    n = len(call.params)
    for i, result in enumerate(results):
        call.params[i].copy_(result.param)
        if call.grad_scale is not None:
            call.grads[i].copy_(result.grad)
        for s, state in enumerate(result.states.values()):
            call.states[s * n + i].copy_(state)
        call.steps[i].add_(1)
    if call.measured is not None:
        rows = [result.measured for result in results if result.measured is not None]
        if rows:
            call.measured.copy_(torch.cat(rows))


def rescale_(tensors: list[Tensor], axes: list[int], target: float) -> None:
    """Sets the norm of every group to the target."""
    new = [reference.rescale(t, _dims(mask, t), target) for t, mask in zip(tensors, axes, strict=True)]
    for tensor, value in zip(tensors, new, strict=True):
        tensor.copy_(value)


def channel_norms(tensors: list[Tensor], axes: list[int], out: list[Tensor]) -> None:
    """Writes the norm of every group into ``out``."""
    for tensor, mask, norms in zip(tensors, axes, out, strict=True):
        norms.copy_(reference.group_norms(tensor, _dims(mask, tensor)))


def _dims(mask: int, tensor: Tensor) -> tuple[int, ...]:
    dims = masked_dims(mask, tensor.ndim)
    if dims is None:
        raise RuntimeError("a tensor without norm groups cannot be projected")
    return dims


def _result(call: StepCall, i: int) -> reference.Result:
    rule, n = RULES[call.rule], len(call.params)
    width = len(rule.record)
    row = call.hyper[call.groups[i] * width : (call.groups[i] + 1) * width]
    hyper = {known.name: value for known, value in zip(rule.record, row, strict=True)}
    slots = len(call.states) // n
    states = {slot.name: call.states[s * n + i] for s, slot in enumerate(rule.slots[:slots])}
    t = int(call.steps[i]) + 1
    return reference.step(
        call.rule,
        call.params[i],
        call.grads[i],
        states,
        t=t,
        hyper=hyper,
        dims=masked_dims(call.axes[i], call.params[i].ndim),
        first=t == 1 or i in call.fresh,
        lr=float(call.lrs[int(hyper["lr_tensor"])]) if hyper["lr_tensor"] >= 0 else None,
        grad_scale=None if call.grad_scale is None else float(call.grad_scale),
    )


def _check(call: StepCall) -> None:
    """What the kernels check on every call: a plan may be out of date where only its tensors can tell."""
    n = len(call.params)
    if call.grad_scale is not None and not RULES[call.rule].updates:
        raise RuntimeError(f'rule "{call.rule}" has no gradient to unscale by grad_scale')
    if call.grad_scale is not None and not bool(call.grad_scale > 0):
        raise RuntimeError(f"grad_scale must be > 0, got {float(call.grad_scale)}")
    for i, param in enumerate(call.params):
        mine = (param, call.grads[i], *call.states[i::n])
        if any(t.layout != torch.strided for t in mine):
            raise RuntimeError(f"tensor {i}: only dense tensors are supported")
        if any(lacks_memory(t) for t in (*mine, call.steps[i])):
            raise RuntimeError(f"tensor {i}: a tensor reaches beyond its storage")
        if any(t.shape != param.shape for t in mine):
            raise RuntimeError(f"tensor {i}: shapes differ: {[tuple(t.shape) for t in mine]}")
        if any(t.device != call.params[0].device for t in (*mine, call.steps[i])):
            raise RuntimeError(f"tensor {i}: devices differ: {[str(t.device) for t in (*mine, call.steps[i])]}")
        if any(t._is_zerotensor() or t.is_neg() for t in mine):
            raise RuntimeError(f"tensor {i}: a tensor has no memory that is its own, or a negative bit")
        if not torch.is_inference_mode_enabled() and any(t.is_inference() for t in (*mine, call.steps[i])):
            raise RuntimeError(f"tensor {i}: a tensor was made in inference mode")
        if any(t.dtype != first.dtype for t, first in zip(mine, _first(call), strict=True)):
            raise RuntimeError(f"tensor {i}: dtypes {[str(t.dtype) for t in mine]} are not those of the first tensor")
        written = (param, *mine[2:]) if call.grad_scale is None else mine
        if any(overlaps_itself(t) for t in written):
            raise RuntimeError(f"tensor {i}: a tensor that is written overlaps itself in memory")
        if call.steps[i].dtype != torch.float32 or call.steps[i].ndim:
            raise RuntimeError(f"tensor {i}: the step must be a 0-d fp32 tensor")
        if not (bool(call.steps[i] >= 0) and bool(call.steps[i].isfinite())):
            raise RuntimeError(f"tensor {i}: the step is {float(call.steps[i])}, not a count")
    try:
        dtypes_of(call.params[0], call.grads[0], [*_first(call)[2:], call.steps[0]])
    except ValueError as error:
        raise RuntimeError(str(error)) from None


def _first(call: StepCall) -> tuple[Tensor, ...]:
    return (call.params[0], call.grads[0], *call.states[:: len(call.params)])
