"""Leaps: the twin in float64, quadratics and saddles, what is rejected, noise, broken evaluations; and mechanics."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.sharding import PartitionSpec as P

import vsa_optax
from vsa_optax import checkpoint
from vsa_optax.kernels import secants
from vsa_optax.prediction import leap
from vsa_optax.prediction.fits import multisecant_fit

SIZE, RATE = 6, 0.05
CURVATURES = np.geomspace(1, 100, SIZE)
START = np.array([-1.2, 1.0, 0.5, -0.5, 1.5, -1.0])

# Runs are other runs with other ones.
CONSTANTS = """
NUM_LOSSES = 8
LEAST_DAMPING = 1e-06
FIRST_DAMPING = 1.0
MOST_DAMPING = 100.0
LESS = 0.5
MORE = 1.5
MUCH_MORE = 4.0
WORST_ERROR = 1.0
WORST_IF_IT_ROSE = 0.3
METRIC_DECAY = 0.98
CURVATURE_SHARE = 0.3
CURVATURE_DECAY = 0.5
LEAST_OUTSIDE = 1e-06
MOST_LOGARITHM = 80.0
MOST_REST = 64
"""


def test_the_constants_are_those_that_were_tried():
    """All that this module has; every other test takes them from there."""
    numbers = {name: value for name, value in vars(leap).items() if name.isupper() and np.isscalar(value)}
    assert [f"{name} = {value!r}" for name, value in numbers.items()] == CONSTANTS.strip().splitlines()
    assert secants.EPSILON == 1e-8


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
        weights = leap.METRIC_DECAY ** np.arange(len(squares))[::-1]
        wanted = np.sqrt(weights @ np.array(squares) / np.sum(weights))
        np.testing.assert_allclose(flat_of(run.state.gradient_rms), wanted, rtol=1e-5)


def test_fifty_updates_are_those_of_the_twin():
    """Rejections and evaluations that are not finite among them, the first one too."""
    with jax.enable_x64(True):
        opt = vsa_optax.multisecant(optax.adam(RATE), history_window=5, history_dtype=None)
        twin = reference.Multisecant(adam(RATE), SIZE, window=5, of=leap, fit=multisecant_fit)
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
        assert accepted.count(False) >= 7
        assert twin.loss < 1
        stats = vsa_optax.multisecant_stats(state)
        assert (stats.evaluations, stats.accepted, stats.nonfinite_count) == (50, accepted.count(True), 4)
        assert stats.dimension == 5


def test_in_noise_its_rests_are_those_of_the_twin():
    """Ever longer ones; the loss that has none in the end is foreseen again at the first look."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        opt = vsa_optax.multisecant(optax.adam(RATE), history_window=5, history_dtype=None)
        twin = reference.Multisecant(adam(RATE), SIZE, window=5, of=leap, fit=multisecant_fit)
        params = tree_of(START, np.float64)
        state, update, rests = opt.init(params), jax.jit(opt.update), []
        for count in range(240):
            value, gradient = quadratic(flat_of(params))
            if count < 150:
                value, gradient = value + rng.normal(), gradient + 300 * rng.normal(size=SIZE)
            if count == 140:
                gradient[2] = np.nan
            updates, state = update(tree_of(gradient, np.float64), state, params, value=np.float64(value))
            wanted = twin.update(flat_of(params), gradient, value)
            np.testing.assert_allclose(flat_of(updates), wanted, rtol=1e-7, atol=1e-9)
            np.testing.assert_allclose([state.damping, state.prediction_error], [twin.damping, twin.error])
            assert (state.rest, state.rest_length) == (twin.rest, twin.rest_length)
            assert state.rest == 0 or state.leap.dimension == 0
            rests.append((int(state.rest), float(state.damping)))
            params = optax.apply_updates(params, updates)
    lengths = [now for (before, _), (now, _) in itertools.pairwise(rests) if now > before]
    assert lengths[-1] == leap.MOST_REST
    assert rests[-1][0] == 0
    assert rests[-1][1] < leap.FIRST_DAMPING


