"""The guard: how many steps to predict before the next true one, from what the last predictions were worth.

A leap is what is predicted between two true steps. At the true step that ends a leap of P predictions, and at every
other one, what came is compared with what was predicted of it: ``e = ||x - x̂||² / ||x||²``. The error is taken for
one of second order in the distance, ``||x - x̂|| ~ h²`` after h = P + 1 steps; its constant is the worst of late, and
the next leap is as long as keeps the error at τ, the square of the tolerance:

    κ <- max(e / h⁴, 3/4 κ)
    P + 1 <- min(1.6 h, 0.9 (τ / κ)^(1/4)),       P <= longest

Below 3/4 there is no leap, and every step is the optimizer's own, until ``κ < τ / 4``; then it starts with a leap of
one. So on mini-batches, whose gradients nothing predicts to within τ, it never leaps, and the steps are those of the
optimizer alone.

Watching has a price: a true step that is recorded and compared takes up to a quarter longer. So the guard keeps an
account of steps that were watched for nothing:

    u <- max(0, u + (2 if e > 1/2 else 1) - 4 P)                after a leap of P predictions, or with P = 0 after none

When u reaches 64, it sleeps: the next 16 true steps are neither recorded nor compared, then twice as many each time, up
to 1024, until a leap ends with ``e < τ`` and u = 0. So where gradients are noise it watches 32 steps at a time. Where
they are nearly predictable, but not well enough for leaps, it watches 64.

The plan counts steps, but an error grows with how far the parameters move. So each comparison also measures their way
from the newest record, by two lengths: w, the sum of the norms of the updates emitted since, and d, the distance
between the parameters then and now. A leap ends early, or does not begin, once one of them is longer than this pace
allows:

    p <- w / h,   q <- d / h                          h steps from the newest record
    a true step is next    if w > 2 p (P + 1) or d > 2 q (P + 1)

w includes the update that a step has just emitted. So if the rate jumps, the coming step is already a true one. (With
one more predicted step a host that launches steps would know one ahead what comes. But in one of eight such cases in
benchmarks/guard_way.py the loss then peaked 2.7 times as high as plain training's.) But `predict_gradients` emits
gradients, and has no w; nor does w include what later links of a chain do to the updates of `phase_switched`. There d
sees the jump one step later. Only secants have it. Where p or q is 0, nothing was measured, and nothing is bounded.

While the guard sleeps the way does not count, and p stays what it was.

Where w or d is 0 the parameters rest. Then everything predicts perfectly, which is no evidence: the step counts as one
without a comparison, and no leap follows.

A few scalars, the same on every device, as parameters and updates are; the loss is not needed.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vsa_optax.prediction.phases import Guarded

# Growth and safety factor as in the step-size control of ODE solvers: Hairer, Nørsett and Wanner, "Solving ordinary
# differential equations I" (1993), section II.4, has 1.5 to 5 and 0.8 to 0.9. All others are chosen by hand.
# benchmarks/constants.log has each of them moved; those of sleeping change no loss and no pass there.
_GROWTH, _SAFETY = 1.6, 0.9
_FORGET = 0.75  # Of κ, a true step.
_MOST_ERROR = 100.0  # So that κ is forgotten in time.
_SHORTEST_LEAP = 0.75  # So that a length rounds to one prediction at least.
_START = 0.25  # Of τ: how small κ must be for the first leap.
_SLACK = 2.0  # Of the way. No other value was tried; benchmarks/guard_way.log shows what this one does.
# The fewest steps watched at a time, 32, are twice the default window of 16 changes; at the longest sleep they are 3 %.
_HOPELESS_ERROR, _MOST_WATCHED = 0.5, 64
_WORTH = 4  # Watched steps that a prediction pays for: each takes a quarter of a step more, and it saves a whole one.
_SHORTEST_SLEEP, _LONGEST_SLEEP = 16, 1024


class GuardAction(enum.IntEnum):
    """What the guard did last.

    Attributes:
        NONE: nothing yet.
        GREW: it lengthened the next leap, or started one.
        SHRANK: it shortened the next leap.
        GAVE_UP: it predicts nothing for now, since the last prediction was too far off.
        SLEPT: it stopped recording and comparing for a while, since nothing was predictable for long.
    """

    NONE = 0
    GREW = 1
    SHRANK = 2
    GAVE_UP = 3
    SLEPT = 4


class GuardState(NamedTuple):
    """What the guard knows.

    Attributes:
        length: ``[] float32``, P, predictions of the next leap; 0 for none.
        constant: ``[] float32``, κ.
        leap: ``[] int32``, predictions since the last true step.
        hopeless: ``[] int32``, u, true steps that were watched for nothing.
        asleep: ``[] int32``, coming true steps that are neither recorded nor compared.
        sleep: ``[] int32``, how many it will be the next time.
        action: ``[] int32``, the last `GuardAction`.
        way: ``[] float32``, w, the length of the updates emitted since the newest record, without those emitted while
            asleep. The fields from here on are the last, because `vsa_optax.checkpoint` takes them for 0 in a
            checkpoint that was made before they existed.
        pace: ``[] float32``, w a step, at the last comparison; 0 before the first, when there is no bound.
        drift: ``[] float32``, d a step, likewise.
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
    """How a step moves away from the newest record.

    Attributes:
        horizon: ``[] float32``, steps from there to the parameters before the step.
        distance: ``[] float32``, from the newest record's parameters to those before the step; None if the predictor
            does not read the parameters.
        emitted: ``[] float32``, the norm of the update that leaves; None if what leaves is a gradient.
        is_recorded: ``[] bool``, whether the step is recorded.
    """

    horizon: jax.Array
    distance: jax.Array | None
    emitted: jax.Array | None
    is_recorded: jax.Array


