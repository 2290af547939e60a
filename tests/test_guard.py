"""The guard: its rules beside a plain twin, leaps that are taken back, streams that are hostile to predictions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import vsa_optax
from vsa_optax import GuardAction, Phase
from vsa_optax.transforms.predict import PhaseSwitchedState

GUARDED = {"calibrate": True, "guard": True, "correct_every": 20}


def train(opt, loss, params, steps, noise=None):
    """A jitted scan: the losses at each step, phase_stats at each step, the last parameters and state."""
    opt = optax.with_extra_args_support(opt)
    noise = jnp.zeros([steps, *params.shape]) if noise is None else jnp.asarray(noise)
    is_plain = not isinstance(opt.init(params), PhaseSwitchedState)

    def step(carry, shift):
        params, state = carry
        value, gradient = jax.value_and_grad(lambda p: loss(p, shift))(params)
        updates, state = opt.update(gradient, state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), (value, params, 0 if is_plain else vsa_optax.phase_stats(state))

    run = jax.jit(lambda params: jax.lax.scan(step, (params, opt.init(params)), noise))
    (params, state), (values, path, stats) = run(params)
    return np.asarray(values), np.asarray(path), stats, state


CURVATURE = jnp.logspace(-2, 0, 30)


def bowl(params, shift):
    return 0.5 * jnp.sum(CURVATURE * (params - shift) ** 2) + 1e-6


def guarded(**kwargs):
    return vsa_optax.phase_switched(optax.sgd(1.0), learning_rate=0.1, **GUARDED | kwargs)


def test_on_a_smooth_task_it_skips_steps_and_loses_nothing():
    start = jnp.ones(30)
    plain, _, _, _ = train(optax.sgd(0.1), bowl, start, 200)
    values, _, stats, _ = train(guarded(), bowl, start, 200)
    assert int(stats.predict_steps[-1]) > 80
    assert values[-1] <= 1.01 * plain[-1]
    assert int(stats.guard.action[-1]) in (GuardAction.GREW, GuardAction.SHRANK)


def test_where_noise_hides_the_loss_it_is_the_optimizer_alone():
    noise = 3.0 * np.random.default_rng(1).normal(size=(200, 30)).astype(np.float32)
    _, path, _, _ = train(optax.sgd(0.1), bowl, jnp.ones(30), 200, noise)
    _, ours, stats, _ = train(guarded(), bowl, jnp.ones(30), 200, noise)
    assert int(stats.predict_steps[-1]) <= 3
    exact = lambda p: float(bowl(p, 0.0))  # noqa: E731 # as the loss, without its noise
    assert exact(ours[-1]) < 1.5 * exact(path[-1])


def hostile(flips_after):
    """A bowl whose gradients point the other way for a step after each leap, known by how far parameters moved."""

    def opt_under_attack(opt):
        def update(updates, state, params=None, **extra):
            inner, leapt = state
            flipped = jax.tree.map(lambda g: jnp.where(leapt >= flips_after, -g, g), updates)
            is_predict = ~vsa_optax.needs_backward(inner)
            updates, inner = opt.update(flipped, inner, params, **extra)
            return updates, (inner, jnp.where(is_predict, leapt + 1, 0))

        return optax.GradientTransformationExtraArgs(lambda p: (opt.init(p), jnp.int32(0)), update)

    return opt_under_attack


def test_gradients_that_flip_after_each_prediction_do_no_harm():
    start = jnp.ones(30)
    plain, _, _, _ = train(optax.sgd(0.1), bowl, start, 200)
    attacked = hostile(1)(guarded())

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(bowl)(params, 0.0)
        updates, state = attacked.update(gradient, state, params, value=value)
        return (optax.apply_updates(params, updates), state), value

    (_, state), values = jax.jit(lambda p: jax.lax.scan(step, (p, attacked.init(p)), None, length=200))(start)
    stats = vsa_optax.phase_stats(state)
    assert int(stats.predict_steps) < 60
    assert float(values[-1]) < 1.25 * plain[-1]


def test_without_losses_it_stops_where_nothing_can_be_predicted_and_starts_again_where_it_can():
    rng = np.random.default_rng(1)
    random, constant = rng.normal(size=(80, 50)), np.broadcast_to(rng.normal(size=50), (160, 50))
    opt = vsa_optax.predict_gradients(**GUARDED, history_window=4)

    def step(state, gradient):
        _, state = opt.update(gradient, state)
        return state, vsa_optax.phase_stats(state)

    gradients = jnp.asarray(np.concatenate([random, constant]), jnp.float32)
    _, stats = jax.jit(lambda g: jax.lax.scan(step, opt.init(g[0]), g))(gradients)
    predicted = np.asarray(stats.predict_steps)
    assert predicted[79] <= 8
    assert stats.guard.predict_length[79] < 1
    assert int(stats.guard.action[70]) == GuardAction.GAVE_UP
    assert predicted[-1] - predicted[79] > 60


def cliff(params, shift):
    """A line that ends in a wall a little way ahead."""
    del shift
    return jnp.sum(jnp.where(params > -1.0, params + 2.0, 20.0 - params))


@pytest.mark.parametrize("wall", ["high", "nan"])
def test_a_leap_over_a_cliff_is_taken_back(wall):
    def loss(params, shift):
        value = cliff(params, shift)
        return jnp.where((wall == "nan") & (value > 20.0 * params.size), jnp.nan, value)

    opt = vsa_optax.phase_switched(optax.sgd(1.0), learning_rate=0.07, **GUARDED | {"warmup_steps": 3})
    _, path, stats, _ = train(opt, loss, jnp.ones(4), 60)
    rollbacks = np.diff(np.asarray(stats.guard.rollbacks), prepend=0) > 0
    assert rollbacks.any()
    first = int(np.argmax(rollbacks))
    leap = np.diff(np.asarray(stats.predict_steps), prepend=0)
    began = first - 1
    while leap[began]:
        began -= 1
    assert began < first - 1
    np.testing.assert_allclose(path[first], path[began], rtol=1e-6, atol=1e-6)
    assert int(stats.guard.action[first]) == GuardAction.ROLLED_BACK
    assert float(stats.guard.predict_length[first]) < float(stats.guard.predict_length[first - 1])
    assert np.isfinite(path).all()


class Twin:
    """The rules as the docstring states them, in plain Python."""

    def __init__(self):
        self.length, self.boost, self.wait, self.mean, self.variance, self.count = 1.0, 1.0, 8.0, 0.0, 0.0, 0
        self.loss = None

    def true_step(self, loss, predictions, predicts_something):
        value = math.log(loss)
        drop = None if self.loss is None else self.loss - value
        if predictions:
            limit = -max(abs(self.mean), 2 * math.sqrt(self.variance))
            if drop < limit:
                self.length, self.boost, self.wait = self.length / 2, self.boost / 1.2, self.wait * 2
                self.clip()
                return
            if drop >= (1 + predictions / 2) * self.mean and predicts_something:
                self.length, self.boost, self.wait = min(1.5 * self.length + 0.5, 20), self.boost * 1.1, self.wait / 2
            else:
                self.length, self.boost = 0.7 * self.length, self.boost / 1.2
                self.wait *= 2 if predictions <= 1 else 1
            self.clip()
        elif drop is not None:
            self.count += 1
            rate, distance = max(0.2, 1 / self.count), drop - self.mean
            self.mean += rate * distance
            self.variance = (1 - rate) * (self.variance + rate * distance**2)
        self.loss = value

    def clip(self):
        self.boost, self.wait = min(max(self.boost, 1), 2), min(max(self.wait, 8), 256)


def test_its_numbers_are_those_of_the_twin():
    wavy = lambda p, shift: bowl(p, 0.002 * shift)  # noqa: E731 # a loss whose drops differ
    noise = np.sin(np.arange(150) * 0.7)[:, None] * np.ones(30, np.float32)
    values, _, stats, _ = train(guarded(), wavy, jnp.ones(30), 150, noise.astype(np.float32))
    predicted = np.diff(np.asarray(stats.predict_steps), prepend=0) > 0
    assert predicted.sum() > 10
    twin, in_leap = Twin(), 0
    before_error = 0.0
    for step, value in enumerate(values):
        if predicted[step]:
            in_leap += 1
            continue
        measured = float(stats.last_prediction_error[step]) if in_leap else before_error
        before_error = measured
        twin.true_step(float(value), in_leap, measured**2 < 1)
        in_leap = 0
        retried = float(stats.guard.predict_length[step]) == 1.0 and twin.length < 0.75
        twin.length = max(twin.length, 1.0) if retried else twin.length
        guard = jax.tree.map(lambda x, step=step: float(x[step]), stats.guard)
        assert guard.drop == pytest.approx(twin.mean, rel=1e-3, abs=1e-5)
        assert guard.drop_deviation == pytest.approx(math.sqrt(twin.variance), rel=1e-3, abs=1e-4)
        assert guard.predict_length == pytest.approx(twin.length, rel=1e-5)
        assert guard.boost == pytest.approx(twin.boost, rel=1e-5)


def test_a_loss_that_is_not_positive_says_nothing_and_nothing_is_predicted():
    lowered = lambda p, shift: bowl(p, shift) - 100.0  # noqa: E731 # the same gradients
    _, _, stats, _ = train(guarded(), lowered, jnp.ones(30), 60)
    assert int(stats.predict_steps[-1]) == 0


@pytest.mark.parametrize("predict_in", ["update", "gradient"])
def test_bounds_are_kept_and_one_program_serves_all_phases(predict_in):
    opt = guarded(predict_steps=3, full_steps=1, predict_in=predict_in)
    compiled = 0

    @jax.jit
    def step(params, state):
        nonlocal compiled
        compiled += 1
        value, gradient = vsa_optax.value_and_grad_by_phase(bowl)(params, 0.0, state=state)
        updates, state = opt.update(gradient, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params = jnp.ones(30)
    state = opt.init(params)
    run, longest, phases = 0, 0, set()
    states = {}
    for _ in range(80):
        phase = int(state.machine.phase)
        phases.add(phase)
        states.setdefault(phase, (params, state))
        run = run + 1 if phase == Phase.PREDICT else 0
        longest = max(longest, run)
        params, state = step(params, state)
    assert compiled == 1
    assert longest == 3
    assert phases == {Phase.WARMUP, Phase.FULL, Phase.PREDICT}
    for (
        params_then,
        state_then,
    ) in states.values():  # A run that is resumed from host memory goes on with the same bits.
        resumed = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (params_then, state_then))
        for left, right in zip(
            jax.tree.leaves(step(*resumed)), jax.tree.leaves(step(params_then, state_then)), strict=True
        ):
            np.testing.assert_array_equal(left, right)


def test_switched_off_it_leaves_no_trace():
    state = vsa_optax.phase_switched(optax.sgd(0.1), calibrate=False, guard=False).init(jnp.ones(3))
    assert state.machine.calibration is None
    assert state.machine.guard is None
    stats = vsa_optax.phase_stats(state)
    assert stats.quality is None
    assert stats.guard is None


def test_settings_that_exclude_each_other_are_named():
    with pytest.raises(ValueError, match="guard=True needs calibrate=True"):
        vsa_optax.phase_switched(optax.sgd(0.1), guard=True, calibrate=False)
    with pytest.raises(ValueError, match="adaptive must be False with guard=True"):
        vsa_optax.phase_switched(optax.sgd(0.1), guard=True, calibrate=True, adaptive=True)
    with pytest.raises(ValueError, match="guard must be True or False"):
        vsa_optax.phase_switched(optax.sgd(0.1), guard=1, calibrate=True)
    with_guard = guarded().init(jnp.ones(2))
    with pytest.raises(ValueError, match="guard is True, here False"):
        guarded(guard=False).update(jnp.ones(2), with_guard)
