"""``follow_batchnorm``: BatchNorm's running statistics follow the rescale of the layer in front of them."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastwrs.batchnorm_pairs import LAYERS, InputShape, Pair, channels_of, find, named
from fastwrs.measuring import Measured, Scope, group_count
from fastwrs.optim.base import FusedOptimizer
from fastwrs.options import axis_mask, common_axis
from fastwrs.spec import MEASURED

Pairs = Mapping[str, str | Iterable[str]] | Iterable[tuple[str, str]]

foreach: Any = torch  # its list operations are known to no stub
_FACTORS = MEASURED.index("rescale_factor"), MEASURED.index("shrink_factor")


class BatchNormFollower:
    """What :func:`follow_batchnorm` returns."""

    pairs: dict[str, tuple[str, ...]]
    """The BatchNorm layers behind each layer, by their names in the model."""
    unpaired: tuple[str, ...]
    """Layers that are rescaled or shrunk without a BatchNorm that follows, as the head is."""

    def __init__(self, model: nn.Module, optimizer: FusedOptimizer, pairs: Pairs | None = None) -> None:
        self._optimizer = optimizer
        placed = {param: g for g, group in enumerate(optimizer.param_groups) for param in group["params"]}
        found = find(model, placed) if pairs is None else named(model, placed, pairs)
        self._pairs: dict[Tensor, list[Pair]] = {}
        self.pairs = {}
        for pair in found:
            self._pairs.setdefault(pair.layer.weight, []).append(pair)
            self.pairs[pair.layer_name] = (*self.pairs.get(pair.layer_name, ()), pair.norm_name)
        self._biases = {pair.layer.bias: pair for pair in found if pair.layer.bias is not None}
        self._seen: list[Any] = []
        self._scope = Scope.NOTHING
        self._check()
        _claim(found, self)
        self._shapes = [(pair, InputShape(pair.norm)) for pair in found if isinstance(pair.layer, nn.Linear)]
        groups = optimizer.param_groups
        self.unpaired = tuple(
            name
            for name, module in model.named_modules()
            if isinstance(module, LAYERS)
            and name not in self.pairs
            and module.weight in placed
            and _axis(groups[placed[module.weight]]) is not None
        )
        optimizer.watch(self)

    def before_step(self) -> Scope:
        """Called by the optimizer: refuses options that leave no common factor per channel."""
        for pair, shape in self._shapes:
            if shape.ndim not in (None, 2):
                raise ValueError(
                    f"follow_batchnorm: {pair.norm_name!r} was called on {shape.ndim} dimensions, where its channels "
                    f"are not those of the Linear layer {pair.layer_name!r}: name the pairs without this one"
                )
        # An option is frozen: the same object is the same option.
        groups = self._optimizer.param_groups
        seen = [[id(group["rescale"]), id(group["shrink"]), *map(id, group["params"])] for group in groups]
        if seen != self._seen:
            self._check()
            self._seen = seen
        return self._scope

    def after_step(self, measured: list[Measured], loss: Any) -> None:  # noqa: ARG002 (the Watcher's)
        """Called by the optimizer: the statistics get the factors that the step has multiplied by."""
        for launch in measured:
            rescaling, shrinking = (launch.values[:, column] for column in _FACTORS)
            factors = rescaling * shrinking  # one of the two is 1
            # NaN: a skipped step. 0: the channel is gone, and no statistics would keep what it was.
            factors = torch.where(factors.isfinite() & (factors > 0), factors, 1)
            of_params = zip(launch.rows.params, factors.split(launch.rows.counts), strict=True)
            _follow([(pair, s) for param, s in of_params for pair in self._pairs.get(param, ())])

    def remove(self) -> None:
        """The statistics follow no longer."""
        self._optimizer.unwatch(self)
        for pairs in self._pairs.values():
            for pair in pairs:
                _followers.pop(pair.norm, None)
        for _, shape in self._shapes:
            shape.handle.remove()

    def __enter__(self) -> BatchNormFollower:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"BatchNormFollower(pairs={self.pairs}, unpaired={self.unpaired})"

    def _check(self) -> None:
        """Every paired weight that is projected has one factor per channel, or one for all."""
        self._scope = Scope.NOTHING
        for group in self._optimizer.param_groups:
            axis = _axis(group)
            for param in group["params"] if axis is not None else ():
                if (of := self._biases.get(param)) is not None:
                    raise ValueError(
                        f"follow_batchnorm: parameter '{of.layer_name}.bias' is rescaled or shrunk too, and "
                        f"{of.norm_name!r} can follow the weight alone. fastwrs.param_groups(model) leaves biases as "
                        "they are"
                    )
                for pair in self._pairs.get(param, ()):
                    _check_axis(pair, axis)
                    self._scope = Scope.PROJECTED


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

    ::

        follower = fastwrs.follow_batchnorm(model, optimizer)
        print(follower.unpaired)  # ("fc",): the head
        ...
        follower.remove()

    Args:
        model: holds the layers (``Linear``, ``Conv*d``, ``ConvTranspose*d``) and the BatchNorm layers.
        optimizer: a fastwrs optimizer; its options may change later.
        pairs: None finds the pairs with ``torch.fx``: a BatchNorm that is called on the output of a layer, or of
            ``Identity`` or ``Dropout`` behind it, and always on that of the same layer. Otherwise the names of the
            modules, ``{"conv1": "bn1"}`` or ``[("conv1", "bn1")]``, and no others are followed.

    Returns:
        An object with ``pairs``, ``unpaired`` (the layers that are rescaled or shrunk and have no pair) and
        ``remove()``. It can be used as a context manager.

    Raises:
        TypeError: the optimizer is not one of fastwrs, the model no module.
        ValueError: the model cannot be traced and no pairs are given; a name is wrong; two modules do not go together;
            the axis has no common factor per channel: ``"in"`` with a kernel of more than one position. Changed
            options are refused in the same way by the next step, before it has changed anything.

    Source: from the definition of BatchNorm (Ioffe and Szegedy, ICML 2015) and Liu et al., *Weight Rescaling*.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"follow_batchnorm: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"follow_batchnorm: optimizer must be one of fastwrs, got {type(optimizer).__name__}")
    return BatchNormFollower(model, optimizer, pairs)


def _axis(group: Mapping[str, Any]) -> Any:
    return common_axis(group["rescale"], group["shrink"])


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
    for pair in pairs:
        other = _followers.get(pair.norm)
        if other is not None and other() is not None:
            raise ValueError(
                f"follow_batchnorm: {pair.norm_name!r} is followed already; remove() that follower before another comes"
            )
    for pair in pairs:
        _followers[pair.norm] = weakref.ref(follower)


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
