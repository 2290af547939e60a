"""Leaps: the twin in float64, quadratics and saddles, what is rejected, noise, broken evaluations; and mechanics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from samples import AS_USERS_DO

import vsa_optax
from vsa_optax import checkpoint
from vsa_optax.prediction import multisecant
from vsa_optax.prediction.fits import multisecant_fit

SIZE, RATE = 6, 0.05
CURVATURES = np.geomspace(1, 100, SIZE)
START = np.array([-1.2, 1.0, 0.5, -0.5, 1.5, -1.0])


def tree_of(flat, dtype=np.float32):
    flat = np.asarray(flat, dtype)
    return {"b": flat[0], "empty": np.zeros((0, 3), dtype), "v": flat[1:2], "w": flat[2:].reshape(2, 2)}


def flat_of(tree):
    return np.concatenate([np.ravel(tree[name]) for name in ("b", "v", "w")]).astype(np.float64)


def rosenbrock(x):
    """Value and gradient."""
    valley, slope = x[1:] - x[:-1] ** 2, 1 - x[:-1]
    gradient = np.zeros(SIZE)
    gradient[1:] = 20 * valley
    gradient[:-1] -= 40 * x[:-1] * valley + 2 * slope
    return np.sum(10 * valley**2 + slope**2), gradient


def quadratic(x):
    return 0.5 * np.sum(CURVATURES * (x - 1) ** 2), CURVATURES * (x - 1)


@functools.cache
def wrapped():
    """The transformation that most tests share, and its update, compiled."""
    opt = vsa_optax.multisecant(optax.adam(RATE), history_dtype=None)
    return opt, jax.jit(opt.update)


@functools.cache
def plain():
    opt = optax.adam(RATE)
    return opt, jax.jit(opt.update)


class Run:
    """Parameters and state, which `step` changes."""

    def __init__(self, x=START, state=None):
        self.params = tree_of(x)
        self.state = wrapped()[0].init(self.params) if state is None else state
        self.values = []

    def step(self, fun, **changed):
        """One evaluation; ``changed`` is what it is said to be instead of what it is."""
        value, gradient = fun(flat_of(self.params))
        self.values.append(value)
        given = {"value": value, "gradient": gradient} | changed
        updates, self.state = wrapped()[1](
            tree_of(given["gradient"]), self.state, self.params, value=np.float32(given["value"])
        )
        self.params = optax.apply_updates(self.params, updates)
        return updates

    def steps(self, fun, num):
        for _ in range(num):
            self.step(fun)
        return self

    @property
    def stats(self):
        return vsa_optax.multisecant_stats(self.state)

    @property
    def best(self):
        """The accepted parameters."""
        return flat_of(self.state.params)


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype, np.asarray(a).tobytes()) == (e.shape, e.dtype, np.asarray(e).tobytes())


def adam(rate, b1=0.9, b2=0.999, eps=1e-8):
    """Its steps, one gradient after the other."""
    mean, square, count = 0.0, 0.0, 0

    def step(gradient):
        nonlocal mean, square, count
        count += 1
        mean, square = b1 * mean + (1 - b1) * gradient, b2 * square + (1 - b2) * gradient**2
        return -rate * (mean / (1 - b1**count)) / (np.sqrt(square / (1 - b2**count)) + eps)

    return step


def test_the_metric_is_of_the_root_mean_square_from_the_first_gradient_on():
    run, squares = Run(), []
    for _ in range(4):
        run.step(rosenbrock)
        squares.append(flat_of(run.state.gradient) ** 2)
        weights = multisecant._METRIC_DECAY ** np.arange(len(squares))[::-1]
        wanted = np.sqrt(weights @ np.array(squares) / np.sum(weights))
        np.testing.assert_allclose(flat_of(run.state.gradient_rms), wanted, rtol=1e-5)


def test_fifty_updates_are_those_of_the_twin():
    """Rejections and evaluations that are not finite among them, the first one too."""
    with jax.enable_x64(True):
        opt = vsa_optax.multisecant(optax.adam(RATE), history_window=5, history_dtype=None)
        twin = reference.Multisecant(adam(RATE), SIZE, window=5, of=multisecant, fit=multisecant_fit)
        params = tree_of(START, np.float64)
        state, update, accepted = opt.init(params), jax.jit(opt.update), []
        for count in range(50):
            value, gradient = rosenbrock(flat_of(params))
            if count in (0, 20):
                gradient[3] = np.nan
            if count in (1, 25):
                value = np.inf
            if count in (30, 31, 40):
                value, gradient = 1e6 * count, -gradient
            updates, state = update(tree_of(gradient, np.float64), state, params, value=np.float64(value))
            wanted = twin.update(flat_of(params), gradient, value)
            np.testing.assert_allclose(flat_of(updates), wanted, rtol=1e-7, atol=1e-9)
            np.testing.assert_array_equal(flat_of(state.params), START if count < 2 else twin.point)
            for found, of_twin in (
                (state.damping, twin.damping),
                (state.prediction_error, twin.error),
                (state.num_accepted, twin.num_accepted),
                (state.log_curvature, np.log(twin.curvature or 1)),
            ):
                np.testing.assert_allclose(found, of_twin, rtol=1e-6, atol=1e-9)
            accepted.append(twin.is_accepted)
            params = optax.apply_updates(params, updates)
        assert accepted.count(False) > 7
        assert twin.loss < 1
        stats = vsa_optax.multisecant_stats(state)
        assert (stats.evaluations, stats.accepted, stats.nonfinite_count) == (50, accepted.count(True), 4)
        assert stats.dimension == 5
