"""``follow_batchnorm``: BatchNorm's running statistics follow the rescale of the layer in front of them."""

from __future__ import annotations

import functools
import gc
import operator
import weakref
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastwrs.batchnorm_pairs import LAYERS, InputShape, Names, Pair, channels_of, find, listed, resolve, resolve_named
from fastwrs.measuring import Measured, Scope, group_count
from fastwrs.optim.base import FusedOptimizer
from fastwrs.options import axis_mask, common_axis
from fastwrs.spec import MEASURED
from fastwrs.wrapper import unwrapped

Pairs = Mapping[str, str | Iterable[str]] | Iterable[tuple[str, str]]

foreach: Any = torch  # its list operations are known to no stub
_FACTORS = MEASURED.index("rescale_factor"), MEASURED.index("shrink_factor")


class BatchNormFollower:
    """What :func:`fastwrs.follow_batchnorm` returns. A step that finds other parameters or options updates it."""

    pairs: dict[str, tuple[str, ...]]
    """The BatchNorm layers behind each layer, by their names in the model."""
    unpaired: tuple[str, ...]
    """What is rescaled or shrunk without a BatchNorm that follows: layers by their names, as the head, and parameters
    that are no layer's weight by theirs, as ``"0.weight_orig"``."""

    def __init__(self, model: nn.Module, optimizer: FusedOptimizer, pairs: Pairs | None = None) -> None:
        # Weak: the optimizer holds its watchers, and goes at once when nobody else holds it.
        self._optimizer = weakref.ref(optimizer)
        self._model = model
        self._named = pairs is not None
        self._names: Names = find(model) if pairs is None else list(listed(pairs))
        self._paired: list[Pair] = []
        self._projected: dict[Tensor, list[Pair]] = {}
        self._shapes: dict[nn.Module, InputShape] = {}
        self._looked_at: list[tuple[Pair, dict[str, Tensor | None], InputShape | None]] = []
        self._refresh(optimizer, needed=True)
        self._seen = _seen(optimizer)
        optimizer.watch(self)

    keeps = False  # of what it is told

    def before_step(self) -> Scope:
        """Called by the optimizer: refuses options that leave no common factor per channel."""
        optimizer = self._optimizer()
        assert optimizer is not None, "it is the one that calls"
        seen = _seen(optimizer)
        if len(seen) != len(self._seen) or not all(map(operator.is_, seen, self._seen)):
            self._refresh(optimizer)
            self._seen = seen
        for pair, buffers, shape in self._looked_at:
            if buffers.get("running_mean") is None or buffers.get("running_var") is None:
                raise ValueError(
                    f"follow_batchnorm: {pair.norm_name!r} has lost its running statistics since it was paired with "
                    f"{pair.layer_name!r}: remove() this follower, and follow anew without the pair"
                )
            if shape is not None and shape.ndim not in (None, 2):
                raise ValueError(
                    f"follow_batchnorm: {pair.norm_name!r} was called on {shape.ndim} dimensions, where its channels "
                    f"are not those of the Linear layer {pair.layer_name!r}: name the pairs without this one"
                )
        return Scope.PROJECTED if self._projected else Scope.NOTHING

    def after_step(self, measured: list[Measured], loss: Any) -> None:  # noqa: ARG002 (the Watcher's)
        """Called by the optimizer: the statistics get the factors that the step has multiplied by."""
        for launch in measured:
            rescaling, shrinking = (launch.values[:, column] for column in _FACTORS)
            factors = rescaling * shrinking  # one of the two is 1
            # NaN: a skipped step. 0: the channel is gone, and no statistics would keep what it was.
            factors = torch.where(factors.isfinite() & (factors > 0), factors, 1)
            of_params = zip(launch.rows.params, factors.split(launch.rows.counts), strict=True)
            _follow([(pair, s) for param, s in of_params for pair in self._projected.get(param, ())])

    def remove(self) -> None:
        """The statistics follow no longer."""
        if (optimizer := self._optimizer()) is not None:
            optimizer.unwatch(self)
        for pair in self._paired:
            self._release(pair.norm)

    def __enter__(self) -> BatchNormFollower:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"BatchNormFollower(pairs={self.pairs}, unpaired={self.unpaired})"

    def _refresh(self, optimizer: FusedOptimizer, *, needed: bool = False) -> None:
        """Finds pairs and ``unpaired`` for the parameters and options as they are now. On an error nothing changes."""
        groups = optimizer.param_groups
        axes = {param: axis for group in groups for axis in (_axis(optimizer, group),) for param in group["params"]}
        if self._named:
            found = resolve_named(self._model, self._names, axes, needed=needed)
        else:
            found = resolve(self._model, self._names, axes)
        _check(found, axes)
        _claim(found, self)

        for norm in {pair.norm for pair in self._paired} - {pair.norm for pair in found}:
            self._release(norm)
        self._paired, self._projected, self.pairs = found, {}, {}
        for pair in found:
            self.pairs[pair.layer_name] = (*self.pairs.get(pair.layer_name, ()), pair.norm_name)
            if axes[pair.layer.weight] is not None:
                self._projected.setdefault(pair.layer.weight, []).append(pair)
            if isinstance(pair.layer, nn.Linear) and pair.norm not in self._shapes:
                self._shapes[pair.norm] = InputShape(pair.norm)
        projected = [pair for pairs in self._projected.values() for pair in pairs]
        # A module finds its attributes slowly, and every step looks at these.
        self._looked_at = [(pair, pair.norm._buffers, self._shapes.get(pair.norm)) for pair in projected]
        layers = {pair.layer for pair in found}
        self.unpaired = tuple(
            layer if isinstance(module, LAYERS) and name == "weight" else f"{layer}.{name}".removeprefix(".")
            for layer, module in self._model.named_modules()
            for name, param in module._parameters.items()
            if param is not None and axes.get(param) is not None and not (module in layers and name == "weight")
        )

    def _release(self, norm: nn.Module) -> None:
        """Gives up a BatchNorm, if it is not another follower's by now."""
        if (shape := self._shapes.pop(norm, None)) is not None:
            shape.remove(norm)
        if (holder := _followers.get(norm)) is not None and holder() is self:
            del _followers[norm]


