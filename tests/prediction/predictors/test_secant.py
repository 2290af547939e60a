"""Secants: the twin in float64, exactness on quadratics, the ridge that errors choose, edges of numbers and trees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import vsa_optax
from vsa_optax import Cycle, Phase, Secants
from vsa_optax.prediction.fits import secant_fit

SIZE = 13
CYCLE = dict(phases=Cycle(warmup_steps=6, full_steps=2, predict_steps=3, correct_every=9))


def tree_of(flat):
    flat = np.asarray(flat, np.float32)
    return {"w": flat[:12].reshape(4, 3), "b": flat[12], "empty": np.zeros((0, 2), np.float32)}


def flat_of(tree):
    return np.concatenate([np.ravel(tree["w"]), np.ravel(tree["b"])]).astype(np.float64)


@functools.cache
def in_a_cycle(window=16, dtype="float16"):
    """A transformation and its update, compiled."""
    opt = vsa_optax.predict_gradients(predictor=Secants(window, dtype=dtype), **CYCLE)
    return opt, jax.jit(opt.update)


def curved(seed):
    """A function of the parameters that is all but linear, and its noise."""
    rng = np.random.default_rng(seed)
    half = rng.normal(size=(SIZE, SIZE))
    hessian, third = half @ half.T / SIZE, 0.03 * rng.normal(size=(SIZE, SIZE))
    return lambda x: hessian @ x + (third @ x) ** 2


@pytest.mark.parametrize(
    ("noise", "dtype", "tolerance"),
    [(0.0, None, 2e-3), (0.3, None, 2e-3), (0.0, "float16", 6e-3), (0.3, "float16", 6e-3)],
)
def test_predictions_equal_the_twin_over_a_hundred_steps(noise, dtype, tolerance):
    opt, update = in_a_cycle(5, dtype)
    twin = reference.SecantPredictor(window=5, ridges=secant_fit.RIDGES, forget=0.9)
    gradient_at, rng = curved(1), np.random.default_rng(2)
    x = rng.normal(size=SIZE).astype(np.float32)
    state, predicted, ridges = opt.init(tree_of(x)), 0, set()
    for _ in range(100):
        phase = Phase(int(state.machine.phase))
        gradient = (gradient_at(x) + noise * rng.normal(size=SIZE)).astype(np.float32)
        emitted, state = update(tree_of(gradient), state, tree_of(x))
        if phase == Phase.PREDICT:
            predicted += 1
            expected = twin.predict(x)
            assert np.linalg.norm(flat_of(emitted) - expected) < tolerance * np.linalg.norm(expected)
        else:
            np.testing.assert_array_equal(flat_of(emitted), gradient)
            twin.record(x, gradient)
        ridges.add(int(secant_fit.best(state.machine.calibration.scores)))
        # A walk that turns, so that the changes span more than a line.
        x = (x - 0.2 * flat_of(emitted) + 0.1 * rng.normal(size=SIZE)).astype(np.float32)
    assert predicted > 40
    np.testing.assert_allclose(state.machine.calibration.scores.of_ridges, twin.scores, rtol=2e-2, atol=1e-5)
    quality = vsa_optax.phase_stats(state).quality
    assert quality.ridge == np.float32(secant_fit.RIDGES[twin.best])
    if noise:
        assert quality.ridge >= 0.01
    else:
        assert quality.ridge <= 1e-2
    assert quality.r_squared[1] == pytest.approx(0.0, abs=1e-6)  # the empty leaf's


def test_a_quadratic_is_known_where_the_parameters_have_been():
    """Of four dimensions, after four steps and more, the gradient anywhere."""
    hessian = np.diag(np.float32([1, 2, 5, 10]))
    opt = vsa_optax.predict_gradients(phases=Cycle(warmup_steps=8, full_steps=1, predict_steps=50))
    update, rng = jax.jit(opt.update), np.random.default_rng(0)
    x = np.ones(4, np.float32)
    state = opt.init(x)
    for _ in range(50):
        emitted, state = update(hessian @ x, state, x)
        np.testing.assert_allclose(emitted, hessian @ x, atol=0.03)
        x = rng.normal(size=4).astype(np.float32)
    assert vsa_optax.phase_stats(state).predict_steps > 30


def test_training_on_a_quadratic_takes_the_same_way_with_few_gradients():
    curvature = jnp.logspace(-2, 0, 6)

    def loss(x):
        return 0.5 * jnp.sum(curvature * x**2)

    plain, ours = optax.sgd(1.0, momentum=0.9), vsa_optax.phase_switched(optax.sgd(1.0, momentum=0.9))

    def path(opt, steps=120):
        opt = optax.with_extra_args_support(opt)

        def step(carry, _):
            x, state = carry
            updates, state = opt.update(jax.grad(loss)(x), state, x)
            return (optax.apply_updates(x, updates), state), x

        start = jnp.ones(6)
        return jax.jit(lambda: jax.lax.scan(step, (start, opt.init(start)), None, length=steps))()

    (_, state), ours_path = path(ours)
    _, plain_path = path(plain)
    np.testing.assert_allclose(ours_path, plain_path, atol=5e-3)
    assert vsa_optax.phase_stats(state).predict_steps > 60


def test_where_nothing_helps_the_newest_gradient_predicts():
    rng = np.random.default_rng(3)
    opt, update = in_a_cycle()
    x = np.zeros(40, np.float32)
    state = opt.init(x)
    for _ in range(60):
        was = state
        gradient = np.float32(1.0 + 0.2 * rng.normal(size=40))
        emitted, state = update(gradient, state, x)
        if was.machine.phase == Phase.PREDICT and vsa_optax.phase_stats(was).total_steps > 40:
            np.testing.assert_array_equal(emitted, was.history.gradient)
        x = x + np.float32(rng.normal(size=40))
    assert vsa_optax.phase_stats(state).quality.ridge == np.inf


def test_the_products_kept_are_those_of_the_changes():
    (opt, update), rng = in_a_cycle(5, None), np.random.default_rng(4)
    x = tree_of(np.zeros(SIZE))
    state = opt.init(x)
    for _ in range(17):
        _, state = update(tree_of(rng.normal(size=SIZE)), state, x)
        x = tree_of(rng.normal(size=SIZE))
    moves = np.concatenate([np.asarray(m).reshape(5, -1) for m in jax.tree.leaves(state.history.diff_params)], axis=1)
    np.testing.assert_allclose(state.history.gram, moves @ moves.T, rtol=1e-4, atol=1e-4)
    for leaf, changes in enumerate(jax.tree.leaves(state.history.diff_gradients)):
        flat = np.asarray(changes).reshape(5, -1)
        np.testing.assert_allclose(state.machine.calibration.gram[leaf], flat @ flat.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("of_w", "of_b"), [(1.0, 1.0), (1e-14, 1e14), (1e12, 1e-12)])
def test_in_float16_changes_of_any_size_keep_eleven_bits(of_w, of_b):
    """Each leaf has its own power of two; predictions and inner products are in the true units."""
    (opt, update), rng = in_a_cycle(5), np.random.default_rng(7)
    factors = {"w": np.float32(of_w), "b": np.float32(of_b), "empty": np.float32(1)}

    def scaled(flat):
        return jax.tree.map(lambda x, factor: np.asarray(x * factor, np.float32), tree_of(flat), factors)

    points, gradients, state = [], [], opt.init(scaled(np.zeros(SIZE)))
    for _ in range(9):
        assert state.machine.phase != Phase.PREDICT or len(points) >= 6
        x, gradient = scaled(rng.normal(size=SIZE)), scaled(rng.normal(size=SIZE))
        if state.machine.phase != Phase.PREDICT:
            points.append(x)
            gradients.append(gradient)
        _, state = update(gradient, state, x)
    num = len(points) - 1
    for which, (stored, records) in enumerate(
        ((state.history.diff_params, points), (state.history.diff_gradients, gradients))
    ):
        for leaf, name in ((0, "b"), (2, "w")):
            assert stored[name].dtype == jnp.float16
            scales = np.asarray(state.history.scales[which][leaf])
            assert set(np.frexp(scales)[0].tolist()) == {0.5}
            for number in range(max(0, num - 5), num):
                change = records[number + 1][name] - records[number][name]
                found = np.asarray(stored[name][(number + 1) % 5], np.float32) * scales[(number + 1) % 5]
                assert np.abs(found - change).max() <= 2**-11 * np.abs(change).max()


def test_a_state_in_float16_is_not_taken_for_one_in_another_dtype():
    (opt, _), (other, _) = in_a_cycle(5), in_a_cycle(5, None)
    x = tree_of(np.ones(SIZE))
    with pytest.raises(ValueError, match="dtype is float16, here None"):
        other.update(x, opt.init(x), x)
    with pytest.raises(ValueError, match="dtype is another, here float16"):
        opt.update(x, other.init(x), x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "complex64"])
def test_dtypes_pass_through(dtype):
    params = {"a": jnp.ones((3, 2), dtype), "b": jnp.ones([], jnp.float32)}
    opt = vsa_optax.predict_gradients(predictor=Secants(dtype=None if dtype == "complex64" else "bfloat16"), **CYCLE)
    state = opt.init(params)
    kinds = jax.tree.map(lambda x: (x.dtype, x.weak_type), state)
    hessian = np.float32(0.3)

    @jax.jit
    def step(params, state):
        gradients = jax.tree.map(lambda x: (hessian * x).astype(x.dtype), params)
        emitted, state = opt.update(gradients, state, params)
        return emitted, state, jax.tree.map(lambda p, u: (p - 0.5 * u).astype(p.dtype), params, emitted)

    for _ in range(40):
        emitted, state, moved = step(params, state)
        assert emitted["a"].dtype == jnp.dtype(dtype)
        expected = hessian * np.asarray(params["a"]).astype(np.complex64)
        np.testing.assert_allclose(np.asarray(emitted["a"]).astype(np.complex64), expected, rtol=0.05, atol=1e-4)
        params = moved
    assert jax.tree.map(lambda x: (x.dtype, x.weak_type), state) == kinds
    assert vsa_optax.phase_stats(state).predict_steps > 15


@pytest.mark.parametrize("magnitude", [1e-30, 1e-18, 1e15, 1e30])
def test_far_from_one_it_falls_back_on_the_newest_gradient_and_stays_finite(magnitude):
    rng = np.random.default_rng(5)
    (opt, update), x = in_a_cycle(), np.zeros(40, np.float32)
    state = opt.init(x)
    for _ in range(30):
        emitted, state = update(np.float32(magnitude * rng.normal(size=40)), state, x)
        assert np.isfinite(emitted).all()
        x = np.float32(magnitude * rng.normal(size=40))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_bad_gradient_leaves_no_trace():
    opt = vsa_optax.phase_switched(optax.adam(0.1), **CYCLE)
    update, rng = jax.jit(opt.update), np.random.default_rng(6)
    x = tree_of(rng.normal(size=SIZE))
    state = opt.init(x)
    for _ in range(20):
        gradient = rng.normal(size=SIZE)
        if bool(vsa_optax.needs_backward(state)):
            emitted, after = update(tree_of(np.where(np.arange(SIZE) == 3, np.nan, gradient)), state, x)
            assert not flat_of(emitted).any()
            for left, right in (
                (after.history, state.history),
                (after.inner_state, state.inner_state),
                (after.machine.calibration, state.machine.calibration),
            ):
                jax.tree.map(np.testing.assert_array_equal, left, right)
        updates, state = update(tree_of(gradient), state, x)
        x = optax.apply_updates(x, updates)


def test_the_state_costs_what_is_documented():
    params = {"a": jnp.zeros(1000), "b": jnp.zeros([70, 3])}
    size = 4 * 1210
    for window, dtype, trees in ((16, None, 34), (3, None, 8), (4, "bfloat16", 6), (16, "float16", 18)):
        state = vsa_optax.predict_gradients(predictor=Secants(window, dtype=dtype)).init(params)
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        per_leaf = 4 * (window**2 + 1) + (8 * window if dtype == "float16" else 0)
        besides = 4 * window**2
        assert 0 < total - trees * size - 2 * per_leaf - besides < 150
        assert state.residual is None


def test_large_leaves_are_kept_in_float16_unless_a_dtype_is_given():
    shapes = {"large": (512, 512), "small": (511, 513), "wide": (2**18,)}
    dtypes = {"large": "bfloat16", "small": "float32", "wide": "complex64"}
    params = {name: jnp.zeros(shape, dtypes[name]) for name, shape in shapes.items()}
    kept = vsa_optax.predict_gradients().init(params).history
    assert {name: str(x.dtype) for name, x in kept.diff_params.items()} == dtypes | {"large": "float16"}
    assert {name: str(x.dtype) for name, x in kept.gradient.items()} == dtypes
    kept = vsa_optax.predict_gradients(predictor=Secants(dtype="float32")).init(params).history
    assert kept.diff_gradients["large"].dtype == jnp.float32
    assert kept.scales is None
    params = {"w": jnp.zeros([512, 512])}
    state = vsa_optax.predict_gradients().init(params)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) < 18.1 * 4 * 2**18


def test_the_rounding_of_a_large_leaf_does_not_show():
    """On a quadratic whose curvatures span a factor of a thousand, with a small leaf beside the large one."""
    rng = np.random.default_rng(8)
    shapes = {"large": (2**16,), "small": (300,)}
    start = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    curvature = {name: jnp.asarray(10 ** rng.uniform(-3, 0, shape), jnp.float32) for name, shape in shapes.items()}

    def run(dtype):
        opt = vsa_optax.phase_switched(optax.adam(0.02), predictor=Secants(dtype=dtype))

        def step(carry, _):
            params, state = carry
            gradients = jax.tree.map(jnp.multiply, curvature, params)
            gradients = jax.tree.map(lambda g: jnp.where(vsa_optax.needs_backward(state), g, 0), gradients)
            updates, state = opt.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = jax.lax.scan(step, (start, opt.init(start)), length=100)[0]
        return carry[0], vsa_optax.phase_stats(carry[1]).predict_steps

    (exact, exact_steps), (rounded, rounded_steps) = jax.jit(lambda: (run("float32"), run("float16")))()
    assert exact_steps > 50
    assert abs(int(rounded_steps) - int(exact_steps)) <= 8
    for name, leaf in exact.items():
        losses = [float(jnp.sum(curvature[name] * x**2)) for x in (rounded[name], leaf)]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_parameters_are_asked_for():
    opt = vsa_optax.predict_gradients()
    state = opt.init(jnp.ones(3))
    with pytest.raises(ValueError, match=r"params must be given with predictor=Secants\(\), the default"):
        opt.update(jnp.ones(3), state)
    with pytest.raises(ValueError, match="params: "):
        opt.update(jnp.ones(3), state, jnp.ones(4))
    jax.jit(opt.update)({}, opt.init({}), {})
