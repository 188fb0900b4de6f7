"""The shape of weight distributions, in the space of the weights and in that of the inputs that they meet.

What Figs. 4 and 5 of Liu et al., *Weight Rescaling*, are made of. Fitting needs scipy, imported when it is used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastwrs.options import checked_real

LEAST = 10
"""The fewest weights that a shape is fitted to."""
MOST_EQUAL = 0.05
"""The largest share of weights that may have one value."""
SHAPES = 0.01, 1000.0
"""The shapes that are tried. Uniform weights have no best one: the likelihood grows without end."""
_CHUNK = 1 << 22
"""About how many numbers of a layer's input are looked at in one go: 32 MB of fp64."""

Layer = nn.Linear | nn.Conv2d


class GeneralizedGaussian(NamedTuple):
    """A generalized Gaussian distribution as ``scipy.stats.gennorm`` writes it.

    ::

        p(x) = beta / (2 * scale * Gamma(1 / beta)) * exp(-(|x - loc| / scale) ** beta)
    """

    beta: float
    """The shape: 2 is a Gaussian, 1 a Laplacian; less has heavier tails, that is sparser weights."""
    loc: float
    scale: float


def generalized_gaussian_fit(weights: Tensor) -> GeneralizedGaussian:
    """Fits a generalized Gaussian to all elements of a tensor, by maximum likelihood.

    The mean negative log likelihood of ``scipy.stats.gennorm``, in which the best scale is known for every shape and
    location, ``scale ** beta = beta * mean(|x - loc| ** beta)``, is minimised over ``log(beta)`` and ``loc`` (Nelder
    and Mead). It starts at the median and at the shape that has the data's ratio of mean absolute deviation to
    standard deviation. For beta < 1 there is a maximum at each of the middle weights: one of them is found, and they
    differ by less than the data can tell. beta is looked for between 0.01 and 1000; 1000 means uniform weights, as
    torch's layers start with.

    Weights that are exactly equal, as pruned or quantised ones are, are no sample of any density: with beta towards 0
    the likelihood grows without end around them. A few of them pull beta down, many are refused.

    Args:
        weights: a tensor of real floating-point numbers of any shape, on any device, of at least 10 elements.

    Returns:
        ``GeneralizedGaussian(beta, loc, scale)``, three floats.

    Raises:
        TypeError, ValueError: not such a tensor; an element is not finite; more than one in 20 has the same value; the
            likelihood has no maximum.
        ImportError: scipy is not installed.

    Example:
        >>> fit = fastwrs.analysis.generalized_gaussian_fit(torch.randn(10_000))
        >>> 1.8 < fit.beta < 2.2
        True

    Source: Liu et al., *Weight Rescaling*, Section V-A; Nadarajah, *A generalized normal distribution*, 2005. Start
    values: Mallat, *A theory for multiresolution signal decomposition*, 1989.
    """
    x = _checked_weights(weights)
    optimize = _scipy_optimize()
    low, median, high = (float(x[place * len(x) // 4]) for place in (1, 2, 3))
    width = high - low
    x = (x - median) / width

    def best_scale(beta: float, loc: float) -> tuple[float, float]:
        """The logarithm of the best scale, and the mean negative log likelihood that goes with it."""
        distances = (x - loc).abs_()
        largest = float(distances.max())
        power = float(distances.div_(largest).pow_(beta).mean())  # at most 1, whatever beta is
        log_scale = math.log(largest) + math.log(beta * power) / beta
        return log_scale, math.log(2) + log_scale + math.lgamma(1 + 1 / beta) + 1 / beta

    least, most = map(math.log, SHAPES)
    start = min(max(least, math.log(_shape_by_moments(x, optimize))), most - 0.1)
    found = optimize.minimize(
        lambda at: best_scale(math.exp(at[0]), float(at[1]))[1],
        (start, 0.0),
        method="Nelder-Mead",
        bounds=[(least, most), (None, None)],
        options={"initial_simplex": [(start, 0.0), (start + 0.1, 0.0), (start, 0.1)], "xatol": 1e-6, "fatol": 1e-12},
    )
    beta, loc = math.exp(found.x[0]), float(found.x[1])
    if beta < 1.01 * SHAPES[0]:
        raise ValueError(
            f"generalized_gaussian_fit: the likelihood of the {len(x)} weights has no maximum: it grows as beta goes "
            "to 0, as where many are nearly equal"
        )
    return GeneralizedGaussian(beta, median + width * loc, width * math.exp(best_scale(beta, loc)[0]))


def input_projection(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Sequence[str] | None = None,
    *,
    rtol: float | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> dict[str, Tensor]:
    """The weights of layers in the space of their inputs: Eq. 12 of the paper, its "input space projection".

    With the inputs h of a layer over the whole loader, the eigenvectors U of their covariance, and the weight W
    as PyTorch has it, [outputs, inputs]::

        Sigma = mean(h h^T) - mean(h) mean(h)^T = U diag(eigenvalues) U^T            (Eq. 12)
        projection = W U

    The inputs of a convolution are the patches that its kernel meets, padding included, and W is
    ``weight.flatten(1)``: Appendix B of the paper. Each group of a grouped convolution has a covariance of its own. The
    inputs of ``Linear`` are all vectors along the last dimension. A weight behind a parametrization is taken as the
    layer uses it.

    The paper leaves open, and this is what is done here:

    - Whether U has the directions in which the inputs do not vary. The paper also calls it the projection onto the
      input span, so they are left out (``rtol=0`` keeps them): no output depends on the weights along them but by a
      constant, and their eigenvectors are arbitrary. As long as the covariance has full rank it makes no difference.
    - The signs of eigenvectors: the largest component is positive. Where eigenvalues are equal, the eigenvectors are
      LAPACK's choice.
    - Whether features are those of training or of evaluation: the model is in eval mode meanwhile, and afterwards every
      module is in the mode that it was in.

    Sums are in fp64, around the first input of each layer. Memory is one [inputs, inputs] fp64 matrix per layer and
    group (170 MB for 512 channels of 3 x 3), the work 2 * inputs ** 2 flops for every patch and the cube of inputs for
    the eigenvectors: ``layers`` and a part of the data make it less.

    Args:
        model: holds the layers; it is called without gradients.
        loader: batches. A tensor, or the first element of a tuple or list, goes to the model, after it was
            moved to the device of the model's first parameter.
        layers: names of ``Linear`` and ``Conv2d`` modules of the model; None takes all of them, and warns of those that
            were not called.
        rtol: directions are left out whose eigenvalue is not above ``rtol`` times the layer's largest. None stands for
            the number of inputs times the fp64 epsilon. finite and >= 0.
        forward: called as ``forward(model, batch)`` in place of the above, for batches of another kind.

    Returns:
        For each layer by its name the projection in fp64, [outputs, directions] by descending eigenvalues, on the
        device of the layer. Of groups the one with most directions counts. No directions: the inputs were all the same.

    Raises:
        TypeError, ValueError: an argument is not allowed; a layer was not called, had inputs that are not finite, or
            does not compute what its class computes. The message names the layer.

    Example:
        >>> projections = fastwrs.analysis.input_projection(model, loader, layers=["fc"])
        >>> len(projections["fc"])  # as many rows as outputs
        10

    Source: Liu et al., *Weight Rescaling*, Section V-A, Eq. 12, Figs. 4 and 5, Appendix B.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"input_projection: model must be an nn.Module, got {type(model).__name__}")
    if forward is not None and not callable(forward):
        raise TypeError(f"input_projection: forward must be callable, got {forward!r}")
    if not isinstance(loader, Iterable):
        raise TypeError(f"input_projection: loader must be an iterable of batches, got {loader!r}")
    tolerance = None if rtol is None else checked_real(rtol, "input_projection: rtol")
    if tolerance is not None and tolerance < 0:
        raise ValueError(f"input_projection: rtol must be >= 0, got {rtol!r}")
    chosen = _chosen(model, layers)
    covariances = {layer: _Covariance(name, layer) for name, layer in reversed(chosen.items())}
    modes = [(module, module.training) for module in model.modules()]
    hooks = []
    try:
        for layer, covariance in covariances.items():
            hooks.append(layer.register_forward_hook(covariance.see, with_kwargs=True))
        model.eval()
        with torch.no_grad():
            for batch in loader:
                (forward or _forward)(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    silent = [name for name, layer in chosen.items() if not covariances[layer].count]
    if silent and (layers is not None or len(silent) == len(chosen)):
        raise ValueError(f"input_projection: no inputs came to {', '.join(map(repr, silent))}")
    if silent:
        warnings.warn(f"input_projection: no inputs came to {', '.join(map(repr, silent))}", stacklevel=2)
    found = {}
    for name, layer in chosen.items():
        if name not in silent:
            found[name] = covariances[layer].project(tolerance)
    return found


class _Covariance:
    """The covariance of the inputs of one layer, one matrix per group, updated pairwise (Chan, Golub and LeVeque)."""

    def __init__(self, name: str, layer: Layer) -> None:
        self.name, self.layer, self.count = name, layer, 0
        self.groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        self.inputs = layer.weight.numel() // layer.weight.shape[0]
        self.origin = self.mean = self.moment = torch.empty(0)

    def see(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The forward hook."""
        inputs = (args[0] if args else kwargs["input"]).detach()
        self._check(inputs, output)
        if isinstance(layer, nn.Conv2d):
            chunks = _patches(layer, inputs)
        else:
            chunks = iter(inputs.reshape(1, -1, self.inputs).split(max(1, _CHUNK // self.inputs), dim=1))
        for chunk in chunks:
            self._add(chunk)

    def _check(self, inputs: Tensor, output: Any) -> None:
        """A subclass with a forward of its own may use other weights than it has."""
        plain: Any = nn.Conv2d if isinstance(self.layer, nn.Conv2d) else nn.Linear
        if self.count or type(self.layer).forward is plain.forward:
            return
        expected = plain.forward(self.layer, inputs)
        # near enough for a short type, far from other weights
        same = isinstance(output, Tensor) and output.shape == expected.shape
        if not same or not torch.allclose(output, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().mean())):
            raise ValueError(
                f"input_projection: layer {self.name!r} ({type(self.layer).__name__}) does not compute what "
                f"{plain.__name__} computes with its weight"
            )

    def _add(self, rows: Tensor) -> None:
        """Adds inputs, [groups, number, inputs]."""
        number = rows.shape[1]
        if number == 0:
            return
        if self.count == 0:
            # With the first input as the origin, inputs that never vary have a covariance of exactly 0.
            self.origin = rows[:, :1].double()
            self.mean = torch.zeros_like(self.origin)
            self.moment = self.mean.new_zeros(self.groups, self.inputs, self.inputs)
        rows = rows.double() - self.origin
        mean = rows.mean(1, keepdim=True)
        rows -= mean
        self.moment.baddbmm_(rows.mT, rows)
        total = self.count + number
        shift = mean - self.mean
        self.moment.baddbmm_(shift.mT, shift, alpha=self.count * number / total)
        self.mean += shift * (number / total)
        self.count = total

    def project(self, rtol: float | None) -> Tensor:
        """The layer's weight in the eigenvectors; Eq. 12."""
        sigma = self.moment / self.count
        if not bool(sigma.isfinite().all()):
            raise ValueError(f"input_projection: layer {self.name!r} has had inputs that are not finite")
        values, vectors = torch.linalg.eigh((sigma + sigma.mT) / 2)
        values, vectors = values.flip(-1), vectors.flip(-1)
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        vectors = vectors * largest.sign()
        weight = self.layer.weight.detach().double().reshape(self.groups, -1, self.inputs)
        projection = (weight.to(vectors.device) @ vectors).reshape(-1, self.inputs)
        if rtol == 0:
            return projection
        bound = float(values.max()) * (self.inputs * torch.finfo(torch.float64).eps if rtol is None else rtol)
        return projection[:, (values > max(bound, 0.0)).any(0)]


def _patches(layer: nn.Conv2d, inputs: Tensor) -> Iterator[Tensor]:
    """What the kernel meets: [groups, number, inputs of a group] in some chunks, C_in slow and positions fast."""
    padded = F.pad(inputs if inputs.ndim == 4 else inputs[None], _padding(layer), _MODES[layer.padding_mode])
    places = padded  # a view: [batch, channels, height, width, kernel height, kernel width]
    for dim in range(2):
        reach = layer.dilation[dim] * (layer.kernel_size[dim] - 1) + 1
        places = places.unfold(2 + dim, reach, layer.stride[dim])
    places = places[..., :: layer.dilation[0], :: layer.dilation[1]]
    channels, height = places.shape[1:3]
    row = max(1, math.prod(places.shape[1:]) // max(1, height))
    for part in places.split(max(1, _CHUNK // max(1, row * height))):
        for strip in part.split(max(1, _CHUNK // row) if len(part) == 1 else max(1, height), dim=2):
            grouped = strip.unflatten(1, (layer.groups, channels // layer.groups))
            yield grouped.permute(1, 0, 3, 4, 2, 5, 6).flatten(4).flatten(1, 3)


_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def _padding(layer: nn.Conv2d) -> list[int]:
    """Left, right, top, bottom."""
    if layer.padding == "valid":
        return [0, 0, 0, 0]
    sides = []
    for dim in (1, 0):
        if layer.padding == "same":
            total = layer.dilation[dim] * (layer.kernel_size[dim] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [layer.padding[dim], layer.padding[dim]]
    return sides


def _chosen(model: nn.Module, layers: Sequence[str] | None) -> dict[str, Layer]:
    """The layers to look at, by name."""
    if layers is None:
        found: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
        if not found:
            raise ValueError("input_projection: the model has no Linear and no Conv2d")
    else:
        layers = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else layers
        if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
            raise TypeError(f"input_projection: layers must be a sequence of module names, got {layers!r}")
        modules = dict(model.named_modules(remove_duplicate=False))
        if unknown := [name for name in layers if name not in modules]:
            raise ValueError(f"input_projection: the model has no module {', '.join(map(repr, unknown))}")
        found = {name: modules[name] for name in layers}
        if not found:
            raise ValueError("input_projection: layers names no module")
    for name, layer in found.items():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            raise ValueError(f"input_projection: {name!r} is a {type(layer).__name__}, not a Linear or Conv2d")
        if is_lazy(layer.weight):
            raise ValueError(f"input_projection: {name!r} is not initialized yet: run the model on a batch first")
        if layer.weight.numel() == 0:
            raise ValueError(
                f"input_projection: {name!r} (weight of shape {tuple(layer.weight.shape)}) has no weights; name the "
                "others in layers"
            )
        if layer.weight.is_complex():
            raise ValueError(f"input_projection: {name!r} is complex; name the others in layers")
    return found


def _forward(model: nn.Module, batch: Any) -> None:
    """Calls the model on the inputs of a batch."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(inputs, Tensor):
        raise TypeError(
            "input_projection: a batch must be a tensor or begin with one, got "
            f"{type(batch).__name__}; forward=lambda model, batch: ... calls the model on other batches"
        )
    first = next(model.parameters(), None)
    model(inputs if first is None else inputs.to(first.device))


def _checked_weights(weights: Tensor) -> Tensor:
    """All elements in fp64 and in ascending order."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"generalized_gaussian_fit: weights must be a tensor, got {type(weights).__name__}")
    if not weights.is_floating_point():
        raise TypeError(f"generalized_gaussian_fit: weights must be real floating-point numbers, got {weights.dtype}")
    if weights.numel() < LEAST:
        raise ValueError(f"generalized_gaussian_fit: needs at least {LEAST} weights, got {weights.numel()}")
    x = weights.detach().to("cpu", torch.float64).flatten().sort().values
    if not bool(x.isfinite().all()):
        raise ValueError(f"generalized_gaussian_fit: {int((~x.isfinite()).sum())} of {len(x)} weights are not finite")
    values, counts = x.unique_consecutive(return_counts=True)
    most = int(counts.max())
    if most > max(2, MOST_EQUAL * len(x)):
        value = float(values[counts.argmax()])
        raise ValueError(
            f"generalized_gaussian_fit: {most} of {len(x)} weights are {value:g}; more than {MOST_EQUAL:.0%} that are "
            "equal have no density: leave them out"
        )
    return x


def _shape_by_moments(x: Tensor, optimize: Any) -> float:
    """The shape whose mean absolute deviation has the data's ratio to the standard deviation, location 0."""

    def ratio(log_beta: float) -> float:
        a = math.exp(-log_beta)  # mean(|z|)^2 / mean(z^2) is Gamma(2a)^2 / (Gamma(a) Gamma(3a)), which grows with beta
        return 2 * math.lgamma(2 * a) - math.lgamma(a) - math.lgamma(3 * a)

    wanted = 2 * math.log(float(x.abs().mean())) - math.log(float(x.square().mean()))
    least, most = map(math.log, SHAPES)
    if not ratio(least) < wanted < ratio(most):
        return SHAPES[0] if wanted <= ratio(least) else SHAPES[1]
    return math.exp(optimize.brentq(lambda log_beta: ratio(log_beta) - wanted, least, most))


def _scipy_optimize() -> Any:
    try:
        from scipy import optimize
    except ImportError as error:
        raise ImportError(f"generalized_gaussian_fit needs scipy: pip install scipy ({error})") from error
    return optimize
