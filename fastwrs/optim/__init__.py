"""The optimizers: what they share is in ``base``, then one short class per rule."""

from fastwrs.optim.adam import Adam, AdamW
from fastwrs.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
