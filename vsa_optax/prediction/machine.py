"""The phase machine: a dozen scalars decide which steps run a backward pass.

    WARMUP  until ``warmup_steps`` gradients are recorded
    FULL    ``full_steps`` true gradients
    PREDICT ``predict_steps`` steps without a backward pass, except that
    CORRECT takes one true gradient whenever the step within the phase is a positive multiple of ``correct_every``

``phase`` is the phase of the *coming* step: `advance` is called after that step and decides the next phase. Steps of
PREDICT and CORRECT count together. CORRECT takes precedence over the end of the phase (20 steps corrected every 5 take
21), and two CORRECT steps are never adjacent. ``predict_steps=0`` stays in FULL. With `Guarded`, FULL lasts until the
guard starts a leap, and PREDICT until the leap ends. There are no CORRECT steps: the FULL step after the leap corrects.

The machine reads replicated scalars only, so devices that run the same program agree on the phase.
"""

import enum
import weakref

import jax
import jax.numpy as jnp
import optax

from vsa_optax.kernels import numerics
from vsa_optax.prediction import guard as guards
from vsa_optax.prediction.guard import Moved, Plan
from vsa_optax.prediction.machine_state import AdaptiveLengthsState, Machine, PredictionErrorState
from vsa_optax.prediction.phases import AdaptiveCycle, Cycle, Guarded, LegacyCycle, QualityCycle
from vsa_optax.prediction.predictors.base import Calibration, Comparison
from vsa_optax.prediction.predictors.momentum import MomentumCalibrationState

# The adaptive rule and its numbers are those of the Rust crate vsa-optim-rs 0.1.1.
_RECENT_LOSSES = 100
_COMPARED_LOSSES = 10
_BETTER = 0.05  # The relative fall of the loss that counts as better.
_SHORTEST_FULL, _LONGEST_FULL = 3, 30
_SHORTEST_PREDICT, _LONGEST_PREDICT = 5, 50
# The phases, by id, of machines that repeat the loss in PREDICT; `note_repeated_loss` adds them.
_repeating: weakref.WeakValueDictionary[int, jax.Array] = weakref.WeakValueDictionary()


class Phase(enum.IntEnum):
    """The phase of a step: WARMUP, FULL and CORRECT run the backward pass, PREDICT does not."""

    WARMUP = 0
    FULL = 1
    PREDICT = 2
    CORRECT = 3


def ever_predicts(phases: Guarded | Cycle) -> bool:
    """Whether these settings ever predict a step."""
    return isinstance(phases, Guarded) or phases.predict_steps > 0


def shortest_full(phases: AdaptiveCycle) -> int:
    """The smallest number of steps that a FULL phase may have."""
    return min(phases.shortest_full if isinstance(phases, LegacyCycle) else _SHORTEST_FULL, phases.full_steps)


def init(phases: Guarded | Cycle, calibration: Calibration | None = None) -> Machine:
    """The machine before its first step, with the initial calibration."""

    def zero() -> jax.Array:
        return jnp.zeros([], jnp.int32)

    adaptive = None
    if isinstance(phases, AdaptiveCycle):
        adaptive = AdaptiveLengthsState(
            full_length=jnp.asarray(phases.full_steps, jnp.int32),
            predict_length=jnp.asarray(phases.predict_steps, jnp.int32),
            num_losses=zero(),
            losses=jnp.zeros([_RECENT_LOSSES], jnp.float32),
        )
    return Machine(
        phase=jnp.where(phases.warmup_steps > 0, jnp.int32(Phase.WARMUP), jnp.int32(Phase.FULL)),
        steps_in_phase=zero(),
        warmup_steps=zero(),
        full_steps=zero(),
        predict_steps=zero(),
        correct_steps=zero(),
        cycles=zero(),
        nonfinite_count=zero(),
        errors=PredictionErrorState(zero(), *jnp.zeros([2], jnp.float32)) if ever_predicts(phases) else None,
        value=jnp.zeros([], jnp.float32),
        has_value=jnp.zeros([], jnp.bool_),
        adaptive=adaptive,
        calibration=calibration,
        guard=guards.init() if isinstance(phases, Guarded) else None,
        ignored_gradients=zero(),
    )


def total_steps(state: Machine) -> jax.Array:
    """``[] int32``, the number of steps taken so far, which is also the 0-based number of the coming step."""
    return state.warmup_steps + state.full_steps + state.predict_steps + state.correct_steps


def ends_leap(state: Machine) -> jax.Array:
    """``[] bool``: whether the coming step is the true step after a leap, or after the correction that ended it."""
    is_first = (state.phase == Phase.FULL) & (state.steps_in_phase == 0) & (state.cycles > 0)
    return is_first | (state.phase == Phase.CORRECT)