def test_a_quadratic_of_few_dimensions_is_solved_in_few_evaluations():
    """At most two a dimension."""
    run = Run().steps(quadratic, 2 * SIZE + 1)
    assert min(run.values) < 1e-8 * run.values[0]
    state, params = plain()[0].init(tree_of(START)), tree_of(START)
    for _ in run.values:
        updates, state = plain()[1](tree_of(quadratic(flat_of(params))[1]), state, params)
        params = optax.apply_updates(params, updates)
    assert quadratic(flat_of(params))[0] > 0.3 * run.values[0]


def test_a_saddle_is_left_downhill():
    """Newton's step would lead to it."""
    curvatures = np.array([4.0, 2.0, 1.0, -1.0, 3.0, 2.0])

    def saddle(x):
        return 0.5 * np.sum(curvatures * x**2) + 0.025 * np.sum(x**4), curvatures * x + 0.1 * x**3

    run = Run([1.0, 1.0, 1.0, 1e-3, 1.0, 1.0]).steps(saddle, 40)
    assert abs(run.best[3]) > 3
    assert run.state.loss == pytest.approx(-2.5, abs=0.05)


def test_a_rejected_point_is_gone_back_from():
    """To the accepted parameters, of which no bit changed; and its secant is kept."""
    run = Run().steps(rosenbrock, 12)
    before, given, secants = run.state, run.params, int(run.state.num_secants)
    updates = run.step(rosenbrock, value=1e6)
    after = run.state
    for name in ("params", "gradient", "losses", "loss", "num_accepted"):
        assert_same(getattr(after, name), getattr(before, name))
    slot = secants % 8
    moved = jax.tree.map(np.subtract, given, before.params)
    for ring, move in zip(jax.tree.leaves(after.diff_params), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(ring[slot], move)
    assert after.damping == pytest.approx(float(before.damping) * leap.MUCH_MORE)
    # The update leads back to the accepted point and on: at the damping's bound by the optimizer's own step.
    state = before._replace(damping=jnp.float32(0.9 * leap.MOST_DAMPING))
    value, gradient = 1e6, rosenbrock(flat_of(given))[1]
    updates, after = wrapped()[1](tree_of(gradient), state, given, value=np.float32(value))
    assert after.damping == leap.MOST_DAMPING
    own, _ = plain()[1](before.gradient, before.inner_state, before.params)
    expected = flat_of(before.params) + flat_of(own)
    np.testing.assert_allclose(flat_of(optax.apply_updates(given, updates)), expected, rtol=1e-6, atol=1e-6)


def test_it_is_compared_with_the_largest_of_the_last_accepted_losses():
    run = Run().steps(rosenbrock, 20)
    run.state = run.state._replace(losses=jnp.arange(1.0, 9.0), damping=jnp.float32(0.1))
    assert run.state.losses.shape == (leap.NUM_LOSSES,)
    before = run.state
    for value, is_accepted in ((8.0, True), (np.nextafter(np.float32(8), np.float32(9)), False)):
        run.state = before
        run.step(rosenbrock, value=value)
        assert (run.state.num_accepted > before.num_accepted) == is_accepted
    # The oldest is forgotten first.
    run.state, slot = before, int(before.num_accepted) % leap.NUM_LOSSES
    run.step(rosenbrock, value=0.5)
    np.testing.assert_array_equal(run.state.losses, before.losses.at[slot].set(0.5))


def test_damping_falls_where_the_gradient_is_as_predicted_and_rises_where_it_is_not_and_the_loss_rises():
    run = Run().steps(quadratic, 5)
    before, given, loss = run.state, run.params, float(run.state.loss)
    right = quadratic(flat_of(given))[1]
    wrong = right + 10 * np.linalg.norm(flat_of(before.gradient))
    # Squared, less than all of what it was before, but more than a third.
    nearly = right + 0.7 * flat_of(before.gradient)
    below, above = 0.9 * loss, 1.1 * loss
    for value, gradient, factor in (
        (below, right, leap.LESS),
        (above, right, leap.LESS),
        (below, nearly, leap.LESS),
        (above, nearly, leap.MORE),
        (below, wrong, 1),
        (above, wrong, leap.MORE),
    ):
        run.state, run.params = before._replace(losses=before.losses.at[:].set(2 * loss)), given
        run.step(quadratic, value=value, gradient=gradient)
        assert run.state.damping == pytest.approx(factor * float(before.damping))
        assert run.state.num_accepted == before.num_accepted + 1


def test_damping_stays_within_its_bounds():
    run = Run().steps(quadratic, 5)
    for damping, value in ((leap.LEAST_DAMPING, 0.0), (leap.MOST_DAMPING, np.inf)):
        run.state = run.state._replace(damping=jnp.float32(damping))
        run.step(quadratic, value=value)
        assert run.state.damping == np.float32(damping)


def test_a_coordinate_without_a_gradient_stays_where_it_is():
    """Its root mean square is zero."""
    run = Run()
    for _ in range(10):
        run.step(rosenbrock, gradient=rosenbrock(flat_of(run.params))[1] * (np.arange(SIZE) != 3))
        assert flat_of(run.params)[3] == START[3]
        state = run.state._replace(losses=None)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_the_optimizer_is_given_what_was_accepted():
    """It also receives its loss; and its step without a gradient is not emitted."""

    def update(updates, state, params=None, *, value, **extra):
        del state
        return jax.tree.map(jnp.ones_like, updates), (value, updates, params, extra["other"])

    given = optax.GradientTransformationExtraArgs(
        lambda params: (jnp.float32(0), params, params, jnp.float32(0)), update
    )
    opt = vsa_optax.multisecant(given, history_window=1)
    step, x = jax.jit(opt.update), np.float32(3)
    state = opt.init(x)
    updates, state = step(np.float32(np.nan), state, x, value=np.float32(5), other=np.float32(7))
    assert (updates, *state.inner_state) == (0, 0, x, x, 0)
    updates, state = step(np.float32(2), state, x, value=np.float32(5), other=np.float32(7))
    assert (updates, *state.inner_state) == (1, 5, 2, 3, 7)
    _, state = step(np.float32(1), state, x + 1, value=np.float32(np.inf), other=np.float32(8))
    assert state.inner_state == (5, 2, 3, 8)


def test_gradients_beyond_the_range_of_the_parameters_are_taken_at_their_largest():
    opt = vsa_optax.multisecant(optax.sgd(1e-6), history_window=1)
    step, x = jax.jit(opt.update), np.float16(3)
    state = opt.init(x)
    for _ in range(2):
        _, state = step(np.float32(1e6), state, x, value=np.float32(5))
    assert state.gradient == np.finfo(np.float16).max


def test_at_the_bound_of_damping_it_is_the_optimizer():
    """Whatever the loss, bit for bit."""
    (opt, update), rng = plain(), np.random.default_rng(0)
    run, params = Run(), tree_of(START)
    run.state, state = run.state._replace(damping=jnp.float32(leap.MOST_DAMPING)), opt.init(params)
    for count in range(30):
        # Nothing that could be foreseen: damping would fall.
        gradient = tree_of(rosenbrock(flat_of(params))[1] + 300 * rng.normal(size=SIZE))
        updates, state = update(gradient, state, params)
        assert_same(run.step(rosenbrock, gradient=flat_of(gradient), value=float(count)), updates)
        params = optax.apply_updates(params, updates)
    assert_same(run.state.inner_state, state)
    assert (run.stats.rejected, run.stats.damping) == (0, leap.MOST_DAMPING)


def test_with_noise_it_becomes_the_optimizer():
    rng, opt = np.random.default_rng(0), plain()[0]
    run, params, state, dampings = Run(), tree_of(START), opt.init(tree_of(START)), []
    for _ in range(200):
        noise = 3 * np.sqrt(CURVATURES) * rng.normal(size=SIZE)

        def noisy(x, noise=noise):
            value, gradient = quadratic(x)
            return value + noise @ x, gradient + noise

        dampings.append(float(run.state.damping))
        accepted = run.stats.accepted
        run.step(noisy)
        assert dampings[-1] < leap.MOST_DAMPING or run.stats.accepted == accepted + 1
        updates, state = plain()[1](tree_of(noisy(flat_of(params))[1]), state, params)
        params = optax.apply_updates(params, updates)
    assert np.mean(np.array(dampings[50:]) == leap.MOST_DAMPING) > 0.9
    assert run.stats.accepted > 190
    assert quadratic(run.best)[0] < 1.5 * quadratic(flat_of(params))[0] + 1


@pytest.mark.parametrize("every", [3, 5])
def test_gradients_and_losses_of_another_function_make_it_no_worse_than_the_optimizer(every):
    def other(x):
        return 5 * np.sum((x + 3) ** 2) - 50, 10 * (x + 3)

    run, params, state = Run(), tree_of(START), plain()[0].init(tree_of(START))
    for count in range(150):
        fun = other if count % every == every - 1 else rosenbrock
        run.step(fun)
        updates, state = plain()[1](tree_of(fun(flat_of(params))[1]), state, params)
        params = optax.apply_updates(params, updates)
    assert rosenbrock(run.best)[0] < 1.05 * rosenbrock(flat_of(params))[0]


def test_what_is_not_finite_is_rejected_and_counted_and_leaves_no_trace():
    run, bad = Run(), 0
    for count in range(60):
        before = run.state
        value, gradient = rosenbrock(flat_of(run.params))
        broken = {7: {"value": np.nan}, 8: {"value": np.inf}, 9: {"value": -np.inf}}.get(count, {})
        if count % 10 == 2:
            broken = {"gradient": np.where(np.arange(SIZE) == 4, np.nan if count % 20 == 2 else -np.inf, gradient)}
        run.step(rosenbrock, **broken)
        bad += bool(broken)
        assert run.stats.nonfinite_count == bad
        if broken:
            names = "params", "gradient", "diff_params", "diff_gradients", "losses", "num_secants", "num_accepted"
            names += "log_curvature", "prediction_error"
            for name in names:
                assert_same(getattr(run.state, name), getattr(before, name))
            assert run.state.damping >= before.damping
        assert np.isfinite(flat_of(run.params)).all()
        state = run.state._replace(losses=None)  # Minus infinity before any.
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
        assert value < 1e4
    assert run.stats.rejected >= bad == 9
    assert run.state.loss < 5


def test_before_the_first_finite_evaluation_nothing_moves():
    run = Run()
    first = run.state
    for broken in ({"value": np.nan}, {"gradient": np.full(SIZE, np.inf)}):
        assert not flat_of(run.step(rosenbrock, **broken)).any()
        assert_same(run.state.inner_state, first.inner_state)
        assert (run.stats.accepted, run.stats.damping) == (0, first.damping)
    own, _ = plain()[1](tree_of(rosenbrock(START)[1]), plain()[0].init(tree_of(START)), tree_of(START))
    assert_same(run.step(rosenbrock), own)
    assert run.stats == (3, 1, 2, 2, first.damping, 0, 0)


def test_what_is_missing_or_does_not_fit_is_said():
    opt, params = wrapped()[0], tree_of(START)
    state = jax.eval_shape(opt.init, params)

    def refused(message, error=ValueError, *, gradients=params, state=state, params=params, opt=opt, **extra):
        with pytest.raises(error, match=message):
            jax.eval_shape(functools.partial(opt.update, **extra), gradients, state, params)

    refused(r"^value must be given, the loss at params: update\(grads, state, params, value=loss\); got None.*nnx")
    refused("^params must be given", params=None, value=1.0)
    refused(r"value must be one real number, got shape \(2,\)", value=np.ones(2))
    refused(r"gradients: leaf \['v'\] is missing", gradients={**params, "v": None}, value=1.0)
    refused(r"gradients: leaf \['w'\] has shape \(4,\)", gradients={**params, "w": np.ones(4)}, value=1.0)
    refused(r"params: leaf \['b'\] has shape \(1,\)", params={**params, "b": np.ones(1)}, value=1.0)
    refused("history_window is 8, here 7", opt=vsa_optax.multisecant(optax.adam(0.1), history_window=7), value=1.0)
    refused("state must be what init returned, a MultisecantState, got tuple", state=(), value=1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vsa_optax.multisecant(0.1), "opt must be an optax.GradientTransformation, got 0.1"),
        (lambda: vsa_optax.multisecant(optax.adam(1.0), history_window=0), "history_window must be an integer >= 1"),
        (lambda: vsa_optax.multisecant(optax.adam(1.0), history_dtype="int8"), "history_dtype must be None or one of"),
        (
            lambda: vsa_optax.multisecant(optax.adam(1.0), learning_rate=-1.0),
            "learning_rate must be a finite number >=",
        ),
    ],
)
def test_refused_where_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("opt", "message"),
    [
        (vsa_optax.multisecant(optax.lbfgs()), "opt must not contain a line search"),
        (
            vsa_optax.multisecant(optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5))),
            "opt must not contain a line search",
        ),
        (vsa_optax.multisecant(optax.chain(vsa_optax.multisecant(optax.sgd(1.0)))), "a multisecant of its own"),
        (
            vsa_optax.multisecant(optax.MultiSteps(optax.sgd(1.0), 2)),
            "not contain optax.MultiSteps, which emits rarely",
        ),
        (
            vsa_optax.multisecant(vsa_optax.ternary_multi_steps(optax.sgd(1.0), 2)),
            "not contain ternary_multi_steps, which emits rarely",
        ),
        (
            vsa_optax.multisecant(optax.chain(optax.apply_every(2), optax.sgd(1.0))),
            "not contain optax.apply_every, which emits rarely",
        ),
        (
            vsa_optax.multisecant(optax.adam(optax.constant_schedule(0.1)), learning_rate=0.1),
            "learning_rate must be None where opt scales by a rate of its own.*multiply",
        ),
    ],
)
def test_refused_at_init(opt, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(opt.init, tree_of(START))


def test_leaves_without_gradients_are_refused():
    with pytest.raises(TypeError, match=r"leaf \['n'\] has dtype int32"):
        wrapped()[0].init({"n": np.ones(3, np.int32)})


@pytest.mark.parametrize("num", [0, 2])
def test_stats_want_exactly_one_state(num):
    states = [wrapped()[0].init(tree_of(START))] * num
    with pytest.raises(ValueError, match=f"expected one state of multisecant in the optimizer state, found {num}"):
        vsa_optax.multisecant_stats([optax.EmptyState(), *states])


def trained(opt, steps=8):
    """Parameters and state after some steps on a valley of two dimensions, in one program."""
    opt = optax.with_extra_args_support(opt)

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(lambda x: (1 - x[0]) ** 2 + 10 * (x[1] - x[0] ** 2) ** 2)(params)
        updates, state = opt.update(grads, state, params, value=value)
        return (optax.apply_updates(params, updates), state), None

    start = jnp.array([-1.0, 1.0])
    return jax.jit(lambda: jax.lax.scan(step, (start, opt.init(start)), length=steps)[0])()


def leaping(learning_rate):
    return vsa_optax.multisecant(optax.adam(1.0), learning_rate=learning_rate, history_window=2)


SCHEDULE = optax.cosine_decay_schedule(0.1, 10)


def test_schedules_count_evaluations_inside_and_outside():
    inside, state = trained(vsa_optax.multisecant(optax.adam(SCHEDULE), history_window=2))
    outside, _ = trained(leaping(SCHEDULE))
    np.testing.assert_array_equal(inside, outside)
    assert optax.tree.get(state.inner_state[-1], "count") == vsa_optax.multisecant_stats(state).evaluations == 8


def test_a_rate_may_be_injected():
    """Like the optimizer's own, it is for the updates only; the accepted parameters are where it has been."""
    injected, state = trained(optax.inject_hyperparams(leaping)(0.1))
    constant, of_constant = trained(vsa_optax.multisecant(optax.adam(0.1), history_window=2))
    np.testing.assert_allclose(injected, constant, rtol=1e-5)
    assert vsa_optax.multisecant_stats(state)[:4] == vsa_optax.multisecant_stats(of_constant)[:4]
    assert optax.tree.get(state, "learning_rate") == np.float32(0.1)


def test_dtypes_scalars_and_empty_leaves_pass_through():
    """One tree has half-precision and complex leaves, scalars and zero-size leaves; in a chain."""
    rng = np.random.default_rng(0)
    params = {
        "half": jnp.asarray(rng.normal(size=(3, 2)), jnp.bfloat16),
        "complex": jnp.asarray(rng.normal(size=4) + 1j * rng.normal(size=4), jnp.complex64),
        "scalar": jnp.float32(2.0),
        "empty": jnp.zeros((2, 0)),
    }
    opt = optax.chain(
        optax.clip_by_global_norm(100.0), vsa_optax.multisecant(optax.sgd(0.01, momentum=0.9), history_window=3)
    )
    state = opt.init(params)
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), (params, state))
    scales = {"half": 1.0, "complex": 4.0, "scalar": 9.0, "empty": 1.0}

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda x, scale: (scale * x).astype(x.dtype), params, scales)
        value = sum(0.5 * scales[name] * jnp.sum(jnp.abs(x) ** 2).astype(jnp.float32) for name, x in params.items())
        updates, state = opt.update(grads, state, params, value=value)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), updates) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
        return optax.apply_updates(params, updates), state, value

    values = []
    for _ in range(20):
        params, state, value = step(params, state)
        values.append(float(value))
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), (params, state)) == kinds
    assert step._cache_size() == 1
    assert min(values) < 1e-3 * values[0]


