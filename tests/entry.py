"""Calls of the registered ops past all checks in Python: valid ones, and what may be wrong with one.

``python tests/entry.py SEED COUNT`` prints each call of one seed of ``test_entry.py`` before it is made, so that the
last line names the call that crashed.
"""

from __future__ import annotations

import faulthandler
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from calls import bits, group_count
from cases import mask_of, select
from torch import Tensor

import fastwrs
from fastwrs import library

OP_NAMES = ["step", "step_plan", "triton_table", "triton_step", "rescale_", "channel_norms", "reduce_measured"]
KEEPING = ["keep"]
"""It makes a list that a step names, and looks at no tensor."""
WITHOUT_ARGUMENTS = ["cuda_why_not", "triton_layout", "rules", "cpu_isa"]
CASES = [case for case in select(600) if 1 <= len(case.tensors) <= 4]
TABLE_WORDS, SIZES = 4000, [256, 8, 16, 64]
HANGS_AFTER = 60
"""Seconds after which a call is taken for one that never ends."""
NO_DRIVER = "0 active drivers"
"""What Triton says to a step that it should launch where there is no GPU."""


def registered() -> list[str]:
    """All ops of the library, those without a kernel in this build too."""
    library.load()
    fastwrs.backends()  # imports the one that is registered in Python
    names: list[str] = torch._C._dispatch_get_all_op_names()
    return sorted(name.removeprefix("fastwrs::") for name in names if name.startswith("fastwrs::"))


def has_kernel(name: str) -> bool:
    """Whether the op runs on the CPU in this build."""
    keys = ("CPU", "CompositeExplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(f"fastwrs::{name}", key) for key in keys)


def on_device() -> bool:
    """Whether this build has the emulated CUDA kernels, which read numbers themselves, in the place of the CPU's."""
    return has_kernel("step_plan")


@dataclass
class Entry:
    """A call that is to be made: the arguments by name, and whether one of them makes it a call that has to fail.

    The lists of these names are ``kept``: handed over before, for the call to name them.
    """

    op: str
    args: dict[str, Any]
    wrong: bool = False
    said: str = ""
    kept: tuple[str, ...] = ()

    @property
    def schema(self) -> Any:
        return getattr(torch.ops.fastwrs, self.op).default._schema

    @property
    def written(self) -> set[str]:
        """The arguments that the op may write."""
        return {a.name for a in self.schema.arguments if a.alias_info is not None and a.alias_info.is_write}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor among the arguments, with the name of its argument."""
        for name, value in self.args.items():
            yield from ((name, item) for item in (value if isinstance(value, list) else [value]) if is_tensor(item))

    def make(self) -> None:
        args, numbers = dict(self.args), []
        try:
            for name in self.kept:
                numbers.append(torch.ops.fastwrs.keep(args[name]))
                args |= {name: [], f"kept_{name}": numbers[-1]}
            getattr(torch.ops.fastwrs, self.op)(*args.values())
        finally:
            for number in numbers:
                library.extension().forget(number)


def is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def valid(op: str, rng: random.Random, case: Any = None) -> Entry:
    """A call that is as it should be; of this case, nothing is kept for it."""
    call = (case or rng.choice(CASES)).build()
    counts = [group_count(tensor) for tensor in call.case.tensors]
    args: list[Any] = [*call.args(), False]
    if op == "rescale_":
        args = [call.params, [axes or -1 for axes in call.axes], 0.5]
    elif op == "channel_norms":
        masks = [mask_of(t.axis or "tensor", len(t.shape)) or 1 << 62 for t in call.case.tensors]
        kept = [(t, mask) for t, mask in zip(call.params, masks, strict=True) if mask != 1 << 62]
        kept = kept or [(torch.ones(2), -1)]
        compute = torch.float64 if kept[0][0].dtype == torch.float64 else torch.float32
        room = sum(t.numel() + 8 * 4096 * (t.numel() == 0) for t, _ in kept)
        args = [[t for t, _ in kept], [mask for _, mask in kept], torch.zeros(room, dtype=compute)]
    elif op == "reduce_measured":
        counts = [count for count in counts if count] or [1]
        args = [torch.rand(sum(counts), 8), counts, torch.zeros(len(counts), 4, 8)]
    elif op == "triton_table":
        records = len(call.case.records)
        table = torch.zeros(TABLE_WORDS, dtype=torch.int64)
        args += [[0.5] * 3 * records, list(SIZES), rng.random() < 0.5, table]
    elif op == "triton_step":
        args[-1] = True
    elif on_device() or rng.random() < 0.3:
        args[13] = torch.zeros(20_000)
    elif rng.random() < 0.1:
        args[-1] = True
    named: tuple[str, ...] = ()
    if op == "step":
        args += [0, 0]
        named = () if case else rng.choice([(), (), (), ("states",), ("steps",), ("states", "steps")])
    names = [argument.name for argument in getattr(torch.ops.fastwrs, op).default._schema.arguments]
    return Entry(op, dict(zip(names, args, strict=True)), said="; kept ".join(("", *named)), kept=named)


# ---- what a tensor may have become ----------------------------------------------------------------------------------


def own(t: Tensor) -> Tensor:
    """A copy with the same strides, in memory that ends where it ends."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)


def closed(t: Tensor) -> Tensor:
    t = own(t)
    t.untyped_storage().resize_(0)
    return t


def short(t: Tensor) -> Tensor:
    t = own(t)
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - 1)
    return t


