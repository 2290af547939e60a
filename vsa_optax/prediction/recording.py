"""The record of a true step, and what leaves for it: the gradient itself, or corrected by what a leap missed of it."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from vsa_optax.core.conditional import in_place_if
from vsa_optax.core.trees import all_finite, tree_where
from vsa_optax.kernels import numerics
from vsa_optax.prediction.machine import PhaseMachineState, ends_leap
from vsa_optax.prediction.predictors.base import HistoryState, Predictor, Scalars
from vsa_optax.prediction.predictors.momentum import MomentumPredictor


class Recording:
    """Writes what came into the history; `MomentumPredictor` corrects what leaves behind a leap.

    The history is read before it is written, by a conditional or in one pass. XLA writes in place only if it knows that
    order: so whether to write depends on a number that was read, which is always finite, but XLA cannot know.

    Outside jit, JAX compiles a loop or a conditional anew for each new function object: here they are made once.
    """

    def __init__(self, predictor: Predictor) -> None:
        def record(
            history: HistoryState,
            target: optax.Updates,
            params: optax.Params | None,
            count: jax.Array,
            scalars: Scalars,
        ) -> HistoryState:
            return predictor.history.record(history, target, params, count, scalars, jnp.array(True))

        self._record, self._record_if = predictor.history.record, in_place_if(record)
        self._corrected = predictor.corrected if isinstance(predictor, MomentumPredictor) else None

    def __call__(
        self,
        machine: PhaseMachineState,
        history: HistoryState,
        target: optax.Updates,
        params: optax.Params | None,
        count: jax.Array,
        scalars: Scalars,
        is_recorded: jax.Array,
    ) -> tuple[HistoryState, optax.Updates]:
        """The history with one more record, if it is recorded, and what leaves; ``machine`` is that before the step."""
        leaving = target
        if self._corrected is not None:
            is_due = is_recorded & _is_behind_leap(machine, scalars)
            leaving = lax.cond(is_due, self._corrected, _as_it_is, history, scalars, target)
            firsts = [leaf.reshape(-1)[0] for leaf in jax.tree.leaves(leaving) if leaf.size]
            for first in firsts:
                is_recorded &= numerics.is_finite(first) | ~is_due
        return self._record_if(is_recorded, history, target, params, count, scalars), leaving

    def straight(
        self,
        machine: PhaseMachineState,
        history: HistoryState,
        target: optax.Updates,
        params: optax.Params | None,
        count: jax.Array,
        scalars: Scalars,
        is_recorded: jax.Array,
    ) -> tuple[HistoryState, optax.Updates]:
        """The same by selects: nothing is decided on the device."""
        leaving = target
        if self._corrected is not None:
            is_due = is_recorded & _is_behind_leap(machine, scalars)
            leaving = tree_where(is_due, self._corrected(history, scalars, target), target)
            is_recorded &= all_finite(leaving)
        return self._record(history, target, params, count, scalars, is_recorded), leaving


def _is_behind_leap(machine: PhaseMachineState, scalars: Scalars) -> jax.Array:
    """``[] bool``: something was predicted since the newest record."""
    return ends_leap(machine) & (scalars.horizon > 1)


def _as_it_is(history: HistoryState, scalars: Scalars, target: optax.Updates) -> optax.Updates:
    del history, scalars
    return target
