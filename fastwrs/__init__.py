"""fastwrs: fused PyTorch optimizers that hold the norm of every channel in the pass that updates the weights.

The public API is what is listed in ``__all__``. ``fastwrs.backends()`` says what can run here, and why the rest cannot.
"""

from fastwrs._version import __version__
from fastwrs.dispatch import backends
from fastwrs.groups import param_groups
from fastwrs.optim import SGD, Adam, AdamW
from fastwrs.options import Rescale, Shrink
from fastwrs.projection import channel_norms, rescale_

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Rescale",
    "Shrink",
    "__version__",
    "backends",
    "channel_norms",
    "param_groups",
    "rescale_",
]