def unaligned(t: Tensor) -> Tensor:
    memory = bytearray(t.numel() * t.element_size() + 1)
    return torch.frombuffer(memory, dtype=t.dtype, offset=1, count=t.numel()).view(t.shape)


def negative(t: Tensor) -> Tensor:
    view = torch.zeros(t.shape, dtype=torch.complex128 if t.dtype == torch.float64 else torch.complex64).conj().imag
    assert view.is_neg()
    return view


def inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def odd_strides(t: Tensor) -> Tensor:
    """The same elements, with strides of 2**62 where they are of no account."""
    of_no_account = [size == 1 or t.numel() == 0 for size in t.shape]
    strides = [1 << 62 if free else stride for free, stride in zip(of_no_account, t.stride(), strict=True)]
    return t.as_strided(t.shape, strides, t.storage_offset())


def repeated(t: Tensor) -> Tensor:
    return torch.ones((1,) * t.ndim, dtype=t.dtype).expand(t.shape)


def interleaved(t: Tensor) -> Tensor:
    return torch.ones(sum(t.shape) + 1, dtype=t.dtype).as_strided(t.shape, [1] * t.ndim)


NEVER: dict[str, Callable[[Tensor], Any]] = {
    "closed": closed,
    "short": short,
    "unaligned": unaligned,
    "negative": negative,
    "meta": lambda t: torch.empty_like(t, device="meta"),
    "sparse": lambda t: t.to_sparse(),
    "csr": lambda t: t.reshape(1, -1).to_sparse_csr(),
    "mkldnn": lambda t: t.float().contiguous().to_mkldnn(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.as_nested_tensor([t.reshape(-1)]),
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),  # type: ignore[attr-defined]
    "integers": lambda t: t.to(torch.int32),
    "booleans": lambda t: t != 0,
    "complex": lambda t: t.to(torch.complex64),
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "64 dimensions": lambda t: t.reshape(-1)[:1].view((1,) * 64),
    "None": lambda _: None,
    "a number": lambda _: 1.5,
}
"""What no tensor of a call may be, if it has elements."""

PERHAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "a copy": own,
    "a leaf": lambda t: t.detach().clone().requires_grad_(t.is_floating_point()),
    "no leaf": lambda t: t.detach().requires_grad_(t.is_floating_point()).view_as(t),
    "inference": inference,
    "NaN": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
    "infinite": lambda t: torch.full_like(t, float("inf")) if t.is_floating_point() else t,
    "below 0": lambda t: torch.full_like(t, -1),
    "transposed": lambda t: t.mT if t.ndim > 1 else t,
    "flat": lambda t: t.reshape(-1),
    "one dimension more": lambda t: t.unsqueeze(0),
    "a part": lambda t: t.reshape(-1)[: t.numel() // 2],
    "one element": lambda t: t.reshape(-1)[:1].reshape(()) if t.numel() else t,
    "nothing": lambda t: t.new_empty(0),
    "huge and empty": lambda t: t.new_empty((0, 1 << 40)),
    "many and empty": lambda t: t.new_empty((1 << 40, 0)),
    "huge strides": odd_strides,
    "repeated": repeated,
    "repeated for ever": lambda t: torch.ones(1, dtype=t.dtype).expand(1 << 62),
    "repeated in a square": lambda t: torch.ones(1, dtype=t.dtype).expand(1 << 30, 1 << 30),
    "interleaved": interleaved,
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
    "fp64": lambda t: t.double(),
    "fp32": lambda t: t.float(),
    "bf16": lambda t: t.bfloat16(),
    "fp16": lambda t: t.half(),
    "large": lambda t: torch.zeros(5000, dtype=t.dtype),
}
"""What depends on the argument: an error, or a call that is valid."""


