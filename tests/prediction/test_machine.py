import json
import pathlib

import blind
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import vsa_optax
from vsa_optax import AdaptiveCycle, Cycle, Phase
from vsa_optax.prediction import machine

TRACES = json.loads(pathlib.Path(__file__).with_name("phase_traces.json").read_text())["traces"]
LETTERS = "WFPC"


def walk_scan(opt, losses, gradients=None):
    """Phases of all steps in one lax.scan, as a string."""
    gradients = jnp.ones((len(losses), 2)) if gradients is None else gradients

    def step(state, inputs):
        gradient, loss = inputs
        phase = state.machine.phase
        _, state = opt.update(gradient, state, value=loss)
        return state, phase

    run = jax.jit(lambda state: jax.lax.scan(step, state, (gradients, jnp.asarray(losses))))
    state, walked = run(opt.init(jnp.zeros(2)))
    return "".join(LETTERS[i] for i in np.asarray(walked)), state


def walk_loop(update, opt, losses):
    state, walked = opt.init(jnp.zeros(2)), ""
    for loss in losses:
        walked += LETTERS[int(state.machine.phase)]
        _, state = update(jnp.ones(2), state, loss)
    return walked, state


@pytest.mark.parametrize("trace", TRACES, ids=range(len(TRACES)))
def test_traces(trace):
    config = dict(trace["config"])
    when = AdaptiveCycle if config.pop("adaptive", False) else Cycle
    opt = blind.predict_gradients(when=when, **config)
    losses = trace["losses"] or [1.0] * trace["steps"]
    update = jax.jit(lambda g, state, loss: opt.update(g, state, value=loss))
    by_scan, scanned = walk_scan(opt, losses)
    by_jit, jitted = walk_loop(update, opt, losses)
    assert by_scan == by_jit == trace["phases"]
    assert vsa_optax.phase_stats(scanned).cycles == vsa_optax.phase_stats(jitted).cycles
    by_hand, _ = walk_loop(lambda g, state, loss: opt.update(g, state, value=loss), opt, losses)
    assert by_hand == trace["phases"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Two corrections never adjoin: every other step.
        (dict(predict_steps=4, correct_every=1), "WWFPCPCFPCPCF"),
        # The end of an odd phase falls on a multiple of one: the correction comes first.
        (dict(predict_steps=5, correct_every=1), "WWFPCPCPCFPCPCPCF"),
        # A correction that the phase never reaches.
        (dict(predict_steps=3, correct_every=7), "WWFPPPFPPPF"),
        # One at the very end of the phase: a step more.
        (dict(predict_steps=3, correct_every=3), "WWFPPPCFPPPCF"),
        (dict(predict_steps=1, correct_every=1), "WWFPCFPCF"),
        (dict(predict_steps=0, correct_every=1), "WWFFFFFFF"),
    ],
)
def test_short_cycles(config, expected):
    opt = blind.predict_gradients(warmup_steps=2, full_steps=1, **config)
    walked, state = walk_scan(opt, [1.0] * len(expected))
    assert walked == expected
    assert reference.walk_phases(len(expected), warmup_steps=2, full_steps=1, **config) == expected
    stats = vsa_optax.phase_stats(state)
    assert [int(x) for x in (stats.warmup_steps, stats.full_steps, stats.predict_steps, stats.correct_steps)] == [
        expected.count(letter) for letter in LETTERS
    ]
    assert stats.total_steps == len(expected)
    np.testing.assert_allclose(
        stats.steps_per_backward, len(expected) / (len(expected) - expected.count("P")), rtol=1e-6
    )


@given(
    warmup_steps=st.integers(2, 12),
    full_steps=st.integers(1, 6),
    predict_steps=st.integers(0, 12),
    correct_every=st.integers(1, 14),
    skipped=st.sets(st.integers(0, 59), max_size=20),
)
def test_walk_equals_twin(skipped, **config):
    phases = Cycle(**config)

    def step(state, is_finite):
        is_finite |= state.phase == Phase.PREDICT
        return machine.advance(phases, state, is_finite=is_finite, value=None), state.phase

    _, walked = jax.lax.scan(step, machine.init(phases), jnp.array([i not in skipped for i in range(60)]))
    expected = reference.walk_phases(60, skipped=skipped, **config)
    assert "".join(LETTERS[i] for i in np.asarray(walked)) == expected


