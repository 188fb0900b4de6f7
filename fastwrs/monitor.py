"""``Monitor``: norms of weights, gradients and steps, measured in the optimizer's own pass over the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import compress
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from fastwrs import monitor_export as export
from fastwrs.measuring import TAKEN, Measured, Rows, Scope
from fastwrs.monitor_export import NORMS, STATISTICS, Record, plain_number
from fastwrs.monitor_store import Layout, Part, Reading, Store
from fastwrs.optim.base import FusedOptimizer
from fastwrs.spec import MEASURED

Names = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class Monitor:
    """Measures every norm group on every ``every``-th step of an optimizer, inside the step's own kernels.

    ::

        monitor = fastwrs.Monitor(optimizer, every=10)
        ...                                         # train as before
        monitor.curve("norm_after")                 # {"conv1.weight": [(10, 1.0), (20, 1.0), ...], ...}
        monitor.to_jsonl("norms.jsonl")
        monitor.plot("norms.png")
        monitor.remove()

    The figures of a norm group are

    ===================== ==========================================================================
    ``norm_before``       weight norm before the step
    ``norm_updated``      after the update, before shrink and rescale
    ``norm_after``        after the step
    ``grad_norm``         norm of the gradient, unscaled
    ``update_norm``       norm of the step before the learning rate (Adam: m-hat / (sqrt(v-hat) + eps))
    ``effective_grad_norm`` ``update_norm / norm_before``
    ``rescale_factor``    what the rescale multiplied by; 1 where there was none
    ``shrink_factor``     what the shrink multiplied by; 1 where there was none
    ===================== ==========================================================================

    in fp32, all in the units of the weights, the gradients and the steps. The groups are those of the parameter's axis.
    A tensor that is neither rescaled nor shrunk is measured by ``"out"``, one of less than two dimensions as a whole.
    Parameters without a gradient, and tensors without norm groups (of shape (0, 3), say), are not measured.

    **Nothing is read back** until one of the methods below is called: a step neither waits for the device nor copies
    from it. **Memory** on the device: 32 bytes per norm group for each of the last ``channels`` measured steps; older
    ones are reduced to minimum, mean, maximum and total of each parameter there, 128 bytes per parameter for each of
    the last ``layers`` measured steps. What was read stays on the CPU.

    **A skipped step** (GradScaler's ``found_inf``) is counted and leaves figures that are marked as not taken: None in
    what is exported. **A captured graph** repeats what was captured, so a step that measured writes the same buffer in
    every replay, and replays are not counted.

    Several param groups, closures, GradScaler and several monitors at once are fine. On the CPU and the reference a
    monitored step gives the same bits as one that is not; on a GPU the last bit of a rescaled weight may differ.

    Args:
        optimizer: a fastwrs optimizer.
        every: measure each ``every``-th step of the optimizer, counted from 1 when the monitor is made; an int >= 1.
        names: ``model.named_parameters()``, or a dict of names and parameters. Parameters that are not in it have the
            name of their param group's ``param_names``, as from :func:`fastwrs.param_groups`, else ``params[g][i]``.
        channels: how many measured steps are kept in full; an int >= 0.
        layers: how many older ones are kept as reductions; an int >= 0.

    Raises:
        TypeError, ValueError: an argument is not as it must be; the message names it.

    Source: figures of Liu et al., *Weight Rescaling*, Figs. 2a and 3; Cisneros-Velarde et al., *Optimization and
    Generalization Guarantees for Weight Normalization*, Definition 3.1 and Figs. 1 and 2.
    """

    def __init__(
        self,
        optimizer: FusedOptimizer,
        every: int = 1,
        names: Names | None = None,
        *,
        channels: int = 16,
        layers: int = 10_000,
    ) -> None:
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(f"Monitor: optimizer must be one of fastwrs, got {type(optimizer).__name__}")
        self.optimizer, self.every = optimizer, _whole("every", every, 1)
        self.steps = 0
        """The steps of the optimizer since the monitor was made, skipped ones included."""
        self._given = _checked_names(names)
        self._names: dict[Tensor, str] = {}
        self._layouts: WeakKeyDictionary[Rows, Layout] = WeakKeyDictionary()
        self._store = Store(_whole("channels", channels, 0), _whole("layers", layers, 0))
        self._loss: Any = None
        optimizer.watch(self)

    # ------------------------------------------------------------------------------------------------------ in a step

    def before_step(self) -> Scope:
        """Called by the optimizer: every ``every``-th step measures everything."""
        return Scope.EVERYTHING if self._is_due() else Scope.NOTHING

    def after_step(self, measured: list[Measured], loss: Any) -> None:
        """Called by the optimizer: keeps what was measured, where it is."""
        due = self._is_due()
        self.steps += 1
        given, self._loss = self._loss, None
        if not due:
            return
        if given is None and _is_scalar(loss):
            given = _kept(loss)
        self._store.add(Reading(self.steps, given, [Part(self._layout_of(m.rows), m.values) for m in measured]))

    def log_loss(self, loss: Tensor | float) -> None:
        """Notes the loss of the step that comes next, for :meth:`gradient_over_loss`. A tensor stays on its device.

        With a closure that is not needed.

        Args:
            loss: one number, as the gradients are of it (not scaled).

        Raises:
            ValueError: it is not one number.
        """
        if not _is_scalar(loss):
            shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"log_loss: loss must be one number, got {shape}")
        if self._is_due():
            self._loss = _kept(loss)

    def remove(self) -> None:
        """Stops measuring. What has been measured can still be read."""
        self.optimizer.unwatch(self)

    def clear(self) -> None:
        """Forgets what has been measured; ``steps`` goes on."""
        self._store.clear()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def state_dict(self) -> dict[str, int]:
        """``{"steps": ...}``, so that a resumed run goes on counting. What was measured is not part of it."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Goes on counting from a :meth:`state_dict`.

        Raises:
            ValueError: it has no step count >= 0.
        """
        if "steps" not in state_dict:
            raise ValueError(f"Monitor: the state dict must have 'steps', got {sorted(map(str, state_dict))}")
        self.steps = _whole("steps", state_dict["steps"], 0)

    def _is_due(self) -> bool:
        return (self.steps + 1) % self.every == 0

    def _layout_of(self, rows: Rows) -> Layout:
        if rows in self._layouts:
            return self._layouts[rows]
        kept = [(param, count) for param, count in zip(rows.params, rows.counts, strict=True) if count]
        if not all(param in self._names for param, _ in kept):
            self._names = dict(_names_of(self.optimizer, self._given))
        layout = self._layouts[rows] = Layout(
            tuple(self._names[param] for param, _ in kept),
            tuple(count for _, count in kept),
            tuple(param.ndim >= 2 and param.numel() > 0 for param, _ in kept),
        )
        return layout

    # ------------------------------------------------------------------------------------------------------- read back

    def channels(self) -> list[Record]:
        """Every norm group of the last measured steps, as plain dicts.

        They have ``step``, ``name``, ``group``, ``taken`` and the figures. ``group`` counts the groups of a parameter
        in row-major order of the dimensions that its axis keeps.
        """
        records: list[Record] = []
        for reading in self._store.full():
            for name, values in reading.rows():
                for group, row in enumerate(values.tolist()):
                    taken = not math.isnan(row[TAKEN])
                    figures = dict(zip(MEASURED, map(plain_number, row), strict=True))
                    records.append({"step": reading.step, "name": name, "group": group, "taken": taken, **figures})
        return records

    def latest(self) -> dict[str, dict[str, Tensor]]:
        """The last measured step: for each parameter, the figures by name, as CPU tensors of shape [groups].

        A skipped step gives NaN. Empty before the first measurement, or with ``channels=0``.
        """
        full = self._store.full()
        rows = full[-1].rows() if full else ()
        return {name: dict(zip(MEASURED, values.unbind(1), strict=True)) for name, values in rows}

    def layers(self) -> list[Record]:
        """Every parameter in every measured step that is kept, as plain dicts.

        They have ``step``, ``name``, ``groups`` (how many), ``taken``, and for each figure ``figure.min``,
        ``figure.mean`` and ``figure.max`` over the groups; the norms have ``figure.total`` too, the norm of the whole
        tensor. None stands for what was not taken, and for what is not finite.
        """
        return list(self._layer_records())

    def curve(self, figure: str, statistic: str = "mean") -> dict[str, list[tuple[int, float]]]:
        """One figure over the steps: for each parameter, ``(step, value)`` for the steps that were taken.

        Args:
            figure: a figure of the table above.
            statistic: ``"min"``, ``"mean"``, ``"max"`` over the groups; for norms ``"total"``, of the whole tensor.

        Raises:
            ValueError: there is no such figure or statistic.
        """
        key = export.checked_key(figure, statistic)
        curves: dict[str, list[tuple[int, float]]] = {}
        for record in self._layer_records():
            if record[key] is not None:
                curves.setdefault(record["name"], []).append((record["step"], record[key]))
        return curves

    def minimum_norm(self) -> list[Record]:
        """For each step the least weight norm after it over all norm groups: ``step``, ``minimum_norm``, ``name``.

        Over the parameters of two or more dimensions that have elements (the groups of one without are empty, and of
        norm 0). This is the minimum weight vector norm of Cisneros-Velarde et al., Definition 3.1, where the groups are
        the output channels.
        """
        return export.minimum_norm(self._layer_records(), self._weights())

    def gradient_over_loss(self) -> list[Record]:
        """The squared norm of the gradient of all parameters, over the loss: for each step with a loss, in dicts.

        They have ``step``, ``squared_gradient_norm``, ``loss`` and ``ratio`` (None where the loss is 0). The loss comes
        from the closure, or from :meth:`log_loss`. Source: Cisneros-Velarde et al., Figs. 1 and 2.

        Raises:
            RuntimeError: steps were measured, and none of them has a loss.
        """
        losses = {reading.step: float(reading.loss) for reading in self._store.all() if reading.loss is not None}
        if not losses and self._store.all():
            raise RuntimeError("no measured step has a loss: call monitor.log_loss(loss) before optimizer.step()")
        return export.gradient_over_loss(self._layer_records(), losses)

    def to_jsonl(self, path: Any, detail: str = "layers") -> None:
        """Writes the records of :meth:`layers` or :meth:`channels` (``detail``) to a file, one JSON object per line."""
        export.to_jsonl(path, self._records(detail))

    def to_pandas(self, detail: str = "layers") -> Any:
        """The records of :meth:`layers` or :meth:`channels` as a pandas DataFrame; ImportError without pandas."""
        return export.to_pandas(self._records(detail))

    def to_tensorboard(self, writer: Any, statistic: str = "mean") -> None:
        """Writes every figure of every parameter to a ``SummaryWriter``, as the scalar ``figure.statistic/name``.

        With the minimum norm, and gradient over loss if there are losses. All that is kept is written: call it once at
        the end, or :meth:`clear` after each call. ``writer`` is anything with ``add_scalar(tag, value, step)``.
        """
        export.to_tensorboard(writer, statistic, self._records("layers"), self.minimum_norm(), self._ratios())

    def plot(self, path: Any, figures: Iterable[str] = ("norm_after", "effective_grad_norm", "grad_norm")) -> None:
        """Draws curves to an image file: a panel per figure, a line per parameter, its mean over the groups.

        With a panel for the minimum norm, and one for gradient over loss if there are losses. ``path`` is what
        matplotlib's ``savefig`` takes; ImportError without matplotlib.
        """
        export.plot(path, tuple(figures), self.curve, self.minimum_norm(), self._ratios())

    # -------------------------------------------------------------------------------------------------------- helpers

    def _weights(self) -> set[str]:
        layouts = [part.layout for reading in self._store.all() for part in reading.parts]
        return {name for layout in layouts for name in compress(layout.names, layout.weights)}

    def _ratios(self) -> list[Record]:
        return self.gradient_over_loss() if any(reading.loss is not None for reading in self._store.all()) else []

    def _records(self, detail: str) -> list[Record]:
        if detail not in ("layers", "channels"):
            raise ValueError(f"detail must be 'layers' or 'channels', got {detail!r}")
        return self.layers() if detail == "layers" else self.channels()

    def _layer_records(self) -> Iterator[Record]:
        for reading in self._store.reduced():
            for layout, values in reading.parts:
                for name, count, table in zip(layout.names, layout.counts, values.tolist(), strict=True):
                    taken = not math.isnan(table[0][TAKEN])
                    record = {"step": reading.step, "name": name, "groups": count, "taken": taken}
                    for statistic, row in zip(STATISTICS, table, strict=True):
                        for figure, value in zip(MEASURED, row, strict=True):
                            if statistic != "total" or figure in NORMS:
                                record[f"{figure}.{statistic}"] = plain_number(value)
                    yield record


def _names_of(optimizer: FusedOptimizer, given: Mapping[Tensor, str]) -> Iterator[tuple[Tensor, str]]:
    """What every parameter of the optimizer is called; a name that is taken already gets its place behind it."""
    used: set[str] = set()
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            names, place = group.get("param_names"), f"params[{g}][{i}]"
            name = given.get(param) or (names[i] if names else place)
            name = f"{name} ({place})" if name in used else name
            used.add(name)
            yield param, name


def _checked_names(names: Names | None) -> dict[Tensor, str]:
    pairs = names.items() if isinstance(names, Mapping) else names or ()
    found: dict[Tensor, str] = {}
    try:
        for name, param in pairs:
            if not isinstance(name, str) or not isinstance(param, Tensor):
                raise TypeError
            found.setdefault(param, name)
    except (TypeError, ValueError):
        raise TypeError("Monitor: names must be model.named_parameters() or a dict of names and parameters") from None
    if len(set(found.values())) < len(found):
        twice = sorted({name for name in found.values() if list(found.values()).count(name) > 1})
        raise ValueError(f"Monitor: names gives {', '.join(map(repr, twice))} to several parameters")
    return found


def _whole(name: str, value: Any, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Monitor: {name} must be an int, got {value!r}")
    if value < low:
        raise ValueError(f"Monitor: {name} must be >= {low}, got {value!r}")
    return value


def _is_scalar(loss: Any) -> bool:
    if isinstance(loss, Tensor):
        return loss.numel() == 1 and not loss.is_complex()
    return isinstance(loss, (int, float)) and not isinstance(loss, bool)


def _kept(loss: Any) -> Any:
    """A copy, where the loss lies: its memory may be used again."""
    return loss.detach().clone() if isinstance(loss, Tensor) else float(loss)