def test_no_leaf_at_all():
    opt = vsa_optax.multisecant(optax.sgd(0.1))
    state = opt.init({})
    updates, after = jax.eval_shape(lambda: opt.update({}, state, {}, value=1.0))
    assert updates == {}
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


PARAMS = {"w": jnp.linspace(-1, 1, 12000).reshape(300, 40), "b": jnp.zeros(300), "v": jnp.ones((40, 7))}
BATCH = jnp.cos(jnp.arange(320.0)).reshape(8, 40)


def loss(params, x):
    hidden = jnp.tanh(x @ params["w"].T + params["b"])
    return jnp.mean((hidden - 0.3) ** 2) + jnp.mean((x @ params["v"] - 1.0) ** 2)


@functools.cache
def programs():
    """The transformation, a step, and the scan of it."""
    opt = vsa_optax.multisecant(optax.adamw(1e-2), history_window=3)

    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params, BATCH)
        updates, state = opt.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    def scanned(params, state, num):
        return jax.lax.scan(lambda carry, _: (step(*carry), None), (params, state), length=num)[0]

    return opt, jax.jit(step, donate_argnums=(0, 1)), jax.jit(scanned, static_argnums=2)


def test_a_gpus_step_has_no_control_flow():
    """The choice by platform is decided at compilation."""
    opt, _, _ = programs()
    update = jax.jit(lambda grads, state, params: opt.update(grads, state, params, value=jnp.float32(1)))
    text = update.trace(PARAMS, opt.init(PARAMS), PARAMS).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.while" not in text
    cases = re.findall(r'(%\w+)\S* = "stablehlo.case"\((%\w+)\)', text)
    # The index of the platform is chosen by a constant, and chooses.
    chosen = {name for name, index in cases if index.startswith("%c")}
    assert cases
    assert all(index in chosen for _, index in cases if not index.startswith("%c"))


