"""The guard: how far to predict, and when to take a leap back, from the losses that true steps bring with them.

A leap is what is predicted between two true steps. Let d be the drop of the log-loss over a leap of P predictions and
the true step before it, and m and s the mean and the standard deviation of the drop from one true step to the next.

    d < -max(|m|, 2 s), or not finite     the leap is taken back, P <- P / 2
    d >= (1 + P / 2) m                    P <- 1.5 P + 0.5, and predictions get longer, by 1.1 to at most 2
    else                                  P <- 0.7 P, predictions get shorter, down to 1

It leaps only where the effect of a leap can be seen, ``(P + 1) m >= s``: under mini-batch noise it soon cannot, and
what is left is the optimizer alone. Where P is below 3/4 it waits, and tries one prediction after 8 true steps, twice
as many after each failure, up to 256, and half as many after each success. Every fourth leap is followed by two true
steps, for m and s. Without losses a leap counts as good where the prediction at its end explains half of what came,
and as bad where it explains nothing.

All of it is a dozen scalars, the same on every device.
"""

import dataclasses
import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vsa_optax.transforms.step_result import StepResult

_RATE = 0.2  # Of the averages.
_LONGEST_BOOST = 2.0
_SHORTEST_WAIT, _LONGEST_WAIT = 8.0, 256.0
_LEAPS_BETWEEN_PAIRS = 4
_TOLERANCE = 0.5


class GuardAction(enum.IntEnum):
    """What the guard did last."""

    NONE, GREW, SHRANK, ROLLED_BACK, GAVE_UP = 0, 1, 2, 3, 4


class GuardState(NamedTuple):
    """What the guard knows.

    Attributes:
        length: ``[] float32``, P, predictions of a leap.
        boost: ``[] float32``, what predicted updates are multiplied by.
        drop: ``[] float32``, m, the mean drop of the log-loss from one true step to the next.
        variance: ``[] float32``, s².
        num_drops: ``[] int32``, drops seen.
        idle: ``[] int32``, true steps since the guard gave up.
        wait: ``[] float32``, true steps until it tries again.
        since_leap: ``[] int32``, true steps since the last leap, the one at its end included.
        leap: ``[] int32``, predictions since the last true step.
        leaps: ``[] int32``, leaps so far.
        rollbacks: ``[] int32``, leaps taken back.
        loss: ``[] float32``, log-loss of the last true step.
        has_loss: ``[] bool``, whether it is known.
        action: ``[] int32``, the last `GuardAction`.
        moved: ``[K] float32``, the present leap as weights of the predictor's features, without calibration.
    """

    length: jax.Array
    boost: jax.Array
    drop: jax.Array
    variance: jax.Array
    num_drops: jax.Array
    idle: jax.Array
    wait: jax.Array
    since_leap: jax.Array
    leap: jax.Array
    leaps: jax.Array
    rollbacks: jax.Array
    loss: jax.Array
    has_loss: jax.Array
    action: jax.Array
    moved: jax.Array


class Plan(NamedTuple):
    """What the guard wants of the phase machine.

    Attributes:
        leaps: ``[] bool``, whether a FULL phase may end now.
        ends: ``[] bool``, whether a PREDICT phase must.
        length: ``[] int32``, steps of a PREDICT phase.
    """

    leaps: jax.Array
    ends: jax.Array
    length: jax.Array


