"""The rules as plain data: what each optimizer rule is called, which numbers it takes and which states it keeps.

Everything that has to agree between the oracle, the kernels and the optimizers is written here once: the order of the
hyperparameter record that travels to a kernel, the bounds that user input is checked against, and the state slots.
The C++ functors describe themselves in the same terms (``fastwrs::rules``), and a test compares the two.

This module imports nothing of ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

NO_STOP = math.inf
"""How ``Rescale(stop=None)`` is written in a record: the window never closes."""


@dataclass(frozen=True)
class Hyper:
    """One number of a record and the values it may take (``low <= x < high``, or ``<= high`` if ``closed``)."""

    name: str
    low: float = -math.inf
    high: float = math.inf
    closed: bool = False
    flag: bool = False

    def why_not(self, value: float) -> str | None:
        """Why ``value`` is not allowed, or None if it is."""
        if self.flag:
            return None if value in (0, 1) else f"must be True or False, got {value!r}"
        inside = self.low <= value and (value <= self.high if self.closed else value < self.high)
        if math.isfinite(value) and inside:
            return None
        return f"must be {self.allowed}, got {value!r}"

    @property
    def allowed(self) -> str:
        """The allowed values in words, for error messages."""
        if self.low == -math.inf and self.high == math.inf:
            return "finite"
        if self.high == math.inf:
            return f"finite and >= {self.low:g}"
        return f"in [{self.low:g}, {self.high:g}{']' if self.closed else ')'}"


@dataclass(frozen=True)
class Slot:
    """One state tensor of a rule: its key in ``state[p]``, and the option that switches it on (None: always)."""

    name: str
    when: str | None = None
    elsewhere: str | None = None
    """The key that it has in the state dicts of the authors' package, where that is another one."""


@dataclass(frozen=True)
class Rule:
    """An optimizer rule: its hyperparameters in the order of the record, its state slots in order, and its source."""

    name: str
    hypers: tuple[Hyper, ...]
    slots: tuple[Slot, ...]
    source: str
    look: str | None = None
    """What a look at each whole tensor finds out before its weights change: "gate", whether AdamP's gate is open (the
    states have been changed by then); "shift", the mean and the standard deviation of every channel. None: no look."""
    updates: bool = True
    """Whether it changes weights by a gradient. One that does not reads none, and does only what all rules have in
    common: rescaling and shrinking."""
    counts: bool = True
    """Whether the formula has the step count in it; if not, states without one are those after a first step."""

    @property
    def gated(self) -> bool:
        """Whether the rule has AdamP's gate."""
        return self.look == "gate"

    @property
    def record(self) -> tuple[Hyper, ...]:
        """The whole record of one param group: the common numbers, then the rule's own."""
        return COMMON + self.hypers

    def slots_for(self, group: Mapping[str, object]) -> tuple[str, ...]:
        """The slots that a param group with these options needs; a switched-off slot is always a last one."""
        return tuple(slot.name for slot in self.slots if slot.when is None or group[slot.when])


COMMON = (
    Hyper("lr", low=0.0),
    Hyper("lr_tensor", low=-1.0),  # index into the op's `lrs`, or -1: `lr` is the number in the record
    Hyper("maximize", flag=True),
    Hyper("every", low=0.0),  # rescale each time the step count is a multiple; 0: never
    Hyper("start", low=0.0),
    Hyper("stop", low=0.0, closed=True),  # NO_STOP: never
    Hyper("target", low=0.0),
    Hyper("rate", low=0.0),  # shrink; 0: never
    Hyper("power"),
)
"""The numbers that every rule has. `lr` comes first."""

_SGD = Rule(
    name="sgd",
    hypers=(
        Hyper("momentum", low=0.0),
        Hyper("dampening"),
        Hyper("nesterov", flag=True),
        Hyper("weight_decay", low=0.0),
    ),
    slots=(Slot("momentum_buffer", when="momentum"),),
    source="torch.optim.SGD; Sutskever et al., On the importance of initialization and momentum, ICML 2013",
    counts=False,
)

_SGD_SHIFTED = Rule(
    name="sgd_shifted",
    hypers=(*_SGD.hypers, Hyper("shifted_l2_lam", low=0.0), Hyper("shifted_l2_eps", low=0.0)),
    slots=_SGD.slots,
    source=f"{_SGD.source}; the epsilon-shifted L2 term of arXiv 1911.05920",
    look="shift",
    counts=False,
)

_ADAM = Rule(
    name="adam",
    hypers=(
        Hyper("beta1", low=0.0, high=1.0),
        Hyper("beta2", low=0.0, high=1.0),
        Hyper("eps", low=0.0),
        Hyper("weight_decay", low=0.0),
        Hyper("decoupled_weight_decay", flag=True),
    ),
    slots=(Slot("exp_avg"), Slot("exp_avg_sq"), Slot("max_exp_avg_sq", when="amsgrad")),
    source="torch.optim.Adam and AdamW; Kingma and Ba, ICLR 2015; Loshchilov and Hutter, ICLR 2019; "
    "Reddi et al. (AMSGrad), ICLR 2018",
)

_GATE = (
    Hyper("eps", low=0.0),
    Hyper("weight_decay", low=0.0),
    Hyper("delta"),
    Hyper("wd_ratio", low=0.0),
    Hyper("nesterov", flag=True),
)
_GATE_SOURCE = (
    "Heo et al., AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights, ICLR 2021"
)

_ADAMP = Rule(
    name="adamp",
    hypers=(Hyper("beta1", low=0.0, high=1.0), Hyper("beta2", low=0.0, high=1.0), *_GATE),
    slots=(Slot("exp_avg"), Slot("exp_avg_sq")),
    source=_GATE_SOURCE,
    look="gate",
)

_SGDP = Rule(
    name="sgdp",
    hypers=(
        Hyper("momentum", low=0.0, high=1.0),
        Hyper("dampening"),
        *_GATE,
        Hyper("project_momentum", flag=True),
    ),
    slots=(Slot("momentum_buffer", elsewhere="momentum"),),
    source=_GATE_SOURCE,
    look="gate",
    counts=False,
)

_PROJECT = Rule(
    name="project",
    hypers=(),
    slots=(),
    source="none of its own: it leaves the update to another optimizer",
    updates=False,
    counts=False,
)

RULES: dict[str, Rule] = {rule.name: rule for rule in (_SGD, _ADAM, _ADAMP, _SGDP, _SGD_SHIFTED, _PROJECT)}
"""All rules by name."""

MEASURED = (
    "norm_before",  # |w| before the step
    "norm_updated",  # |w| after the update, before shrink and rescale
    "norm_after",  # |w| after the step
    "grad_norm",  # |g|, unscaled, as the user sees it
    "update_norm",  # |u|: the step before the learning rate (Adam: m-hat / (sqrt(v-hat) + eps))
    "effective_grad_norm",  # |u| / |w before|
    "rescale_factor",  # what rescaling multiplied by; 1 where it did not run
    "shrink_factor",  # what shrinking multiplied by; 1 where it did not run
)
"""The columns of the [groups, 8] buffer that a step can fill."""

DTYPE_TRIPLES: tuple[tuple[str, str, str], ...] = (
    ("float32", "float32", "float32"),
    ("float64", "float64", "float64"),
    ("bfloat16", "bfloat16", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("float16", "float16", "float32"),
    ("float32", "bfloat16", "float32"),
)
"""The allowed (param, grad, state) dtypes."""