class Plan(NamedTuple):
    """What the guard wants of the phase machine.

    Attributes:
        leaps: ``[] bool``, whether a FULL phase ends now.
        length: ``[] int32``, steps of a PREDICT phase; 0 if it ends now, since the way is too long.
    """

    leaps: jax.Array
    length: jax.Array


def init() -> GuardState:
    """It starts without a leap."""
    return GuardState(
        length=jnp.zeros([], jnp.float32),
        constant=jnp.zeros([], jnp.float32),
        leap=jnp.zeros([], jnp.int32),
        hopeless=jnp.zeros([], jnp.int32),
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
    """The guard after a step, and what it wants.

    Args:
        settings: the static ones.
        state: before the step.
        is_predict: ``[] bool``, whether the step was predicted.
        error: ``[] float32``, ``||x - x̂|| / ||x||`` of a true one.
        is_measured: ``[] bool``, whether that is known; if not, there is no leap, and nothing is learned.
        moved: how the step moves away from the newest record.
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
    """``[] int32``, predictions of the next leap, or of this one, if there is one; the way may end it earlier."""
    return jnp.clip(jnp.round(state.length), 1, settings.longest).astype(jnp.int32)


def watched_for_certain(settings: Guarded, state: GuardState, num_warmup: jax.Array) -> jax.Array:
    """``[] int32``: so many true steps come that are watched, one at least, whatever they bring.

    Awake and without a leap behind it, the guard starts one only where ``κ < τ / 4``, and a step leaves 3/4 of κ at
    least; it falls asleep where u reaches 64, and a step adds 2 at most.

    Args:
        settings: the static ones.
        state: before the coming step.
        num_warmup: ``[] int32``, coming steps behind which no leap may start yet, but for the last of them.
    """
    tiny = jnp.finfo(jnp.float32).tiny
    excess = jnp.log(jnp.maximum(state.constant, tiny)) - jnp.log(_START * settings.tolerance**2)
    to_leap = jnp.ceil(excess / -jnp.log(_FORGET) - 0.01)  # Rounded so that it is never too many.
    to_leap = jnp.where(state.leap > 0, 1, to_leap)
    to_sleep = (_MOST_WATCHED - state.hopeless + 1) // 2
    return jnp.clip(jnp.minimum(jnp.maximum(to_leap, num_warmup), to_sleep), 1, _MOST_WATCHED).astype(jnp.int32)


def _rests(state: GuardState, moved: Moved) -> jax.Array:
    """``[] bool``: nothing has moved since the newest record, as far as is known."""
    rests = jnp.array(False)
    if moved.distance is not None:
        rests |= moved.distance == 0
    if moved.emitted is not None:
        rests |= state.way == 0
    return rests


def _is_far(state: GuardState, moved: Moved, steps: jax.Array) -> jax.Array:
    """``[] bool``: the way is longer than so many steps may be, as they were when last measured."""
    most = _SLACK * steps.astype(jnp.float32)
    is_far = (state.pace > 0) & (state.way > most * state.pace)
    if moved.distance is not None:
        distance = jnp.where(moved.is_recorded, 0, moved.distance)
        is_far |= (state.drift > 0) & (distance > most * state.drift)
    return is_far


def _judged(settings: Guarded, state: GuardState, error: jax.Array, moved: Moved) -> GuardState:
    """After a true step with this squared error."""
    tolerated = settings.tolerance**2
    distance = (state.leap + 1).astype(jnp.float32)
    constant = jnp.maximum(jnp.minimum(error, _MOST_ERROR) / distance**4, _FORGET * state.constant)
    reach = _SAFETY * (tolerated / jnp.maximum(constant, jnp.finfo(jnp.float32).tiny)) ** 0.25
    length = jnp.minimum(reach, _GROWTH * distance) - 1
    length = jnp.where(length < _SHORTEST_LEAP, 0, jnp.minimum(length, settings.longest))
    ends_leap = state.leap > 0
    has_slept = moved.horizon > distance
    length = jnp.where(ends_leap, length, jnp.where(constant < _START * tolerated, 1.0, 0.0))
    hopeless = jnp.maximum(state.hopeless + jnp.where(error > _HOPELESS_ERROR, 2, 1) - _WORTH * state.leap, 0)
    falls_asleep = hopeless >= _MOST_WATCHED
    length = jnp.where(falls_asleep, 0, length)
    sleep = jnp.where(ends_leap & (error < tolerated) & (hopeless == 0), _SHORTEST_SLEEP, state.sleep)
    grew, shrank, gave_up, slept = (  # JAX 0.8.2 takes an enum's member for an int64.
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
