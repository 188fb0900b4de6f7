"""The ops called past all checks in Python: what is malformed is an error before anything has changed, never a crash.

The lane of the sanitizers runs this against kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and with more
calls. Every entry that the library registers is called. Calls that crashed once, or were taken and should not have
been, have names here.
"""

from __future__ import annotations

import gc
import os
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import entry as entries
import pytest
import torch
from cases import DTYPES, Case, TensorCase
from entry import Entry
from torch import Tensor

from fastwrs import library

pytestmark = [pytest.mark.cpu, pytest.mark.bad_input]

SEEDS = 20
CALLS = int(os.environ.get("ENTRY_CALLS", "2000"))
"""Mutated calls in all."""
ADAMW = Case("entry", "adamw", (TensorCase((3, 4)), TensorCase((2, 3, 2, 2), "in")), DTYPES[0])
HUGE = 1 << 62


@pytest.fixture(scope="module", autouse=True)
def _ops() -> None:
    entries.registered()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def test_every_entry_is_called() -> None:
    assert entries.registered() == sorted([*entries.OP_NAMES, *entries.KEEPING, *entries.WITHOUT_ARGUMENTS])
    for name in entries.WITHOUT_ARGUMENTS:
        assert isinstance(getattr(torch.ops.fastwrs, name)(), str)
        with pytest.raises(RuntimeError, match=f"fastwrs::{name}"):
            getattr(torch.ops.fastwrs, name)(1)


@pytest.mark.parametrize("what", [*entries.NEVER, *entries.PERHAPS])
def test_every_malformed_tensor_can_be_made(what: str) -> None:
    for dtype in (torch.float32, torch.float64):
        made = entries.malformed(what, torch.ones(4, 4, dtype=dtype))
        assert isinstance(made, Tensor) or what in ("None", "a number")