def follow_batchnorm(model: nn.Module, optimizer: FusedOptimizer, pairs: Pairs | None = None) -> BatchNormFollower:
    """Lets the running statistics of every BatchNorm follow the rescaling of the layer in front of it.

    When a step multiplies the weights of an output channel by s, what BatchNorm sees of that channel is multiplied by
    s too, but for the layer's bias b. So after the step

    ::

        running_mean <- s * (running_mean - b) + b
        running_var  <- s ** 2 * (running_var + eps) - eps

    with which the output in eval mode is what it would be without the rescale, up to rounding: ``update_bn`` is not
    needed for it. What the optimizer's update itself changes is left to BatchNorm's own averages, as always. A shrink
    multiplies every channel by a common factor too, and is followed in the same way. A channel that is shrunk to 0
    keeps its statistics.

    The factors are those that the step's kernels have used; they are measured in the same pass, and nothing waits for
    the device. Every step measures what is rescaled or shrunk, which costs what a :class:`fastwrs.Monitor` costs on
    each step. The factors are fp32, for fp64 weights too. :func:`fastwrs.rescale_` is not followed: where a network
    is to start from rescaled weights, let the first step do it.

    Args:
        model: holds the layers (``Linear``, ``Conv*d``, ``ConvTranspose*d``) and the BatchNorm layers.
        optimizer: a fastwrs optimizer, or the wrapper that a training framework has put around one; its options may
            change later.
        pairs: None finds the pairs with ``torch.fx``: a BatchNorm that is called on the output of a layer, or of
            ``Identity`` or ``Dropout`` behind it, and always on that of the same layer, where nothing else uses that
            output, and the layer computes what torch's own class does (no ``forward`` of a subclass, no forward
            hook). Otherwise the names of the modules, ``{"conv1": "bn1"}`` or ``[("conv1", "bn1")]``; they are taken
            as they are, and no others are followed.

    Returns:
        An object with ``pairs``, ``unpaired`` (what is rescaled or shrunk and has no pair) and ``remove()``. It can be
        used as a context manager. It follows for as long as the optimizer lives, whether it is kept or not. Parameters
        that are replaced, come or go, and options that are changed, are looked up by the next step, by the names of
        the modules.

    Raises:
        TypeError: the optimizer is not one of fastwrs, the model no module.
        ValueError: the model cannot be traced and no pairs are given; a name is wrong; two modules do not go together;
            the axis has no common factor per channel: ``"in"`` with a kernel of more than one position; another
            follower has the BatchNorm. Changed options are refused in the same way by the next step, before it has
            changed anything, and so is a BatchNorm that has lost its running statistics.

    Example:
        >>> follower = fastwrs.follow_batchnorm(model, optimizer)
        >>> follower.pairs
        {'conv1': ('bn1',), 'layer1.0.conv1': ('layer1.0.bn1',)}
        >>> follower.unpaired  # the head
        ('fc',)

    Source: from the definition of BatchNorm (Ioffe and Szegedy, ICML 2015) and Liu et al., *Weight Rescaling*.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"follow_batchnorm: model must be an nn.Module, got {type(model).__name__}")
    optimizer = unwrapped(optimizer)
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"follow_batchnorm: optimizer must be one of fastwrs, got {type(optimizer).__name__}")
    return BatchNormFollower(model, optimizer, pairs)


def _axis(optimizer: FusedOptimizer, group: Mapping[str, Any]) -> Any:
    """Of a group that was put into the list by hand too: it gets the defaults when the step begins."""
    rescale, shrink = (group.get(name, optimizer.defaults[name]) for name in ("rescale", "shrink"))
    return common_axis(rescale, shrink)


def _seen(optimizer: FusedOptimizer) -> list[Any]:
    """What pairs depend on, to be compared by identity. An option is frozen: the same object is the same option."""
    seen: list[Any] = []
    for group in optimizer.param_groups:
        seen += (group.get(name, optimizer.defaults[name]) for name in ("rescale", "shrink"))
        seen += group["params"]
    return seen


def _check(pairs: list[Pair], axes: Mapping[Tensor, Any]) -> None:
    """Every paired weight that is projected has one factor per channel, or one for all, and its bias has none."""
    for pair in pairs:
        bias = pair.layer.bias
        if bias is not None and axes.get(bias) is not None:
            raise ValueError(
                f"follow_batchnorm: parameter '{pair.layer_name}.bias' is rescaled or shrunk too, and "
                f"{pair.norm_name!r} can follow the weight alone. fastwrs.param_groups(model) leaves biases as "
                "they are"
            )
        if (axis := axes[pair.layer.weight]) is not None:
            _check_axis(pair, axis)


def _check_axis(pair: Pair, axis: Any) -> None:
    """Refuses norm groups that are not whole output channels, or all of them together."""
    weight, channels = pair.layer.weight, channels_of(pair.layer)
    mask = axis_mask(axis, weight.ndim)
    kept_dims = [dim for dim in range(weight.ndim) if not mask >> dim & 1]
    kept = [weight.shape[dim] for dim in kept_dims]
    groups = group_count(weight.shape, mask)
    transposed = isinstance(pair.layer, nn.modules.conv._ConvTransposeNd)
    by_channel = groups == channels and int(transposed) in kept_dims
    if transposed and pair.layer.groups > 1:  # weights are [in, out / groups, ...]
        by_channel = by_channel and 0 in kept_dims and pair.layer.groups == weight.shape[0]
    if groups != 1 and not by_channel:
        raise ValueError(
            f"follow_batchnorm: parameter '{pair.layer_name}.weight' (shape {tuple(weight.shape)}) has axis {axis!r}, "
            f"that is {groups} norm groups of sizes {tuple(kept)}, and {pair.norm_name!r} behind it {channels} "
            "channels: there is no common factor per channel. Allowed: one norm group per output channel ('out'; 'in' "
            "where the kernel has one position), or 'tensor'"
        )


_followers: WeakKeyDictionary[nn.Module, weakref.ref[BatchNormFollower]] = WeakKeyDictionary()
"""Who follows which BatchNorm: two would apply every factor twice."""


def _claim(pairs: list[Pair], follower: BatchNormFollower) -> None:
    if any(_taken(pair.norm, follower) for pair in pairs):
        gc.collect()  # an optimizer that was dropped may still wait for the collector, and its follower with it
    for pair in pairs:
        if _taken(pair.norm, follower):
            raise ValueError(
                f"follow_batchnorm: {pair.norm_name!r} is followed already; remove() that follower before another comes"
            )
    for pair in pairs:
        _followers[pair.norm] = weakref.ref(follower)


def _taken(norm: nn.Module, follower: BatchNormFollower) -> bool:
    """Whether another follower has it whose optimizer can still take a step."""
    holder = _followers.get(norm)
    other = None if holder is None else holder()
    return other is not None and other is not follower and other._optimizer() is not None


@torch.no_grad()
def _follow(pairs: list[tuple[Pair, Tensor]]) -> None:
    """Multiplies running statistics by factors, all layers at once."""
    if not pairs:
        return
    means, variances, scales, eps = [], [], [], []
    biased, biases, complements = [], [], []
    for pair, s in pairs:
        mean, variance = pair.norm.running_mean, pair.norm.running_var
        assert mean is not None and variance is not None
        means.append(mean)
        variances.append(variance)
        scales.append(s.to(mean.dtype).expand_as(mean))
        eps.append(pair.norm.eps)
        if pair.layer.bias is not None:
            biased.append(mean)
            biases.append(pair.layer.bias.to(mean.dtype))
            complements.append(1 - scales[-1])
    # The formulas of the docstring, so arranged that a factor of 1 changes no bit.
    foreach._foreach_mul_(means, scales)
    if biased:
        foreach._foreach_addcmul_(biased, complements, biases)
    squares = foreach._foreach_mul(scales, scales)
    foreach._foreach_mul_(variances, squares)
    foreach._foreach_add_(variances, foreach._foreach_mul(foreach._foreach_sub(squares, 1), eps))
    # A variance far below eps is lost in the rounding of the difference; the root must not become that of 0.
    foreach._foreach_clamp_min_(variances, [_above(-e, v.dtype) for e, v in zip(eps, variances, strict=True)])


@functools.cache
def _above(x: float, dtype: torch.dtype) -> float:
    """The next number towards 0."""
    return float(torch.nextafter(torch.tensor(x, dtype=dtype), torch.zeros((), dtype=dtype)))
