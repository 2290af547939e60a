"""Prediction by momentum beside its twin, in both domains, under every rhythm."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from refusals import check_names_itself
from samples import AS_USERS_DO, PARAMS, draw, flat_of, gradient_stream, relative, tree_of

import vsa_optax
from vsa_optax import Cycle, Guarded, LegacyCycle, Momentum, Phase, QualityCycle

RHYTHMS = {
    "cycle": Cycle(warmup_steps=2, full_steps=2, predict_steps=4, correct_every=3),
    "legacy": LegacyCycle(full_steps=2, predict_steps=7, correct_every=3),
    "from one record": Cycle(warmup_steps=0, full_steps=1, predict_steps=3, correct_every=2),
    "quality": QualityCycle(),
    "guarded": Guarded(tolerance=1.0, warmup_steps=2),
}


@functools.cache
def compiled(rhythm, momentum, weight, predicts):
    predictor = Momentum(momentum=momentum, correction_weight=weight, predicts=predicts)
    opt = vsa_optax.phase_switched(optax.sgd(0.5), predictor=predictor, phases=RHYTHMS[rhythm])
    return opt, jax.jit(lambda g, state: opt.update(g, state, value=1.0))


def smooth_stream(num):
    """Gradients that drift, so that a guard of momentum leaps."""
    start, slope, noise = gradient_stream(3, seed=5)
    return [start + 0.03 * step * slope + 0.01 * np.sin(step) * noise for step in range(num)]


# Every coefficient in one rhythm, and every rhythm with one pair of them; the other pairs at length.
TWINS = [
    pytest.param(rhythm, *pair, predicts, marks=() if rhythm == "cycle" or pair == (0.9, 0.5) else pytest.mark.slow)
    for rhythm in RHYTHMS
    for pair in ((0.9, 0.5), (0.4, 2.0), (0.0, 0.0))
    for predicts in ("gradient", "update")
]


@pytest.mark.parametrize(("rhythm", "momentum", "weight", "predicts"), TWINS)
def test_what_leaves_equals_the_twin_over_a_hundred_steps(rhythm, momentum, weight, predicts):
    opt, update = compiled(rhythm, momentum, weight, predicts)
    twin, state = reference.MomentumPredictor(momentum, weight), opt.init(PARAMS)
    num_predicted = num_corrected = 0
    for gradient in smooth_stream(100):
        phase = Phase(int(state.machine.phase))
        emitted, state = update(tree_of(gradient if phase != Phase.PREDICT else 0 * gradient), state)
        num_corrected += phase != Phase.PREDICT and twin.predicted > 0
        expected = twin.predict() if phase == Phase.PREDICT else twin.true_step(gradient)
        num_predicted += phase == Phase.PREDICT
        assert relative(-2 * flat_of(emitted), expected) < 1e-6
    stats = vsa_optax.phase_stats(state)
    assert num_predicted == stats.predict_steps > 20
    assert num_corrected > 4
    recent, num = state.machine.calibration.recent, state.machine.calibration.num_recent
    assert num == len(twin.errors) > 10
    np.testing.assert_allclose(np.roll(recent, -(int(num) % 10)), twin.errors[-10:], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("begin", [0, 60])
def test_the_rhythm_of_quality_is_that_of_the_twin(begin):
    """Gradients that are well predicted, then noise, or noise from the first; then well predicted again."""
    opt, update = compiled("quality", 0.9, 0.5, "gradient")
    smooth = smooth_stream(160)
    stream = [draw(i, smooth[0].size) if begin <= i < 110 else g for i, g in enumerate(smooth)]
    twin, state, walked, wanted = reference.MomentumPredictor(), opt.init(PARAMS), "", ""
    for gradient in stream:
        walked += "P" if state.machine.phase == Phase.PREDICT else "T"
        wanted += "T" if twin.wants_true() else "P"
        _, state = update(tree_of(gradient), state)
        twin.true_step(gradient) if wanted[-1] == "T" else twin.predict()
    assert walked == wanted
    assert walked[:17] == "TT" + "PPPPT" * 3
    assert "PPPP" + "T" * 20 in walked
    assert walked.endswith("PPPPT" * 2) or "PPPPTPPPP" in walked[-12:]


def test_a_gradient_that_is_not_finite_leaves_no_trace():
    opt, update = compiled("cycle", 0.9, 0.5, "gradient")
    states = []
    for broken in ((), (1, 6)):
        state, fed = opt.init(PARAMS), 0
        stream = smooth_stream(40)
        for step in range(14 + len(broken)):
            is_broken = step in broken
            emitted, state = update(tree_of(stream[fed] * (np.nan if is_broken else 1)), state)
            assert np.isfinite(flat_of(emitted)).all()
            fed += not is_broken
        assert np.isfinite(flat_of(jax.tree.map(lambda x: x[0], state.history.records))).all()
        states.append(state)
    assert states[1].machine.unpacked().nonfinite_count > 0
    assert states[0].history.num_records > 4


def test_a_skipped_gradient_is_no_leap():
    """Nothing was predicted, so nothing is to be corrected."""
    opt = vsa_optax.predict_gradients(predictor=Momentum(), phases=Cycle(warmup_steps=2, full_steps=50))
    state, update = opt.init(jnp.zeros(3)), jax.jit(opt.update)
    for step, gradient in enumerate([1.0, 2.0, 3.0, np.nan, 7.0, np.nan, 9.0]):
        emitted, state = update(jnp.full(3, gradient), state)
        np.testing.assert_array_equal(emitted, np.nan_to_num(gradient), err_msg=str(step))


def test_a_skipped_gradient_behind_a_leap_is_no_leap():
    """The true step after the leap is corrected, and the one after a skipped gradient is not."""
    opt = vsa_optax.predict_gradients(predictor=Momentum(), phases=Cycle(warmup_steps=2, full_steps=5, predict_steps=2))
    state, update = opt.init(jnp.zeros(3)), jax.jit(opt.update)
    for _ in range(9):
        _, state = update(jnp.ones(3), state)
    assert (state.machine.phase, state.machine.unpacked().cycles) == (Phase.FULL, 1)
    for gradient, expected in [(2.0, 2.5), (np.nan, 0.0), (5.0, 5.0)]:
        emitted, state = update(jnp.full(3, gradient), state)
        np.testing.assert_allclose(emitted, expected, rtol=1e-6)


@pytest.mark.parametrize("predicts", ["gradient", "update"])
def test_the_records_are_written_in_place(predicts):
    opt = vsa_optax.phase_switched(optax.sgd(0.1), predictor=Momentum(predicts=predicts), phases=LegacyCycle())
    params = {"a": jnp.zeros((300, 40)), "b": jnp.zeros((70, 40))}
    update = jax.jit(lambda g, state: opt.update(g, state, value=1.0), donate_argnums=1, **AS_USERS_DO)
    text = update.lower(params, opt.init(params)).compile().as_text()
    copied = [line for line in text.splitlines() if re.search(r"= f32\[2,(300|70),40\]\S* copy\(", line)]
    assert "f32[2,300,40]" in text
    assert not copied


def test_corrections_beyond_the_dtype_saturate():
    opt = vsa_optax.predict_gradients(
        predictor=Momentum(correction_weight=3), phases=Cycle(warmup_steps=0, full_steps=1, predict_steps=1)
    )
    state, update = opt.init(jnp.zeros(2, jnp.float16)), jax.jit(opt.update)
    for sign in (1, 1, -1, 1, -1):
        emitted, state = update(jnp.full(2, sign * 6e4, jnp.float16), state)
        assert emitted.dtype == jnp.float16
        assert np.isfinite(np.float32(emitted)).all()


def test_quality_by_leaf():
    """A leaf that stands still is predicted, one of noise is not."""
    opt = vsa_optax.predict_gradients(predictor=Momentum(), phases=Cycle(warmup_steps=2, full_steps=9))
    params = {"noise": jnp.zeros(50), "still": jnp.zeros(50)}
    state, update = opt.init(params), jax.jit(opt.update)
    twin = reference.MomentumPredictor()
    for step in range(60):
        is_true = state.machine.phase != Phase.PREDICT
        _, state = update({"noise": draw(step, 50), "still": jnp.ones(50)}, state)
        twin.true_step(draw(step, 50)) if is_true else twin.predict()
    quality = vsa_optax.phase_stats(state).quality
    noise, still = quality.r_squared
    assert still > 0.9
    squared, first = np.square(twin.errors), np.linalg.norm(draw(1, 50) - draw(0, 50)) / np.linalg.norm(draw(1, 50))
    squared = np.append(first**2, squared)  # The second is compared with the first.
    weights = 0.95 ** np.arange(len(squared))[::-1]
    np.testing.assert_allclose(noise, 1 - np.sum(weights * squared) / np.sum(weights), rtol=1e-4)
    assert (quality.coefficients, quality.ridge) == (None, None)


def test_state_cost_is_two_records():
    params = {"w": jnp.zeros((10, 64)), "b": jnp.zeros(7, jnp.bfloat16)}
    opt = vsa_optax.predict_gradients(predictor=Momentum())
    state = jax.eval_shape(opt.init, params)
    history = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.history))
    assert history == 2 * (2560 + 14) + 8
    assert state.residual is None
    learned = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.machine.calibration))
    assert learned == 8 * 2 + 44


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("momentum", -0.1, ">= 0"),
        ("momentum", float("inf"), ">= 0"),
        ("correction_weight", "1", ">= 0"),
        ("predicts", "x", "one of"),
    ],
)
def test_bad_arguments_name_themselves(name, value, valid):
    check_names_itself(Momentum, name, value, valid)


def test_a_state_of_another_predictor_is_refused():
    opt = vsa_optax.predict_gradients(predictor=Momentum())
    other = vsa_optax.predict_gradients(predictor=vsa_optax.Window(2, predicts="gradient"))
    with pytest.raises(ValueError, match="predictor is Window, here Momentum"):
        opt.update(jnp.ones(3), other.init(jnp.zeros(3)))
