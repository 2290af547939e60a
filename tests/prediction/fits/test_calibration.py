"""The calibrated prediction: an independent twin, what it finds in noise and on a line, what it survives."""

import functools

import blind
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsa_optax
from vsa_optax import Recursive, Window
from vsa_optax.prediction.fits import calibration

SETTINGS = {"warmup_steps": 4, "full_steps": 2, "predict_steps": 3, "correct_every": 2, "calibrate": True}
HISTORIES = {
    "window": {"length": 5},
    "recursive": {"line": Recursive},
    "coded": {"length": 5, "codec": vsa_optax.TritCodec(3, block_size=8)},
}


@functools.cache
def hundred_steps():
    """Gradients, and what becomes of them with a window."""
    gradients = stream(0, 100)
    return gradients, *emitted(blind.predict_gradients(**SETTINGS, **HISTORIES["window"]), gradients)


def stream(seed, steps):
    """Gradients that drift and oscillate, with noise, of two leaves of unlike size."""
    rng = np.random.default_rng(seed)
    base, drift, beat = (rng.normal(size=12) for _ in range(3))
    t = np.arange(steps)[:, None]
    flat = base + 0.1 * t * drift + np.cos(2.0 * t) * beat + 0.1 * rng.normal(size=(steps, 12))
    return {"b": (1e-3 * flat[:, :4]).astype(np.float32), "w": flat[:, 4:].reshape(steps, 2, 4).astype(np.float32)}


def emitted(opt, gradients):
    """The emitted updates at each step, and the last state; one jitted scan."""

    def step(state, gradient):
        updates, state = opt.update(gradient, state)
        return state, (updates, vsa_optax.phase_stats(state))

    def run(gradients):
        return jax.lax.scan(step, opt.init(jax.tree.map(lambda g: g[0], gradients)), gradients)

    state, (updates, stats) = jax.jit(run)(gradients)
    return jax.tree.map(np.asarray, updates), stats, state


class Twin:
    """Calibrated weighted least squares on one leaf, in float64 and from stored records."""

    def __init__(self, window, decay=0.95):
        self.window, self.decay = window, decay
        self.records, self.steps, self.measurements = [], [], []

    def features(self, step):
        records, steps = np.array(self.records[-self.window :]), np.array(self.steps[-self.window :], float)
        ages = steps - steps[-1]
        if len(ages) == 1:
            line, mean_age = np.array([records[0], 0 * records[0]]), 0.0
        else:
            weights = np.sqrt(self.decay ** np.arange(len(ages) - 1, -1, -1.0))
            design = np.stack([np.ones_like(ages), ages], 1) * weights[:, None]
            line = np.linalg.lstsq(design, records * weights[:, None], rcond=None)[0]
            mean_age = weights**2 @ ages / (weights @ weights)
        mean = line[0] + mean_age * line[1]
        return np.stack([mean, (step - steps[-1] - mean_age) * line[1], records[-1]])

    def coefficients(self):
        if not self.measurements:
            return np.array([1.0, 0.0, 0.0])
        forgotten = 0.95 ** np.arange(len(self.measurements) - 1, -1, -1.0)
        gram = sum(f * x @ x.T / (y @ y) for f, (x, y) in zip(forgotten, self.measurements, strict=True))
        products = sum(f * x @ y / (y @ y) for f, (x, y) in zip(forgotten, self.measurements, strict=True))
        scale = np.sqrt(np.diag(gram) + 1e-6 * gram[0, 0])
        safe = np.where(scale > 0, scale, 1)
        unit = np.array([[gram[i, j] / safe[i] / safe[j] if i != j else 1.0 for j in range(3)] for i in range(3)])
        right = products / safe + 1e-4 * scale * np.array([1.0, 0, 0])
        return np.linalg.solve(unit + 1e-4 * np.eye(3), right) / safe

    def predict(self, step):
        return self.coefficients() @ self.features(step)

    def record(self, step, target):
        if self.records:
            self.measurements.append((self.features(step), target))
        self.records.append(target)
        self.steps.append(step)


def test_predictions_are_those_of_the_twin_over_a_hundred_steps():
    gradients, updates, stats, _ = hundred_steps()
    was_predicted = np.diff(np.asarray(stats.predict_steps), prepend=0) > 0
    assert was_predicted.sum() > 30
    for name, leaf in gradients.items():
        twin = Twin(window=5)
        for step, gradient in enumerate(leaf.reshape(100, -1).astype(np.float64)):
            given = updates[name][step].ravel()
            if was_predicted[step]:
                wanted = twin.predict(step)
                np.testing.assert_allclose(given, wanted, rtol=2e-3, atol=2e-3 * np.abs(wanted).max())
            else:
                np.testing.assert_array_equal(given, gradient.astype(np.float32))
                twin.record(step, gradient)


@pytest.mark.parametrize("history", HISTORIES)
def test_on_a_clean_line_the_prediction_is_the_line(history):
    base, slope = np.random.default_rng(1).normal(size=(2, 40)).astype(np.float32)
    line = base + 0.05 * slope * np.arange(40, dtype=np.float32)[:, None]
    updates, stats, _ = emitted(blind.predict_gradients(**SETTINGS, **HISTORIES[history]), line)
    tolerance = 0.1 if history == "coded" else 0.02
    assert np.linalg.norm(updates[20:] - line[20:]) < tolerance * np.linalg.norm(line[20:])
    if history == "recursive":
        np.testing.assert_allclose(stats.quality.coefficients[-1], [[1.0, 1.0]], atol=0.03)
    assert float(stats.quality.r_squared[-1, 0]) > 1 - tolerance