def malformed(what: str, t: Tensor) -> Any:
    """What a tensor is after one of these."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of kinds of tensors that it calls a prototype or old
        return (NEVER | PERHAPS)[what](t)


INTEGERS = [-(1 << 63), -(1 << 40), -2, -1, 0, 1, 2, 3, 5, 63, 1 << 31, 1 << 40, 1 << 61, 1 << 62, (1 << 63) - 1]
NUMBERS = [float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 0.0, 0.5, 1.0, 2.0, 1e308, -1e308, 5e-324, 2.0**62]


def change(entry: Entry, name: str, rng: random.Random) -> None:
    """Changes one argument of a call, and notes whether the call has to fail for it."""
    value = entry.args[name]
    if value is None:  # instead of nothing: of the right kind, or not
        entry.args[name] = value = torch.ones(rng.choice([(), (1,), (2,), (64, 8), (0,)]))
        entry.said += f"; {name} of shape {tuple(value.shape)}"
    if isinstance(value, list):
        change_list(entry, name, value, rng)
    elif is_tensor(value):
        entry.args[name] = changed_tensor(entry, name, value, rng)
    elif isinstance(value, str):
        entry.args[name] = rng.choice(["", value + "x", value + "\0", value.upper(), "sgd", "\xfc" * 9])
        entry.said += f"; {name} = {entry.args[name]!r}"
    elif isinstance(value, bool):
        entry.args[name] = not value
    elif isinstance(value, int):
        entry.args[name] = rng.choice([number for number in INTEGERS if number])
        entry.said += f"; {name} = {entry.args[name]!r}"
        entry.wrong |= not entry.kept  # a list is given too
    else:
        entry.args[name] = rng.choice(NUMBERS)
        entry.said += f"; {name} = {entry.args[name]!r}"


def change_list(entry: Entry, name: str, value: list[Any], rng: random.Random) -> None:
    kind = rng.choice(["item", "item", "item", "item", "drop", "double", "clear", "swap", "repeat"])
    value = entry.args[name] = list(value)
    if not value:
        kind = "new"
        value += [torch.ones(()) if name == "lrs" else rng.choice(INTEGERS)]
    i = rng.randrange(len(value))
    entry.said += f"; {name}[{i}] {kind}"
    if kind == "item":
        if is_tensor(value[i]):
            value[i] = changed_tensor(entry, f"{name}[{i}]", value[i], rng)
        else:
            value[i] = rng.choice(NUMBERS if isinstance(value[i], float) else INTEGERS)
            entry.said += f" = {value[i]!r}"
    elif kind == "drop":
        del value[i]
    elif kind == "double":
        value.insert(i, value[i])
    elif kind == "clear":
        value.clear()
    elif kind == "swap":
        k = rng.randrange(len(value))
        value[i], value[k] = value[k], value[i]
    elif kind == "repeat":
        value[i] = value[-1]


def changed_tensor(entry: Entry, name: str, t: Tensor, rng: random.Random) -> Any:
    if rng.random() < 0.15:  # memory of another one
        other = rng.choice([tensor for _, tensor in entry.tensors()])
        entry.said += f"; {name} is another"
        return other
    what = rng.choice([*NEVER, *PERHAPS])
    try:
        new = malformed(what, t)
    except (RuntimeError, ValueError):  # torch makes no such tensor of this one
        return own(t)
    entry.said += f"; {name} {what}"
    if what not in NEVER:
        return new
    may_be_none = "[" not in name and name in ("grad_scale", "found_inf", "measured", "workspace")
    entry.wrong |= t.numel() > 0 and not (what == "None" and may_be_none)
    return new


def mutated(rng: random.Random) -> Entry:
    """A valid call with one to three arguments changed."""
    entry = valid(rng.choice([name for name in OP_NAMES if has_kernel(name)]), rng)
    names = list(entry.args)
    for name in rng.sample(names, min(len(names), rng.choice([1, 1, 1, 2, 3]))):
        change(entry, name, rng)
    of_one_length = ("params", "grads", "steps", "groups", "axes") if "params" in entry.args else ("tensors", "axes")
    unread = {"grads"} if entry.args.get("rule") == "project" and not entry.args["grads"] else set()
    entry.wrong |= len({len(entry.args[name]) for name in {*of_one_length} - unread if name in entry.args}) > 1
    return entry


# ---- what came of it ------------------------------------------------------------------------------------------------


def storages(entry: Entry) -> dict[int, Tensor]:
    """All the memory of the arguments, as bytes, by address."""
    found: dict[int, Tensor] = {}
    for _, tensor in entry.tensors():
        if tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized and dense(tensor):
            memory = tensor.untyped_storage()
            if memory.nbytes():
                found[memory.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(memory)  # type: ignore[call-overload]
    return found


def dense(tensor: Tensor) -> bool:
    """Whether a tensor has a storage that can be asked for."""
    return not (tensor.is_nested or torch._is_zerotensor(tensor))  # type: ignore[attr-defined]


def may_change(entry: Entry, memory: dict[int, Tensor]) -> tuple[dict[int, Tensor], str | None]:
    """Of every storage a mask of the bytes that are elements of what is written; and which are so twice."""
    masks = {address: torch.zeros_like(data) for address, data in memory.items()}
    twice = None
    for name, tensor in entry.tensors():
        only_read = name == "grads" and entry.args["grad_scale"] is None
        if name in entry.written and tensor.numel() and tensor.device.type == "cpu" and not only_read:
            size = tensor.element_size()
            strides = [stride * size if n > 1 else 0 for n, stride in zip(tensor.shape, tensor.stride(), strict=True)]
            mask = masks[tensor.untyped_storage().data_ptr()]
            own = torch.zeros_like(mask)
            own.as_strided((*tensor.shape, size), (*strides, 1), tensor.storage_offset() * size).fill_(1)
            if int(own.sum()) < tensor.numel() * size or bool((own & mask).any()):
                twice = name
            mask |= own
    return masks, twice


def names_what_is_wrong(entry: Entry, error: Exception) -> bool:
    """An error of ours names the argument, one of torch's the op; and the fakes say what devices there are."""
    text, names = str(error), "|".join([*entry.args, "rule", "tensor", "record"])
    return bool(re.search(rf"^fastwrs: .*({names})|fastwrs::({entry.op}|keep)|all tensors must be on one device", text))