def test_warmup_longer_than_the_window_ends():
    opt = blind.predict_gradients(warmup_steps=25, length=4, full_steps=3, predict_steps=6)
    walked, _ = walk_scan(opt, [1.0] * 40)
    assert walked.startswith("W" * 25 + "FFFPP")


def test_skipped_gradients_prolong_the_warmup_only():
    gradients = np.ones((14, 2), np.float32)
    gradients[[1, 2, 5, 6]] = np.nan
    opt = blind.predict_gradients(warmup_steps=3, full_steps=2, predict_steps=3, correct_every=2)
    walked, state = walk_scan(opt, [1.0] * 14, jnp.asarray(gradients))
    assert walked == "WWWWWFFPPCFFPP"  # 1 and 2 do not count; 5 and 6 do, though skipped as well
    assert vsa_optax.phase_stats(state).nonfinite_count == 4


def adaptive_lengths(losses, **config):
    config = dict(warmup_steps=2, full_steps=5, predict_steps=20, correct_every=5) | config
    opt = blind.predict_gradients(when=AdaptiveCycle, **config)
    _, state = walk_scan(opt, losses)
    return int(state.machine.adaptive.full_length), int(state.machine.adaptive.predict_length)


def test_adaptive_lengths_stay_in_bounds():
    rising, falling = 1.02 ** np.arange(600), 0.98 ** np.arange(600)
    assert adaptive_lengths(rising) == (30, 5)
    assert adaptive_lengths(falling) == (3, 50)


def test_adaptive_bounds_are_widened_by_settings_beyond_them():
    rising, falling = 1.02 ** np.arange(600), 0.98 ** np.arange(600)
    assert adaptive_lengths(rising, full_steps=40, predict_steps=4) == (40, 4)
    assert adaptive_lengths(falling, full_steps=2, predict_steps=60) == (2, 60)


def test_adaptive_leaves_a_steady_loss_alone():
    assert adaptive_lengths(np.full(600, 0.7)) == (5, 20)
    # 8 % up is within the default threshold of 10 %, and beyond one of 5 %.
    steps = np.concatenate([np.full(20, 1.0), np.full(20, 1.08)])
    assert adaptive_lengths(steps) == (5, 20)
    assert adaptive_lengths(steps, loss_threshold=0.05)[0] > 5


def test_adaptive_handles_losses_below_zero():
    assert adaptive_lengths(-(1.02 ** np.arange(600))) == (3, 50)


def test_nonfinite_values_are_not_remembered():
    opt = blind.predict_gradients(when=AdaptiveCycle)
    _, state = walk_scan(opt, [2.0, np.nan, np.inf])
    assert state.machine.value == 2.0
    assert state.machine.adaptive.num_losses == 1
    assert np.isfinite(state.machine.adaptive.losses).all()


def test_adaptive_needs_the_loss():
    opt = blind.predict_gradients(when=AdaptiveCycle)
    with pytest.raises(ValueError, match=r"AdaptiveCycle needs the loss.*value=None"):
        opt.update(jnp.ones(2), opt.init(jnp.zeros(2)))


def test_a_cycle_is_counted_when_its_predict_phase_ends():
    """WW, then FPPC over and over: nothing is counted for the warm-up, nor before the correction is done."""
    phases = Cycle(warmup_steps=2, full_steps=1, predict_steps=2, correct_every=2)

    def step(state, _):
        state = machine.advance(phases, state, is_finite=jnp.array(True), value=None)
        return state, state.cycles

    _, cycles = jax.lax.scan(step, machine.init(phases), None, length=15)
    assert cycles.tolist() == [0, 0, *[0, 0, 0, 1], *[1, 1, 1, 2], *[2, 2, 2, 3], 3]
