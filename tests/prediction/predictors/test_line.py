import functools

import blind
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from samples import PARAMS, flat_of, gradient_stream, relative, tree_of

import vsa_optax
from vsa_optax import Recursive, Window
from vsa_optax.prediction.machine import Phase

SHORT = dict(warmup_steps=3, full_steps=2, predict_steps=4, correct_every=2)


@functools.cache
def like_the_twin(line, residual_decay):
    """A transformation and its update, compiled."""
    opt = blind.predict_gradients(line=line, length=5, decay=0.9, residual_decay=residual_decay, **SHORT)
    return opt, jax.jit(opt.update)


@pytest.mark.parametrize("line", [Window, Recursive])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("skip_rate", [0.0, 0.3])
def test_predictions_equal_the_twin_over_a_hundred_steps(line, has_residual, skip_rate):
    opt, update = like_the_twin(line, 0.8 if has_residual else None)
    window = 5 if line is Window else None
    twin = reference.Predictor(window=window, decay=0.9, residual_decay=0.8, has_residual=has_residual)
    state, predicted = opt.init(PARAMS), 0
    for step, gradient in enumerate(gradient_stream(100, skip_rate=skip_rate)):
        phase = Phase(int(state.machine.phase))
        emitted, state = update(tree_of(gradient), state)
        if phase == Phase.PREDICT:
            predicted += 1
            assert relative(flat_of(emitted), twin.predict(step)) < 1e-5
        elif np.isfinite(gradient).all():
            np.testing.assert_array_equal(flat_of(emitted), gradient)
            if phase == Phase.CORRECT:
                twin.correct(step, gradient)
            twin.record(step, gradient)
        else:
            np.testing.assert_array_equal(flat_of(emitted), 0.0)
    stats = vsa_optax.phase_stats(state)
    assert predicted == stats.predict_steps > 30
    np.testing.assert_allclose(stats.mean_prediction_error, np.mean(twin.errors), rtol=1e-4)
    np.testing.assert_allclose(stats.last_prediction_error, twin.errors[-1], rtol=1e-4)
    if has_residual:
        assert relative(flat_of(state.residual), twin.residual) < 1e-4


@pytest.mark.parametrize("line", [Window, Recursive])
def test_exact_on_gradients_that_move_on_a_line(line):
    opt = blind.predict_gradients(line=line, **SHORT)
    start, slope = gradient_stream(2, seed=3)
    state = opt.init(PARAMS)
    update = jax.jit(opt.update)
    for step in range(60):
        is_true = bool(vsa_optax.needs_backward(state))
        gradient = start + slope * step
        emitted, state = update(tree_of(gradient if is_true else np.full_like(gradient, np.nan)), state)
        assert relative(flat_of(emitted), gradient) < 1e-5
    assert vsa_optax.phase_stats(state).mean_prediction_error < 1e-5
    assert vsa_optax.phase_stats(state).nonfinite_count == 0  # The gradients of PREDICT steps are not read.


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("line", [Window, Recursive])
def test_predictions_beyond_the_dtype_saturate(dtype, line):
    top = float(jnp.finfo(dtype).max)
    opt = blind.predict_gradients(line=line, warmup_steps=4, full_steps=1, predict_steps=9, correct_every=3)
    state, update = opt.init(np.zeros(2, dtype)), jax.jit(opt.update)
    for step in range(14):
        gradient = np.array([(-1.0) ** step * top, top * step / 14]).astype(dtype)
        emitted, state = update(gradient, state)
        assert emitted.dtype == dtype
        assert np.isfinite(np.asarray(emitted, np.float32)).all()
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(state))


def test_history_dtype_and_half_precision_parameters():
    params = {"w": jnp.ones((4, 3), jnp.bfloat16), "b": jnp.ones(2)}
    opt = blind.phase_switched(optax.adamw(1.0), learning_rate=1e-2, **SHORT)
    state = opt.init(params)
    assert state.history.records["w"].dtype == state.residual["w"].dtype == jnp.bfloat16
    narrow = blind.phase_switched(optax.adamw(1.0), dtype="bfloat16", **SHORT).init(params)
    assert narrow.history.records["b"].dtype == jnp.bfloat16
    update = jax.jit(opt.update)
    for _ in range(20):
        emitted, new = update(params, state, params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
        assert emitted["w"].dtype == jnp.bfloat16
        state = new
    assert vsa_optax.phase_stats(state).predict_steps > 0


def test_complex_leaves_are_predicted():
    opt = blind.predict_gradients(warmup_steps=2, full_steps=1, predict_steps=3)
    state, update = opt.init(np.zeros(2, np.complex64)), jax.jit(opt.update)
    for step in range(6):
        gradient = np.complex64([1.0 + 2.0j, -1.0j]) * np.float32(step)
        emitted, state = update(gradient if step < 3 else np.zeros_like(gradient), state)
        np.testing.assert_allclose(emitted, gradient, rtol=1e-5, atol=1e-5)


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        opt = blind.predict_gradients(warmup_steps=2, full_steps=1, predict_steps=3)
        state, update = opt.init(np.zeros(2)), jax.jit(opt.update)
        for step in range(6):
            gradient = np.array([1.0, 1e-12]) + np.array([0.0, 1.0]) * step
            emitted, state = update(gradient if step < 3 else np.zeros_like(gradient), state)
            assert emitted.dtype == jnp.float64
            np.testing.assert_allclose(emitted, gradient, rtol=1e-6)
        assert state.machine.phase.dtype == jnp.int32
