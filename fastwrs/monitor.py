"""``Monitor``: norms of weights, gradients and steps, measured in the optimizer's own pass over the weights."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from fastwrs import monitor_export as export
from fastwrs.measuring import TAKEN, Measured, Rows, Scope
from fastwrs.monitor_export import KEYS, Curves, Record, plain_number
from fastwrs.monitor_store import Layout, Part, Reading, Store, lengths_on
from fastwrs.optim.base import FusedOptimizer
from fastwrs.spec import MEASURED
from fastwrs.wrapper import unwrapped

Names = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]

_KEPT = operator.itemgetter(*KEYS.values())
"""Of a parameter's statistics in a row, those that mean something."""
_WIDTH = len(MEASURED)


class Monitor:
    """Measures every norm group on every ``every``-th step of an optimizer, inside the step's own kernels.

    The figures of a norm group are

    ======================= ==========================================================================
    ``norm_before``         weight norm before the step
    ``norm_updated``        after the update, before shrink and rescale
    ``norm_after``          after the step
    ``grad_norm``           norm of the gradient, unscaled
    ``update_norm``         norm of the step before the learning rate (Adam: m-hat / (sqrt(v-hat) + eps))
    ``effective_grad_norm`` ``update_norm / norm_before``
    ``rescale_factor``      what the rescale multiplied by; 1 where there was none
    ``shrink_factor``       what the shrink multiplied by; 1 where there was none
    ======================= ==========================================================================

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
        optimizer: a fastwrs optimizer, or the wrapper that a training framework has put around one.
        every: measure each ``every``-th step of the optimizer, counted from 1 when the monitor is made; an int >= 1.
        names: ``model.named_parameters()``, or a dict of names and parameters. Parameters that are not in it have the
            name of their param group's ``param_names``, as from :func:`fastwrs.param_groups`, else ``params[g][i]``:
            then one that takes the place of another goes on with its curve.
        channels: how many measured steps are kept in full; an int >= 0.
        layers: how many older ones are kept as reductions; an int >= 0.

    Raises:
        TypeError, ValueError: an argument is not as it must be; the message names it.

    Example:
        >>> monitor = fastwrs.Monitor(optimizer, every=4)
        >>> for x, y in loader:
        ...     optimizer.zero_grad()
        ...     loss_fn(model(x), y).backward()
        ...     optimizer.step()
        >>> [step for step, norm in monitor.curve("norm_after")["conv1.weight"]]
        [4, 8, 12]
        >>> monitor.to_jsonl("norms.jsonl")
        >>> monitor.plot("norms.png")
        >>> monitor.remove()

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
        optimizer = unwrapped(optimizer)
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(f"Monitor: optimizer must be one of fastwrs, got {type(optimizer).__name__}")
        self.optimizer, self.every = optimizer, _whole("every", every, 1)
        self.steps = 0
        """The steps of the optimizer since the monitor was made, skipped ones included."""
        self._given = _checked_names(names)
        self._names: dict[Tensor, str] = {}
        self._layouts: WeakKeyDictionary[Rows, tuple[Layout, Tensor | None]] = WeakKeyDictionary()
        self._store = Store(_whole("channels", channels, 0), _whole("layers", layers, 0))
        self._loss: Any = None
        self._begun = False  # a step, since the loss was noted
        optimizer.watch(self)

    # ------------------------------------------------------------------------------------------------------ in a step

    @property
    def keeps(self) -> bool:
        """Whether readings are kept in full, that is, where the step has written them."""
        return self._store.room > 0

    def before_step(self) -> Scope:
        """Called by the optimizer: every ``every``-th step measures everything."""
        if self._begun:
            self._loss = None  # of a step that was refused: the one that begins now need not be the same again
        self._begun = True
        return Scope.EVERYTHING if self._is_due() else Scope.NOTHING

    def after_step(self, measured: list[Measured], loss: Any) -> None:
        """Called by the optimizer: keeps what was measured, where it is."""
        due = self._is_due()
        self.steps += 1
        given, self._loss, self._begun = self._loss, None, False
        if not due:
            return
        if given is None:
            given = _kept(loss)
        self._store.add(Reading(self.steps, given, list(map(self._part_of, measured))))

    def log_loss(self, loss: Tensor | float) -> None:
        """Notes the loss of the step that comes next, for :meth:`gradient_over_loss`. A tensor stays on its device.

        With a closure that is not needed. A step that is refused takes its loss along.

        Args:
            loss: one real number, as the gradients are of it (not scaled).

        Raises:
            ValueError: it is not one real number.
        """
        kept = _kept(loss)
        if kept is None:
            shape = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ValueError(f"log_loss: loss must be one number, got {shape}")
        if self._is_due():
            self._loss, self._begun = kept, False

    def remove(self) -> None:
        """Stops measuring. What has been measured can still be read."""
        self.optimizer.unwatch(self)

    def clear(self) -> None:
        """Forgets what has been measured, and the loss that :meth:`log_loss` noted; ``steps`` goes on."""
        self._store.clear()
        self._layouts.clear()
        self._loss = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def state_dict(self) -> dict[str, int]:
        """``{"steps": ...}``, so that a resumed run goes on counting. What was measured is not part of it."""
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Goes on counting from a :meth:`state_dict`, and forgets what was measured in later steps.

        So a run that goes back to a checkpoint has each step once. What the steps before have left stays.

        Raises:
            ValueError, TypeError: it has no step count >= 0.
        """
        if "steps" not in state_dict:
            raise ValueError(f"Monitor: the state dict must have 'steps', got {sorted(map(str, state_dict))}")
        self.steps = _whole("steps", state_dict["steps"], 0)
        self._store.drop_after(self.steps)
        self._loss = None

    def _is_due(self) -> bool:
        return (self.steps + 1) % self.every == 0

    def _part_of(self, measured: Measured) -> Part:
        """What a launch has measured, with whose rows it has. That goes when the optimizer's plan goes."""
        rows, device = measured.rows, measured.values.device
        if rows not in self._layouts:
            layout = self._layout_of(rows)
            # Now, so that reading it later brings nothing to the device.
            self._layouts[rows] = layout, None if device.type == "cpu" else lengths_on(layout.counts, device)
        layout, lengths = self._layouts[rows]
        return Part(layout, measured.values, lengths)

    def _layout_of(self, rows: Rows) -> Layout:
        kept = [(param, count) for param, count in zip(rows.params, rows.counts, strict=True) if count]
        if not all(param in self._names for param, _ in kept):
            self._names = dict(_names_of(self.optimizer, self._given))
        return Layout(
            tuple(self._names[param] for param, _ in kept),
            tuple(count for _, count in kept),
            tuple(param.ndim >= 2 and param.numel() > 0 for param, _ in kept),
        )

    # ------------------------------------------------------------------------------------------------------- read back

    def channels(self) -> list[Record]:
        """Every norm group of the last measured steps, as plain dicts.

        They have ``step``, ``name``, ``group``, ``taken`` and the figures. ``group`` counts the groups of a parameter
        in row-major order of the dimensions that its axis keeps.
        """
        return list(_channel_records(self._store.full()))

    def latest(self) -> dict[str, dict[str, Tensor]]:
        """The last measured step: for each parameter, the figures by name, as new CPU tensors of shape [groups].

        A skipped step gives NaN. Empty before the first measurement, or with ``channels=0``.
        """
        full = self._store.full()
        rows = full[-1].rows() if full else ()
        return {name: dict(zip(MEASURED, values.clone().unbind(1), strict=True)) for name, values in rows}

    def layers(self) -> list[Record]:
        """Every parameter in every measured step that is kept, as plain dicts.

        They have ``step``, ``name``, ``groups`` (how many), ``taken``, and for each figure ``figure.min``,
        ``figure.mean`` and ``figure.max`` over the groups; the norms have ``figure.total`` too, the norm of the whole
        tensor. None stands for what was not taken, and for what is not finite.
        """
        return list(_layer_records(self._store.reduced()))

    def curve(self, figure: str, statistic: str = "mean") -> dict[str, list[tuple[int, float]]]:
        """One figure over the steps: for each parameter, ``(step, value)`` for the steps that were taken.

        Args:
            figure: a figure of the table above.
            statistic: ``"min"``, ``"mean"``, ``"max"`` over the groups; for norms ``"total"``, of the whole tensor.

        Raises:
            ValueError: there is no such figure or statistic.
        """
        key = export.checked_key(figure, statistic)
        return _curves(self._store.reduced(), [key])[0]

    def minimum_norm(self) -> list[Record]:
        """For each step the least weight norm after it over all norm groups: ``step``, ``minimum_norm``, ``name``.

        Over the parameters of two or more dimensions that have elements (the groups of one without are empty, and of
        norm 0). NaN, with the name of the first parameter that has one, if a norm is NaN after a step that was taken.
        This is the minimum weight vector norm of Cisneros-Velarde et al., Definition 3.1, where the groups are the
        output channels.
        """
        return export.minimum_norm(_norms_of_weights(self._store.reduced()))

    def gradient_over_loss(self) -> list[Record]:
        """The squared norm of the gradient of all parameters, over the loss: for each step with a loss, in dicts.

        They have ``step``, ``squared_gradient_norm``, ``loss`` and ``ratio`` (None where the loss is 0). The loss comes
        from the closure, or from :meth:`log_loss`. Source: Cisneros-Velarde et al., Figs. 1 and 2.

        Raises:
            RuntimeError: steps were measured, and none of them has a loss.
        """
        readings = self._store.all()
        if readings and all(reading.loss is None for reading in readings):
            raise RuntimeError("no measured step has a loss: call monitor.log_loss(loss) before optimizer.step()")
        return export.gradient_over_loss(_gradients_with_loss(self._store.reduced()))

    def to_jsonl(self, path: Any, detail: str = "layers") -> None:
        """Writes the records of :meth:`layers` or :meth:`channels` (``detail``) to a file, one JSON object per line.

        Each is written as it is made, so that they are not all in memory at once.
        """
        export.to_jsonl(path, self._records(detail))

    def to_pandas(self, detail: str = "layers") -> Any:
        """The records of :meth:`layers` or :meth:`channels` as a pandas DataFrame; ImportError without pandas."""
        return export.to_pandas(list(self._records(detail)))

    def to_tensorboard(self, writer: Any, statistic: str = "mean") -> None:
        """Writes every figure of every parameter to a ``SummaryWriter``, as the scalar ``figure.statistic/name``.

        With the minimum norm, and gradient over loss if there are losses. All that is kept is written: call it once at
        the end, or :meth:`clear` after each call. ``writer`` is anything with ``add_scalar(tag, value, step)``.
        """
        readings = self._store.reduced()
        minimum = export.minimum_norm(_norms_of_weights(readings))
        ratios = export.gradient_over_loss(_gradients_with_loss(readings))
        export.to_tensorboard(writer, statistic, _layer_records(readings), minimum, ratios)

    def plot(
        self, path: Any, figures: str | Iterable[str] = ("norm_after", "effective_grad_norm", "grad_norm")
    ) -> None:
        """Draws curves to an image file: a panel per figure, a line per parameter, its mean over the groups.

        With a panel for the minimum norm, and one for gradient over loss if there are losses. ``path`` is what
        matplotlib's ``savefig`` takes; ImportError without matplotlib. ``figures`` may be the name of one.
        """
        figures = (figures,) if isinstance(figures, str) else tuple(figures)
        keys = [export.checked_key(figure, "mean") for figure in figures]
        readings = self._store.reduced()
        panels = dict(zip(figures, _curves(readings, keys), strict=True))
        minimum = export.minimum_norm(_norms_of_weights(readings))
        export.plot(path, panels, minimum, export.gradient_over_loss(_gradients_with_loss(readings)))

    # -------------------------------------------------------------------------------------------------------- helpers

    def _records(self, detail: str) -> Iterator[Record]:
        # All that can wait or fail on a device does so here, before the first record.
        if detail not in ("layers", "channels"):
            raise ValueError(f"detail must be 'layers' or 'channels', got {detail!r}")
        return _layer_records(self._store.reduced()) if detail == "layers" else _channel_records(self._store.full())