@pytest.mark.parametrize("name", [name for name in entries.OP_NAMES if name != "triton_step"])
def test_calls_are_valid_before_they_are_changed(name: str) -> None:
    rng = random.Random(name)
    for _ in range(20 * entries.has_kernel(name)):
        entry = entries.valid(name, rng)
        memory = entries.storages(entry)
        assert entries.may_change(entry, memory)[1] is None
        entry.make()
    if not entries.has_kernel(name):
        with pytest.raises(NotImplementedError, match=f"fastwrs::{name}"):
            entries.valid(name, rng).make()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_mutated_calls(seed: int) -> None:
    rng = random.Random(seed)
    for k in range(CALLS // SEEDS):
        entry = entries.mutated(rng)
        why = entries.fault(entry)
        assert why is None, f"seed {seed}, call {k}: {entry.op}{entry.said}: {why}"


# ---- by name --------------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], object]
STEPS = ("step", "triton_table", "triton_step")


def item(name: str, value: Any, i: int = 0) -> Change:
    """One item of a list is another."""
    return lambda args: args[name].__setitem__(i, value(args[name][i]) if callable(value) else value)


def whole(name: str, value: Any) -> Change:
    """An argument is another."""
    return lambda args: args.__setitem__(name, value(args) if callable(value) else value)


def number(name: str, value: float) -> Change:
    """A number of the first record, by its place in the common record or at the end."""
    places = {"lr": 0, "lr_tensor": 1, "every": 3, "stop": 5, "rate": 7, "eps": 11}
    return item("hyper", value, places[name])


def unaligned_table(args: dict[str, Any]) -> None:
    args["table"] = torch.frombuffer(bytearray(80_001), dtype=torch.int64, offset=1, count=10_000)


def negative_buffer(shape: tuple[int, ...]) -> Tensor:
    return torch.zeros(shape, dtype=torch.complex64).conj().imag


def table_in_a_parameter(args: dict[str, Any]) -> None:
    memory = torch.zeros(4000, dtype=torch.int64)
    args["table"], args["params"][0] = memory, memory.view(torch.float32)[:12].view(3, 4)


def shifted_states(args: dict[str, Any]) -> None:
    memory = ones(23)
    args["states"][0], args["states"][2] = memory[:12].view(3, 4), memory[11:].view(3, 4)


def columns_that_meet(args: dict[str, Any]) -> None:
    memory = ones(3, 7)
    args["params"][0], args["states"][0] = memory[:, :4], memory[:, 3:]


def repeated_cube(args: dict[str, Any]) -> None:
    """Eight billion bytes, if every element were looked at."""
    args["params"][0] = ones(3000).as_strided((1000, 1000, 1000), (1, 1, 1))
    args["grads"][0] = args["states"][0] = args["states"][2] = ones(1).expand(1000, 1000, 1000)


MALFORMED: list[tuple[str, tuple[str, ...], Change, str]] = [
    ("lengths", STEPS, lambda args: args["grads"].pop(), "one entry for each of the 2 params"),
    ("no gradients", STEPS, whole("grads", []), "one entry for each of the 2 params"),
    ("masks are missing", STEPS, whole("axes", [2]), "one entry for each of the 2 params"),
    ("a state is missing", STEPS, lambda args: args["states"].pop(), '"adam" cannot have 3 states for 2 params'),
    ("half a record", STEPS, lambda args: args["hyper"].pop(), "hyper must hold records of 14 numbers"),
    ("no record", STEPS, whole("hyper", []), "hyper must hold records"),
    ("an unknown rule", STEPS, whole("rule", "adam2"), "unknown rule"),
    ("a rule with a zero byte", STEPS, whole("rule", "adam\0"), "unknown rule"),
    ("closed parameter", STEPS, item("params", entries.closed), r"params\[0\] reaches beyond its storage"),
    ("short gradient", STEPS, item("grads", entries.short), r"grads\[0\] reaches beyond its storage"),
    ("closed state", STEPS, item("states", entries.closed, 3), r"states\[3\] reaches beyond its storage"),
    ("closed step", STEPS, item("steps", entries.closed, 1), r"steps\[1\] reaches beyond its storage"),
    ("unaligned gradient", STEPS, item("grads", entries.unaligned), r"grads\[0\] is not aligned"),
    ("steps in fp64", STEPS, item("steps", lambda t: t.double()), r"steps\[0\] must be a 0-d float32"),
    ("a step of one dimension", STEPS, item("steps", ones(1)), r"steps\[0\] must be a 0-d float32"),
    ("closed buffer", STEPS, whole("measured", lambda args: entries.closed(args["measured"])), "measured.*its storage"),
    ("a column of a buffer", STEPS, whole("measured", torch.ones(64, 16)[:, :8]), "measured must be contiguous"),
    ("a small buffer", STEPS, whole("measured", ones(2, 8)), "measured must have at least 88 elements"),
    ("scale of two numbers", STEPS, whole("grad_scale", ones(2)), r"grad_scale\[0\] must hold one number"),
    ("found_inf of no number", STEPS, whole("found_inf", ones(0)), r"found_inf\[0\] must hold one number"),
    ("repeated parameter", STEPS, item("params", ones(1, 4).expand(3, 4)), r"params\[0\] overlaps itself"),
    ("repeated cube", STEPS, repeated_cube, r"params\[0\] overlaps itself"),
    ("repeated for ever", STEPS, item("params", ones(1).expand(HUGE)), r"params\[0\] repeats itself"),
    ("a mask of missing dimensions", STEPS, item("axes", 4), r"axes\[0\] = 4 names dimensions"),
    ("a negative mask", STEPS, item("axes", -2), r"axes\[0\] = -2 names dimensions"),
    ("a huge mask", STEPS, item("axes", HUGE), r"axes\[0\] = 46\d+ names dimensions"),
    ("a group too many", STEPS, item("groups", 1), r"groups\[0\] = 1 but there are 1 records"),
    ("a huge group", STEPS, item("groups", -(1 << 63)), r"groups\[0\] = -92\d+ but there are 1"),
    ("fresh beyond the list", STEPS, whole("fresh", [0, 2]), r"fresh names params\[2\]"),
    # what was taken, or crashed, before this test was here
    ("a NaN among the numbers", STEPS, number("every", float("nan")), r"hyper\[3\] \(every of record 0\) is nan"),
    ("an infinite lr", STEPS, number("lr", float("inf")), r"hyper\[0\] \(lr of record 0\) is inf"),
    ("an infinite eps", STEPS, number("eps", float("inf")), r"hyper\[11\] \(eps of record 0\) is inf"),
    ("a stop before all steps", STEPS, number("stop", -float("inf")), r"hyper\[5\] \(stop of record 0\) is -inf"),
    ("half an index of lrs", STEPS, number("lr_tensor", -0.5), r"hyper\[1\] \(lr_tensor of record 0\) is -0.5"),
    ("an index of no lrs", STEPS, number("lr_tensor", 0.0), "lr_tensor 0 but there are 0 lrs"),
    ("states of nothing", STEPS,
     lambda args: args.update(params=[], grads=[], steps=[], groups=[], axes=[]), "4 states for no params"),
    ("fresh in nothing", STEPS,
     lambda args: args.update(params=[], grads=[], steps=[], groups=[], axes=[], states=[], fresh=[7]), "fresh names"),
    ("a parameter twice", STEPS, lambda args: args.update(
        {k: [args[k][0]] * 2 for k in ("params", "grads")}, states=[ones(3, 4) for _ in range(4)], axes=[2, 2]),
     r"params\[0\] and params\[1\] share memory"),
    ("states that share an element", STEPS, lambda args: (args.update(
        params=[ones(3, 4), ones(3, 4)], grads=[ones(3, 4)] * 2, states=[ones(3, 4) for _ in range(4)], axes=[2, 2]),
        shifted_states(args)), r"states\[0\] and states\[2\] share memory"),
    ("a state in a parameter", STEPS, lambda args: item("states", args["params"][0])(args), "and states.0. share"),
    ("columns that meet", STEPS, columns_that_meet, r"params\[0\] and states\[0\] share memory"),
    ("one step for two", STEPS, lambda args: item("steps", args["steps"][0], 1)(args), "steps.1. share memory"),
    ("a step in a parameter", STEPS, lambda args: item("steps", args["params"][0][0, 0])(args), "steps.0. share"),
    ("a scale in a state", STEPS, lambda args: args.update(grad_scale=args["states"][0][0, 0]), "grad_scale.*share"),
    ("a gradient to unscale twice", STEPS,
     lambda args: args.update(grad_scale=ones(), states=[*args["states"][:3], args["grads"][1]]), "grads.*share"),
    ("a buffer in the workspace", STEPS,
     lambda args: args.update(measured=(memory := ones(30_000)), workspace=memory[8:]), "workspace.*share"),
    ("negative gradient", STEPS, item("grads", entries.negative), "a view with the negative bit set"),
    ("negative buffer", STEPS, whole("measured", negative_buffer((11, 8))), "a view with the negative bit set"),
    ("zeros without memory", STEPS, item("grads", entries.NEVER["zeros without memory"]), "zeros without memory"),
    ("one on another device", STEPS, whole("measured", torch.ones(11, 8, device="meta")), "device|measured"),
    ("an unknown list of states", ("step",), lambda args: args.update(states=[], kept_states=1 << 40),
     "kept_states = 1099511627776: no such list is kept"),
    ("a negative list", ("step",), lambda args: args.update(steps=[], kept_steps=-1), "kept_steps = -1: no such list"),
    ("a list besides one that is kept", ("step",), whole("kept_steps", 1), "steps must be empty where kept_steps"),
    ("closed table", ("triton_table",),
     lambda args: args.update(table=entries.closed(args["table"])), r"table\[0\] reaches beyond its storage"),
    ("unaligned table", ("triton_table",), unaligned_table, r"table\[0\] is not aligned"),
    ("table in a parameter", ("triton_table",), table_in_a_parameter, r"params\[0\] and table\[0\] share memory"),
    ("strided table", ("triton_table",), whole("table", torch.zeros(800, 2, dtype=torch.int64)[:, 0]), "table must be"),
    ("huge tiles", ("triton_table",), whole("sizes", [HUGE] * 4), "sizes must be 4 numbers from 1 to"),
    ("tiles of nothing", ("triton_table",), whole("sizes", [256, 8, 0, 64]), "sizes must be 4 numbers from 1 to"),
    ("three sizes", ("triton_table",), whole("sizes", [256, 8, 16]), "sizes must be 4 numbers"),
    ("constants of no record", ("triton_table",),
     lambda args: args.update(hyper=args["hyper"] * 2), "constants must be as many"),
    ("all on the meta device", ("triton_table",), lambda args: args.update(
        {k: [t.to("meta") for t in args[k]] for k in ("params", "grads", "states", "steps")}, measured=None),
     r"params\[0\] has no memory"),
    ("huge counts", ("reduce_measured",), whole("counts", [1 << 61]), r"counts\[0\] = 23\d+ is more rows than"),
    ("counts that overflow", ("reduce_measured",), whole("counts", [HUGE] * 4), r"counts\[0\] = 46\d+ is more rows"),
    ("counts below 1", ("reduce_measured",), whole("counts", [1, 0]), r"counts\[1\] must be > 0, got 0"),
    ("more counts than rows", ("reduce_measured",), whole("counts", [1000]), "measured must have at least 8000"),
    ("out in what is reduced", ("reduce_measured",), lambda args: args.update(measured=(m := ones(99, 8)), out=m[0:44]),
     r"measured\[0\] and out\[0\] share memory"),
    ("closed out", ("reduce_measured", "channel_norms"),
     lambda args: args.update(out=entries.closed(args["out"])), r"out\[0\] reaches beyond its storage"),
    ("negative out", ("reduce_measured", "channel_norms"), whole("out", negative_buffer((64,))), "negative bit"),
    ("small out", ("reduce_measured", "channel_norms"), whole("out", ones(2)), "out must have at least"),
    ("no mask", ("rescale_", "channel_norms"), item("axes", 0), r"axes\[0\] = 0"),
    ("missing masks", ("rescale_", "channel_norms"), whole("axes", [2]), "axes must have one entry for each of the 2"),
    ("two dtypes", ("rescale_", "channel_norms"), item("tensors", lambda t: t.double()), "have different dtypes"),
    ("closed tensor", ("rescale_", "channel_norms"), item("tensors", entries.closed, 1), r"tensors\[1\] reaches"),
    ("a tensor twice", ("rescale_",), lambda args: args.update(tensors=[ones(3, 4)] * 2, axes=[2, 2]), "share memory"),
    ("repeated tensor", ("rescale_",), item("tensors", ones(3, 1).expand(3, 4)), r"tensors\[0\] overlaps itself"),
    ("for ever", ("rescale_", "channel_norms"),
     lambda args: args.update(tensors=[ones(1).expand(HUGE)], axes=[-1]), r"tensors\[0\] repeats itself"),
    ("out in a tensor", ("channel_norms",), lambda args: args.update(out=args["tensors"][1].view(-1)), "share memory"),
    ("no target", ("rescale_",), whole("target", float("nan")), "target must be finite and > 0, got nan"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [pytest.param(op, change, message, id=f"{op}-{name}") for name, ops, change, message in MALFORMED for op in ops],
)
def test_malformed_calls(op: str, change: Change, message: str) -> None:
    entry = entries.valid(op, random.Random(0), ADAMW)
    entry.args.update({"grad_scale": None, "found_inf": None} if "params" in entry.args else {})
    change(entry.args)
    memory = entries.storages(entry)
    before = {address: data.clone() for address, data in memory.items()}
    with pytest.raises(RuntimeError, match=message):
        entry.make()
    assert all(torch.equal(data, before[address]) for address, data in memory.items())


def test_numbers_that_only_the_cpu_reads() -> None:
    """On a GPU they are not looked at: that would wait for it."""
    for change, message in (
        (whole("grad_scale", -ones()), "grad_scale must be > 0, got -1"),
        (whole("grad_scale", ones() / 0), "grad_scale must be > 0, got inf"),
        (item("steps", -ones()), r"steps\[0\] is -1, not a count"),
        (item("steps", ones() * float("nan")), r"steps\[0\] is nan, not a count"),
        (whole("lrs", [ones() / 0]), r"lrs\[0\] is inf"),
    ):
        entry = entries.valid("step", random.Random(0), ADAMW)
        change(entry.args)
        if entries.on_device():
            assert entries.fault(entry) is None
        else:
            with pytest.raises(RuntimeError, match=message):
                entry.make()


def test_a_workspace_for_sums_in_fp64_is_aligned_to_them() -> None:
    case = Case("entry", "adamw", (TensorCase((3, 4)),), DTYPES[1])
    for place in range(4):
        entry = entries.valid("triton_table", random.Random(0), case)
        entry.args["workspace"] = torch.zeros(20_000)[place:]
        if place % 2:
            with pytest.raises(RuntimeError, match="workspace is not aligned"):
                entry.make()
        else:
            entry.make()
            assert entry.args["table"].any()


def test_numbers_without_constants() -> None:
    entry = entries.valid("triton_step", random.Random(0), Case("entry", "sgdp", (TensorCase((3, 4)),), DTYPES[0]))
    entry.args["hyper"][9] = 1.0  # momentum
    with pytest.raises(RuntimeError, match="hyper has a record that 'sgdp' has no constants for"):
        entry.make()


def test_neighbours_in_memory_are_no_fault() -> None:
    """Columns of one matrix in turns, and parts of one buffer that touch: what is written is written once."""
    matrix, buffer = torch.rand(3, 16), torch.rand(24)
    separate, together = ([valid_step() for _ in range(2)] for _ in range(2))
    for entry, joined in zip(separate, together, strict=True):
        joined.args["params"][0] = matrix[:, 0::4].copy_(entry.args["params"][0])
        joined.args["grads"][0] = matrix[:, 1::4].copy_(entry.args["grads"][0])
        joined.args["states"][0] = matrix[:, 2::4].copy_(entry.args["states"][0])
        joined.args["states"][2] = buffer[:12].view(3, 4).copy_(entry.args["states"][2])
        joined.args["states"][3] = buffer[12:].view(2, 3, 2, 1).expand(2, 3, 2, 1).repeat(1, 1, 1, 2)
        joined.args["states"][3].copy_(entry.args["states"][3])
        for _ in range(2):  # the second time memory is that of the call before
            entry.make()
            joined.make()
        for name in ("params", "states", "steps"):
            assert all(torch.equal(*pair) for pair in zip(entry.args[name], joined.args[name], strict=True)), name


def valid_step() -> Entry:
    return entries.valid("step", random.Random(0), ADAMW)


# ---- lists that are kept --------------------------------------------------------------------------------------------


def kept(entry: Entry, *names: str) -> Entry:
    """The call with these lists kept, for as long as the process lives."""
    args = dict(entry.args)
    for name in names:
        args |= {name: [], f"kept_{name}": torch.ops.fastwrs.keep(args[name])}
    return Entry(entry.op, args)


def test_a_kept_list_is_the_list() -> None:
    given, instead = valid_step(), valid_step()
    call = kept(instead, "states", "steps")
    for _ in range(2):
        given.make()
        call.make()
    for name in ("params", "states", "steps"):
        assert all(torch.equal(*pair) for pair in zip(given.args[name], instead.args[name], strict=True)), name


def test_what_is_kept_is_looked_at_in_every_call() -> None:
    for change, message in (
        (lambda args: args["states"][3].untyped_storage().resize_(0), r"states\[3\] reaches beyond its storage"),
        (lambda args: args["states"][0].resize_(4, 3), r"states\[0\] has another shape"),
        (lambda args: args["steps"][1].resize_(2), r"steps\[1\] must be a 0-d float32"),
        (lambda args: args["states"][0].set_(args["params"][0]), "share memory"),
    ):
        entry = valid_step()
        call = kept(entry, "states", "steps")
        call.make()
        change(entry.args)
        before = {address: data.clone() for address, data in entries.storages(entry).items()}
        with pytest.raises(RuntimeError, match=message):
            call.make()
        assert all(torch.equal(data, before[address]) for address, data in entries.storages(entry).items())


def test_a_list_is_kept_until_it_is_forgotten() -> None:
    tensor = ones(2)
    alive = weakref.ref(tensor)
    number = torch.ops.fastwrs.keep([tensor])
    del tensor
    gc.collect()
    assert alive() is not None
    for _ in range(2):  # of one that is gone nothing is left to forget
        library.extension().forget(number)
        assert alive() is None
    entry = Entry("step", valid_step().args | {"steps": [], "kept_steps": number})
    with pytest.raises(RuntimeError, match=f"kept_steps = {number}: no such list is kept"):
        entry.make()


def test_a_list_has_a_whole_number() -> None:
    for wrong, error in ((1 << 64, OverflowError), ("1", TypeError), (None, TypeError)):
        with pytest.raises(error):
            library.extension().forget(wrong)


def test_a_view_with_the_negative_bit_is_not_kept() -> None:
    with pytest.raises(RuntimeError, match="a view with the negative bit set"):
        torch.ops.fastwrs.keep([ones(2), negative_buffer((2,))])
