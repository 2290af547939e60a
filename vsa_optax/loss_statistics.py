"""Statistics of the losses that `track_loss` keeps, computed on the host in float64: `loss_report`."""

import json
from typing import Any, NamedTuple

import jax
import numpy as np

from vsa_optax.core.types import Tree
from vsa_optax.loss_history import TrackLossState
from vsa_optax.prediction import stats
from vsa_optax.prediction.machine import Phase


class LossStatistics(NamedTuple):
    """Statistics of some losses.

    Attributes:
        num: the number of losses, at least one.
        mean: their mean.
        variance: their mean squared distance from the mean, divided by ``num``.
        deviation: the square root of the variance.
        minimum: the smallest loss.
        maximum: the largest loss.
        median: the middle loss, or the mean of the middle two.
    """

    num: int
    mean: float
    variance: float
    deviation: float
    minimum: float
    maximum: float
    median: float


class LossSpike(NamedTuple):
    """A loss far above those before it.

    Attributes:
        step: its step.
        value: the loss.
        deviations: its distance above the mean of the ``rolling_window`` losses before it, in their standard
            deviations.
    """

    step: int
    value: float
    deviations: float


class LossHistory(NamedTuple):
    """Measured losses, the oldest first.

    Attributes:
        steps: the step of each loss.
        values: the losses.
        phases: the name of each step's phase; None without a phase machine.
        errors: the error of the prediction compared at each step, or None if none was; None without a phase machine,
            or if it never predicts.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]
    phases: tuple[str, ...] | None
    errors: tuple[float | None, ...] | None


class LossReport(NamedTuple):
    """The report that `loss_report` returns, in plain Python values.

    Attributes:
        total_steps: the number of updates so far.
        num_measured: the number of steps with a measured loss, which may exceed the history's length.
        num_repeated: the number of skipped steps that repeated the last loss.
        num_nonfinite: the number of steps whose loss was a NaN or an infinity.
        best_value: the smallest loss of the whole run; None before the first.
        best_step: the step of the smallest loss; None before the first.
        last_value: the newest loss; None before the first.
        statistics: statistics of the history; None if it is empty.
        rolling: statistics of the last ``rolling_window`` losses, or of as many as there are.
        by_phase: statistics of the history's losses for each phase that has some; empty without a phase machine.
        improvement_rate: the relative change from the first to the last of the last ``rolling_window`` losses, negative
            for a falling loss; None until so many are known, or if the first is 0.
        trend: the slope of the least-squares line through the last ``convergence_window`` losses, in loss per step;
            None until so many are known.
        is_converging: whether the mean of the second half of the last ``convergence_window`` losses is below that of
            the first half by more than ``convergence_threshold``, relative to the latter.
        is_plateau: whether these two means differ by at most ``convergence_threshold``, relative to the first.
        divergence: the relative change from the mean of the ``rolling_window`` losses before the last
            ``rolling_window`` to the mean of these; None until so many are known, or if the former is 0.
        is_diverging: whether ``divergence`` exceeds ``divergence_threshold - 1``.
        spikes: the losses in the history that are more than ``spike_threshold`` deviations above those before them. The
            window excludes the loss itself: in a window of n with it, no loss could exceed ``(n - 1) / sqrt(n)``
            deviations.
        history: the losses themselves.
    """

    total_steps: int
    num_measured: int
    num_repeated: int
    num_nonfinite: int
    best_value: float | None
    best_step: int | None
    last_value: float | None
    statistics: LossStatistics | None
    rolling: LossStatistics | None
    by_phase: dict[str, LossStatistics]
    improvement_rate: float | None
    trend: float | None
    is_converging: bool
    is_plateau: bool
    divergence: float | None
    is_diverging: bool
    spikes: tuple[LossSpike, ...]
    history: LossHistory

    def over(self, num: int) -> LossStatistics | None:
        """Statistics of the last ``num`` losses of the history, or of as many as there are; None if there are none."""
        if num < 1:
            raise ValueError(f"num must be an integer >= 1, got {num!r}")
        return _statistics(np.asarray(self.history.values[-num:], np.float64))

    def to_json(self) -> str:
        """The report as strict JSON, which `from_json` reads."""
        return json.dumps(_as_dict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "LossReport":
        """Reads the report that `to_json` wrote; both are equal bit for bit."""
        fields = json.loads(text)
        for name in ("statistics", "rolling"):
            fields[name] = None if fields[name] is None else LossStatistics(**fields[name])
        fields["by_phase"] = {phase: LossStatistics(**numbers) for phase, numbers in fields["by_phase"].items()}
        fields["spikes"] = tuple(LossSpike(**spike) for spike in fields["spikes"])
        columns: dict[str, Any] = {
            name: None if column is None else tuple(column) for name, column in fields["history"].items()
        }
        return cls(**{**fields, "history": LossHistory(**columns)})


def loss_report(opt_state: Tree) -> LossReport:
    """Computes statistics, trend and anomalies of the losses in an optimizer's state, on the host.

    It fetches the state's ring buffers and computes in float64. It cannot be used under ``jax.jit``.

    Args:
        opt_state: an optimizer state that contains exactly one `vsa_optax.track_loss` state, at any depth.

    Returns:
        A `vsa_optax.LossReport`.

    Raises:
        ValueError: if the state contains no `vsa_optax.track_loss` state, or more than one.

    Example:
        >>> import jax.numpy as jnp, optax, vsa_optax
        >>> opt = optax.chain(vsa_optax.track_loss(optax.identity()), optax.sgd(0.1))
        >>> state = opt.init(jnp.zeros(2))
        >>> for loss in (3.0, 2.0, float("nan"), 1.0):
        ...     _, state = opt.update(jnp.ones(2), state, value=loss)
        >>> report = vsa_optax.loss_report(state)
        >>> report.statistics.median, report.best_step, report.num_nonfinite
        (2.0, 3, 1)
        >>> report == vsa_optax.LossReport.from_json(report.to_json())
        True
    """
    found = [node for node in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(node)]
    if len(found) != 1:
        raise ValueError(
            f"expected one track_loss in the optimizer state, found {len(found)}: pass the state of an optimizer made "
            "with track_loss(opt), once"
        )
    state: Any = jax.device_get(stats.unwrapped(found[0]._replace(inner_state=None)))
    num, size = int(state.num_measured), len(state.values)
    order = np.arange(max(num - size, 0), num) % size
    values, steps = state.values[order].astype(np.float64), state.steps[order]
    phases = None if state.phases is None else state.phases[order]
    errors = None if state.errors is None else state.errors[order].tolist()
    history = LossHistory(
        steps=tuple(steps.tolist()),
        values=tuple(values.tolist()),
        phases=None if phases is None else tuple(Phase(phase).name for phase in phases.tolist()),
        errors=None if errors is None else tuple(None if error < 0 else error for error in errors),
    )
    settings = state.settings
    rolling, half = int(settings.rolling_window), int(settings.convergence_window) // 2
    threshold = float(settings.convergence_threshold)
    change = _change(values, half)
    divergence = _change(values, rolling)
    first = values[-rolling] if len(values) >= rolling else 0.0
    return LossReport(
        total_steps=int(state.total_steps),
        num_measured=num,
        num_repeated=int(state.num_repeated),
        num_nonfinite=int(state.num_nonfinite),
        best_value=float(state.best_value) if num else None,
        best_step=int(state.best_step) if num else None,
        last_value=float(values[-1]) if num else None,
        statistics=_statistics(values),
        rolling=_statistics(values[-rolling:]),
        by_phase=_by_phase(values, phases),
        improvement_rate=float((values[-1] - first) / abs(first)) if first else None,
        trend=_trend(steps, values, 2 * half),
        is_converging=change is not None and -change > threshold,
        is_plateau=change is not None and abs(change) <= threshold,
        divergence=divergence,
        is_diverging=divergence is not None and divergence > float(settings.divergence_threshold) - 1,
        spikes=_spikes(steps, values, rolling, float(settings.spike_threshold)),
        history=history,
    )


def _is_state(node: object) -> bool:
    return isinstance(node, TrackLossState)


def _statistics(values: np.ndarray) -> LossStatistics | None:
    if not len(values):
        return None
    variance = float(np.var(values))
    numbers = np.mean(values), variance, variance**0.5, np.min(values), np.max(values), np.median(values)
    return LossStatistics(len(values), *map(float, numbers))


def _by_phase(values: np.ndarray, phases: np.ndarray | None) -> dict[str, LossStatistics]:
    found = {} if phases is None else {phase.name: _statistics(values[phases == phase]) for phase in Phase}
    return {name: numbers for name, numbers in found.items() if numbers is not None}


def _change(values: np.ndarray, num: int) -> float | None:
    """The relative change of the mean loss from the ``num`` losses before the last ``num`` to the last ``num``."""
    if len(values) < 2 * num:
        return None
    before, last = np.mean(values[-2 * num : -num]), np.mean(values[-num:])
    return float((last - before) / abs(before)) if before else None


def _trend(steps: np.ndarray, values: np.ndarray, num: int) -> float | None:
    if len(values) < num:
        return None
    at = steps[-num:] - np.mean(steps[-num:])
    return float(np.dot(at, values[-num:]) / np.dot(at, at))


def _spikes(steps: np.ndarray, values: np.ndarray, num: int, threshold: float) -> tuple[LossSpike, ...]:
    if len(values) <= num:
        return ()
    before = np.lib.stride_tricks.sliding_window_view(values[:-1], num)
    mean = np.mean(before, axis=1)
    # Losses are float32: after equal losses, a difference in the last bit is not a spike.
    floor = np.finfo(np.float32).eps * np.maximum(np.abs(mean), np.finfo(np.float32).tiny)
    deviations = (values[num:] - mean) / np.maximum(np.std(before, axis=1), floor)
    at = np.flatnonzero(deviations > threshold)
    columns = steps[num:][at].tolist(), values[num:][at].tolist(), deviations[at].tolist()
    return tuple(LossSpike(*row) for row in zip(*columns, strict=True))


def _as_dict(value: Any) -> Any:  # noqa: ANN401 # The nesting is arbitrary.
    """Turns NamedTuples into dictionaries."""
    if hasattr(value, "_asdict"):
        return {name: _as_dict(part) for name, part in value._asdict().items()}
    if isinstance(value, dict):
        return {name: _as_dict(part) for name, part in value.items()}
    return [_as_dict(part) for part in value] if isinstance(value, tuple) else value
