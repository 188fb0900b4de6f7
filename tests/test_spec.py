"""A rule is in spec.py, the oracle, a C++ functor and a Triton function. A forgotten one is a clear failure here."""

from __future__ import annotations

import inspect

import pytest
import torch

from fastwrs import library, reference, spec
from fastwrs.optim.base import FusedOptimizer
from fastwrs.reference import rules
from fastwrs.triton_kernels import rules as triton_rules
from fastwrs.triton_kernels import table

pytestmark = pytest.mark.cpu


def described() -> dict[str, tuple[list[str], list[str]]]:
    """What the functors say of themselves: hyperparameters and slots by rule; "common" is the shared record."""
    library.load()
    found = {}
    for line in torch.ops.fastwrs.rules().splitlines():
        name, _, rest = line.partition(":")
        hypers, _, slots = rest.partition("|")
        found[name] = hypers.split(), slots.split()
    return found


def test_common_record() -> None:
    assert described()["common"][0] == [hyper.name for hyper in spec.COMMON]


def test_the_same_rules_everywhere() -> None:
    assert set(described()) - {"common"} == set(spec.RULES) == set(rules.RULES)


@pytest.mark.parametrize("rule", spec.RULES.values(), ids=spec.RULES)
def test_functor(rule: spec.Rule) -> None:
    hypers, slots = described()[rule.name]
    assert hypers == [hyper.name for hyper in rule.hypers]
    assert slots == [slot.name for slot in rule.slots]


class Recorder(dict):
    """A dict that remembers which keys were read."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.read: set[str] = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)


@pytest.mark.parametrize("rule", spec.RULES.values(), ids=spec.RULES)
def test_oracle(rule: spec.Rule) -> None:
    """The oracle reads every hyperparameter of the rule and keeps exactly its slots."""
    read: set[str] = set()
    for flag, delta in ((0.0, 0.5), (1.0, 0.5), (0.0, 9.0)):  # such a gate is open
        numbers = {h.name: flag if h.flag else 0.5 for h in rule.record}
        hyper = Recorder(numbers | ({"delta": delta} if rule.gated else {}))
        states = {slot.name: torch.ones(2, 3) for slot in rule.slots}
        result = reference.step(
            rule.name, torch.ones(2, 3), torch.ones(2, 3), states, t=2, hyper=hyper, dims=None, first=False
        )
        assert list(result.states) == [slot.name for slot in rule.slots]
        read |= hyper.read
    assert {h.name for h in rule.hypers} <= read


def subclasses(kind: type) -> list[type]:
    return [kind, *(each for below in kind.__subclasses__() for each in subclasses(below))]


@pytest.mark.parametrize("rule", spec.RULES.values(), ids=spec.RULES)
def test_optimizer(rule: spec.Rule) -> None:
    """Some optimizer runs the rule, and takes what switches its optional slots on."""
    kinds = [
        kind
        for kind in subclasses(FusedOptimizer)
        if rule in (getattr(kind, "rule", None), getattr(kind, "shifted_rule", None))
    ]
    assert kinds
    for slot in rule.slots:
        assert slot.when is None or any(slot.when in inspect.signature(kind).parameters for kind in kinds)


def test_the_same_rules_in_triton() -> None:
    assert set(triton_rules.RULES) == set(spec.RULES)


@pytest.mark.parametrize("rule", spec.RULES.values(), ids=spec.RULES)
def test_triton(rule: spec.Rule) -> None:
    """The same hyperparameters and slots in the same order, and every hyperparameter is read."""
    ours = triton_rules.RULES[rule.name]
    assert ours.hypers == tuple(hyper.name for hyper in rule.hypers)
    assert ours.slots == tuple(slot.name for slot in rule.slots)
    record = Recorder({hyper.name: 0.5 for hyper in rule.record})
    ours.constants(record)
    assert record.read == set(ours.hypers)
    assert (ours.look, ours.updates) == (rule.look, rule.updates)
    assert rule.gated == (ours.direction is not None) == (ours.advance is not None)
    if rule.look == "shift":
        values = {hyper.name: 0.5 for hyper in rule.record}
        for number, name in enumerate(table.SHIFT_CONTROL):
            assert ours.constants(values | {f"shifted_l2_{name}": 0.75})[number] == 0.75
    if rule.gated:  # what the gate itself reads comes first
        for number, name in enumerate(table.GATE_CONTROL):
            values = {hyper.name: 0.0 if hyper.flag else 0.5 for hyper in rule.record}
            expected = 0.0 if name not in values else 1.0 if name in ("nesterov", "project_momentum") else 0.75
            assert ours.constants(values | {name: expected})[number] == expected


def test_the_words_of_tritons_table() -> None:
    """C++ writes them and the kernels read them, by the same names in the same order."""
    library.load()
    named = dict(line.split(":") for line in torch.ops.fastwrs.triton_layout().splitlines())
    assert {name: words.split() for name, words in named.items()} == {
        "header": list(table.HEADER),
        "entry": list(table.ENTRY),
        "gate": list(table.GATE),
        "kinds": list(table.KINDS),
        "flags": list(table.FLAGS),
    }
    assert list(table.CONTROL) == [hyper.name for hyper in spec.COMMON if hyper.name != "lr_tensor"]


def test_dtype_triples() -> None:
    """The op takes the triples of the spec, and no other."""
    library.load()
    dtypes = ("float32", "float64", "bfloat16", "float16")
    record = [-1.0 if hyper.name == "lr_tensor" else 0.0 for hyper in spec.RULES["sgd"].record]
    for param in dtypes:
        for grad in dtypes:
            for state in dtypes:
                tensors = [torch.ones(2, dtype=getattr(torch, dtype)) for dtype in (param, grad, state)]
                args = ([tensors[0]], [tensors[1]], [tensors[2]], [torch.zeros(())], record, [0], [0], [], [])
                if (param, grad, state) in spec.DTYPE_TRIPLES:
                    torch.ops.fastwrs.step("sgd", *args, None, None, None, None, True)
                else:
                    with pytest.raises(RuntimeError, match="do not go together"):
                        torch.ops.fastwrs.step("sgd", *args, None, None, None, None, True)