def last_value(state: Machine) -> jax.Array:
    """``[] float32``, the last finite loss that an update received; NaN before the first.

    If JAX is set to stop at each NaN, infinity is used instead.
    """
    unknown = jnp.inf if jax.config.jax_debug_nans else jnp.nan  # type: ignore[attr-defined] # Made at run time.
    return jnp.where(state.has_value, state.value, unknown)


def note_repeated_loss(state: Machine) -> None:
    """Remembers, for the duration of a trace, that no forward pass runs in this machine's PREDICT steps.

    `value_and_grad_by_phase` and ``update`` see the same machine, and its arrays are the same Python objects if both
    are called in one trace. So the former can inform the latter; only warnings and errors depend on it.
    """
    _repeating[id(state.phase)] = state.phase


def repeats_loss(state: Machine) -> bool:
    """Whether this machine's PREDICT steps are known to repeat the loss."""
    return _repeating.get(id(state.phase)) is state.phase


def advance(
    phases: Guarded | Cycle,
    state: Machine,
    *,
    is_finite: jax.Array,
    is_ignored: jax.Array | bool = False,
    value: jax.Array | None,
    moved: Moved | None = None,
    comparison: Comparison | None = None,
) -> Machine:
    """Counts the step that was just done, learns from its comparison, and decides the next phase.

    Args:
        phases: the static settings.
        state: the machine before the step, whose ``phase`` the step has performed.
        is_finite: ``[] bool``, false if the step's gradient was skipped. Such a step does not count in the warm-up.
        is_ignored: ``[] bool``, true if the step was predicted but received a non-zero gradient.
        value: ``[]``, the step's loss, or None.
        moved: the movement of the parameters away from the newest record; None if no step is ever predicted.
        comparison: the comparison of the true gradient or update with its prediction; None if no step is ever
            predicted.
    """
    plan = None
    if comparison is not None:
        assert moved is not None
        state, plan = _learn(phases, state, moved, comparison)
    phase, adaptive = state.phase, state.adaptive
    recorded_or_later = is_finite | (phase != Phase.WARMUP)
    done = state.steps_in_phase + recorded_or_later.astype(jnp.int32)
    has_value, last_value = state.has_value, state.value
    if value is not None:
        loss = jnp.asarray(value, jnp.float32)
        is_known = jnp.isfinite(loss)
        # In PREDICT the caller's value is the last one, which `value_and_grad_by_phase` repeated. If the caller changes
        # it, e.g. divides it by a loss scale, remembering it would repeat the change at every step.
        is_measured = is_known & (phase != Phase.PREDICT)
        has_value, last_value = has_value | is_measured, jnp.where(is_measured, loss, last_value)
        if adaptive is not None:
            adaptive = _remember_loss(adaptive, loss, is_known)

    following = _following(phases, plan, adaptive, phase, done)
    if isinstance(phases, QualityCycle):
        assert isinstance(state.calibration, MomentumCalibrationState)
        # Nothing is measured in a leap, so this never ends one.
        is_poor = state.calibration.exceeds(phases.most_error)
        following = jnp.where(is_poor, jnp.int32(Phase.FULL), following)
    was_leap = phase >= Phase.PREDICT
    starts_full = (following == Phase.FULL) & (phase != Phase.FULL)
    starts_leap = (following == Phase.PREDICT) & (phase == Phase.FULL)
    if adaptive is not None:
        assert isinstance(phases, AdaptiveCycle)
        adaptive = _adapt(phases, adaptive, starts_full)
    return state._replace(
        phase=following,
        steps_in_phase=jnp.where(starts_full | starts_leap, 0, done),
        warmup_steps=_count_if(phase == Phase.WARMUP, state.warmup_steps),
        full_steps=_count_if(phase == Phase.FULL, state.full_steps),
        predict_steps=_count_if(phase == Phase.PREDICT, state.predict_steps),
        correct_steps=_count_if(phase == Phase.CORRECT, state.correct_steps),
        cycles=_count_if(was_leap & starts_full, state.cycles),
        nonfinite_count=_count_if(~is_finite, state.nonfinite_count),
        value=last_value,
        has_value=has_value,
        adaptive=adaptive,
        ignored_gradients=_count_if(is_ignored, state.ignored_gradients),
    )