def test_a_step_is_one_program_that_reuses_its_memory():
    opt, step, _ = programs()
    params = jax.tree.map(jnp.array, PARAMS)
    state = opt.init(params)
    compiled = step.lower(PARAMS, state).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text.count(" conditional(") == 2  # One around the error, one around the leap: a pause skips both.
    # Records are written in place: nothing of their size is copied.
    assert not re.search(r"= \w+\[8,\S* copy\(", text[text.index("ENTRY") :])
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(PARAMS))
    assert memory.alias_size_in_bytes >= size + sum(leaf.nbytes for leaf in jax.tree.leaves(state)) - 100
    # On a CPU, which turns the histories over for their products in f32: far more than they need.
    assert memory.temp_size_in_bytes < 25 * size
    for _ in range(12):
        donated = [leaf for leaf in jax.tree.leaves((params, state)) if leaf.ndim]
        params, state = step(params, state)
        assert all(leaf.is_deleted() for leaf in donated)
    assert step._cache_size() == 1
    assert vsa_optax.multisecant_stats(state).accepted > 9


def test_scanned_and_again_the_bits_are_the_same():
    opt, step, scanned = programs()
    params = jax.tree.map(jnp.array, PARAMS)
    looped = params, opt.init(params)
    for _ in range(12):
        looped = step(*looped)
    for _ in range(2):
        assert_same(scanned(PARAMS, opt.init(PARAMS), 12), looped)


