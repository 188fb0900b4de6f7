"""Which BatchNorm stands behind which layer: found by tracing the model, or named by the user."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

Names = list[tuple[str, str]]
"""The names of layers and of the BatchNorms behind them; they stay when weights are replaced."""

LAYERS = (nn.Linear, _ConvNd)
_LINEAR_IN_WEIGHT = (
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""What may stand between the two: in eval mode it is the identity."""
_METHODS = ("__call__", "forward", "_conv_forward")
_LOOKS = {"size", "dim", "shape", "ndim", "device", "dtype"}
"""What asks a tensor for anything but its values."""
_SHAPE = "_fastwrs_input_shape"


@dataclass(frozen=True)
class Pair:
    """A layer and a BatchNorm that is always called on its output."""

    layer_name: str
    layer: Any
    norm_name: str
    norm: _BatchNorm

    def why_not(self) -> str | None:
        """Why the two do not go together, None if they do."""
        mean = self.norm.running_mean
        if mean is None or self.norm.running_var is None:
            return "it has no running statistics (track_running_stats=False), so nothing has to follow"
        if self.norm.num_features != channels_of(self.layer):
            return f"it has {self.norm.num_features} channels, the layer has {channels_of(self.layer)}"
        if mean.device != self.layer.weight.device:
            return f"it is on {mean.device}, the layer on {self.layer.weight.device}"
        return None


class InputShape:
    """Sees on how many dimensions a BatchNorm is called: those of a Linear layer's output are known to nobody else."""

    def __init__(self, norm: nn.Module) -> None:
        former = vars(norm).get(_SHAPE)
        if former is not None:  # of a follower that went without remove()
            former.remove(norm)
        self.ndim: int | None = None
        self._handle = norm.register_forward_hook(_note_shape, prepend=True)
        setattr(norm, _SHAPE, self)

    def remove(self, norm: nn.Module) -> None:
        """Takes the hook from the BatchNorm; nothing if that has been done."""
        self._handle.remove()
        if vars(norm).get(_SHAPE) is self:
            delattr(norm, _SHAPE)


def _note_shape(module: Any, _inputs: tuple[Tensor], output: Tensor) -> None:
    """The hook: a plain function with types, which torch.jit.script compiles with the model.

    It looks at the output, which has the dimensions of the input, however that was passed. What is not 2 stays.
    """
    if not torch.jit.is_scripting():  # pyright: ignore[reportPrivateImportUsage]
        shape = vars(module).get(_SHAPE)
        if shape is not None and shape.ndim in (None, 2) and isinstance(output, Tensor) and shape.ndim != output.ndim:
            shape.ndim = output.ndim


def channels_of(layer: Any) -> int:
    """The number of output channels."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def weight_of(layer: nn.Module) -> Tensor | None:
    """The weight if it is a parameter. One that is computed is left alone: reading it may change the layer."""
    return layer._parameters.get("weight")


def find(model: nn.Module) -> Names:
    """The pairs by tracing the model; a ValueError where that is not possible."""
    try:
        with _left_as_it_was(model):
            graph = _Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises on what is no tensor
        raise ValueError(
            f"follow_batchnorm: torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {error}). Name "
            'the pairs: follow_batchnorm(model, optimizer, pairs={"conv1": "bn1", ...})'
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    params = dict(model.named_parameters(remove_duplicate=False))
    sources: dict[nn.Module, set[str | None]] = {}
    names: dict[nn.Module, str] = {}
    calls: dict[str, list[torch.fx.Node]] = {}
    used = set()  # parameters whose values something else than their module uses
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "get_attr" and target in params and not all(map(_looks, node.users)):
            used.add(params[target])
        if node.op != "call_module":
            continue
        module = modules[target]
        if isinstance(module, LAYERS):
            calls.setdefault(target, []).append(node)
        elif isinstance(module, _BatchNorm):
            sources.setdefault(module, set()).add(_source(node, modules))
            names.setdefault(module, target)
    behind: dict[str, list[nn.Module]] = {}
    for norm, layers in sources.items():
        (layer, *others) = layers
        if layer is not None and not others:  # else its statistics are of several layers, or of none that is known
            behind.setdefault(layer, []).append(norm)
    return [
        (layer, names[norm])
        for layer, norms in behind.items()
        if weight_of(modules[layer]) not in used and all(_only_into(node, norms, modules) for node in calls[layer])
        for norm in norms
    ]


def resolve(model: nn.Module, names: Names, wanted: Container[Any]) -> list[Pair]:
    """The pairs that were found, as their modules are now: those whose weights are wanted and that go together."""
    modules = dict(model.named_modules(remove_duplicate=False))
    pairs = []
    for layer_name, norm_name in names:
        layer, norm = modules.get(layer_name), modules.get(norm_name)
        if layer is None or not isinstance(norm, _BatchNorm) or norm._forward_pre_hooks:
            continue
        if not _as_in_torch(layer, _LINEAR_IN_WEIGHT) or weight_of(layer) not in wanted:
            continue
        pair = Pair(layer_name, layer, norm_name, norm)
        if pair.why_not() is None:
            pairs.append(pair)
    return pairs


def resolve_named(model: nn.Module, names: Names, wanted: Container[Any], *, needed: bool) -> list[Pair]:
    """The pairs that the user has named, checked. All weights are ``needed``, or those that are not wanted left out."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for layer_name, norm_name in names:
        for name in (layer_name, norm_name):
            if name not in modules:
                raise ValueError(f"follow_batchnorm: the model has no module {name!r}")
        layer, norm = modules[layer_name], modules[norm_name]
        if not isinstance(layer, LAYERS):
            raise ValueError(f"follow_batchnorm: {layer_name!r} must be Linear or Conv, it is {type(layer).__name__}")
        if not isinstance(norm, _BatchNorm):
            raise ValueError(f"follow_batchnorm: {norm_name!r} must be a BatchNorm, it is {type(norm).__name__}")
        if weight_of(layer) in wanted:
            found.append(_checked(Pair(layer_name, layer, norm_name, norm)))
        elif needed:
            raise ValueError(f"follow_batchnorm: parameter '{layer_name}.weight' is not in the optimizer")
    if len({pair.norm for pair in found}) < len(found):
        norms = [pair.norm_name for pair in found]
        twice = sorted({name for name in norms if norms.count(name) > 1})
        raise ValueError(f"follow_batchnorm: {', '.join(map(repr, twice))} cannot follow several layers")
    return found


