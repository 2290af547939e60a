"""One step of a transformation, or its prediction, chosen by the phase without copying anybody's state."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from vsa_optax.core.conditional import in_place_if, split_extra_args
from vsa_optax.core.mesh import all_finite_over, varying_axes
from vsa_optax.core.trees import all_finite, any_nonzero, tree_where
from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics
from vsa_optax.prediction.kinds import StepKind
from vsa_optax.prediction.machine import Phase, PhaseMachineState, ends_leap
from vsa_optax.prediction.predictors.base import Comparison, Experience, HistoryState, Predictor, Scalars
from vsa_optax.prediction.predictors.momentum import MomentumPredictor

# To see whether a gradient is zero: so many leaves, and coordinates in each, unless all leaves have more.
_NUM_LOOKED_AT, _LOOKED_AT = 4, 65536
_Look: TypeAlias = Callable[[optax.Updates], tuple[jax.Array, jax.Array]]
_PredictIf: TypeAlias = Callable[[jax.Array, HistoryState, Tree, Scalars, jax.Array | None], optax.Updates]


class StepResult(NamedTuple):
    """What one step comes to, before it is recorded.

    Attributes:
        target: tree, what the recorded transformation emitted, or its prediction; of no use if not finite.
        inner_state: the recorded transformation's state.
        is_finite: ``[] bool``, false if a gradient, or what the transformation made of it, holds a NaN or an infinity.
        comparison: of the target with its prediction: measured at CORRECT steps, or, calibrated or with the guard, at
            all true steps. None if no step is ever predicted.
        is_ignored: ``[] bool``, whether this was PREDICT and a gradient that is not zero came all the same, as far as
            a few leaves tell. Always false where devices would have to ask each other, since in PREDICT they do not
            communicate.
    """

    target: optax.Updates
    inner_state: optax.OptState
    is_finite: jax.Array
    is_ignored: jax.Array
    comparison: Comparison | None = None


class PhaseStep:
    """One step of ``recorded``, or its prediction if the phase is PREDICT.

    Outside jit, JAX compiles a loop or a conditional anew for each new function object, which for a small model
    takes seventy times as long as the update (benchmarks/eager_step.log): `_functions` makes them once.
    """

    def __init__(self, recorded: optax.GradientTransformationExtraArgs, predictor: Predictor) -> None:
        self._recorded = recorded
        self._predictor = predictor
        self._functions_for = functools.lru_cache(maxsize=16)(self._functions)

    def __call__(
        self,
        updates: optax.Updates,
        inner_state: optax.OptState,
        params: optax.Params | None,
        extra_args: dict[str, object],
        phase: jax.Array,
        history: HistoryState,
        experience: Experience,
        scalars: Scalars,
        watches: jax.Array | None = None,
        axes: frozenset[str] = frozenset(),
    ) -> StepResult:
        """One step in a true phase, the prediction in PREDICT; ``scalars`` are what the step is to the history.

        A true step is compared with its prediction in CORRECT; calibrated, always; and where ``watches`` is given, if
        that is true. Devices along ``axes`` decide together: what is not finite on one is skipped on all.
        """
        traced_args, static_args = split_extra_args(extra_args)

        def emitted(
            updates: optax.Updates,
            inner_state: optax.OptState,
            params: optax.Params | None,
            extra_args: dict[str, object],
        ) -> optax.Updates:
            target, _ = self._recorded.update(updates, inner_state, params, **extra_args, **static_args)
            _check_same_everywhere(target, axes)
            return target

        leaves, treedef = jax.tree.flatten(jax.eval_shape(emitted, updates, inner_state, params, traced_args))
        predict_if, step, step_if = self._functions_for(treedef, tuple(leaves))
        is_predict = phase == Phase.PREDICT
        weights = self._predictor.weights(experience.calibration, scalars)
        has_gradient, is_ignored = lax.cond(is_predict, *_looks_over(axes), updates)
        result = StepResult(
            target=predict_if(is_predict, history, experience.residual, scalars, weights),
            inner_state=inner_state,
            is_finite=has_gradient,
            is_ignored=is_ignored,
            comparison=Comparison(experience, error=jnp.zeros([], jnp.float32), is_measured=jnp.array(False)),
        )
        if static_args:
            step_if = in_place_if(functools.partial(step, **static_args))
        runs = ~is_predict & has_gradient
        if watches is None:
            watches = jnp.array(True) if experience.calibration is not None else phase == Phase.CORRECT
        return step_if(runs, result, updates, params, traced_args, watches, history, scalars)

    def straight(
        self,
        kind: StepKind,
        updates: optax.Updates,
        inner_state: optax.OptState,
        params: optax.Params | None,
        extra_args: dict[str, object],
        history: HistoryState,
        experience: Experience,
        scalars: Scalars,
        axes: frozenset[str] = frozenset(),
    ) -> StepResult:
        """The same for a kind that is known: nothing is decided on the device, selects leave out what is not finite."""

        def emitted(updates: optax.Updates, inner_state: optax.OptState) -> tuple[optax.Updates, optax.OptState]:
            target, inner_state = self._recorded.update(updates, inner_state, params, **extra_args)
            _check_same_everywhere(target, axes)
            return target, inner_state

        nothing = Comparison(experience, error=jnp.zeros([], jnp.float32), is_measured=jnp.array(False))
        is_predict = kind is StepKind.PREDICTED
        has_gradient, is_ignored = _looks_over(axes)[0 if is_predict else 1](updates)
        if is_predict:
            weights = self._predictor.weights(experience.calibration, scalars)
            predicted = self._predictor.predict(history, experience.residual, scalars, weights)
            avals = jax.eval_shape(emitted, updates, inner_state)[0]
            target = _cast(predicted, *reversed(jax.tree.flatten(avals)))
            return StepResult(target, inner_state, has_gradient, is_ignored, nothing)
        target, new_state = emitted(updates, inner_state)
        is_finite = has_gradient & all_finite(target)
        comparison = nothing
        if kind is StepKind.WATCHED:

            def prediction() -> optax.Updates:
                predicted = self._predictor.predict(history, experience.residual, scalars, None)
                return _cast(predicted, *reversed(jax.tree.flatten(target)))

            compared = self._predictor.compare(history, experience, scalars, target, prediction)
            comparison = tree_where(is_finite, compared, nothing)
        return StepResult(target, tree_where(is_finite, new_state, inner_state), is_finite, is_ignored, comparison)

    def _functions(
        self, treedef: jax.tree_util.PyTreeDef, avals: tuple[jax.ShapeDtypeStruct, ...]
    ) -> tuple[_PredictIf, Callable[..., StepResult], Callable[..., StepResult]]:
        """Prediction, true step and conditional true step of a transformation that emits leaves like ``avals``."""

        def predicted(
            history: HistoryState, residual: Tree, scalars: Scalars, weights: jax.Array | None
        ) -> optax.Updates:
            return _cast(self._predictor.predict(history, residual, scalars, weights), treedef, avals)

        def nothing(
            history: HistoryState, residual: Tree, scalars: Scalars, weights: jax.Array | None
        ) -> optax.Updates:
            del history, residual, scalars, weights
            return jax.tree.unflatten(treedef, [jnp.zeros_like(aval, dtype=aval.dtype) for aval in avals])

        def predict_if(
            pred: jax.Array, history: HistoryState, residual: Tree, scalars: Scalars, weights: jax.Array | None
        ) -> optax.Updates:
            return lax.cond(pred, predicted, nothing, history, residual, scalars, weights)

        def compare(
            comparison: Comparison, is_due: jax.Array, target: optax.Updates, history: HistoryState, scalars: Scalars
        ) -> Comparison:
            experience = comparison.experience

            def prediction() -> optax.Updates:
                # ``is_due`` is always true here. But a conditional's result is one array: without it XLA copies each
                # record on the way.
                return predict_if(is_due, history, experience.residual, scalars, None)

            return self._predictor.compare(history, experience, scalars, target, prediction)

        compare_if = in_place_if(compare)

        def step(
            result: StepResult,
            updates: optax.Updates,
            params: optax.Params | None,
            extra_args: dict[str, object],
            watches: jax.Array,
            history: HistoryState,
            scalars: Scalars,
            **static_args: object,
        ) -> StepResult:
            target, inner_state = self._recorded.update(
                updates, result.inner_state, params, **extra_args, **static_args
            )
            is_finite = all_finite(target)
            inner_state = tree_where(is_finite, inner_state, result.inner_state)
            is_due = watches & is_finite
            assert result.comparison is not None
            comparison = compare_if(is_due, result.comparison, is_due, target, history, scalars)
            return StepResult(target, inner_state, is_finite, result.is_ignored, comparison)

        return predict_if, step, in_place_if(step)  # type: ignore[arg-type] # It is run without keywords.


def _cast(
    tree: Tree, treedef: jax.tree_util.PyTreeDef, like: Sequence[jax.Array | jax.ShapeDtypeStruct]
) -> optax.Updates:
    """The tree's leaves in the dtypes of others, and in their structure."""
    leaves = jax.tree.leaves(tree)
    cast = [numerics.saturating_cast(x, aval.dtype) for x, aval in zip(leaves, like, strict=True)]
    return jax.tree.unflatten(treedef, cast)