def test_in_noise_round_a_constant_the_slope_is_not_believed():
    rng = np.random.default_rng(2)
    constant = rng.normal(size=4096)
    noisy = (constant + rng.normal(size=(200, 4096))).astype(np.float32)
    _, stats, _ = emitted(blind.predict_gradients(**SETTINGS, line=Recursive, decay=1.0), noisy)
    alpha, beta = np.asarray(stats.quality.coefficients[-1, 0])
    assert abs(beta) < 0.1
    assert 0.9 < alpha < 1.05
    # Half of the gradient is noise that nothing predicts.
    assert float(stats.quality.mean_r_squared[-1]) == pytest.approx(0.49, abs=0.03)


def test_an_oscillation_that_a_line_misses_is_found_with_the_newest_record():
    wave = (np.cos(0.7 * np.arange(41))[:, None] * np.ones(8) + 0.2).astype(np.float32)
    settings = {"warmup_steps": 39, "full_steps": 1, "predict_steps": 1}
    updates, stats, _ = emitted(blind.predict_gradients(calibrate=True, **settings), wave)
    assert int(stats.predict_steps[-1]) == 1
    uncalibrated, _, _ = emitted(blind.predict_gradients(residual_decay=None, **settings), wave)
    assert np.linalg.norm(updates[-1] - wave[-1]) < 0.2 * np.linalg.norm(uncalibrated[-1] - wave[-1])


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_dtypes_pass_through_every_history(history, dtype):
    gradients = np.random.default_rng(3).normal(size=(30, 3, 16)).astype(np.float32) + 1
    gradients = gradients.astype(jnp.dtype(dtype))
    updates, stats, _ = emitted(blind.predict_gradients(**SETTINGS, **HISTORIES[history]), gradients)
    assert updates.dtype == gradients.dtype
    assert np.isfinite(updates.astype(np.complex64)).all()
    assert float(stats.quality.r_squared[-1, 0]) > 0.2


def test_what_is_not_finite_or_out_of_range_is_not_measured():
    gradients = np.ones([40, 6], np.float32)
    gradients[2, 3] = np.nan
    gradients[20:26] = 1e30
    updates, stats, state = emitted(blind.predict_gradients(**SETTINGS, length=4), gradients)
    assert np.isfinite(updates).all()
    assert int(stats.nonfinite_count[-1]) == 1
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(state.machine.calibration.sums))
    np.testing.assert_allclose(updates[-6:], 1.0, atol=0.02)


def test_nothing_is_learnt_from_a_target_that_vanishes():
    sums = calibration.zeros(2, 3)
    gram, products = jnp.ones([2, 3, 3]), jnp.array([[0.0] * 3, [1.0] * 3])
    coefficients, r_squared = jax.jit(calibration.coefficients), jax.jit(calibration.r_squared)
    theta = coefficients(sums)
    np.testing.assert_array_equal(theta, [[1, 0, 0]] * 2)
    sums, squared = jax.jit(calibration.measure)(sums, theta, gram, products, jnp.array([0.0, 1.0]), 0.9)
    np.testing.assert_array_equal(sums.weight, [0, 1])
    np.testing.assert_array_equal(squared, [1, 0])
    np.testing.assert_array_equal(r_squared(sums.error, sums.weight), [0, 1])
    np.testing.assert_array_equal(coefficients(sums)[0], [1, 0, 0])


def test_the_products_kept_are_those_of_the_records():
    *_, state = hundred_steps()
    for leaf, records in enumerate(jax.tree.leaves(state.history.records)):
        flat = np.asarray(records, np.float64).reshape(5, -1)
        np.testing.assert_allclose(state.machine.calibration.gram[leaf], flat @ flat.T, rtol=1e-5, atol=1e-12)


def test_the_state_costs_what_is_documented():
    params = {"a": jnp.zeros(100), "b": jnp.zeros([7, 3])}
    for settings, per_leaf in (({"length": 6}, 4 * (36 + 14)), ({"line": Recursive}, 32)):
        state = blind.predict_gradients(**SETTINGS, **settings).init(params)
        assert state.residual is None
        assert sum(x.nbytes for x in jax.tree.leaves(state.machine.calibration)) == 2 * per_leaf


def test_an_empty_tree_has_nothing_to_calibrate():
    opt = vsa_optax.predict_gradients(predictor=Window(predicts="gradient"))
    state, update = opt.init({}), jax.jit(opt.update)
    for _ in range(12):
        _, state = update({}, state)
    assert vsa_optax.phase_stats(state).quality.mean_r_squared == 0
    assert vsa_optax.phase_stats(state).predict_steps == 0


def test_settings_that_exclude_each_other_are_named():
    with pytest.raises(ValueError, match=r"residual_decay must be None with calibrate=True.* got 0\.5"):
        blind.predict_gradients(calibrate=True, residual_decay=0.5)
    with pytest.raises(ValueError, match="calibrate must be True or False"):
        blind.predict_gradients(calibrate=1)
    calibrated = blind.phase_switched(optax.sgd(0.1), calibrate=True)
    with pytest.raises(ValueError, match="calibrate is True, here False"):
        blind.phase_switched(optax.sgd(0.1)).update(jnp.ones(2), calibrated.init(jnp.ones(2)))


def test_the_ridge_pulls_towards_the_mean():
    nothing_in_common = calibration.Sums(
        jnp.array([[[4.0, 0.0], [0.0, 1.0]]]), jnp.zeros([1, 2]), jnp.ones([1]), jnp.ones([1])
    )
    coefficients = jax.jit(calibration.coefficients)(nothing_in_common)
    np.testing.assert_allclose(coefficients, [[1e-4, 0.0]], rtol=1e-3, atol=1e-9)