def test_optax_maps_what_is_like_the_parameters():
    """Accepted parameters, their gradient, its root mean square, two rings, and the optimizer's two moments."""
    opt, params = wrapped()[0], tree_of(START)
    state = jax.eval_shape(opt.init, params)
    marked = optax.tree.map_params(opt, lambda x: "param", state, transform_non_params=lambda x: "other")
    assert jax.tree.leaves(marked).count("param") == 7 * len(params)
    assert jax.tree.structure(optax.tree.map_params(opt, lambda x: x, state)) == jax.tree.structure(state)


def test_a_state_may_be_made_of_shapes():
    opt, params = wrapped()[0], tree_of(START)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert jax.tree.map(jnp.shape, opt.init(shapes)) == jax.tree.map(jnp.shape, opt.init(params))


def test_parameters_of_weak_type_do_not_compile_it_twice():
    opt, params = vsa_optax.multisecant(optax.sgd(0.1), history_window=1), jnp.asarray(2.0)
    assert params.weak_type
    state = opt.init(params)
    _, after = jax.eval_shape(lambda: opt.update(params, state, params, value=1.0))
    kinds = [jax.tree.map(lambda x: (x.dtype, x.weak_type), tree) for tree in (state, after)]
    assert kinds[0] == kinds[1]


