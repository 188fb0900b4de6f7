"""Weight standardization and bounded weight normalization, the baselines that normalise weights in the forward pass.

Both are parametrizations of torch (``torch.nn.utils.parametrize``), as torch's own
``torch.nn.utils.parametrizations.weight_norm``, which is the plain weight normalization that the two go with.
``fastwrs.param_groups`` neither rescales nor decays what is behind a parametrization.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fastwrs.options import checked_real

Module = TypeVar("Module", bound=nn.Module)
Dims = tuple[int, ...]

_STANDARD_EPS = {"official": 1e-5, "timm": 1e-6}
_BOUNDED_FORMS = ("fixed", "learned")


def weight_standardization(
    module: Module, name: str = "weight", form: str = "official", eps: float | None = None
) -> Module:
    """Standardizes every output channel of a weight in the forward pass; what is trained is the raw weight v.

    With the mean m of a channel, over all other dimensions, its standard deviation s with n - 1 in the denominator,
    and its variance q with n::

        official:  w = (v - m) / (s + eps)          eps = 1e-5
        timm:      w = (v - m) / sqrt(q + eps)      eps = 1e-6

    The two differ where the weights are small: by 40 % at s = 1e-3. A channel whose weights are all equal becomes 0.
    Computed in the weight's dtype, in fp32 for bf16 and fp16. The output channel is dimension 0, for
    ``ConvTranspose*d`` dimension 1. Make the optimizer afterwards. Another layer that shares the weight has v.

    Args:
        module: a layer; it is changed in place.
        name: the name of its weight, a parameter of at least 2 dimensions.
        form: ``"official"`` or ``"timm"``.
        eps: another eps than that of the form; finite and >= 0. With 0 a channel of equal weights becomes NaN.

    Returns:
        The module.

    Raises:
        TypeError, ValueError: an argument is not allowed, or the weight cannot be standardized; the message says why.

    Example:
        >>> layer = fastwrs.nn.weight_standardization(nn.Linear(16, 4))
        >>> torch.allclose(layer.weight.std(dim=1), torch.ones(4), atol=1e-3)
        True

    Source: Qiao, Wang, Liu, Shen and Yuille, *Weight Standardization*, arXiv:1903.10520, and the authors' code, where
    eps is added to the deviation. pytorch-image-models has it inside the root, of the biased variance.
    """
    where = "weight_standardization"
    if form not in tuple(_STANDARD_EPS):
        raise ValueError(f"{where}: form must be 'official' or 'timm', got {form!r}")
    number = _STANDARD_EPS[form] if eps is None else checked_real(eps, f"{where}: eps")
    if number < 0:
        raise ValueError(f"{where}: eps must be >= 0, got {eps!r}")
    weight, dims = _checked_weight(module, name, where)
    if math.prod(weight.shape[dim] for dim in dims) < 2:
        raise ValueError(f"{where}: {name!r} (shape {tuple(weight.shape)}) has one element per channel: no deviation")
    if number > torch.finfo(_wide_dtype(weight)).max:
        raise ValueError(f"{where}: eps must be finite in {_wide_dtype(weight)}, got {eps!r}")
    parametrize.register_parametrization(module, name, _Standardized(dims, form, number))
    return module


def bounded_weight_norm(module: Module, name: str = "weight", form: str = "fixed", rho: float | None = None) -> Module:
    """Normalises every output channel of a weight in the forward pass, to norms that are bounded for good.

    With the trained v, and ``|v_i|`` the norm of channel i::

        fixed:    w_i = rho * v_i / |v_i|                      rho: the mean of the channels' norms at the start
        learned:  w_i = (rho * g_i / |g|) * v_i / |v_i|        rho: the norm |g| at the start

    ``"learned"`` is weight normalization with a trained g, one number per channel that starts as the channel's norm,
    of which only the direction counts: the norm of the vector of all channels' norms, which is the Frobenius norm of
    the weight, stays rho. rho is a buffer, and so part of the state dict, and rounded where the module is cast to a
    shorter type. A channel of zeros stays zero until a gradient moves it; with ``"learned"`` none does, since g and v
    are both zero. Computed in the weight's dtype, in fp32 for bf16 and fp16, where channels are normalised whose norms
    lie between 1e-19 and 1e19. The output channel is dimension 0, for ``ConvTranspose*d`` dimension 1. The trained
    tensors are called as those of torch's ``weight_norm``. Make the optimizer afterwards. Another layer that shares the
    weight has v.

    Args:
        module: a layer; it is changed in place.
        name: the name of its weight, a parameter of at least 2 dimensions.
        form: ``"fixed"`` or ``"learned"``.
        rho: another rho than that of the weights at the start; finite and > 0.

    Returns:
        The module.

    Raises:
        TypeError, ValueError: an argument is not allowed, or the weight cannot be normalised; the message says why.

    Example:
        >>> layer = fastwrs.nn.bounded_weight_norm(nn.Linear(16, 4), rho=2.0)
        >>> torch.allclose(layer.weight.norm(dim=1), torch.full((4,), 2.0))
        True

    Source: Hoffer, Banner, Golan and Soudry, *Norm matters*, NeurIPS 2018. The text has the root of the mean square of
    the norms, ``|V|_F / sqrt(number of channels)``, for rho; the authors' code has the mean, and so have we.
    ``"learned"`` is in their code only. They differ where channels start with different norms.
    """
    where = "bounded_weight_norm"
    if form not in _BOUNDED_FORMS:
        raise ValueError(f"{where}: form must be 'fixed' or 'learned', got {form!r}")
    number = None if rho is None else checked_real(rho, f"{where}: rho")
    if number is not None and number <= 0:
        raise ValueError(f"{where}: rho must be > 0, got {rho!r}")
    weight, dims = _checked_weight(module, name, where)
    if weight.is_meta:
        raise ValueError(f"{where}: {name!r} (shape {tuple(weight.shape)}) is on the meta device: give it values first")
    norms = torch.linalg.vector_norm(weight.detach().double(), dim=dims)
    if number is None:
        number = float(norms.mean() if form == "fixed" else torch.linalg.vector_norm(norms))
        if not 0 < number < float("inf"):
            raise ValueError(
                f"{where}: {name!r} (shape {tuple(weight.shape)}) has channels of norm {number} to start from, which "
                "is no bound: give rho, or initialise the weight first"
            )
    bound = torch.tensor(number, dtype=_wide_dtype(weight), device=weight.device)
    if not 0 < float(bound) < float("inf"):
        raise ValueError(f"{where}: rho must be > 0 and finite in {bound.dtype}, got {number!r}")
    kind = _Bounded if form == "fixed" else _LearnedBounded
    parametrize.register_parametrization(module, name, kind(dims, bound))
    return module


class _Standardized(nn.Module):
    """The parametrization of :func:`weight_standardization`."""

    def __init__(self, dims: Dims, form: str, eps: float) -> None:
        super().__init__()
        self.dims, self.form, self.eps = dims, form, eps

    def forward(self, v: Tensor) -> Tensor:
        wide = v.to(_wide_dtype(v))
        # From the first weight of each channel: differences of close numbers are exact, those of equal ones 0.
        first = [slice(0, 1) if dim in self.dims else slice(None) for dim in range(wide.ndim)]
        wide = wide - wide[tuple(first)].detach()
        centred = wide - wide.mean(self.dims, keepdim=True)
        if self.form == "official":
            scale = wide.std(self.dims, correction=1, keepdim=True) + self.eps
        else:
            scale = (wide.var(self.dims, correction=0, keepdim=True) + self.eps).sqrt()
        return (centred / scale).to(v.dtype)

    def right_inverse(self, w: Tensor) -> Tensor:
        return w

    def extra_repr(self) -> str:
        return f"form={self.form!r}, eps={self.eps}"


class _Bounded(nn.Module):
    """The parametrization of :func:`bounded_weight_norm` with ``form="fixed"``."""

    rho: Tensor

    def __init__(self, dims: Dims, rho: Tensor) -> None:
        super().__init__()
        self.dims = dims
        self.register_buffer("rho", rho)

    def forward(self, v: Tensor) -> Tensor:
        wide = v.to(_wide_dtype(v))
        return (wide * (self.rho / _nonzero(_norms(wide, self.dims)))).to(v.dtype)

    def right_inverse(self, w: Tensor) -> Tensor:
        return w

    def extra_repr(self) -> str:
        return f"rho={float(self.rho):g}"


class _LearnedBounded(_Bounded):
    """The parametrization of ``form="learned"``; the tensors are in the order of torch's weight_norm."""

    def forward(self, g: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        wide, gains = v.to(_wide_dtype(v)), g.to(_wide_dtype(g))
        gains = gains * (self.rho / _nonzero(torch.linalg.vector_norm(gains)))
        return (wide * (gains / _nonzero(_norms(wide, self.dims)))).to(v.dtype)

    def right_inverse(self, w: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return _norms(w.to(_wide_dtype(w)), self.dims).to(w.dtype), w


def _norms(wide: Tensor, dims: Dims) -> Tensor:
    return torch.linalg.vector_norm(wide, dim=dims, keepdim=True)


def _nonzero(norms: Tensor) -> Tensor:
    """Norms to divide by: what has norm 0 is 0, whatever it is divided by, and so are no gradients NaN."""
    return torch.where(norms == 0, torch.ones_like(norms), norms)


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _checked_weight(module: nn.Module, name: str, where: str) -> tuple[Tensor, Dims]:
    """The weight, and the dimensions that make up a channel; refuses what has no output channels."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{where}: module must be an nn.Module, got {type(module).__name__}")
    kind = type(module).__name__
    if not isinstance(name, str):
        raise TypeError(f"{where}: name must be a str, got {name!r}")
    if parametrize.is_parametrized(module, name):
        there = ", ".join(type(part).__name__ for part in module.parametrizations[name])  # type: ignore[index]
        raise ValueError(
            f"{where}: {name!r} of this {kind} is parametrized already ({there}); "
            "torch.nn.utils.parametrize.remove_parametrizations takes that away"
        )
    weight = dict(module.named_parameters(recurse=False, remove_duplicate=False)).get(name)
    if weight is None:
        has = ", ".join(repr(key) for key, _ in module.named_parameters(recurse=False)) or "none"
        raise ValueError(f"{where}: this {kind} has no parameter {name!r} of its own; it has: {has}")
    if is_lazy(weight):
        raise ValueError(f"{where}: {name!r} of this {kind} is not initialized yet: run the model on a batch first")
    shape = tuple(weight.shape)
    if weight.ndim < 2:
        raise ValueError(f"{where}: {name!r} of this {kind} (shape {shape}) needs at least 2 dimensions")
    if not weight.is_floating_point():
        raise ValueError(f"{where}: {name!r} of this {kind} must be real, it is {weight.dtype}")
    if not weight.numel():
        raise ValueError(f"{where}: {name!r} of this {kind} (shape {shape}) has no elements")
    transposed = isinstance(module, _ConvTransposeNd)
    if isinstance(module, _ConvTransposeNd) and module.groups > 1:
        raise ValueError(f"{where}: {name!r} of a {kind} with groups={module.groups} has no dimension of channels")
    return weight, tuple(dim for dim in range(weight.ndim) if dim != int(transposed))
