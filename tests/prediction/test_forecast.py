"""Certain forecasts come true, whatever the settings, and however the gradients behave."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from samples import draw

import vsa_optax
from vsa_optax import AdaptiveCycle, Cycle, Guarded, LegacyCycle, Momentum, QualityCycle, Secants, Window
from vsa_optax.core.kinds import StepKind
from vsa_optax.prediction.forecast import FOREVER, forecast
from vsa_optax.prediction.machine import Phase

STEPS = 220
TARGET = draw(0, 8)
UNCALIBRATED = Window(calibrate=False, residual_decay=0.9)


@functools.cache
def compiled(predictor, phases):
    """The transformation, and a step on a quadratic."""
    opt = vsa_optax.phase_switched(optax.adam(1.0), learning_rate=0.01, predictor=predictor, phases=phases)

    @jax.jit
    def step(params, state, more):
        gradient = jnp.where(state.machine.phase == Phase.PREDICT, 0, params - TARGET + more)
        updates, state = opt.update(gradient, state, params, value=jnp.sum(gradient**2))
        return optax.apply_updates(params, updates), state

    return opt, step


@functools.cache
def forecasts(phases):
    return jax.jit(lambda machine: forecast(phases or Cycle(predict_steps=0), machine))


def machines_of(predictor, phases, noise=0.0, broken=()):
    """The machine before each step of a run, and after the last, on the host."""
    opt, step = compiled(predictor, phases)
    params, found = jnp.zeros(8), []
    state = opt.init(params)
    for count in range(STEPS):
        found.append(state.machine.unpacked())
        more = jnp.full(8, jnp.nan) if count in broken else noise * draw(count, 8)
        params, state = step(params, state, more)
    return jax.device_get([*found, state.machine.unpacked()])


def kind_of(machine):
    """Of the coming step, from what the machine's scalars mean."""
    if machine.errors is None:
        return StepKind.PLAIN
    if machine.phase == Phase.PREDICT:
        return StepKind.PREDICTED
    if machine.guard is not None:
        return StepKind.WATCHED if machine.guard.asleep == 0 else StepKind.PLAIN
    is_watched = machine.calibration is not None or machine.phase == Phase.CORRECT
    return StepKind.WATCHED if is_watched else StepKind.RECORDED


@pytest.mark.parametrize("phases", [Guarded(), Guarded(warmup_steps=50)], ids=["default", "long warm-up"])
@pytest.mark.parametrize("noise", [0.02, 0.1, 1.0])
def test_watched_steps_are_foreseen_where_no_leap_can_start(phases, noise):
    """With some noise nothing is predicted well enough for leaps; with more of it, the guard falls asleep."""
    machines = machines_of(Secants(4), phases, noise=noise)
    kinds, lengths, foresee = [kind_of(machine) for machine in machines], [], forecasts(phases)
    for count, machine in enumerate(machines):
        runs = foresee(machine).tolist()
        coming = [kind for kind, num in runs for _ in range(num)]
        assert kinds[count : count + len(coming)] == coming[: len(kinds) - count]
        lengths.append(runs[0][1])
    awake = [length for length, kind in zip(lengths, kinds, strict=True) if kind is StepKind.WATCHED]
    assert sum(awake) > 4 * len(awake)
    assert kinds.count(StepKind.PLAIN) > 15


@pytest.mark.parametrize(
    ("predictor", "phases", "least"),
    [
        pytest.param(Window(), Guarded(), 1, id="guarded"),
        pytest.param(Window(), Cycle(), 5, id="calibrated cycle"),
        pytest.param(UNCALIBRATED, Cycle(), 5, id="cycle"),
        pytest.param(
            UNCALIBRATED, Cycle(full_steps=3, predict_steps=7, correct_every=1), 1, id="every other corrected"
        ),
        pytest.param(UNCALIBRATED, Cycle(full_steps=1, predict_steps=4, correct_every=9), 4, id="never corrected"),
        pytest.param(UNCALIBRATED, AdaptiveCycle(), 5, id="adaptive"),
        pytest.param(UNCALIBRATED, LegacyCycle(full_steps=7, predict_steps=20), 10, id="legacy"),
        pytest.param(Momentum(), Cycle(warmup_steps=0, full_steps=1, predict_steps=4), 4, id="no warm-up"),
        pytest.param(Momentum(), QualityCycle(most_error=0.05), 5, id="quality"),
        pytest.param(Window(), None, FOREVER, id="none"),
    ],
)
@pytest.mark.parametrize("broken", [(), (0, 5, 31, 32, 77)], ids=["finite", "broken"])
def test_what_is_certain_comes(predictor, phases, least, broken):
    machines = machines_of(predictor, phases, broken=broken)
    kinds = [kind_of(machine) for machine in machines]
    foresee = forecasts(phases)
    lengths = []
    for count, machine in enumerate(machines):
        runs = foresee(machine).tolist()
        assert runs[0][1] >= 1
        coming = [kind for kind, num in runs for _ in range(min(num, STEPS))]
        assert kinds[count : count + len(coming)] == coming[: len(kinds) - count]
        lengths.append(sum(num for _, num in runs))
    assert max(lengths[20:]) >= least


def test_a_sleep_is_known_in_advance():
    """On noise, whose length the guard has set."""
    machines = machines_of(Secants(), Guarded(), noise=30.0)
    asleep = [count for count, machine in enumerate(machines) if machine.guard.asleep == 64]
    assert asleep
    runs = forecast(Guarded(), machines[asleep[0]])
    assert runs.tolist() == [[StepKind.PLAIN, 64], [StepKind.WATCHED, 1]]
