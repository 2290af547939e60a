import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

from vsa_optax.kernels import numerics
from vsa_optax.prediction.fits import line_fit
from vsa_optax.prediction.predictors.recursive import RecursiveHistory
from vsa_optax.prediction.predictors.window import WindowHistory

spacings = st.lists(st.integers(1, 40), min_size=1, max_size=24)


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def extrapolation_weights(ages, weights, newest, horizon):
    """Of the records, in the line that many steps ahead."""
    mean, slope, age = line_fit.line_weights(ages, weights, jnp.int32(newest))
    return mean + (horizon - age) * slope


@functools.cache
def compiled(history):
    """To record at a step, and to predict for one, by the history's own pieces."""

    def record(state, record, at):
        return history.record(state, record, None, at, history.scalars(state, at))

    def predict(state, step):
        return numerics.linear_combination(*history.terms(state, history.scalars(state, step)))

    return jax.jit(record), jax.jit(predict)


def run(history, steps, records, step):
    """Prediction for ``step`` after ``records``."""
    record, predict = compiled(history)
    state = history.init(jnp.zeros(records.shape[1]))
    for at, x in zip(steps, np.asarray(records, np.float32), strict=True):
        state = record(state, x, np.int32(at))
    return predict(state, np.int32(step))


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


@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_recursion_equals_lstsq_over_many_records(decay):
    rng = np.random.default_rng(0)
    steps = np.cumsum(rng.integers(1, 5, size=600))
    records = (rng.normal(size=5) + 0.01 * steps[:, None] * rng.normal(size=5)).astype(np.float32)
    step = int(steps[-1]) + 7
    expected = reference.lstsq_prediction(steps, records, step, decay)
    assert relative(run(RecursiveHistory(decay, None), steps, records, step), expected) < 1e-5


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
    """Noise of variance 1 in each of eight records: what the horizon makes of it (0.125 is the mean's)."""
    ages, weights = jnp.arange(-7.0, 1.0), jnp.ones(8)
    variance = [jnp.sum(extrapolation_weights(ages, weights, 7, float(h)) ** 2) for h in (1, 5, 10, 20)]
    np.testing.assert_allclose(variance, [0.607, 1.845, 4.464, 13.27], rtol=2e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_is_finite(bad, dtype):
    x = jnp.ones((3, 5), dtype)
    assert numerics.is_finite(x)
    assert not numerics.is_finite(x.at[1, 2].set(bad))
    assert numerics.is_finite(jnp.zeros((0, 3), dtype))


def test_saturating_cast():
    x = jnp.array([1e30, -1e30, jnp.inf, -jnp.inf, jnp.nan, 1.5])
    np.testing.assert_array_equal(
        numerics.saturating_cast(x, jnp.float16), np.array([65504, -65504, 65504, -65504, 0, 1.5], np.float16)
    )
    z = numerics.saturating_cast(jax.lax.complex(jnp.float32(jnp.inf), jnp.float32(-2)), jnp.complex64)
    assert z == np.complex64(complex(np.finfo(np.float32).max, -2))


@pytest.mark.parametrize("scale", [1e-34, 1e-30, 1.0, 1e30, 1e38])
def test_relative_distance_at_any_magnitude(scale):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 40)).astype(np.float32) * 0.3
    expected = np.linalg.norm(x - y) / np.linalg.norm(x)
    scaled = [jnp.asarray(v * np.float32(scale)) for v in (x, y)]
    distance, is_defined = numerics.relative_distance([scaled[0][:7], scaled[0][7:]], [scaled[1][:7], scaled[1][7:]])
    assert is_defined
    np.testing.assert_allclose(distance, expected, rtol=2e-5)


def test_relative_distance_from_zero_is_not_defined():
    distance, is_defined = numerics.relative_distance([jnp.zeros(3)], [jnp.ones(3)])
    assert not is_defined
    assert distance == 0.0
    assert not numerics.relative_distance([], [])[1]
    distance, is_defined = numerics.relative_distance([jnp.float32(1e-30)], [jnp.float32(1e30)])
    assert is_defined
    assert np.isfinite(distance)
