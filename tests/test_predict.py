import blind
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import vsa_optax
from vsa_optax.transforms import queries
from vsa_optax.transforms.phases import Phase

SHAPES = {"b": (), "w": (3, 4), "empty": (0, 3), "deep": (1, 2, 1, 2, 1)}
SIZES = [int(np.prod(SHAPES[k])) for k in sorted(SHAPES)]
SHORT = dict(warmup_steps=3, full_steps=2, predict_steps=4, correct_every=2)


def tree_of(flat):
    pieces = np.split(np.asarray(flat, np.float32), np.cumsum(SIZES)[:-1])
    return {k: jnp.asarray(p.reshape(SHAPES[k])) for k, p in zip(sorted(SHAPES), pieces, strict=True)}


def flat_of(tree):
    return np.concatenate([np.ravel(np.asarray(tree[k])) for k in sorted(SHAPES)])


PARAMS = tree_of(np.zeros(sum(SIZES)))


def relative(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def gradient_stream(steps, seed=0, skip_rate=0.0):
    """A drifting, noisy gradient; where ``skip_rate`` says so, not finite, which varies the spacing of the records."""
    rng = np.random.default_rng(seed)
    d = sum(SIZES)
    drift = rng.normal(size=d) + 0.05 * np.arange(steps)[:, None] * rng.normal(size=d)
    stream = (drift + 0.1 * rng.normal(size=(steps, d))).astype(np.float32)
    stream[rng.random(steps) < skip_rate, 0] = np.nan
    return stream


@pytest.mark.parametrize("history", ["window", "recursive"])
@pytest.mark.parametrize("has_residual", [True, False])
@pytest.mark.parametrize("skip_rate", [0.0, 0.3])
def test_predictions_equal_the_twin_over_a_hundred_steps(history, has_residual, skip_rate):
    opt = blind.predict_gradients(
        history=history,
        residual=has_residual,
        history_window=5,
        history_decay=0.9,
        residual_decay=0.8,
        **SHORT,
    )
    window = 5 if history == "window" else None
    twin = reference.Predictor(window=window, decay=0.9, residual_decay=0.8, has_residual=has_residual)
    update = jax.jit(opt.update)
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


@pytest.mark.parametrize("history", ["window", "recursive"])
def test_exact_on_gradients_that_move_on_a_line(history):
    opt = blind.predict_gradients(history=history, **SHORT)
    start, slope = gradient_stream(2, seed=3)
    state = opt.init(PARAMS)
    update = jax.jit(opt.update)
    for step in range(60):
        is_true = bool(vsa_optax.needs_backward(state))
        gradient = start + slope * step
        emitted, state = update(tree_of(gradient if is_true else np.full_like(gradient, np.nan)), state)
        assert relative(flat_of(emitted), gradient) < 1e-5
    assert vsa_optax.phase_stats(state).mean_prediction_error < 1e-5
    assert vsa_optax.phase_stats(state).nonfinite_count == 0  # what enters in PREDICT is not looked at


@pytest.mark.parametrize("history", ["window", "recursive"])
@pytest.mark.parametrize("predict_in", ["update", "gradient"])
def test_bad_gradients_leave_no_trace(history, predict_in):
    """With bad steps in between, optimizer, history and residual hold what they hold without them."""
    opt = blind.phase_switched(optax.adam(0.1), history=history, predict_in=predict_in, **SHORT)
    update = jax.jit(opt.update)
    state = opt.init(PARAMS)
    for step, gradient in enumerate(gradient_stream(40)):
        if bool(vsa_optax.needs_backward(state)):
            for bad in (np.nan, np.inf):
                broken = dict(tree_of(gradient), b=jnp.float32(bad))
                emitted, after = update(broken, state, PARAMS)
                assert not flat_of(emitted).any()
                for name in ("history", "residual", "inner_state"):
                    jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
                assert after.machine.nonfinite_count == state.machine.nonfinite_count + 1
                assert vsa_optax.phase_stats(after).total_steps == step + 1
        _, state = update(tree_of(gradient), state, PARAMS)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_an_optimizers_own_nan_is_not_emitted_or_recorded():
    broken = optax.stateless(lambda updates, params: jax.tree.map(lambda u: u / 0.0 * 0.0, updates))
    opt = blind.phase_switched(broken, **SHORT)
    emitted, state = opt.update(tree_of(np.ones(sum(SIZES))), opt.init(PARAMS))
    assert not flat_of(emitted).any()
    assert state.machine.nonfinite_count == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_without_predictions_a_bad_gradient_is_counted_and_opts_own_affair():
    opt = blind.phase_switched(optax.apply_if_finite(optax.adam(0.1), 2), predict_steps=0)
    emitted, state = opt.update(tree_of(np.full(sum(SIZES), np.nan)), opt.init(PARAMS), PARAMS)
    assert not flat_of(emitted).any()
    assert state.machine.nonfinite_count == 1


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("history", ["window", "recursive"])
def test_predictions_beyond_the_dtype_saturate(dtype, history):
    top = float(jnp.finfo(dtype).max)
    opt = blind.predict_gradients(history=history, warmup_steps=4, full_steps=1, predict_steps=9, correct_every=3)
    state = opt.init(jnp.zeros(2, dtype))
    for step in range(14):
        gradient = jnp.asarray([(-1.0) ** step * top, top * step / 14], dtype)
        emitted, state = opt.update(gradient, state)
        assert emitted.dtype == dtype
        assert np.isfinite(emitted.astype(jnp.float32)).all()
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(state))


