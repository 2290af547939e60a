import jax.numpy as jnp
import numpy as np
import pytest
import reference
from histories import run
from hypothesis import given
from hypothesis import strategies as st
from samples import relative

from vsa_optax.prediction.fits import line_fit
from vsa_optax.prediction.predictors.recursive import RecursiveHistory
from vsa_optax.prediction.predictors.window import WindowHistory

spacings = st.lists(st.integers(1, 40), min_size=1, max_size=24)


def extrapolation_weights(ages, weights, newest, horizon):
    """Of the records, in the line that many steps ahead."""
    mean, slope, age = line_fit.line_weights(ages, weights, jnp.int32(newest))
    return mean + (horizon - age) * slope


@given(
    gaps=spacings,
    horizon=st.integers(1, 40),
    decay=st.sampled_from([1e-6, 0.1, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 99),
)
def test_predictions_equal_lstsq_at_any_spacing(gaps, horizon, decay, seed):
    rng = np.random.default_rng(seed)
    steps = np.cumsum(gaps)
    records = rng.normal(size=(len(gaps), 6)).astype(np.float32)
    step = int(steps[-1]) + horizon
    window = run(WindowHistory(8, decay, None), steps, records, step)
    assert relative(window, reference.lstsq_prediction(steps[-8:], records[-8:], step, decay)) < 1e-5
    recursive = run(RecursiveHistory(decay, None), steps, records, step)
    assert relative(recursive, reference.lstsq_prediction(steps, records, step, decay)) < 1e-5


@pytest.mark.parametrize("history", [WindowHistory(8, 0.95, None), RecursiveHistory(0.95, None)], ids=type)
@given(gaps=st.lists(st.integers(1, 9), min_size=2, max_size=12), horizon=st.integers(1, 30))
def test_exact_on_lines(history, gaps, horizon):
    steps = np.cumsum(gaps)
    start, slope = np.array([1.0, -2.0, 0.5]), np.array([0.25, 0.5, -1.0])
    step = int(steps[-1]) + horizon
    line = start + slope * step
    assert relative(run(history, steps, start + slope * steps[:, None], step), line) < 1e-5


@pytest.mark.parametrize("history", [WindowHistory(4, 0.95, None), RecursiveHistory(0.95, None)], ids=type)
def test_fewer_than_two_steps_predict_the_newest(history):
    record = np.array([[1.0, -2.0]])
    np.testing.assert_array_equal(run(history, [3], record, 9), record[0])
    np.testing.assert_array_equal(run(history, [], np.zeros((0, 2)), 9), [0.0, 0.0])
    twice = np.array([[1.0, -2.0], [5.0, 7.0]])
    np.testing.assert_allclose(run(history, [3, 3], twice, 9), twice[1])


@pytest.mark.parametrize("decay", [1e-30, 1e-6])
@pytest.mark.parametrize("kind", ["window", "recursive"])
def test_vanishing_weights_stay_finite(decay, kind):
    history = WindowHistory(4, decay, None) if kind == "window" else RecursiveHistory(decay, None)
    predicted = run(history, [0, 1, 2, 3], np.arange(4.0)[:, None] * np.ones(2), 5)
    assert np.isfinite(predicted).all()
    np.testing.assert_allclose(predicted, 5.0, rtol=1e-5)  # the line through the last two


def test_coefficients_sum_to_one_and_ignore_empty_slots():
    ages = jnp.array([-3.0, 0.0, -1.0, -99.0])
    c = extrapolation_weights(ages, jnp.array([0.8, 1.0, 0.9, 0.0]), 1, 4.0)
    np.testing.assert_allclose(c.sum(), 1.0, rtol=1e-6)
    assert c[3] == 0.0


def test_variance_of_raw_extrapolation():
    """The variance of a prediction by its horizon, for noise of variance 1 in each of eight records (mean: 0.125)."""
    ages, weights = jnp.arange(-7.0, 1.0), jnp.ones(8)
    variance = [jnp.sum(extrapolation_weights(ages, weights, 7, float(h)) ** 2) for h in (1, 5, 10, 20)]
    np.testing.assert_allclose(variance, [0.607, 1.845, 4.464, 13.27], rtol=2e-3)


def test_no_records_have_no_coefficients():
    for coefficients in line_fit.line_weights(jnp.zeros(4), jnp.zeros(4), jnp.int32(2))[:2]:
        np.testing.assert_array_equal(coefficients, np.zeros(4))