def fault(entry: Entry) -> str | None:
    """Makes a call; what is wrong with what came of it, or None."""
    memory = storages(entry)
    before = {address: bits(data) for address, data in memory.items()}
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
    error = None
    try:
        entry.make()
    except (RuntimeError, ValueError, TypeError) as raised:
        error = raised
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    finally:
        faulthandler.cancel_dump_traceback_later()
    changed = [address for address, data in memory.items() if not torch.equal(data, before[address])]
    if NO_DRIVER in str(error):  # the arguments have been checked by then
        error = None
    if error is not None:
        if changed:
            return f"memory has changed before the error: {error}"
        return None if names_what_is_wrong(entry, error) else f"the error names nothing: {error}"
    if entry.wrong and any(tensor.device.type != "meta" for _, tensor in entry.tensors()):
        return "it was taken"
    masks, twice = may_change(entry, memory)
    if twice:
        return f"it was taken, though it writes memory of {twice} twice"
    for address in changed:
        if bool(((memory[address] != before[address]) & (masks[address] == 0)).any()):
            return "memory was written that belongs to no element of what is written"
    return None


def main(seed: str, count: str) -> None:
    torch.set_num_threads(1)
    library.load()
    rng = random.Random(int(seed))
    for k in range(int(count)):
        entry = mutated(rng)
        print(k, entry.op, entry.said, flush=True)
        if why := fault(entry):
            print("   ", why, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
