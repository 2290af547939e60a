"""The legacy pair: its rhythm beside the trainer's of the crate, whatever the settings, and what it gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from refusals import check_names_itself

import vsa_optax
from vsa_optax import Cycle, LegacyCycle, Momentum, Phase, QualityCycle
from vsa_optax.prediction import machine

STEPS = 260
LETTERS = "WFPC"


@functools.cache
def walk():
    """Phases of a run; one program for all settings."""

    def walked(losses, full_steps, predict_steps, correct_every, threshold):
        phases = LegacyCycle()
        object.__setattr__(phases, "correct_every", correct_every)
        object.__setattr__(phases, "loss_threshold", threshold)
        state = machine.init(phases)
        lengths = state.adaptive._replace(full_length=full_steps, predict_length=predict_steps)

        def step(state, loss):
            return machine.advance(phases, state, is_finite=jnp.array(True), value=loss), state.phase

        return jax.lax.scan(step, state._replace(adaptive=lengths), losses)[1]

    return jax.jit(walked)


@given(
    full_steps=st.integers(1, 70),
    predict_steps=st.integers(1, 120),
    correct_every=st.integers(1, 60),
    loss_threshold=st.sampled_from([0.0, 0.1, 0.55]),
    drift=st.lists(st.sampled_from([-0.03, -0.002, 0.0, 0.002, 0.03]), min_size=1, max_size=6),
)
def test_the_rhythm_is_the_trainers_for_any_settings(full_steps, predict_steps, correct_every, loss_threshold, drift):
    """Losses rise and fall in stretches, so that both rules and all bounds come."""
    rates = np.repeat(drift, -(-STEPS // len(drift)))[:STEPS]
    losses = np.float32(np.exp(np.cumsum(rates)))
    found = walk()(losses, full_steps, predict_steps, correct_every, loss_threshold)
    expected = reference.walk_legacy(
        losses.astype(np.float64),
        full_steps=full_steps,
        predict_steps=predict_steps,
        correct_every=correct_every,
        loss_threshold=loss_threshold,
    )
    assert "".join(LETTERS[i] for i in np.asarray(found)) == expected


@pytest.mark.parametrize(
    ("losses", "lengths"),
    [
        (np.ones(STEPS), (10, 40)),
        (np.exp(0.03 * np.arange(STEPS)), (35, 10)),
        (np.exp(-0.03 * np.arange(STEPS)), (5, 60)),
    ],
    ids=["flat", "rises", "falls"],
)
def test_lengths_follow_the_loss(losses, lengths):
    opt = vsa_optax.predict_gradients(predictor=Momentum(), phases=LegacyCycle())

    def step(state, loss):
        _, new = opt.update(jnp.ones(2), state, value=loss)
        return new, state.machine.phase

    state, found = jax.jit(lambda losses: jax.lax.scan(step, opt.init(jnp.zeros(2)), losses))(np.float32(losses))
    settings = dict(full_steps=10, predict_steps=40, correct_every=10, loss_threshold=0.1)
    assert "".join(LETTERS[i] for i in np.asarray(found)) == reference.walk_legacy(losses, **settings)
    full, predict = state.machine.unpacked().adaptive[:2]
    assert (full, predict) == lengths


@pytest.mark.parametrize("settings", [(10, 40, 10), (3, 7, 1), (1, 1, 1), (2, 5, 9)])
def test_fixed_lengths_are_a_cycle_without_warmup(settings):
    settings = dict(zip(("full_steps", "predict_steps", "correct_every"), settings, strict=True))
    opt = vsa_optax.predict_gradients(predictor=Momentum(), phases=Cycle(warmup_steps=0, **settings))

    def step(state, _):
        return opt.update(jnp.ones(2), state)[1], state.machine.phase

    _, found = jax.jit(lambda: jax.lax.scan(step, opt.init(jnp.zeros(2)), None, length=120))()
    walked = "".join(LETTERS[i] for i in np.asarray(found))
    assert walked == reference.walk_legacy(np.ones(120), **settings)
    assert walked.startswith("F" * settings["full_steps"] + "P")


def test_the_shares_of_predicted_steps():
    """36 of 51 with the trainer's lengths, and with the predictor's rhythm four in five."""
    for schedule, length, share in (("trainer", 51 * 4, 36 / 51), ("predictor", 5 * 40, 0.8)):
        pair = vsa_optax.momentum_predictor(schedule)
        opt = vsa_optax.predict_gradients(**pair._asdict())

        def step(state, _, opt=opt):
            return opt.update(jnp.ones(2), state, value=1.0)[1], None

        state, _ = jax.jit(lambda opt=opt, step=step, n=length: jax.lax.scan(step, opt.init(jnp.zeros(2)), None, n))()
        stats = vsa_optax.phase_stats(state)
        assert abs(stats.predict_steps / length - share) < 0.02


def test_the_pair_and_its_arguments():
    assert vsa_optax.momentum_predictor() == (Momentum(), LegacyCycle())
    pair = vsa_optax.momentum_predictor("predictor", momentum=0.5, correction_weight=0, predicts="update")
    assert pair == (Momentum(momentum=0.5, correction_weight=0.0, predicts="update"), QualityCycle())
    check_names_itself(vsa_optax.momentum_predictor, "schedule", "trainers", "one of 'trainer', 'predictor'")
    check_names_itself(vsa_optax.momentum_predictor, "momentum", -1, ">= 0")


def test_quality_needs_momentum():
    with pytest.raises(ValueError, match=r"use predictor=Momentum\(\)"):
        vsa_optax.phase_switched(optax.sgd(0.1), phases=QualityCycle())


def test_the_trainers_rhythm_needs_the_loss():
    opt = vsa_optax.phase_switched(optax.sgd(0.1), **vsa_optax.momentum_predictor()._asdict())
    with pytest.raises(ValueError, match="needs the loss at every step"):
        opt.update(jnp.ones(2), opt.init(jnp.zeros(2)))


def test_it_trains_and_predicts_through_value_and_grad():
    for schedule in ("trainer", "predictor"):
        opt = vsa_optax.phase_switched(optax.sgd(0.02), **vsa_optax.momentum_predictor(schedule)._asdict())
        params = jnp.arange(1.0, 5.0)

        def step(carry, _, opt=opt):
            params, state = carry
            value, grads = vsa_optax.value_and_grad_by_phase(lambda w: jnp.sum(w**2))(params, state=state)
            updates, state = opt.update(grads, state, params, value=value)
            return (optax.apply_updates(params, updates), state), state.machine.phase

        (params, state), _ = jax.lax.scan(step, (params, opt.init(params)), None, length=100)
        assert jnp.sum(params**2) < 3
        stats = vsa_optax.phase_stats(state)
        assert stats.predict_steps > 60
        assert stats.ignored_gradients == 0
        assert stats.phase in (Phase.FULL, Phase.PREDICT, Phase.CORRECT)