def _following(
    phases: Guarded | Cycle,
    plan: Plan | None,
    adaptive: AdaptiveLengthsState | None,
    phase: jax.Array,
    done: jax.Array,
) -> jax.Array:
    """``[] int32``, the phase that follows ``phase`` after ``done`` of its steps."""
    if isinstance(phases, Guarded):
        assert plan is not None
        in_full = jnp.where(plan.leaps, Phase.PREDICT, Phase.FULL)
        in_leap = jnp.where(done >= plan.length, Phase.FULL, Phase.PREDICT)
    else:
        full_length: int | jax.Array = phases.full_steps if adaptive is None else adaptive.full_length
        predict_length: int | jax.Array = phases.predict_steps if adaptive is None else adaptive.predict_length
        after_full = Phase.PREDICT if ever_predicts(phases) else Phase.FULL
        in_full = jnp.where(done >= full_length, after_full, Phase.FULL)
        in_leap = jnp.where(done >= predict_length, Phase.FULL, Phase.PREDICT)
        wants_correction = (done % phases.correct_every == 0) & (phase != Phase.CORRECT)
        in_leap = jnp.where(wants_correction, Phase.CORRECT, in_leap)
    return jnp.select(
        [phase == Phase.WARMUP, phase == Phase.FULL],
        [jnp.where(done >= phases.warmup_steps, Phase.FULL, Phase.WARMUP), in_full],
        in_leap,
    ).astype(jnp.int32)


def _learn(
    phases: Guarded | Cycle, state: Machine, moved: Moved, comparison: Comparison
) -> tuple[Machine, Plan | None]:
    """The machine with the step's error in its mean and in the guard, and the guard's plan."""
    assert state.errors is not None
    error, plan = comparison.error, None
    is_after_gap = (moved.horizon > 1) | (state.phase == Phase.CORRECT)
    is_after_leap = is_after_gap if state.guard is None else state.guard.leap > 0
    is_counted = comparison.is_measured & is_after_leap
    num_measured = _count_if(is_counted, state.errors.num_measured)
    mean = state.errors.mean + (error - state.errors.mean) / jnp.maximum(num_measured, 1).astype(jnp.float32)
    errors = PredictionErrorState(
        num_measured=num_measured,
        mean=jnp.where(is_counted, numerics.saturating_cast(mean, jnp.float32), state.errors.mean),
        last=jnp.where(is_counted, error, state.errors.last),
    )
    if isinstance(phases, Guarded):
        assert state.guard is not None
        is_predict = state.phase == Phase.PREDICT
        watched, plan = guards.after(phases, state.guard, is_predict, error, comparison.is_measured, moved)
        state = state._replace(guard=watched)
    return state._replace(errors=errors, calibration=comparison.experience.calibration), plan


def _count_if(pred: jax.Array | bool, count: jax.Array) -> jax.Array:
    return count + jnp.asarray(pred, jnp.int32)


def _remember_loss(state: AdaptiveLengthsState, loss: jax.Array, is_known: jax.Array) -> AdaptiveLengthsState:
    slot = state.num_losses % _RECENT_LOSSES
    return state._replace(
        losses=state.losses.at[slot].set(jnp.where(is_known, loss, state.losses[slot])),
        num_losses=jnp.where(is_known, optax.safe_increment(state.num_losses), state.num_losses),
    )


def _adapt(phases: AdaptiveCycle, state: AdaptiveLengthsState, is_due: jax.Array) -> AdaptiveLengthsState:
    """The rule of vsa-optim-rs: FULL grows and PREDICT shrinks while the loss rises, and the reverse while it falls.

    The mean of the first ten of the recent losses is compared with that of the last ten. A user's setting beyond one
    of the bounds widens the bound.
    """
    known = jnp.minimum(state.num_losses, _RECENT_LOSSES)
    offsets = jnp.arange(_COMPARED_LOSSES, dtype=jnp.int32)
    first = jnp.mean(state.losses[(state.num_losses - known + offsets) % _RECENT_LOSSES])
    last = jnp.mean(state.losses[(state.num_losses - _COMPARED_LOSSES + offsets) % _RECENT_LOSSES])
    is_due &= known >= 2 * _COMPARED_LOSSES
    is_worse = is_due & (last - first > phases.loss_threshold * jnp.abs(first))
    is_better = is_due & ~is_worse & (first - last > _BETTER * jnp.abs(first))

    def moved(length: jax.Array, worse: int, better: int, low: int, high: int) -> jax.Array:
        step = jnp.where(is_worse, worse, jnp.where(is_better, better, 0))
        return jnp.clip(length + step, low, high).astype(jnp.int32)

    if isinstance(phases, LegacyCycle):
        full_length, predict_length = phases.moved(state.full_length, state.predict_length, is_worse, is_better)
        return state._replace(full_length=full_length, predict_length=predict_length)
    full, predict = phases.full_steps, phases.predict_steps
    return state._replace(
        full_length=moved(state.full_length, 2, -1, shortest_full(phases), max(_LONGEST_FULL, full)),
        predict_length=moved(
            state.predict_length, -5, 3, min(_SHORTEST_PREDICT, predict), max(_LONGEST_PREDICT, predict)
        ),
    )