def test_a_checkpoint_continues_with_the_same_bits(tmp_path):
    run = Run()
    for count in range(16):
        if count == 9:
            checkpoint.save(tmp_path, count, (run.params, run.state))
        run.step(rosenbrock, **({"value": 1e6} if count == 8 else {}))
    fresh = Run(np.zeros(SIZE))
    count, (params, state) = checkpoint.restore(tmp_path, (fresh.params, fresh.state))
    resumed = Run(state=state)
    resumed.params = params
    resumed.steps(rosenbrock, 16 - count)
    assert_same((resumed.params, resumed.state), (run.params, run.state))


def test_inside_and_around_optax():
    """A mask, a chain and one vector of all leaves change nothing."""
    params = tree_of(START)

    def run(opt, steps=7):
        def step(carry, _):
            params, state = carry

            def fun(tree):
                x = jnp.concatenate([jnp.ravel(tree[name]) for name in ("b", "v", "w")])
                return jnp.sum(10 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

            value, grads = jax.value_and_grad(fun)(params)
            updates, state = opt.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), value

        return jax.jit(lambda: jax.lax.scan(step, (params, opt.init(params)), length=steps))()

    leaping = vsa_optax.multisecant(optax.sgd(1e-3, momentum=0.9), history_window=2, history_dtype=None)
    frozen = {"b": True, "empty": False, "v": True, "w": True}
    nested = optax.masked(optax.flatten(optax.chain(optax.clip(1e6), leaping)), frozen)
    (found, state), values = run(nested)
    (wanted, of_plain), of_plain_values = run(leaping)
    np.testing.assert_allclose(values, of_plain_values, rtol=1e-3)
    np.testing.assert_allclose(flat_of(found), flat_of(wanted), rtol=1e-3, atol=1e-4)
    assert vsa_optax.multisecant_stats(state)[:4] == vsa_optax.multisecant_stats(of_plain)[:4]


