"""The two transformations: what they take for settings, what they refuse, and what the bounds of settings mean."""

import dataclasses
import pydoc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from blind import MAKERS
from samples import PARAMS, flat_of, gradient_stream, tree_of

import vsa_optax
from vsa_optax import AdaptiveCycle, Cycle, Guarded, Recursive, Secants, TritCodec, Window

TRANSFORMATIONS = {
    "predict_gradients": vsa_optax.predict_gradients,
    "phase_switched": lambda **settings: vsa_optax.phase_switched(optax.adam(0.1), **settings),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_help_fits_a_screen(name):
    assert len(pydoc.render_doc(getattr(vsa_optax, name)).splitlines()) <= 50


@pytest.mark.parametrize("make", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_settings_that_are_none_name_those_that_are(make):
    for wrong in ("secants", None, 16, Guarded(), TritCodec()):
        with pytest.raises(
            ValueError, match="predictor must be a Secants, Window, Recursive or Momentum, such as"
        ) as error:
            make(predictor=wrong)
        assert f"got {wrong!r}" in str(error.value)
    for wrong in ("guarded", True, 20, Secants()):
        with pytest.raises(ValueError, match=r"phases must be a Guarded, .*, or None, got ") as error:
            make(phases=wrong)
        assert f"got {wrong!r}" in str(error.value)
    for kind in (Secants, Window, Recursive):
        with pytest.raises(ValueError, match=rf"call it, predictor={kind.__name__}\(\)"):
            make(predictor=kind)
    for kind in (Guarded, Cycle, AdaptiveCycle):
        with pytest.raises(ValueError, match=rf"call it, phases={kind.__name__}\(\)"):
            make(phases=kind)


@pytest.mark.parametrize(
    "settings",
    [
        Secants(np.int64(5), dtype=jnp.bfloat16),
        Window(np.int32(5), decay=np.float32(0.5), dtype=np.dtype("float16"), codec=TritCodec(3)),
        Recursive(decay=1, calibrate=False, residual_decay=np.float32(0.25), dtype=np.float32),
        Guarded(tolerance=np.float32(0.25), longest=np.int64(7)),
        Cycle(warmup_steps=np.int32(3), predict_steps=0),
        AdaptiveCycle(full_steps=np.int8(2), loss_threshold=np.float32(0.5)),
    ],
    ids=lambda settings: type(settings).__name__,
)
def test_settings_are_values(settings):
    """An object pasted from ``repr`` is equal and hashes alike, and nothing else is equal."""
    pasted = eval(repr(settings), {name: getattr(vsa_optax, name) for name in vsa_optax.__all__})
    assert (pasted, hash(pasted)) == (settings, hash(settings))
    assert settings not in (Secants(), Window(), Recursive(), Guarded(), Cycle(), AdaptiveCycle())
    with pytest.raises(AttributeError):
        setattr(settings, dataclasses.fields(settings)[0].name, 3)


@pytest.mark.parametrize("line", [Window, Recursive])
def test_predict_gradients_predicts_no_updates(line):
    with pytest.raises(ValueError, match=rf"use {line.__name__}\(predicts='gradient'\)"):
        vsa_optax.predict_gradients(predictor=line())


@pytest.mark.parametrize("make", TRANSFORMATIONS.values(), ids=TRANSFORMATIONS)
def test_without_phases_no_history_is_allocated(make):
    for predictor in (Secants(), Window(predicts="gradient", calibrate=False, residual_decay=0.5)):
        state = make(predictor=predictor, phases=None).init(PARAMS)
        assert (state.history, state.residual) == (None, None)
        machine = state.machine.unpacked()
        assert (machine.guard, machine.calibration, machine.errors) == (None, None, None)


def run(opt, steps):
    """All updates of that many steps on a drifting, noisy gradient, and the last state."""
    update, state, updates = jax.jit(opt.update), opt.init(PARAMS), []
    for gradient in gradient_stream(steps):
        emitted, state = update(tree_of(gradient), state, PARAMS, value=1.0)
        updates.append(flat_of(emitted))
    assert np.isfinite(updates).all()
    return np.stack(updates), state


@pytest.mark.parametrize("maker", MAKERS)
def test_the_bounds_themselves_are_valid(maker):
    """A transformation made at a bound trains, in the phases and with the state that the bound implies."""
    smallest = dict(warmup_steps=2, full_steps=1, predict_steps=0, correct_every=1, length=2)
    _, state = run(MAKERS[maker](**smallest, residual_decay=0), 6)
    assert vsa_optax.phase_stats(state)[1:6] == (6, 2, 4, 0, 0)
    assert (state.history, state.residual) == (None, None)
    _, state = run(MAKERS[maker](full_steps=2**31 - 1, decay=1, residual_decay=1), 20)
    assert vsa_optax.phase_stats(state)[1:6] == (20, 10, 10, 0, 0)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state.history.records)} == {8}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("decay", [0, 1])
def test_the_shortest_cycle_and_what_becomes_of_its_residual(maker, decay):
    """A window of two records. Of errors, a decay of 0 keeps the last one alone, and a decay of 1 takes none in."""
    shortest = dict(warmup_steps=2, full_steps=1, predict_steps=1, correct_every=1, length=2)
    opt = MAKERS[maker](**shortest, residual_decay=decay, decay=1, when=AdaptiveCycle, loss_threshold=0)
    _, state = run(opt, 8)
    assert vsa_optax.phase_stats(state)[1:6] == (8, 2, 2, 2, 2)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(state.history.records)} == {2}
    assert flat_of(state.residual).any() == (decay == 0)


def test_numpy_settings_are_welcome():
    """And give the updates that the same Python numbers give, to the bit."""
    settings = dict(warmup_steps=np.int64(3), decay=np.float32(0.5), learning_rate=np.float32(0.1))
    updates, state = run(MAKERS["phase_switched"](**settings), 20)
    python_numbers = {name: setting.item() for name, setting in settings.items()}
    expected, expected_state = run(MAKERS["phase_switched"](**python_numbers), 20)
    np.testing.assert_array_equal(updates, expected)
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    assert vsa_optax.phase_stats(state).predict_steps > 5