def quadratic(params):
    return jnp.sum((params["w"] - 3.0) ** 2) + 0.5 * jnp.sum((params["b"] + 1.0) ** 4)


def train(opt, steps, *, by_scan=False, loss=quadratic):
    def step(carry, _):
        params, state = carry
        if queries.contains_machine(state):
            value, grads = vsa_optax.value_and_grad_by_phase(loss)(params, state=state)
            updates, state = opt.update(grads, state, params, value=value)
        else:
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = opt.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    params = {"w": jnp.linspace(-1, 1, 50).reshape(5, 10), "b": jnp.linspace(0, 2, 7)}
    carry = params, opt.init(params)
    if by_scan:
        (params, state), updates = jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps))(carry)
        return params, state, updates
    compiled, history = jax.jit(step), []
    for _ in range(steps):
        carry, updates = compiled(carry, None)
        history.append(updates)
    return *carry, jax.tree.map(lambda *x: jnp.stack(x), *history)


OPTIMIZERS = {
    "sgd": lambda rate: optax.sgd(rate),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "lion": optax.lion,
    "rmsprop": optax.rmsprop,
    "nadamw": optax.nadamw,
    "adafactor": optax.adafactor,
    "clipped": lambda rate: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate)),
}


@pytest.mark.parametrize("predict_in", ["update", "gradient"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("by_scan", [False, True], ids=["jit", "scan"])
def test_without_predictions_the_bits_are_plain_optax(name, predict_in, by_scan):
    rate = optax.cosine_decay_schedule(0.05, 30)
    plain, _, _ = train(OPTIMIZERS[name](rate), 30, by_scan=by_scan)
    opt = blind.phase_switched(OPTIMIZERS[name](rate), predict_steps=0, predict_in=predict_in)
    ours, state, _ = train(opt, 30, by_scan=by_scan)
    jax.tree.map(np.testing.assert_array_equal, ours, plain)
    assert state.history is None
    assert state.residual is None
    assert state.machine.errors is None


@pytest.mark.parametrize("predict_in", ["update", "gradient"])
def test_learning_rate_without_predictions_equals_plain_optax(predict_in):
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.05, 5, 40)
    plain, _, _ = train(optax.adamw(rate), 40)
    opt = blind.phase_switched(optax.adamw(1.0), learning_rate=rate, predict_steps=0, predict_in=predict_in)
    ours, _, _ = train(opt, 40)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, plain)