def _telling_leaves(tree: Tree) -> list[jax.Array]:
    """Some leaves that are not zero if a gradient was computed: a few, and small, so that a look at them costs nothing.

    The whole gradient would be one of about twelve transfers of the parameters' size in a PREDICT step.
    """
    by_size = sorted((leaf for leaf in jax.tree.leaves(tree) if leaf.size), key=lambda leaf: leaf.size)
    small = [leaf for leaf in by_size if leaf.size <= _LOOKED_AT]
    return small[-_NUM_LOOKED_AT:] or by_size[:1]


@functools.cache
def _looks_over(axes: frozenset[str]) -> tuple[_Look, _Look]:
    """What gradients are asked in PREDICT and in true phases: are they finite, and are they ignored."""

    def in_predict(updates: optax.Updates) -> tuple[jax.Array, jax.Array]:
        return jnp.array(True), jnp.array(False) if axes else any_nonzero(_telling_leaves(updates))

    def in_true_phases(updates: optax.Updates) -> tuple[jax.Array, jax.Array]:
        return all_finite_over(axes)(updates), jnp.array(False)

    return in_predict, in_true_phases


def _check_same_everywhere(target: optax.Updates, axes: frozenset[str]) -> None:
    """``ValueError`` if what is to be recorded differs between devices along ``axes``, which decide together."""
    differing = varying_axes(target) & axes
    if differing:
        raise ValueError(
            f"gradients differ between the devices along {sorted(differing)}, and so would what is recorded of them: "
            "average them before (jax.lax.pmean), or inside opt (compressed_pmean) with predictor=Window(...), which "
            "predicts updates; if the parameters themselves are sharded, leave that to jax.jit"
        )


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
