"""The guard: its rule beside a plain twin, noise and hostile streams it must not predict, and where it should."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from samples import compiled_once

import vsa_optax
from vsa_optax import Cycle, GuardAction, Guarded, Phase, Recursive, Secants, Window
from vsa_optax.prediction import guard
from vsa_optax.prediction.update import PhaseSwitchedState

CURVATURE = jnp.logspace(-2, 0, 30)


def bowl(params, shift):
    """Thirty curvatures, and a little of what is no quadratic."""
    return 0.5 * jnp.sum(CURVATURE * (params - shift) ** 2) + 0.02 * jnp.sum(jnp.cos(3 * params))


def train(opt, loss, params, steps, noise=None):
    """A jitted scan: the losses and parameters at each step, phase_stats at each step, and the last state."""
    opt = optax.with_extra_args_support(opt)
    noise = jnp.zeros([steps, *params.shape]) if noise is None else jnp.asarray(noise)
    is_plain = not isinstance(jax.eval_shape(opt.init, params), PhaseSwitchedState)

    def step(carry, shift):
        params, state = carry
        value, gradient = jax.value_and_grad(lambda p: loss(p, shift))(params)
        updates, state = opt.update(gradient, state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), (value, params, 0 if is_plain else vsa_optax.phase_stats(state))

    run = jax.jit(lambda params, noise: jax.lax.scan(step, (params, opt.init(params)), noise))
    (_, state), (values, path, stats) = compiled_once(run.lower(params, noise))(params, noise)
    return np.asarray(values), np.asarray(path), stats, state


def guarded(**settings):
    return vsa_optax.phase_switched(optax.sgd(1.0, momentum=0.5), learning_rate=0.1, **settings)


PLAIN = optax.sgd(0.1, momentum=0.5)


@pytest.mark.parametrize(
    ("predictor", "least", "steps"),
    [(Secants(), 120, 200), (Window(), 90, 200), (Recursive(predicts="gradient"), 10, 500)],
)
def test_on_a_smooth_task_it_skips_steps_and_loses_nothing(predictor, least, steps):
    start = jnp.ones(30)
    plain, _, _, _ = train(PLAIN, bowl, start, steps)
    values, _, stats, _ = train(guarded(predictor=predictor), bowl, start, steps)
    assert int(stats.predict_steps[-1]) > least
    assert values[-1] == pytest.approx(plain[-1], rel=0.01)
    assert int(stats.correct_steps[-1]) == 0
    assert set(np.asarray(stats.guard.action).tolist()) <= {*map(int, GuardAction)}


@pytest.mark.parametrize("predictor", [Secants(), Window(), Window(predicts="gradient")])
def test_under_noise_it_is_the_optimizer_alone(predictor):
    noise = 3.0 * np.random.default_rng(1).normal(size=(200, 30)).astype(np.float32)
    _, path, _, _ = train(PLAIN, bowl, jnp.ones(30), 200, noise)
    _, ours, stats, _ = train(guarded(predictor=predictor), bowl, jnp.ones(30), 200, noise)
    assert int(stats.predict_steps[-1]) == 0
    np.testing.assert_allclose(ours, path, rtol=1e-5, atol=1e-6)


INPUTS = jnp.linspace(-1, 1, 48)


def fit(params, shift):
    """A net with 24 hidden units, all of its 73 parameters in one vector."""
    del shift
    inner, bias, outer = params[:24], params[24:48], params[48:72]
    found = jnp.tanh(3 * INPUTS[:, None] * inner + bias) @ outer / 5 + params[72]
    return jnp.mean((found - jnp.sin(3 * INPUTS) - 0.3 * jnp.cos(9 * INPUTS)) ** 2)


def jumping(step):
    return jnp.where(step < 300, 1e-3, 0.1)


def resting(step):
    return jnp.where(step < 100, 0.0, 0.03)


@pytest.mark.parametrize(
    ("make", "loss", "size", "steps"),
    [
        (lambda: optax.adam(jumping), fit, 73, 400),
        (lambda: optax.adam(resting), fit, 73, 200),
        (lambda: optax.contrib.prodigy(1.0), bowl, 30, 120),
    ],
    ids=["jump", "rest", "prodigy"],
)
def test_where_steps_grow_at_once_it_peaks_no_higher_than_the_optimizer_alone(make, loss, size, steps):
    start = jnp.asarray(np.random.default_rng(2).normal(size=size), jnp.float32)
    plain, _, _, _ = train(make(), loss, start, steps)
    values, _, stats, _ = train(vsa_optax.phase_switched(make()), loss, start, steps)
    late = slice(steps // 2, None)  # At the jump's the first losses are the highest.
    assert values[late].max() < 1.1 * plain[late].max()
    assert values.max() < 1.1 * plain.max()
    assert int(stats.predict_steps[-1]) > 15


class Twin:
    """The rule as the docstring states it, in plain Python."""

    def __init__(self, longest, tolerance):
        self.longest, self.tolerance = longest, tolerance**2
        self.length, self.constant = 0.0, 0.0
        self.account, self.asleep, self.sleep = -64, 0, 16
        self.way, self.pace, self.drift = 0.0, 0.0, 0.0

    def true_step(self, error, predictions, distance=1.0, horizon=None):
        """After a true step with this squared error, behind so many predictions, so far from the newest record."""
        horizon = horizon or predictions + 1
        if self.asleep:
            self.asleep -= 1
            return
        if self.way == 0 or distance == 0:
            self.length = 0.0
            return
        if horizon == predictions + 1:  # Else some of the way was not measured.
            self.pace = self.way / horizon
        self.drift = distance / horizon
        lowest = min(self.account, 0)
        self.account = max(lowest, self.account + (2 if error > 0.5 else 1) - 4 * predictions)
        if predictions and error < self.tolerance and self.account <= 0:
            self.sleep = 16
        distance = predictions + 1
        self.constant = max(min(error, 100) / distance**4, 0.75 * self.constant)
        if predictions:
            length = min(1.6 * distance, 0.9 * (self.tolerance / self.constant) ** 0.25) - 1
            self.length = min(length, self.longest) if length >= 0.75 else 0.0
        else:
            self.length = 1.0 if self.constant < self.tolerance / 4 else 0.0
        if self.account >= 64 and not self.length:
            self.account, self.asleep, self.sleep = 0, self.sleep, min(2 * self.sleep, 1024)

    def is_too_far(self, distance):
        """Whether a leap ends here, or does not begin."""
        most = 2 * (round(max(self.length, 1)) + 1)
        return 0 < self.pace < self.way / most or 0 < self.drift < distance / most


def moved(horizon, distance, emitted, *, is_recorded):
    return guard.Moved(*(jnp.float32(x) for x in (horizon, distance, emitted)), jnp.array(is_recorded))


def test_its_numbers_are_those_of_the_twin():
    """On errors from all decades, given to the rule as they come, and ways that jump and rest now and then."""
    rng, settings, twin = np.random.default_rng(2), Guarded(longest=12, tolerance=0.22), Twin(12, 0.22)
    after, state = jax.jit(guard.after, static_argnums=0), guard.init()
    lengths, shortened, rests = [0], [], 0

    def step_length():
        odd = rng.random()
        return 0.0 if odd < 0.05 else 300.0 if odd < 0.08 else float(np.float32(rng.uniform(1, 2)))

    distance = 0.0
    for _ in range(400):
        error = float(np.float32(10 ** rng.uniform(-5, 3) if rng.random() < 0.1 else 10 ** rng.uniform(-5, -2)))
        emitted, horizon = step_length(), lengths[-1] + 1
        step = moved(horizon, distance, emitted, is_recorded=True)
        state, plan = after(settings, state, False, jnp.float32(np.sqrt(error)), True, step)
        rests += distance == 0
        watches = twin.asleep == 0
        twin.true_step(error, lengths[-1], distance)
        twin.way = emitted if watches else twin.way
        assert float(state.length) == pytest.approx(twin.length, rel=1e-3)
        for name in ("constant", "way", "pace", "drift"):
            assert float(getattr(state, name)) == pytest.approx(getattr(twin, name), rel=1e-4)
        account = int(state.hopeless), int(state.asleep), int(state.sleep)
        assert account == (twin.account, twin.asleep, twin.sleep)
        assert bool(plan.leaps) == (twin.length > 0 and not twin.is_too_far(0.0))
        planned = round(float(state.length)) if plan.leaps else 0
        done, distance = 0, emitted
        while plan.leaps if not done else done < int(plan.length):
            emitted = step_length()
            step = moved(done + 1, distance, emitted, is_recorded=False)
            state, plan = after(settings, state, True, jnp.float32(0.0), False, step)
            done, twin.way = done + 1, twin.way + emitted
            assert int(plan.length) == (0 if twin.is_too_far(distance) else planned)
            distance += emitted
        assert int(state.leap) == done
        lengths.append(done)
        shortened.append(done < planned)
    assert max(lengths) >= 4
    assert min(sum(shortened), rests) > 5


def test_what_it_knows_nothing_of_bounds_nothing_and_either_length_tells_rest():
    """As in a state that was stored before it measured ways; and where no lengths are known, none is asked for."""
    after, settings = jax.jit(guard.after, static_argnums=0), Guarded()
    state = guard.init()._replace(length=jnp.float32(5.0))
    for _ in range(4):
        step = moved(1, 1e6, 1e6, is_recorded=False)
        state, plan = after(settings, state, True, jnp.float32(0.0), False, step)
        assert int(plan.length) == 5
    unknown = moved(5, 0, 0, is_recorded=True)._replace(distance=None, emitted=None)
    state, plan = after(settings, guard.init(), False, jnp.float32(0.0), True, unknown)
    assert (bool(plan.leaps), int(plan.length)) == (True, 1)
    for way, distance, leaps in ((0, 1, False), (1, 0, False), (1, 1, True)):
        state, step = guard.init()._replace(way=jnp.float32(way)), moved(1, distance, 1, is_recorded=True)
        assert after(settings, state, False, jnp.float32(0.0), True, step)[1].leaps == leaps


def into_a_leap(update, state):
    """State and parameters, each of which moves by one a step, five predictions into a leap that is longer."""
    params, done = jnp.zeros(5), 0
    while done < 5:
        done = done + 1 if state.machine.phase == Phase.PREDICT else 0
        _, state = update(jnp.ones(5), state, params)
        params += 1
    assert state.machine.unpacked().guard.length > 6
    assert state.machine.phase == Phase.PREDICT
    return state, params


def test_secants_see_one_step_later_what_others_make_of_what_leaves():
    """As where `predict_gradients` heads a chain: here the parameters jump by themselves, five steps into a leap."""
    opt = vsa_optax.predict_gradients(predictor=Secants(4), phases=Guarded(warmup_steps=2))
    update = jax.jit(opt.update)
    state, params = into_a_leap(update, opt.init(jnp.zeros(5)))
    assert state.machine.unpacked().guard.drift == pytest.approx(np.sqrt(5), rel=1e-5)
    _, state = update(jnp.ones(5), state, params + 40)
    assert state.machine.phase == Phase.FULL


def test_an_update_that_grows_ends_a_leap_before_the_parameters_move():
    sgd = optax.inject_hyperparams(optax.sgd)(1.0)
    opt = vsa_optax.phase_switched(sgd, predictor=Secants(4), phases=Guarded(warmup_steps=2))
    update = jax.jit(opt.update)
    state, params = into_a_leap(update, opt.init(jnp.zeros(5)))
    assert state.machine.unpacked().guard.pace == pytest.approx(np.sqrt(5), rel=1e-5)
    state.inner_state.hyperparams["learning_rate"] *= 40
    _, state = update(jnp.ones(5), state, params)
    assert state.machine.phase == Phase.FULL


@pytest.mark.parametrize("predictor", [Secants(4), Window(4, predicts="gradient")])
def test_rest_is_no_evidence(predictor):
    """The same gradients that it would predict if the parameters moved."""
    opt = vsa_optax.phase_switched(optax.sgd(1.0), learning_rate=lambda step: 0.1 * (step >= 30), predictor=predictor)

    def step(carry, _):
        params, state = carry
        updates, state = opt.update(jnp.ones(5), state, params)
        return (optax.apply_updates(params, updates), state), state.machine.unpacked().predict_steps

    run = jax.jit(lambda params: jax.lax.scan(step, (params, opt.init(params)), None, length=60))
    _, predicted = run(jnp.zeros(5))
    assert predicted[30] == 0
    assert predicted[-1] > 15


def test_where_nothing_is_predicted_it_sleeps_longer_and_longer():
    settings, twin = Guarded(longest=12, tolerance=0.22), Twin(12, 0.22)

    def step(carry, error):
        state, horizon = carry
        watches = state.asleep == 0
        one = guard.Moved(horizon, jnp.float32(3.0), jnp.float32(2.0), is_recorded=watches)
        state, _ = guard.after(settings, state, False, jnp.sqrt(error), True, one)
        return (state, jnp.where(watches, 1.0, horizon + 1)), state

    errors = np.full(3000, 0.9, np.float32)
    errors[2000] = 0.4  # Were it looked at, it would count.
    twin.way, horizon = 1.0, 1
    start = guard.init()._replace(way=jnp.float32(1.0)), jnp.float32(1.0)
    _, states = jax.jit(lambda errors: jax.lax.scan(step, start, errors))(errors)
    hopeless, asleep = (np.asarray(x) for x in (states.hopeless, states.asleep))
    for number, error in enumerate(errors):
        watches = twin.asleep == 0
        twin.true_step(float(error), 0, distance=3.0, horizon=horizon)
        twin.way, horizon = (2.0, 1) if watches else (twin.way, horizon + 1)
        assert (twin.account, twin.asleep) == (hopeless[number], asleep[number])
        assert (twin.way, twin.pace) == (states.way[number], states.pace[number])
        assert twin.drift == pytest.approx(float(states.drift[number]), rel=1e-5)
    assert np.mean(asleep == 0) < 0.1
    assert states.action[-1] == GuardAction.SLEPT


def test_it_does_not_fall_asleep_where_a_leap_begins():
    settings = Guarded()
    state = guard.init()._replace(hopeless=jnp.int32(63), way=jnp.float32(1.0))
    step = moved(1, 1.0, 1.0, is_recorded=True)
    leaps, plan = guard.after(settings, state, jnp.array(False), jnp.float32(1e-3), jnp.array(True), step)
    assert plan.leaps
    assert (int(leaps.asleep), int(leaps.hopeless)) == (0, 64)
    sleeps, plan = guard.after(settings, state, jnp.array(False), jnp.float32(0.5), jnp.array(True), step)
    assert not plan.leaps
    assert int(sleeps.asleep) == 16


def test_asleep_nothing_is_recorded_and_awake_it_starts_again():
    rng = np.random.default_rng(3)
    gradients = np.concatenate([rng.normal(size=(90, 40)), np.ones((120, 40))]).astype(np.float32)
    opt = vsa_optax.predict_gradients(phases=Guarded(warmup_steps=2))

    def step(state, inputs):
        emitted, state = opt.update(inputs[0], state, inputs[1])
        return state, (emitted, vsa_optax.phase_stats(state), state.history.last_step)

    points = rng.normal(size=gradients.shape).astype(np.float32)
    run = jax.jit(lambda g, p: jax.lax.scan(step, opt.init(g[0]), (g, p)))
    _, (emitted, stats, last) = run(gradients, points)
    asleep = np.asarray(stats.guard.asleep)
    began = int(np.argmax(asleep > 0))
    assert 63 <= began <= 72
    assert asleep[began] == 16
    slept = slice(began + 1, began + 17)
    np.testing.assert_array_equal(last[slept], last[began])
    np.testing.assert_array_equal(emitted[slept], gradients[slept])
    assert int(stats.predict_steps[-1]) > 30


def test_gradients_that_flip_after_each_prediction_do_no_harm():
    """A bowl whose gradient points the other way at the true step behind each leap."""
    start, opt = jnp.ones(30), guarded()
    plain, _, _, _ = train(PLAIN, bowl, start, 300)

    def step(carry, _):
        params, state, leapt = carry
        value, gradient = jax.value_and_grad(bowl)(params, 0.0)
        is_predict = ~vsa_optax.needs_backward(state)
        updates, state = opt.update(jnp.where(leapt & ~is_predict, -gradient, gradient), state, params, value=value)
        return (optax.apply_updates(params, updates), state, is_predict), value

    run = jax.jit(lambda p: jax.lax.scan(step, (p, opt.init(p), jnp.array(False)), None, length=300))
    (_, state, _), values = run(start)
    assert 0 < int(vsa_optax.phase_stats(state).predict_steps) < 40
    assert float(values[-1]) < 1.05 * plain[-1]


@pytest.mark.parametrize("predictor", [Secants(4), Window(4, predicts="gradient")])
def test_it_stops_where_nothing_can_be_predicted_and_starts_again_where_it_can(predictor):
    rng = np.random.default_rng(1)
    random, constant = rng.normal(size=(80, 50)), np.broadcast_to(rng.normal(size=50), (160, 50))
    opt = vsa_optax.predict_gradients(predictor=predictor)
    points = jnp.asarray(rng.normal(size=(240, 50)), jnp.float32)

    def step(state, inputs):
        gradient, point = inputs
        _, state = opt.update(gradient, state, point)
        return state, vsa_optax.phase_stats(state)

    gradients = jnp.asarray(np.concatenate([constant[:40], random, constant]), jnp.float32)[:240]
    _, stats = jax.jit(lambda g, p: jax.lax.scan(step, opt.init(g[0]), (g, p)))(gradients, points)
    predicted, action = np.asarray(stats.predict_steps), np.asarray(stats.guard.action)
    assert predicted[39] > 10
    assert predicted[119] - predicted[50] == 0
    assert set(action[50:119].tolist()) == {GuardAction.GAVE_UP, GuardAction.SLEPT}
    assert stats.guard.predict_length[100] == 0
    assert predicted[-1] - predicted[119] > 30


def test_a_gradient_that_is_not_finite_ends_predicting_and_a_finite_one_starts_it_again():
    opt = vsa_optax.predict_gradients(phases=Guarded(warmup_steps=3))
    update, state = jax.jit(opt.update), opt.init(jnp.ones(5))
    params = jnp.ones(5)
    for _ in range(20):
        _, state = update(jnp.ones(5), state, params)
        params += 1
    while not bool(vsa_optax.needs_backward(state)):
        _, state = update(jnp.ones(5), state, params)
        params += 1
    assert int(vsa_optax.phase_stats(state).predict_steps) > 5
    _, state = update(jnp.full(5, jnp.nan), state, params)
    assert state.machine.phase == Phase.FULL
    assert vsa_optax.phase_stats(state).guard.predict_length == 0
    before = int(vsa_optax.phase_stats(state).predict_steps)
    for _ in range(20):
        _, state = update(jnp.ones(5), state, params)
        params += 1
    assert int(vsa_optax.phase_stats(state).predict_steps) > before


@pytest.mark.parametrize("predictor", [Secants(), Window()])
def test_bounds_are_kept_and_one_program_serves_all_phases(predictor):
    opt = guarded(predictor=predictor, phases=Guarded(longest=3))
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
    run, longest, states = 0, 0, {}
    for _ in range(80):
        phase = int(state.machine.phase)
        states.setdefault(phase, (params, state))
        run = run + 1 if phase == Phase.PREDICT else 0
        longest = max(longest, run)
        params, state = step(params, state)
    assert compiled == 1
    assert longest == 3
    assert set(states) == {Phase.WARMUP, Phase.FULL, Phase.PREDICT}
    for then in states.values():  # A run that is resumed from host memory goes on with the same bits.
        resumed = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), then)
        jax.tree.map(np.testing.assert_array_equal, step(*resumed), step(*then))


def test_switched_off_it_leaves_no_trace():
    state = guarded(predictor=Window(calibrate=False), phases=Cycle()).init(jnp.ones(3))
    assert state.machine.calibration is None
    assert state.machine.unpacked().guard is None
    stats = vsa_optax.phase_stats(state)
    assert stats.quality is None
    assert stats.guard is None
    off = guarded(phases=None).init(jnp.ones(3))
    assert (off.machine.unpacked().guard, off.machine.calibration, off.history) == (None, None, None)


def test_who_tolerates_more_predicts_more():
    """On one quadratic with the same noise, the mean error of the leaps that end is within the tolerance."""
    noise, passes = 0.02 * np.random.default_rng(4).normal(size=(200, 30)).astype(np.float32), []
    for tolerance in (0.03, 0.14, 0.55):
        _, _, stats, _ = train(guarded(phases=Guarded(tolerance=tolerance)), bowl, jnp.linspace(-2, 3, 30), 200, noise)
        passes.append(200 - int(stats.predict_steps[-1]))
        assert stats.mean_prediction_error[-1] <= 1.2 * tolerance
    assert passes == sorted(passes, reverse=True)
    assert passes[0] > passes[2] + 20