@dataclasses.dataclass(frozen=True)
class Guard:
    """The bounds it keeps to, and whether it can undo a leap and lengthen one.

    Attributes:
        full_steps: a FULL phase is at most so long before the guard leaps, if it wants to.
        predict_steps: a PREDICT phase is at most so long.
        undoes: whether what is predicted are the updates themselves.
    """

    full_steps: int
    predict_steps: int
    undoes: bool

    def init(self, num_features: int) -> GuardState:
        """It starts with leaps of one."""

        def number(value: float) -> jax.Array:
            return jnp.asarray(value, jnp.float32)

        def count() -> jax.Array:
            return jnp.zeros([], jnp.int32)

        return GuardState(
            length=number(1.0),
            boost=number(1.0),
            drop=number(0.0),
            variance=number(0.0),
            num_drops=count(),
            idle=count(),
            wait=number(_SHORTEST_WAIT),
            since_leap=count(),
            leap=count(),
            leaps=count(),
            rollbacks=count(),
            loss=number(0.0),
            has_loss=jnp.zeros([], jnp.bool_),
            action=count(),
            moved=jnp.zeros([num_features], jnp.float32),
        )

    def takes_back(self, state: GuardState, is_true_step: jax.Array, loss: jax.Array | None) -> jax.Array:
        """``[] bool``: whether the leap that ends with this true step, at this loss, is to be undone."""
        if loss is None or not self.undoes:
            return jnp.array(False)
        drop = state.loss - _log(loss)
        rose = drop < -jnp.maximum(jnp.abs(state.drop), 2 * jnp.sqrt(state.variance))
        return is_true_step & (state.leap > 0) & state.has_loss & (rose | ~jnp.isfinite(loss))

    def emitted(self, state: GuardState, is_taken_back: jax.Array, weights: jax.Array, reach: jax.Array) -> jax.Array:
        """``[L, K]``: the features' weights in a prediction, or in what undoes the leap, from the calibrated ones."""
        safe = jnp.where(reach != 0, reach, 1)
        # While a leap lasts, neither records nor coefficients change: in sum it was this much of each feature.
        return weights * jnp.where(is_taken_back, -state.moved / safe, state.boost)

    def after(
        self,
        state: GuardState,
        is_predict: jax.Array,
        is_taken_back: jax.Array,
        reach: jax.Array,
        loss: jax.Array | None,
        result: StepResult,
    ) -> GuardState:
        """After a step; ``reach``, ``[K]``, is what the features were multiplied by if it was predicted."""
        assert result.error is not None
        assert result.is_measured is not None
        predicted = state._replace(leap=state.leap + 1, moved=state.moved + state.boost * reach)
        gain = jnp.where(result.is_measured, 1 - result.error**2, 0)
        judged = self._judged(state, loss, gain, is_taken_back, result.is_finite)
        return jax.tree.map(lambda p, j: jnp.where(is_predict, p, j), predicted, judged)

    def _judged(
        self,
        state: GuardState,
        loss: jax.Array | None,
        gain: jax.Array,
        is_taken_back: jax.Array,
        is_finite: jax.Array,
    ) -> GuardState:
        """After a true step.

        Args:
            state: before it.
            loss: ``[]``, the step's; None if it was not given.
            gain: ``[] float32``, what share of what came was predicted, ``1 - ||y - ŷ||² / ||y||²``.
            is_taken_back: ``[] bool``, whether the leap that it ended was undone.
            is_finite: ``[] bool``, whether its gradient was.
        """
        ends_leap = state.leap > 0
        good: jax.Array
        bad: jax.Array
        if loss is None:
            good, bad = gain >= _TOLERANCE, gain <= 0
            log_loss, is_known = state.loss, jnp.array(False)
        else:
            log_loss = _log(loss)
            is_known = jnp.isfinite(loss) & is_finite
            drop = state.loss - log_loss
            state = self._averaged(state, drop, is_known & state.has_loss & ~ends_leap)
            good = drop >= (1 + _TOLERANCE * state.leap) * state.drop
            bad = ~is_finite | ~(drop >= -jnp.maximum(jnp.abs(state.drop), 2 * jnp.sqrt(state.variance)))
        bad = ends_leap & (bad | is_taken_back)
        good = ends_leap & good & ~bad & (gain > 0)
        fair = ends_leap & ~good & ~bad
        longest = jnp.float32(self.predict_steps)
        length = jnp.where(good, jnp.minimum(1.5 * state.length + 0.5, longest), state.length)
        length = jnp.where(fair, 0.7 * length, jnp.where(bad, 0.5 * length, length))
        boost = jnp.where(good, state.boost * 1.1, jnp.where(fair | bad, state.boost / 1.2, state.boost))
        failed = bad | (fair & (state.leap <= 1))
        wait = jnp.where(good, state.wait / 2, jnp.where(failed, state.wait * 2, state.wait))
        action = jnp.select(
            [is_taken_back, good, fair | bad],
            [GuardAction.ROLLED_BACK, GuardAction.GREW, GuardAction.SHRANK],
            state.action,
        )
        keeps_loss = is_known & ~is_taken_back
        return state._replace(
            length=length,
            boost=jnp.clip(boost, 1.0, _LONGEST_BOOST if self.undoes else 1.0),
            wait=jnp.clip(wait, _SHORTEST_WAIT, _LONGEST_WAIT),
            since_leap=jnp.where(is_taken_back, 0, jnp.where(ends_leap, 1, state.since_leap + 1)),
            leap=jnp.zeros_like(state.leap),
            leaps=state.leaps + ends_leap,
            rollbacks=state.rollbacks + is_taken_back,
            # A leap that is taken back ends where it began: at the loss of before.
            loss=jnp.where(keeps_loss, log_loss, state.loss),
            has_loss=state.has_loss | keeps_loss,
            action=action.astype(jnp.int32),
            moved=jnp.zeros_like(state.moved),
        )

    def plan(
        self, state: GuardState, is_true_step: jax.Array, is_warm: jax.Array, is_taken_back: jax.Array
    ) -> tuple[GuardState, Plan]:
        """What comes next, and the state with the true steps counted that it waits."""
        rounded = jnp.clip(jnp.round(state.length), 1, self.predict_steps)
        deviation = jnp.sqrt(state.variance)
        is_seen = ~state.has_loss | ((state.drop > 0) & ((rounded + 1) * state.drop >= deviation))
        gives_up = (state.length < 0.75) | ~is_seen
        idle = jnp.where(is_true_step & is_warm, jnp.where(gives_up, state.idle + 1, 0), state.idle)
        retries = gives_up & (idle >= state.wait)
        leaps = is_seen & (~gives_up | retries)
        wanted = jnp.where(state.leaps % _LEAPS_BETWEEN_PAIRS == 0, min(2, self.full_steps), 1)
        state = state._replace(
            idle=jnp.where(retries, 0, idle),
            length=jnp.where(retries, jnp.maximum(state.length, 1.0), state.length),
            action=jnp.where(idle > 1, GuardAction.GAVE_UP, state.action).astype(jnp.int32),
        )
        plan = Plan(
            leaps=leaps & (state.since_leap >= wanted) & (self.predict_steps > 0),
            ends=gives_up | is_taken_back,
            length=rounded.astype(jnp.int32),
        )
        return state, plan

    def _averaged(self, state: GuardState, drop: jax.Array, is_due: jax.Array) -> GuardState:
        count = state.num_drops + is_due
        rate = jnp.maximum(_RATE, 1 / jnp.maximum(count, 1))
        distance = jnp.where(is_due, drop - state.drop, 0.0)
        return state._replace(
            drop=state.drop + rate * distance,
            variance=jnp.where(is_due, (1 - rate) * (state.variance + rate * distance**2), state.variance),
            num_drops=count,
        )


def _log(loss: jax.Array) -> jax.Array:
    """The logarithm; that of f32's smallest normal number for what is zero or below."""
    return jnp.log(jnp.maximum(loss.astype(jnp.float32), jnp.finfo(jnp.float32).tiny))
