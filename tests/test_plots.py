"""The contents of a run's plot, and that Matplotlib is imported only to draw one."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from matplotlib.figure import Figure

import vsa_optax
from vsa_optax import Cycle, Phase, Window, plots

RHYTHM = Cycle(warmup_steps=3, full_steps=2, predict_steps=4, correct_every=3)


def report_of(losses, opt):
    """Of a run whose skipped steps repeat the last loss, whatever is given for them."""
    opt = vsa_optax.track_loss(opt, rolling_window=4)
    update, state, last = jax.jit(opt.update), opt.init(jnp.zeros(2)), None
    for step, value in enumerate(losses):
        is_skipped = state.phases is not None and not vsa_optax.needs_backward(state)
        last = last if is_skipped else float(value)
        _, state = update(jnp.ones(2) * step, state, value=last)
    return vsa_optax.loss_report(state)


def switched():
    return vsa_optax.phase_switched(optax.sgd(0.1), predictor=Window(predicts="gradient"), phases=RHYTHM)


def test_matplotlib_is_not_imported_before_something_is_drawn():
    program = "import sys, vsa_optax.plots; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_page_has_losses_phases_errors_and_spikes(tmp_path):
    report = report_of([5, 4, 3, 2.5, 2, 0, 0, 0, 2.2, 0, 50, 1, 1], switched())
    assert len(report.spikes) == 1
    figure = plots.draw_losses(report, tmp_path / "run.png")
    losses, errors = figure.axes
    lines = {line.get_label(): line for line in losses.get_lines()}
    assert tuple(lines["loss"].get_xdata()) == report.history.steps
    assert tuple(lines["loss"].get_ydata()) == report.history.values
    assert list(lines["spikes: 1"].get_xdata()) == [report.spikes[0].step]
    assert list(lines["best"].get_ydata()) == [report.best_value]
    shown = losses.get_legend_handles_labels()[1]
    assert {"WARMUP", "FULL", "PREDICT", "CORRECT"} <= set(shown)
    compared = [error for error in report.history.errors if error is not None]
    assert list(errors.get_lines()[0].get_ydata()) == compared
    assert compared
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_without_phases_there_are_losses_alone():
    figure = plots.draw_losses(report_of([3.0, -1.0, 2.0], optax.identity()))
    (losses,) = figure.axes
    assert losses.get_yscale() == "linear"
    assert losses.get_legend_handles_labels()[1] == ["loss", "best"]


def test_stretches_of_a_phase_are_shaded_from_edge_to_edge():
    axis = Figure().subplots()
    plots.shade_phases(axis, [Phase.FULL, Phase.PREDICT, Phase.PREDICT, Phase.FULL], first_step=10)
    spans = {
        bars.get_label(): [(box.x0, box.x1) for box in (path.get_extents() for path in bars.get_paths())]
        for bars in axis.collections
    }
    assert spans == {"FULL": [(9.5, 10.5), (12.5, 13.5)], "PREDICT": [(10.5, 12.5)]}


def test_an_empty_report_is_refused():
    with pytest.raises(ValueError, match="at least one loss"):
        plots.draw_losses(report_of([], optax.identity()))