def _channel_records(readings: Sequence[Reading]) -> Iterator[Record]:
    """A record for each norm group, of readings in full."""
    for reading in readings:
        for name, values in reading.rows():
            for group, row in enumerate(values.tolist()):
                taken = not math.isnan(row[TAKEN])
                figures = dict(zip(MEASURED, map(plain_number, row), strict=True))
                yield {"step": reading.step, "name": name, "group": group, "taken": taken, **figures}


def _layer_records(readings: Sequence[Reading]) -> Iterator[Record]:
    """A record for each parameter, of readings that are reduced, as all functions below take them."""
    for reading in readings:
        for layout, values, _ in reading.parts:
            for name, count, row in zip(layout.names, layout.counts, values.flatten(1).tolist(), strict=True):
                taken = not math.isnan(row[TAKEN])
                figures = dict(zip(KEYS, map(plain_number, _KEPT(row)), strict=True))
                yield {"step": reading.step, "name": name, "groups": count, "taken": taken, **figures}


def _column(values: Tensor, key: str) -> list[float]:
    """One statistic of one figure, of each parameter."""
    return values[:, KEYS[key] // _WIDTH, KEYS[key] % _WIDTH].tolist()


def _curves(readings: Sequence[Reading], keys: Sequence[str]) -> list[Curves]:
    """For each key, and each name: step and value where it was taken."""
    found: list[Curves] = [{} for _ in keys]
    for reading in readings:
        for layout, values, _ in reading.parts:
            for curves, key in zip(found, keys, strict=True):
                for name, value in zip(layout.names, _column(values, key), strict=True):
                    if math.isfinite(value):
                        curves.setdefault(name, []).append((reading.step, value))
    return found


def _norms_of_weights(readings: Sequence[Reading]) -> Iterator[tuple[int, list[tuple[str, float]]]]:
    """For each step the name and the least norm of each weight whose step was taken."""
    for reading in readings:
        norms: list[tuple[str, float]] = []
        for layout, values, _ in reading.parts:
            taken, least = _column(values, f"{MEASURED[TAKEN]}.min"), _column(values, "norm_after.min")
            found = zip(layout.names, layout.weights, taken, least, strict=True)
            norms += [(name, norm) for name, weight, known, norm in found if weight and not math.isnan(known)]
        yield reading.step, norms


def _gradients_with_loss(readings: Sequence[Reading]) -> Iterator[tuple[int, list[float], float]]:
    """For each step that has a loss the gradient norms of all parameters, and the loss."""
    for reading in readings:
        if reading.loss is not None:
            norms = [norm for part in reading.parts for norm in _column(part.values, "grad_norm.total")]
            yield reading.step, norms, float(reading.loss)


def _names_of(optimizer: FusedOptimizer, given: Mapping[Tensor, str]) -> Iterator[tuple[Tensor, str]]:
    """What every parameter of the optimizer is called; a name that is taken already gets its place behind it."""
    used: set[str] = set()
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            names, place = group.get("param_names"), f"params[{g}][{i}]"
            name = given.get(param) or (names[i] if names and i < len(names) else place)
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
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"Monitor: {name} must be an int, got {value!r}")
    if number < low:
        raise ValueError(f"Monitor: {name} must be >= {low}, got {value!r}")
    return number


def _kept(loss: Any) -> Tensor | float | None:
    """What is kept of a loss: a number, or a copy where the loss lies, since its memory may be used again.

    None if it is not one real number.
    """
    if isinstance(loss, Tensor):
        return loss.detach().clone() if loss.numel() == 1 and not loss.is_complex() else None
    if not isinstance(loss, Real) or isinstance(loss, bool):
        return None
    try:
        return float(loss)
    except OverflowError:  # of an int beyond all floats
        return None