def listed(pairs: Any) -> Iterator[tuple[str, str]]:
    """What the user has named, one by one; a TypeError if it is something else."""
    try:
        for layer, norms in pairs.items() if isinstance(pairs, Mapping) else pairs:
            for norm in (norms,) if isinstance(norms, str) else norms:
                if not isinstance(layer, str) or not isinstance(norm, str):
                    raise TypeError
                yield layer, norm
    except (TypeError, ValueError):
        raise TypeError(
            f'follow_batchnorm: pairs must be names of modules, {{"conv1": "bn1"}} or [("conv1", "bn1")], got {pairs!r}'
        ) from None


def _checked(pair: Pair) -> Pair:
    if why := pair.why_not():
        raise ValueError(f"follow_batchnorm: {pair.norm_name!r} cannot follow {pair.layer_name!r}: {why}")
    return pair


def _source(node: torch.fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """The layer whose output a BatchNorm is called on, None if it is called on something else."""
    while True:
        before: Iterable[Any] = node.args or tuple(node.kwargs.values())
        first = next(iter(before), None)
        if not isinstance(first, torch.fx.Node) or first.op != "call_module":
            return None
        module = modules[str(first.target)]
        if isinstance(module, LAYERS):
            return str(first.target)
        if not _as_in_torch(module, _PASSING):
            return None
        node = first


def _only_into(node: torch.fx.Node, norms: list[nn.Module], modules: Mapping[str, nn.Module]) -> bool:
    """Whether nothing but these BatchNorms uses an output: what else does, a residual sum, would see the factor."""
    for user in node.users:
        if _looks(user):
            continue
        module = modules[str(user.target)] if user.op == "call_module" else None
        passed = module is not None and _as_in_torch(module, _PASSING) and _only_into(user, norms, modules)
        if module not in norms and not passed:
            return False
    return True


def _looks(user: torch.fx.Node) -> bool:
    asked = user.args[1] if user.op == "call_function" and user.target is getattr else user.target
    return user.op in ("call_function", "call_method") and asked in _LOOKS


def _as_in_torch(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether it computes what torch's own class does: a subclass or a hook may do something else."""
    if module._forward_hooks or any(name in vars(module) for name in _METHODS):
        return False
    return any(
        all(getattr(type(module), name, None) is getattr(kind, name, None) for name in _METHODS)
        for kind in kinds
        if isinstance(module, kind)
    )


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Tracing runs the model's forward: what that assigns to modules, buffers and torch's generators is undone."""
    slots = [slot for module in model.modules() for slot in (vars(module), module._buffers) if isinstance(slot, dict)]
    before = [dict(slot) for slot in slots]
    buffers = [b for b in model.buffers() if not torch.nn.parameter.is_lazy(b) and not b.is_inference()]
    values = [(buffer, buffer._version, buffer.detach().clone()) for buffer in buffers]
    devices = {param.device.index or 0 for param in model.parameters() if param.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for slot, held in zip(slots, before, strict=True):
            for name in slot.keys() - held.keys():
                del slot[name]
            slot.update(held)
        with torch.no_grad():
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.copy_(value)


class _Tracer(torch.fx.Tracer):
    """Does not look into layers and BatchNorms of the user's own classes either."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*LAYERS, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)
