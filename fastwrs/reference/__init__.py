"""The oracle: what every kernel has to compute, written once more from the papers in plain PyTorch.

It is slow on purpose. Nothing here is in place, nothing depends on strides, and every function follows the dtype that
it is given: run in fp64 it is the truth, run in a kernel's compute type it shows what the formula itself loses to
rounding. It shares no code with the kernels, so that the two can disagree.
"""

from fastwrs.reference.norms import compute_dtype, group_norms, rescale, rescale_factor, shrink_factor
from fastwrs.reference.step import Result, rescale_due, step

__all__ = [
    "Result",
    "compute_dtype",
    "group_norms",
    "rescale",
    "rescale_due",
    "rescale_factor",
    "shrink_factor",
    "step",
]
