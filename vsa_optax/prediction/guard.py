"""The guard: decides from the errors of the last predictions how many steps to predict before the next true one.

A leap is a run of predicted steps between two true ones. Each true step compares its gradient (or update) x with the
prediction x̂: ``e = ||x - x̂||² / ||x||²``. The error is assumed to be of second order in the distance, ``||x - x̂|| ~
h²``, where h = P + 1 steps at the end of a leap of P predictions. The constant of this law is the worst recent one. The
next leap has the length at which the error reaches τ, the square of the tolerance:

    κ <- max(e / h⁴, 3/4 κ)
    P + 1 <- min(1.6 h, 0.9 (τ / κ)^(1/4)),       P <= longest

If P is below 3/4 there is no leap, and every step is the optimizer's own, until ``κ < τ / 4``. The first leap then has
one prediction. On mini-batches nothing predicts gradients to within τ, so the guard never leaps, and all steps are
those of the optimizer alone.

Watching has a cost: a true step that is recorded and compared takes up to a quarter longer. So the guard keeps an
account of steps that it watched without benefit:

    u <- max(0, u + (2 if e > 1/2 else 1) - 4 P)                after a leap of P predictions, or with P = 0 after none

When u reaches 64 and no leap follows, the guard sleeps: the next 16 true steps are neither recorded nor compared, then
twice as many each time, up to 1024, until a leap ends with ``e < τ`` and u = 0. If gradients are noise, it watches 32
steps at a time. If they are nearly predictable, but not well enough for leaps, the number is 64. The account starts at
-64, since the first steps of a run are the hardest to predict, and below 0 a leap does not lower it.

The plan counts steps, but an error grows with the distance that the parameters move. So each comparison also measures
two lengths: w, the sum of the norms of the updates emitted since the newest record, and d, the distance of the
parameters from it. A leap ends early, or does not begin, once one of them exceeds twice its usual pace:

    p <- w / h,   q <- d / h                          h steps from the newest record
    a true step is next    if w > 2 p (P + 1) or d > 2 q (P + 1)

w includes the update that a step has just emitted, so after a jump of the rate the next step is already a true one.
(With one more predicted step, a host that launches steps would know the next kind one step ahead. But in one of eight
such cases in benchmarks/guard_way.py the loss then peaked 2.7 times as high as in plain training.) `predict_gradients`
emits gradients, and has no w. Nor does w include the changes that later links of a chain make to the updates of
`phase_switched`. There, d shows the jump one step later; only secants have d. If p or q is 0, nothing was measured, and
the length is not bounded.

While the guard sleeps, w does not grow, and p does not change.

If w or d is 0, the parameters have not moved. Then every prediction is perfect, which is not evidence: the step counts
as one without a comparison, and no leap follows.

The state is a few scalars, which are the same on every device, like parameters and updates. The loss is not needed.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vsa_optax.prediction.phases import Guarded

# Growth and safety factor are as in the step-size control of ODE solvers: Hairer, Nørsett and Wanner, "Solving ordinary
# differential equations I" (1993), section II.4, has 1.5 to 5 and 0.8 to 0.9. All others are chosen by hand.
# benchmarks/constants.log varies those above _HOPELESS_ERROR; its rows of sleeping are of an earlier rule.
_GROWTH, _SAFETY = 1.6, 0.9
_FORGET = 0.75  # The decay of κ per true step.
_MOST_ERROR = 100.0  # The largest error that counts, so that κ decays in time.
_SHORTEST_LEAP = 0.75  # A leap of this length rounds to one prediction.
_START = 0.25  # The bound of κ for the first leap, relative to τ.
_SLACK = 2.0  # The factor of the pace. No other value was tried; benchmarks/guard_way.log shows its effect.
# The fewest steps watched at a time, 32, are twice the default window of 16 changes; at the longest sleep they are 3 %.
_HOPELESS_ERROR, _MOST_WATCHED = 0.5, 64
_WORTH = 4  # The number of watched steps that a prediction pays for: each costs a quarter of a step, and it saves one.
_SHORTEST_SLEEP, _LONGEST_SLEEP = 16, 1024


class GuardAction(enum.IntEnum):
    """The last action of the guard.

    Attributes:
        NONE: the guard has not acted yet.
        GREW: it lengthened the next leap, or started one.
        SHRANK: it shortened the next leap.
        GAVE_UP: it predicts nothing for now, since the error of the last prediction was too large.
        SLEPT: it stopped recording and comparing for a while, since nothing was predictable for long.
    """

    NONE = 0
    GREW = 1
    SHRANK = 2
    GAVE_UP = 3
    SLEPT = 4


class GuardState(NamedTuple):
    """State of the guard.

    Attributes:
        length: ``[] float32``, P, the number of predictions in the next leap; 0 for no leap.
        constant: ``[] float32``, κ.
        leap: ``[] int32``, the number of predictions since the last true step.
        hopeless: ``[] int32``, u, the account of true steps that were watched without benefit.
        asleep: ``[] int32``, the number of coming true steps that are neither recorded nor compared.
        sleep: ``[] int32``, the length of the next sleep.
        action: ``[] int32``, the last `GuardAction`.
        way: ``[] float32``, w, the summed norms of the updates emitted since the newest record, without those emitted
            while asleep. This field and the following come last: `vsa_optax.checkpoint` restores them as 0 from a
            checkpoint that was made before they existed.
        pace: ``[] float32``, p, which is w per step at the last comparison; 0 before the first, without a bound.
        drift: ``[] float32``, q, which is d per step at the last comparison; 0 before the first.
    """

    length: jax.Array
    constant: jax.Array
    leap: jax.Array
    hopeless: jax.Array
    asleep: jax.Array
    sleep: jax.Array
    action: jax.Array
    way: jax.Array
    pace: jax.Array
    drift: jax.Array


class Moved(NamedTuple):
    """The movement of the parameters away from the newest record.

    Attributes:
        horizon: ``[] float32``, the number of steps from the newest record to the parameters before the step.
        distance: ``[] float32``, the distance from the newest record's parameters to those before the step; None if the
            predictor does not read the parameters.
        emitted: ``[] float32``, the norm of the emitted update; None if a gradient is emitted.
        is_recorded: ``[] bool``, whether the step is recorded.
    """

    horizon: jax.Array
    distance: jax.Array | None
    emitted: jax.Array | None
    is_recorded: jax.Array


class Plan(NamedTuple):
    """The guard's plan for the phase machine.

    Attributes:
        leaps: ``[] bool``, whether a FULL phase ends now.
        length: ``[] int32``, the number of steps in a PREDICT phase; 0 if it ends now because the parameters have moved
            too far.
    """

    leaps: jax.Array
    length: jax.Array


def init() -> GuardState:
    """The guard before its first step, without a leap."""
    return GuardState(
        length=jnp.zeros([], jnp.float32),
        constant=jnp.zeros([], jnp.float32),
        leap=jnp.zeros([], jnp.int32),
        hopeless=jnp.asarray(-_MOST_WATCHED, jnp.int32),
        asleep=jnp.zeros([], jnp.int32),
        sleep=jnp.asarray(_SHORTEST_SLEEP, jnp.int32),
        action=jnp.asarray(GuardAction.NONE, jnp.int32),
        way=jnp.zeros([], jnp.float32),
        pace=jnp.zeros([], jnp.float32),
        drift=jnp.zeros([], jnp.float32),
    )


def after(
    settings: Guarded,
    state: GuardState,
    is_predict: jax.Array,
    error: jax.Array,
    is_measured: jax.Array,
    moved: Moved,
) -> tuple[GuardState, Plan]:
    """The guard after a step, and its plan.

    Args:
        settings: the static settings.
        state: the guard before the step.
        is_predict: ``[] bool``, whether the step was predicted.
        error: ``[] float32``, ``||x - x̂|| / ||x||`` of a true step.
        is_measured: ``[] bool``, whether the error is known; if not, no leap follows, and nothing is learned.
        moved: the movement of the parameters away from the newest record.
    """
    was_asleep = state.asleep > 0
    is_measured &= ~_rests(state, moved)
    predicted = state._replace(leap=state.leap + 1)
    unknown = state._replace(length=jnp.zeros_like(state.length), leap=jnp.zeros_like(state.leap))
    judged = jax.tree.map(lambda j, u: jnp.where(is_measured, j, u), _judged(settings, state, error**2, moved), unknown)
    slept = state._replace(asleep=state.asleep - 1)
    judged = jax.tree.map(lambda s, j: jnp.where(was_asleep, s, j), slept, judged)
    state = jax.tree.map(lambda p, j: jnp.where(is_predict, p, j), predicted, judged)
    if moved.emitted is not None:
        way = jnp.where(moved.is_recorded, 0, state.way) + moved.emitted
        state = state._replace(way=jnp.where(was_asleep, state.way, way))
    length = leap_length(settings, state)
    is_far = _is_far(state, moved, length + 1)
    return state, Plan(leaps=(state.length > 0) & ~is_far, length=jnp.where(is_far, 0, length))


def leap_length(settings: Guarded, state: GuardState) -> jax.Array:
    """``[] int32``, the number of predictions in the present or next leap; a large movement may end it earlier."""
    return jnp.clip(jnp.round(state.length), 1, settings.longest).astype(jnp.int32)


def watched_for_certain(settings: Guarded, state: GuardState, num_warmup: jax.Array) -> jax.Array:
    """``[] int32``: the number of watched true steps that are certain to come, at least one, whatever their errors.

    While awake and after a true step, the guard starts a leap only if ``κ < τ / 4``, and a step leaves at least 3/4 of
    κ. After a leap κ is below that, so the number is 1. The guard falls asleep when u reaches 64, and a step adds at
    most 2.

    Args:
        settings: the static settings.
        state: the guard before the coming step.
        num_warmup: ``[] int32``, the number of coming steps in the warm-up; a leap may start only after the last.
    """
    tiny = jnp.finfo(jnp.float32).tiny
    excess = jnp.log(jnp.maximum(state.constant, tiny)) - jnp.log(_START * settings.tolerance**2)
    to_leap = jnp.ceil(excess / -jnp.log(_FORGET) - 0.01)  # The rounding never gives too many.
    to_sleep = (_MOST_WATCHED - state.hopeless + 1) // 2
    return jnp.clip(jnp.minimum(jnp.maximum(to_leap, num_warmup), to_sleep), 1, _MOST_WATCHED).astype(jnp.int32)


def _rests(state: GuardState, moved: Moved) -> jax.Array:
    """``[] bool``: whether the parameters have not moved since the newest record, as far as is known."""
    rests = jnp.array(False)
    if moved.distance is not None:
        rests |= moved.distance == 0
    if moved.emitted is not None:
        rests |= state.way == 0
    return rests


def _is_far(state: GuardState, moved: Moved, steps: jax.Array) -> jax.Array:
    """``[] bool``: whether the parameters have moved further than ``steps`` steps at the measured pace allow."""
    most = _SLACK * steps.astype(jnp.float32)
    is_far = (state.pace > 0) & (state.way > most * state.pace)
    if moved.distance is not None:
        distance = jnp.where(moved.is_recorded, 0, moved.distance)
        is_far |= (state.drift > 0) & (distance > most * state.drift)
    return is_far


def _judged(settings: Guarded, state: GuardState, error: jax.Array, moved: Moved) -> GuardState:
    """The guard after a true step with this squared error."""
    tolerated = settings.tolerance**2
    distance = (state.leap + 1).astype(jnp.float32)
    constant = jnp.maximum(jnp.minimum(error, _MOST_ERROR) / distance**4, _FORGET * state.constant)
    reach = _SAFETY * (tolerated / jnp.maximum(constant, jnp.finfo(jnp.float32).tiny)) ** 0.25
    length = jnp.minimum(reach, _GROWTH * distance) - 1
    length = jnp.where(length < _SHORTEST_LEAP, 0, jnp.minimum(length, settings.longest))
    ends_leap = state.leap > 0
    has_slept = moved.horizon > distance
    length = jnp.where(ends_leap, length, jnp.where(constant < _START * tolerated, 1.0, 0.0))
    hopeless = state.hopeless + jnp.where(error > _HOPELESS_ERROR, 2, 1) - _WORTH * state.leap
    hopeless = jnp.maximum(hopeless, jnp.minimum(state.hopeless, 0))
    falls_asleep = (hopeless >= _MOST_WATCHED) & (length == 0)
    sleep = jnp.where(ends_leap & (error < tolerated) & (hopeless <= 0), _SHORTEST_SLEEP, state.sleep)
    grew, shrank, gave_up, slept = (  # JAX 0.8.2 converts a member of an enum to int64.
        jnp.int32(action) for action in (GuardAction.GREW, GuardAction.SHRANK, GuardAction.GAVE_UP, GuardAction.SLEPT)
    )
    action = jnp.select(
        [length > state.length, length == state.length, length > 0], [grew, state.action, shrank], gave_up
    )
    action = jnp.where(falls_asleep, slept, action)
    return GuardState(
        length=length,
        constant=constant,
        leap=jnp.zeros_like(state.leap),
        hopeless=jnp.where(falls_asleep, 0, hopeless),
        asleep=jnp.where(falls_asleep, sleep, 0),
        sleep=jnp.where(falls_asleep, jnp.minimum(2 * sleep, _LONGEST_SLEEP), sleep),
        action=action,
        way=state.way,
        pace=jnp.where(has_slept, state.pace, state.way / jnp.maximum(moved.horizon, 1)),
        drift=state.drift if moved.distance is None else moved.distance / jnp.maximum(moved.horizon, 1),
    )
