"""Which BatchNorm stands behind which layer: found by tracing the model, or named by the user."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

LAYERS = (nn.Linear, _ConvNd)
_PASSING = (nn.Identity, nn.modules.dropout._DropoutNd)
"""What may stand between the two: it leaves the mean as it is, and multiplies with its input."""


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
        if mean is None:
            return "it has no running statistics (track_running_stats=False), so nothing has to follow"
        if self.norm.num_features != channels_of(self.layer):
            return f"it has {self.norm.num_features} channels, the layer has {channels_of(self.layer)}"
        if mean.device != self.layer.weight.device:
            return f"it is on {mean.device}, the layer on {self.layer.weight.device}"
        return None


class InputShape:
    """Sees on how many dimensions a BatchNorm is called: those of a Linear layer's output are known to nobody else."""

    def __init__(self, norm: nn.Module) -> None:
        self.ndim: int | None = None
        self.handle = norm.register_forward_pre_hook(self)

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """The hook. What is not 2 stays."""
        if inputs and self.ndim in (None, 2):
            self.ndim = inputs[0].ndim


def channels_of(layer: Any) -> int:
    """The number of output channels."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def find(model: nn.Module, wanted: Container[Any]) -> list[Pair]:
    """The pairs of layers whose weights are wanted, by tracing the model; a ValueError where that is not possible."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises on what is no tensor
        raise ValueError(
            f"follow_batchnorm: torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {error}). Name "
            'the pairs: follow_batchnorm(model, optimizer, pairs={"conv1": "bn1", ...})'
        ) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    sources: dict[nn.Module, set[str | None]] = {}
    names: dict[nn.Module, str] = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], _BatchNorm):
            norm = modules[node.target]
            sources.setdefault(norm, set()).add(_source(node, modules))
            names.setdefault(norm, node.target)
    pairs = []
    for norm, layers in sources.items():
        (layer, *others) = layers
        if layer is None or others:
            continue  # its statistics are of several layers, or of none that is known
        assert isinstance(norm, _BatchNorm)
        pair = Pair(layer, modules[layer], names[norm], norm)
        if pair.layer.weight in wanted and pair.why_not() is None:
            pairs.append(pair)
    return pairs


def named(model: nn.Module, wanted: Container[Any], pairs: Any) -> list[Pair]:
    """The pairs that the user has named, checked."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for layer_name, norm_name in _listed(pairs):
        for name in (layer_name, norm_name):
            if name not in modules:
                raise ValueError(f"follow_batchnorm: the model has no module {name!r}")
        layer, norm = modules[layer_name], modules[norm_name]
        if not isinstance(layer, LAYERS):
            raise ValueError(f"follow_batchnorm: {layer_name!r} must be Linear or Conv, it is {type(layer).__name__}")
        if not isinstance(norm, _BatchNorm):
            raise ValueError(f"follow_batchnorm: {norm_name!r} must be a BatchNorm, it is {type(norm).__name__}")
        if layer.weight not in wanted:
            raise ValueError(f"follow_batchnorm: parameter '{layer_name}.weight' is not in the optimizer")
        found.append(_checked(Pair(layer_name, layer, norm_name, norm)))
    if len({pair.norm for pair in found}) < len(found):
        norms = [pair.norm_name for pair in found]
        twice = sorted({name for name in norms if norms.count(name) > 1})
        raise ValueError(f"follow_batchnorm: {', '.join(map(repr, twice))} cannot follow several layers")
    return found


def _listed(pairs: Any) -> Iterator[tuple[str, str]]:
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
        if not isinstance(module, _PASSING):
            return None
        node = first


class _Tracer(torch.fx.Tracer):
    """Does not look into layers and BatchNorms of the user's own classes either."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*LAYERS, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)
