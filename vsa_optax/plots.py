"""Plots of a run. The functions import Matplotlib when they draw; importing the package does not.

The extra ``vsa-optax[demo]`` installs Matplotlib.
"""

import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vsa_optax.loss_statistics import LossReport
from vsa_optax.prediction.machine import Phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SHADES = {
    Phase.WARMUP: "#d9d9d9",
    Phase.FULL: "#bcd7ee",
    Phase.PREDICT: "#fdf0cc",
    Phase.CORRECT: "#a9d8b8",
}
_BLUE, _RED = "#0b5fa5", "#b3261e"


def shade_phases(axis: "Axes", phases: Sequence[int] | np.ndarray, *, first_step: int = 0) -> None:
    """Shades every consecutive run of a phase over the full height of the axes, and labels each phase.

    Args:
        axis: Matplotlib axes on which one step has width 1.
        phases: the `vsa_optax.Phase` of each step.
        first_step: the number of the first step.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from vsa_optax import Phase, plots
        >>> axis = Figure().subplots()
        >>> plots.shade_phases(axis, [Phase.WARMUP, Phase.FULL, Phase.PREDICT, Phase.PREDICT])
        >>> axis.get_legend_handles_labels()[1]
        ['WARMUP', 'FULL', 'PREDICT']
    """
    phases = np.asarray(phases)
    edges = [0, *(np.flatnonzero(np.diff(phases)) + 1), len(phases)]
    for phase, colour in _SHADES.items():
        spans = [(first_step + a - 0.5, b - a) for a, b in itertools.pairwise(edges) if b > a and phases[a] == phase]
        if spans:
            style: dict[str, Any] = {"color": colour, "linewidth": 0, "zorder": 0, "label": phase.name}
            axis.broken_barh(spans, (0, 1), transform=axis.get_xaxis_transform(), **style)


def draw_losses(report: LossReport, path: str | os.PathLike[str] | None = None) -> "Figure":
    """Plots losses over steps with shaded phases and marked spikes, and the errors of predictions below them.

    Steps without their own loss, between two steps that have one, are shaded as PREDICT. Without a phase machine,
    nothing is shaded and no errors are plotted.

    Args:
        report: the result of `vsa_optax.loss_report`, with at least one loss.
        path: the file to write the plot to, or None.

    Returns:
        The Matplotlib figure.

    Raises:
        ValueError: if the report has no losses.

    Example:
        >>> import jax.numpy as jnp, optax, vsa_optax
        >>> opt = vsa_optax.track_loss(optax.sgd(0.1))
        >>> state = opt.init(jnp.zeros(2))
        >>> for loss in (3.0, 2.0, 1.0):
        ...     _, state = opt.update(jnp.ones(2), state, value=loss)
        >>> len(vsa_optax.plots.draw_losses(vsa_optax.loss_report(state)).axes)
        1
    """
    from matplotlib.figure import Figure

    history = report.history
    if not history.steps:
        raise ValueError("report must hold at least one loss, got an empty history")
    steps = np.asarray(history.steps)
    has_errors = history.errors is not None
    figure = Figure(figsize=(10, 6 if has_errors else 4), layout="constrained")
    axes = figure.subplots(
        2 if has_errors else 1, 1, sharex=True, squeeze=False, height_ratios=[2, 1][: 1 + has_errors]
    )
    losses = axes[0, 0]
    losses.plot(steps, history.values, color=_BLUE, linewidth=1, marker=".", markersize=4, label="loss")
    spikes = [spike.step for spike in report.spikes], [spike.value for spike in report.spikes]
    if report.spikes:
        losses.plot(*spikes, color=_RED, marker="v", linestyle="", zorder=3, label=f"spikes: {len(report.spikes)}")
    if report.best_step in history.steps:
        losses.plot([report.best_step], [report.best_value], color="#1b7f3b", marker="*", linestyle="", label="best")
    if min(history.values) > 0:
        losses.set_yscale("log")
    losses.set(ylabel="loss", title=_title(report))
    if history.errors is not None:
        compared = [
            (step, error) for step, error in zip(history.steps, history.errors, strict=True) if error is not None
        ]
        errors = axes[1, 0]
        errors.plot(*(zip(*compared, strict=True) if compared else ([], [])), color=_RED, linewidth=1, marker=".")
        errors.set(ylabel="prediction error", ylim=(0, None))
    for axis in axes[:, 0]:
        if history.phases is not None:
            shade_phases(axis, _every_step(history.steps, history.phases), first_step=history.steps[0])
        axis.grid(alpha=0.3)
    losses.legend(loc="upper right", ncols=3, framealpha=0.95)
    axes[-1, 0].set_xlabel("step")
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def _every_step(steps: tuple[int, ...], phases: tuple[str, ...]) -> np.ndarray:
    """The phase of each step from the first loss to the last."""
    found = np.full(steps[-1] - steps[0] + 1, int(Phase.PREDICT))
    found[np.asarray(steps) - steps[0]] = [Phase[name] for name in phases]
    return found


def _title(report: LossReport) -> str:
    said = {"converging": report.is_converging, "on a plateau": report.is_plateau, "diverging": report.is_diverging}
    of_run = ", ".join(name for name, is_said in said.items() if is_said)
    counts = f"{report.num_measured} losses in {report.total_steps} steps"
    if report.num_nonfinite:
        counts += f", {report.num_nonfinite} not finite"
    return f"{counts}; {of_run}" if of_run else counts
