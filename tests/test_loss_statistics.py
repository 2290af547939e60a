"""Statistics of losses beside NumPy's own, anomalies beside their definitions, and the way to JSON and back."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import vsa_optax
from vsa_optax import Cycle, LossReport, Window
from vsa_optax.loss_statistics import LossSpike, LossStatistics


@functools.cache
def tracker(size, **settings):
    opt = vsa_optax.track_loss(optax.identity(), max_history=size, **settings)

    def fed(values):
        return jax.lax.scan(
            lambda s, v: (opt.update(jnp.ones(1), s, value=v)[1], None), opt.init(jnp.zeros(1)), values
        )[0]

    return jax.jit(fed)


def report_of(values, size=1000, **settings):
    return vsa_optax.loss_report(tracker(size, **settings)(np.asarray(values, np.float32)))


def assert_equals_numpy(found, values):
    values = np.asarray(values, np.float64)
    expected = len(values), values.mean(), values.var(), values.std(), values.min(), values.max(), np.median(values)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)


STREAM = st.lists(
    st.one_of(
        st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
        st.sampled_from([np.nan, np.inf, -np.inf, 0.0]),
    ),
    min_size=60,
    max_size=60,
)


@given(STREAM)
def test_statistics_equal_numpys_on_what_is_finite(stream):
    report = report_of(stream, size=50)
    values = np.float32([x for x in stream if np.isfinite(x)])
    assert (report.total_steps, report.num_measured) == (60, len(values))
    assert report.num_nonfinite == 60 - len(values)
    steps = [i for i, x in enumerate(stream) if np.isfinite(x)]
    assert report.history.steps == tuple(steps[-50:])
    assert report.history.values == tuple(values[-50:].tolist())
    if not len(values):
        assert report.statistics is report.rolling is report.best_value is report.last_value is None
        return
    assert_equals_numpy(report.statistics, values[-50:])
    assert_equals_numpy(report.rolling, values[-50:][-20:])
    assert_equals_numpy(report.over(7), values[-50:][-7:])
    assert report.best_value == values.min()
    assert report.best_step == steps[int(np.argmin(values))]
    assert report == LossReport.from_json(report.to_json())


def test_a_million_losses():
    """All kept, and the last thousand of them."""
    values = np.float32(1 + np.random.default_rng(0).normal(size=1_000_000) * 1e-3)
    report = report_of(values, size=1_000_000)
    assert_equals_numpy(report.statistics, values)
    assert_equals_numpy(report_of(values).statistics, values[-1000:])
    assert report.num_measured == 1_000_000


@pytest.mark.parametrize("constant", [0.0, 2.5, -1e-30, 3e38])
def test_a_constant_is_a_plateau(constant):
    report = report_of(np.full(120, constant))
    assert_equals_numpy(report.statistics, np.full(120, np.float32(constant)))
    assert report.trend == pytest.approx(0.0, abs=1e-9 * max(abs(constant), 1e-9))
    assert not report.spikes
    assert not report.is_converging
    assert not report.is_diverging
    assert report.is_plateau == (constant != 0)  # A loss of 0 has no relative change.
    assert report.improvement_rate == (None if constant == 0 else 0)


def test_a_falling_loss_converges_and_a_rising_one_diverges():
    falls, rises = report_of(np.exp(-0.05 * np.arange(100))), report_of(np.exp(0.05 * np.arange(100)))
    assert (falls.is_converging, falls.is_plateau, falls.is_diverging) == (True, False, False)
    assert (rises.is_converging, rises.is_plateau, rises.is_diverging) == (False, False, True)
    assert falls.improvement_rate == pytest.approx(np.exp(-0.05 * 19) - 1, rel=1e-5)
    assert rises.divergence == pytest.approx(np.exp(0.05 * 20) - 1, rel=1e-5)


def test_thresholds_are_those_that_were_given():
    values = np.repeat([1.0, 1.3], 20)
    assert report_of(values).is_diverging
    assert not report_of(values, divergence_threshold=1.4).is_diverging
    slow = np.repeat([1.0, 0.985], 25)
    assert report_of(slow).is_converging
    assert report_of(slow, convergence_threshold=0.02).is_plateau
    assert report_of(slow, convergence_window=100).is_plateau is False


def test_the_trend_is_the_least_squares_line_over_uneven_steps():
    rng = np.random.default_rng(1)
    values = rng.normal(size=80)
    values[rng.integers(0, 80, 20)] = np.nan
    report = report_of(values)
    steps, kept = np.array(report.history.steps[-50:]), np.array(report.history.values[-50:])
    assert report.trend == pytest.approx(np.polyfit(steps, kept, 1)[0], rel=1e-6)


@pytest.mark.parametrize(("height", "is_spike"), [(2.9, False), (3.1, True)])
def test_a_spike_is_that_many_deviations_above_the_losses_before_it(height, is_spike):
    """The window excludes the loss itself: in a window of 20 with it, none could be more than 4.25 deviations off."""
    before = np.tile([1.0, 3.0], 10)  # Mean 2, deviation 1.
    report = report_of([*before, 2 + height, 2.0])
    expected = (LossSpike(20, pytest.approx(2 + height), pytest.approx(height, rel=1e-5)),)
    assert report.spikes == (expected if is_spike else ())
    high = report_of([*before, 102.0])
    assert high.spikes[0].deviations == pytest.approx(100)


def test_a_last_bit_is_no_spike_behind_a_constant_but_a_step_is():
    assert not report_of([*np.ones(30), 1 + 1.2e-7]).spikes
    assert report_of([*np.ones(30), 1.001]).spikes


def test_statistics_by_phase():
    opt = vsa_optax.track_loss(
        vsa_optax.predict_gradients(
            predictor=Window(predicts="gradient"), phases=Cycle(warmup_steps=3, full_steps=2, predict_steps=4)
        )
    )
    state = opt.init(jnp.zeros(2))
    losses = {"WARMUP": [5.0, 4.0, 3.0], "FULL": [2.0, 1.0], "PREDICT": [7.0, 8.0, 9.0, 10.0]}
    update = jax.jit(opt.update)
    for value in [value for values in losses.values() for value in values]:
        _, state = update(jnp.ones(2), state, value=value)
    report = vsa_optax.loss_report(state)
    assert set(report.by_phase) == set(losses)
    for name, values in losses.items():
        assert_equals_numpy(report.by_phase[name], values)
    assert report.history.phases == ("WARMUP",) * 3 + ("FULL",) * 2 + ("PREDICT",) * 4
    assert LossReport.from_json(report.to_json()) == report


def test_json_is_strict_and_names_everything():
    read = json.loads(report_of([1.0, np.nan, 2.0]).to_json(), parse_constant=pytest.fail)
    assert set(read) == set(LossReport._fields)
    assert set(read["statistics"]) == set(LossStatistics._fields)
    assert read["history"]["values"] == [1.0, 2.0]


def test_what_holds_no_or_two_trackers_is_refused():
    opt = vsa_optax.track_loss(optax.identity())
    for state in (None, optax.adam(0.1).init(jnp.zeros(2)), [opt.init(jnp.zeros(2))] * 2):
        with pytest.raises(ValueError, match=r"expected one track_loss .* found [02]"):
            vsa_optax.loss_report(state)
    with pytest.raises(ValueError, match="num must be an integer >= 1"):
        report_of([1.0]).over(0)