@pytest.mark.parametrize("predict_in", ["update", "gradient"])
def test_the_rate_of_step_t_applies_in_every_phase(predict_in):
    """With unit directions, what is emitted is the schedule, read at the number of the step."""
    sign = optax.stateless(lambda updates, params: jax.tree.map(lambda u: -jnp.sign(u), updates))
    schedule = optax.cosine_decay_schedule(0.3, 60)
    opt = blind.phase_switched(sign, learning_rate=schedule, predict_in=predict_in, **SHORT)
    state, params = opt.init(jnp.zeros(3)), jnp.zeros(3)
    update = jax.jit(opt.update)
    for step in range(60):
        emitted, state = update(jnp.ones(3), state, params)
        np.testing.assert_allclose(emitted, -schedule(step) * np.ones(3), rtol=1e-5, atol=1e-7)
    assert vsa_optax.phase_stats(state).predict_steps > 20


def test_inner_state_rests_in_predict_in_the_update_domain_only():
    for predict_in, moves in (("update", False), ("gradient", True)):
        opt = blind.phase_switched(optax.adam(0.1), predict_in=predict_in, **SHORT)
        _, state, _ = train(opt, 40)
        counted = int(optax.tree.get(state.inner_state, "count"))
        stats = vsa_optax.phase_stats(state)
        assert counted == stats.total_steps if moves else counted == stats.total_steps - stats.predict_steps


def test_predict_gradients_in_a_chain_is_the_gradient_domain():
    chained, _, _ = train(optax.chain(blind.predict_gradients(**SHORT), optax.adam(0.1)), 40)
    wrapped, _, _ = train(blind.phase_switched(optax.adam(0.1), predict_in="gradient", **SHORT), 40)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), chained, wrapped)


@pytest.mark.parametrize("history", ["window", "recursive"])
@pytest.mark.parametrize("predict_in", ["update", "gradient"])
def test_same_bits_twice_and_in_scan(history, predict_in):
    opt = blind.phase_switched(
        optax.adamw(1.0), learning_rate=0.05, history=history, predict_in=predict_in, adaptive=True, **SHORT
    )
    once, twice, scanned = train(opt, 60), train(opt, 60), train(opt, 60, by_scan=True)
    jax.tree.map(np.testing.assert_array_equal, once, twice)
    jax.tree.map(np.testing.assert_array_equal, once, scanned)


def test_history_dtype_and_half_precision_parameters():
    params = {"w": jnp.ones((4, 3), jnp.bfloat16), "b": jnp.ones(2)}
    opt = blind.phase_switched(optax.adamw(1.0), learning_rate=1e-2, **SHORT)
    state = opt.init(params)
    assert state.history.records["w"].dtype == state.residual["w"].dtype == jnp.bfloat16
    narrow = blind.phase_switched(optax.adamw(1.0), history_dtype="bfloat16", **SHORT).init(params)
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
    state = opt.init(jnp.zeros(2, jnp.complex64))
    for step in range(6):
        gradient = jnp.array([1.0 + 2.0j, -1.0j]) * step
        emitted, state = opt.update(gradient if step < 3 else jnp.zeros_like(gradient), state)
        np.testing.assert_allclose(emitted, gradient, rtol=1e-5, atol=1e-5)


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        opt = blind.predict_gradients(warmup_steps=2, full_steps=1, predict_steps=3)
        state = opt.init(jnp.zeros(2, jnp.float64))
        for step in range(6):
            gradient = jnp.array([1.0, 1e-12], jnp.float64) + jnp.array([0.0, 1.0], jnp.float64) * step
            emitted, state = opt.update(gradient if step < 3 else jnp.zeros_like(gradient), state)
            assert emitted.dtype == jnp.float64
            np.testing.assert_allclose(emitted, gradient, rtol=1e-6)
        assert state.machine.phase.dtype == jnp.int32


@pytest.mark.parametrize("params", [{}, [], {"a": jnp.zeros((0, 2))}, jnp.float32(2.0), {"phase": jnp.ones(3)}])
def test_trees_with_nothing_much_in_them(params):
    for opt in (blind.predict_gradients(**SHORT), blind.phase_switched(optax.adam(0.1), **SHORT)):
        state = opt.init(params)
        update = jax.jit(opt.update)
        for _ in range(12):
            emitted, state = update(params, state, params)
            assert jax.tree.structure(emitted) == jax.tree.structure(params)
        assert vsa_optax.phase_stats(state).predict_steps > 0