def test_inside_shard_map_gradients_and_losses_are_averaged():
    """Each of eight devices has its part of the batch; all take the same steps, those of one device."""
    opt = vsa_optax.multisecant(optax.adam(0.05), history_window=2, history_dtype=None)
    x = jnp.sin(jnp.arange(48.0)).reshape(16, 3)
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}

    def fun(params, x):
        return jnp.mean((jnp.tanh(x @ params["w"] + params["b"]) - 0.5) ** 2)

    def steps(params, x, average):
        def step(carry, _):
            params, state = carry
            value, grads = average(jax.value_and_grad(fun)(params, x))
            updates, state = opt.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, opt.init(params)), length=10)

    def averaged(params, x):
        # The gradient varies and is averaged; the parameters do not vary.
        return steps(params, x, lambda tree: jax.lax.pmean(tree, "data"))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    (_, state), values = jax.jit(jax.shard_map(averaged, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))(
        params, x
    )
    alone_on_each = functools.partial(steps, average=lambda tree: tree)
    with pytest.raises(ValueError, match=r"value must be the same on all devices along \['data'\].*jax.lax.pmean"):
        jax.eval_shape(jax.shard_map(alone_on_each, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()), params, x)
    (_, alone), of_one = jax.jit(alone_on_each)(params, x)
    np.testing.assert_allclose(values, of_one, rtol=0.01)  # The sums have another order.
    assert vsa_optax.multisecant_stats(state)[:4] == vsa_optax.multisecant_stats(alone)[:4]
    assert values[-1] < 0.1 * values[0]
