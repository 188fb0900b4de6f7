"""fastwrs: fused PyTorch optimizers that hold the norm of every channel in the pass that updates the weights.

The public API is what is listed in ``__all__``. ``fastwrs.backends()`` says what can run here, and why the rest cannot.
"""

from fastwrs import analysis, nn
from fastwrs._version import __version__
from fastwrs.batchnorm import follow_batchnorm
from fastwrs.dispatch import backends
from fastwrs.groups import param_groups
from fastwrs.monitor import Monitor
from fastwrs.optim import SGD, SGDP, Adam, AdamP, AdamW
from fastwrs.options import Rescale, Shrink
from fastwrs.projection import channel_norms, rescale_
from fastwrs.rescaler import WeightRescaler
from fastwrs.window import WeightDecayWindow

__all__ = [
    "SGD",
    "SGDP",
    "Adam",
    "AdamP",
    "AdamW",
    "Monitor",
    "Rescale",
    "Shrink",
    "WeightDecayWindow",
    "WeightRescaler",
    "__version__",
    "analysis",
    "backends",
    "channel_norms",
    "follow_batchnorm",
    "nn",
    "param_groups",
    "rescale_",
]
