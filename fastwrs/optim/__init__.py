"""The optimizers: what they share is in ``base``, then one short class per rule."""

from fastwrs.optim.adam import Adam, AdamW
from fastwrs.optim.adamp import AdamP
from fastwrs.optim.sgd import SGD
from fastwrs.optim.sgdp import SGDP

__all__ = ["SGD", "SGDP", "Adam", "AdamP", "AdamW"]
