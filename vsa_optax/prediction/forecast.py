"""Forecasts the kinds of the next steps as far as they are certain, so that the host need not wait for a device."""

import jax
import jax.numpy as jnp

from vsa_optax.core.kinds import StepKind, runs
from vsa_optax.prediction.guard import leap_length, watched_for_certain
from vsa_optax.prediction.machine import Phase, ever_predicts, shortest_full
from vsa_optax.prediction.machine_state import Machine
from vsa_optax.prediction.phases import AdaptiveCycle, Cycle, Guarded, QualityCycle

FOREVER = 2**30  # A number of steps that no run reaches.


def forecast(phases: Guarded | Cycle, state: Machine) -> jax.Array:
    """``[2, 2] int32``: a kind and the number of steps of it that are certain to come; then those certain to follow.

    The second number of steps may be 0. A non-finite gradient does not count in WARMUP and only makes it longer. No
    other result of a step can change the forecast.
    """
    if not ever_predicts(phases):
        return runs((StepKind.PLAIN, FOREVER), (StepKind.PLAIN, FOREVER))
    if isinstance(phases, Guarded):
        return _of_guard(phases, state)
    return _of_cycle(phases, state)


def _of_guard(phases: Guarded, state: Machine) -> jax.Array:
    """The forecast with a guard: a leap or a sleep may follow a watched step; in a leap, the distance moved decides."""
    assert state.guard is not None
    asleep, done = state.guard.asleep, state.steps_in_phase
    num_warmup = jnp.where(state.phase == Phase.WARMUP, phases.warmup_steps - done, 1)
    num_watched = watched_for_certain(phases, state.guard, num_warmup)
    is_last = done + 1 >= leap_length(phases, state.guard)
    true = jnp.where(
        asleep > 0,
        runs((StepKind.PLAIN, asleep), (StepKind.WATCHED, 1)),
        runs((StepKind.WATCHED, num_watched), (StepKind.WATCHED, 0)),
    )
    predicted = runs((StepKind.PREDICTED, 1), (StepKind.WATCHED, is_last))
    return jnp.where(state.phase == Phase.PREDICT, predicted, true)


def _of_cycle(phases: Cycle, state: Machine) -> jax.Array:
    """The forecast of a cycle: all is certain except the lengths of `AdaptiveCycle`, which change when FULL begins."""
    true = StepKind.RECORDED if state.calibration is None else StepKind.WATCHED
    full: int | jax.Array = phases.full_steps if state.adaptive is None else state.adaptive.full_length
    leap: int | jax.Array = phases.predict_steps if state.adaptive is None else state.adaptive.predict_length
    coming_full = shortest_full(phases) if isinstance(phases, AdaptiveCycle) else phases.full_steps
    done = state.steps_in_phase

    def num_predicted(done: int | jax.Array) -> jax.Array:
        """The number of predicted steps until a correction or the end of the phase, at least one."""
        to_correction = phases.correct_every - done % phases.correct_every
        return jnp.minimum(to_correction, jnp.maximum(jnp.asarray(leap) - done, 1))

    in_warmup = runs((true, jnp.maximum(phases.warmup_steps - done, 1)), (true, coming_full))
    in_full = runs((true, jnp.maximum(full - done, 1)), (StepKind.PREDICTED, num_predicted(0)))
    if isinstance(phases, QualityCycle):  # The error of the prediction decides the next phase.
        in_full = runs((true, 1), (true, 0))
    num = num_predicted(done)
    is_corrected = (done + num) % phases.correct_every == 0
    in_predict = jnp.where(
        is_corrected,
        runs((StepKind.PREDICTED, num), (StepKind.WATCHED, 1)),
        runs((StepKind.PREDICTED, num), (true, coming_full)),
    )
    in_correct = jnp.where(
        done + 1 >= leap,
        runs((StepKind.WATCHED, 1), (true, coming_full)),
        runs((StepKind.WATCHED, 1), (StepKind.PREDICTED, num_predicted(done + 1))),
    )
    of_phase = jnp.stack([in_warmup, in_full, in_predict, in_correct])  # In the order of `Phase`.
    return of_phase[state.phase]
