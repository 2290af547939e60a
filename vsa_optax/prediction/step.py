"""One step of a transformation, or its prediction, chosen by the phase without copying any state."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from vsa_optax.core.conditional import prefers_branches, run_if, split_extra_args
from vsa_optax.core.kinds import StepKind
from vsa_optax.core.mesh import all_finite_over, as_varying, varying_axes
from vsa_optax.core.trees import all_finite, any_nonzero, num_bytes, tree_where
from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics
from vsa_optax.prediction.guard import Moved
from vsa_optax.prediction.machine import Phase, ends_leap
from vsa_optax.prediction.machine_state import Machine
from vsa_optax.prediction.predictors.base import Comparison, Experience, HistoryState, Predictor, Scalars
from vsa_optax.prediction.predictors.momentum import MomentumPredictor

# The check for a zero gradient reads this many leaves, with at most as many coordinates each unless all have more.
_NUM_LOOKED_AT, _LOOKED_AT = 4, 65536
# Bytes of a history that a GPU copies in less time than it takes to compute a record that may not be kept. They are
# counted on all devices.
_CHEAP_TO_COPY = 1 << 26


class StepResult(NamedTuple):
    """The result of one step.

    Attributes:
        target: tree, the update of the recorded transformation, its prediction, or its correction by
            `MomentumPredictor` after a leap; meaningless if it is not finite.
        inner_state: the state of the recorded transformation.
        is_finite: ``[] bool``, false if a gradient or the transformation's update holds a NaN or an infinity.
        is_ignored: ``[] bool``, whether a PREDICT step received a non-zero gradient, as far as a few leaves show. It is
            always false if devices would have to agree on it, since they do not communicate in PREDICT.
        history: the history, including the target if it was recorded.
        comparison: the comparison of the target with its prediction, measured at CORRECT steps, or with calibration or
            the guard at all true steps. None if no step is ever predicted.
        moved: the movement away from the newest record; zeros while the guard sleeps. None if no step is ever
            predicted.
    """

    target: optax.Updates
    inner_state: optax.OptState
    is_finite: jax.Array
    is_ignored: jax.Array
    history: HistoryState = None
    comparison: Comparison | None = None
    moved: Moved | None = None


class _Emitted(NamedTuple):
    """The result of the transformation in a true step."""

    target: optax.Updates
    inner_state: optax.OptState
    is_finite: jax.Array


class _Consulted(NamedTuple):
    """The results of a step that were read from the history."""

    target: optax.Updates
    comparison: Comparison
    horizon: jax.Array
    distance: jax.Array | None
    is_recorded: jax.Array


# Whether it is a PREDICT step, the target is finite, it is compared, and follows a leap; its number; the parameters.
_Operands: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, optax.Params | None]


class PhaseStep:
    """One step of ``recorded``, or its prediction if the phase is PREDICT.

    Outside jit, JAX compiles a loop or a conditional again for each new function object. For a small model this takes
    eighty times as long as the update (benchmarks/eager_step.log), so all are created here, once.
    """

    def __init__(self, recorded: optax.GradientTransformationExtraArgs | None, predictor: Predictor) -> None:
        """If ``recorded`` is None, the incoming gradients are recorded."""
        self._recorded = recorded
        self._predictor = predictor
        self._emit_if = self._emitting({})
        self._consult_if = run_if(self._consult)
        self._read_or_skipped = self._read_with_scalars, _skipped
        self._compare_if = run_if(self._compare)
        self._record_if = run_if(self._record)
        self._predicted_or_given = self._predicted, _given
        # This is the only predictor that emits something else than it records.
        self._correct = predictor.corrected if isinstance(predictor, MomentumPredictor) else None
        self._corrected = self._corrected_and_horizon

    def __call__(
        self,
        updates: optax.Updates,
        inner_state: optax.OptState,
        params: optax.Params | None,
        extra_args: dict[str, object],
        machine: Machine,
        history: HistoryState,
        experience: Experience,
        count: jax.Array,
        axes: frozenset[str] = frozenset(),
    ) -> StepResult:
        """Runs one step in a true phase, and the prediction in PREDICT; ``count`` is the step's number.

        CORRECT steps are compared with their prediction; with calibration or the guard, all true steps are. Devices
        along ``axes`` decide together: a non-finite gradient on one is skipped on all.

        All that reads the history has one condition, which is false while the guard sleeps.
        """
        is_predict = machine.phase == Phase.PREDICT
        has_gradient, is_ignored = _looked_over(updates, is_predict, axes)
        emitted = _Emitted(updates, inner_state, has_gradient)
        if self._recorded is None:
            _check_same_everywhere(updates, axes)
        else:
            emitted = self._emitted_if(~is_predict & has_gradient, emitted, params, extra_args, axes)
        seen_params = params if self._predictor.reads_params else None
        is_compared = machine.phase == Phase.CORRECT
        if machine.guard is not None or experience.calibration is not None:
            is_compared = ~is_predict
        unknown = as_varying(jnp.zeros([], jnp.float32), varying_axes((history, seen_params)))
        nothing = _Consulted(
            target=emitted.target,
            comparison=_nothing_measured(experience),
            horizon=unknown,
            distance=unknown if self._predictor.reads_params else None,
            is_recorded=is_predict & False,
        )
        operands = is_predict, emitted.is_finite, is_compared, ends_leap(machine), count, seen_params
        is_awake = None if machine.guard is None else machine.guard.asleep == 0
        if prefers_branches() and num_bytes(history) > _CHEAP_TO_COPY:
            consulted, history = self._consulted_and_recorded(is_awake, nothing, history, operands)
        elif is_awake is None:
            consulted, history = self._consult((nothing, history), *operands)
        else:
            consulted, history = self._consult_if(is_awake, (nothing, history), *operands)
        moved = Moved(consulted.horizon, consulted.distance, None, consulted.is_recorded)
        return StepResult(
            consulted.target,
            emitted.inner_state,
            emitted.is_finite,
            is_ignored,
            history,
            consulted.comparison,
            moved,
        )

    def straight(
        self,
        kind: StepKind,
        updates: optax.Updates,
        inner_state: optax.OptState,
        params: optax.Params | None,
        extra_args: dict[str, object],
        machine: Machine,
        history: HistoryState,
        experience: Experience,
        count: jax.Array,
        axes: frozenset[str] = frozenset(),
    ) -> StepResult:
        """The same for a known kind: the device decides nothing, and selects leave out non-finite gradients."""
        if kind is StepKind.PREDICTED:
            has_gradient = jnp.array(True)
            is_ignored = jnp.array(False) if axes else any_nonzero(_telling_leaves(updates))
        else:
            has_gradient, is_ignored = all_finite_over(axes)(updates), jnp.array(False)
        emitted = _Emitted(updates, inner_state, has_gradient)
        if self._recorded is None:
            _check_same_everywhere(updates, axes)
        elif kind is not StepKind.PREDICTED:
            target, new_state = self._recorded.update(updates, inner_state, params, **extra_args)
            _check_same_everywhere(target, axes)
            is_finite = has_gradient & all_finite(target)
            emitted = _Emitted(target, tree_where(is_finite, new_state, inner_state), is_finite)
        else:
            emitted = emitted._replace(target=self._zeros_like_emitted(emitted, params, extra_args, axes))
        comparison, is_recorded = _nothing_measured(experience), jnp.array(False)
        zero = jnp.zeros([], jnp.float32)
        if kind is StepKind.PLAIN:
            distance = zero if self._predictor.reads_params else None
            return StepResult(*emitted, is_ignored, history, comparison, Moved(zero, distance, None, is_recorded))
        seen_params = params if self._predictor.reads_params else None
        scalars = self._predictor.scalars(history, count, seen_params)
        if kind is StepKind.PREDICTED:
            weights = self._predictor.weights(experience.calibration, scalars)
            target = self._predicted(emitted.target, history, experience.residual, scalars, weights)
            emitted = emitted._replace(target=target)
        else:
            if kind is StepKind.WATCHED:
                compared = self._compare(comparison, None, emitted.target, history, scalars)
                comparison = tree_where(emitted.is_finite, compared, comparison)
            is_recorded, target = _behind(emitted.is_finite, comparison), emitted.target
            if self._correct is not None:
                is_due = _is_corrected(is_recorded, ends_leap(machine), scalars)
                leaving = tree_where(is_due, self._correct(history, scalars, target), target)
                emitted, is_recorded = emitted._replace(target=leaving), is_recorded & all_finite(leaving)
            history = self._predictor.history.record(history, target, seen_params, count, scalars, is_recorded)
        moved = Moved(scalars.horizon, scalars.distance, None, is_recorded)
        return StepResult(*emitted, is_ignored, history, comparison, moved)

    def _emitted_if(
        self,
        runs: jax.Array,
        unchanged: _Emitted,
        params: optax.Params | None,
        extra_args: dict[str, object],
        axes: frozenset[str],
    ) -> _Emitted:
        """The result of the transformation for the gradients in ``unchanged.target`` if it runs; otherwise zeros."""
        traced_args, static_args = split_extra_args(extra_args)
        updates = unchanged.target
        target = self._zeros_like_emitted(unchanged, params, extra_args, axes)
        emit_if = self._emit_if if not static_args else self._emitting(static_args)
        return emit_if(runs, unchanged._replace(target=target), updates, params, traced_args)

    def _zeros_like_emitted(
        self,
        given: _Emitted,
        params: optax.Params | None,
        extra_args: dict[str, object],
        axes: frozenset[str],
    ) -> optax.Updates:
        """The zeros that replace the transformation's update if it does not run."""
        traced_args, static_args = split_extra_args(extra_args)

        def target(updates: optax.Updates, state: Tree, params: optax.Params | None, extra_args: Tree) -> Tree:
            assert self._recorded is not None
            emitted, _ = self._recorded.update(updates, state, params, **extra_args, **static_args)
            _check_same_everywhere(emitted, axes)
            return emitted

        avals = jax.eval_shape(target, given.target, given.inner_state, params, traced_args)
        return jax.tree.map(lambda aval: jnp.zeros_like(aval, dtype=aval.dtype), avals)

    def _emitting(self, static_args: dict[str, object]) -> Callable[..., _Emitted]:
        """Returns a function that runs a true step of the transformation under a condition."""

        def emit(
            carry: _Emitted, updates: optax.Updates, params: optax.Params | None, extra_args: dict[str, object]
        ) -> _Emitted:
            assert self._recorded is not None
            target, state = self._recorded.update(updates, carry.inner_state, params, **extra_args, **static_args)
            is_finite = all_finite(target)
            return _Emitted(target, tree_where(is_finite, state, carry.inner_state), is_finite)

        return run_if(emit)

    def _consulted_and_recorded(
        self, is_awake: jax.Array | None, nothing: _Consulted, history: HistoryState, operands: _Operands
    ) -> tuple[_Consulted, HistoryState]:
        """Reads the history in a conditional, and records outside it, since a conditional would copy the history.

        So the device computes a record at each step, and selects whether it is kept. The copy would be 64 bytes a
        parameter with the default predictor. For a transformer of 11 million parameters, a true step takes 1.08 instead
        of 1.05 times AdamW's while the guard sleeps (H200, JAX 0.11.2, benchmarks/phase_in_flight_gpu.log).
        """
        *_, count, params = operands
        if is_awake is None:
            consulted, _, scalars = self._read(nothing, history, *operands)
        else:
            avals = jax.eval_shape(self._predictor.scalars, history, count, params)
            zeros = jax.tree.map(lambda x: as_varying(jnp.zeros(x.shape, x.dtype), varying_axes(x)), avals)
            consulted, scalars = lax.cond(is_awake, *self._read_or_skipped, (nothing, zeros), history, *operands)
        record = nothing.target, params, count, scalars
        if self._predictor.history.encodes:  # To encode takes longer than to copy codes.
            return consulted, self._record_if(consulted.is_recorded, history, *record)
        return consulted, self._predictor.history.record(history, *record, consulted.is_recorded)

    def _consult(
        self, carry: tuple[_Consulted, HistoryState], *operands: *_Operands
    ) -> tuple[_Consulted, HistoryState]:
        """Reads the history, and records a true target."""
        (nothing, history), (*_, count, params) = carry, operands
        consulted, target, scalars = self._read(nothing, history, *operands)
        return consulted, self._record_if(consulted.is_recorded, history, target, params, count, scalars)

    def _read_with_scalars(
        self, nothing: tuple[_Consulted, Scalars], history: HistoryState, *operands: *_Operands
    ) -> tuple[_Consulted, Scalars]:
        consulted, _, scalars = self._read(nothing[0], history, *operands)
        return consulted, scalars

    def _read(
        self,
        nothing: _Consulted,
        history: HistoryState,
        is_predict: jax.Array,
        is_finite: jax.Array,
        is_compared: jax.Array,
        is_behind_leap: jax.Array,
        count: jax.Array,
        params: optax.Params | None,
    ) -> tuple[_Consulted, optax.Updates, Scalars]:
        """Predicts the target, or compares it with its prediction; also the target to record, and the scalars."""
        experience = nothing.comparison.experience
        scalars = self._predictor.scalars(history, count, params)
        weights = self._predictor.weights(experience.calibration, scalars)
        target = lax.cond(
            is_predict, *self._predicted_or_given, nothing.target, history, experience.residual, scalars, weights
        )
        is_due = is_compared & is_finite
        comparison = self._compare_if(is_due, nothing.comparison, is_due, target, history, scalars)
        is_recorded, leaving = _behind(~is_predict & is_finite, comparison), target
        if self._correct is not None:
            is_due = _is_corrected(is_recorded, is_behind_leap, scalars)
            leaving, horizon = lax.cond(is_due, self._corrected, _as_it_is, history, scalars, target)
            is_recorded &= horizon >= 0  # This is always true, but XLA knows it only now.
        consulted = _Consulted(leaving, comparison, scalars.horizon, scalars.distance, is_recorded)
        return consulted, target, scalars

    def _predicted(
        self,
        like: optax.Updates,
        history: HistoryState,
        residual: Tree,
        scalars: Scalars,
        weights: jax.Array | None,
    ) -> optax.Updates:
        """The prediction, in the structure and the dtypes of a target."""
        predicted = self._predictor.predict(history, residual, scalars, weights)
        leaves, treedef = jax.tree.flatten(like)
        pairs = zip(jax.tree.leaves(predicted), leaves, strict=True)
        return jax.tree.unflatten(treedef, [numerics.saturating_cast(x, leaf.dtype) for x, leaf in pairs])

    def _compare(
        self,
        comparison: Comparison,
        is_due: jax.Array | None,
        target: optax.Updates,
        history: HistoryState,
        scalars: Scalars,
    ) -> Comparison:
        experience = comparison.experience
        operands = target, history, experience.residual, scalars, None

        def prediction() -> optax.Updates:
            if is_due is None:
                return self._predicted(*operands)
            # The condition is true here. But a conditional's result is one array: without it XLA copies each record.
            return lax.cond(is_due, *self._predicted_or_given, *operands)

        return self._predictor.compare(history, experience, scalars, target, prediction)

    def _corrected_and_horizon(
        self, history: HistoryState, scalars: Scalars, target: optax.Updates
    ) -> tuple[optax.Updates, jax.Array]:
        """The corrected target, and a non-negative number unlike the other branch's, so that XLA cannot know it."""
        assert self._correct is not None
        return self._correct(history, scalars, target), scalars.horizon + 1

    def _record(
        self,
        history: HistoryState,
        target: optax.Updates,
        params: optax.Params | None,
        count: jax.Array,
        scalars: Scalars,
    ) -> HistoryState:
        return self._predictor.history.record(history, target, params, count, scalars, jnp.array(True))


def _skipped(
    nothing: tuple[_Consulted, Scalars], history: HistoryState, *operands: *_Operands
) -> tuple[_Consulted, Scalars]:
    del history, operands
    return nothing


def _given(
    target: optax.Updates, history: HistoryState, residual: Tree, scalars: Scalars, weights: jax.Array | None
) -> optax.Updates:
    del history, residual, scalars, weights
    return target


def _is_corrected(is_recorded: jax.Array, is_behind_leap: jax.Array, scalars: Scalars) -> jax.Array:
    """``[] bool``: whether a true target followed a predicted step."""
    return is_recorded & is_behind_leap & (scalars.horizon > 1)


def _as_it_is(history: HistoryState, scalars: Scalars, target: optax.Updates) -> tuple[optax.Updates, jax.Array]:
    del history
    return target, scalars.horizon


def _nothing_measured(experience: Experience) -> Comparison:
    return Comparison(experience, error=jnp.zeros([], jnp.float32), is_measured=jnp.array(False))


def _behind(is_recorded: jax.Array, comparison: Comparison) -> jax.Array:
    """``is_recorded``, known only after the comparison has read the history, so that XLA writes the record in place."""
    is_known = ~(comparison.error < 0)  # Neither happens: errors are not negative, and no NaN enters an experience.
    for leaf in jax.tree.leaves(comparison.experience):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            is_known &= ~jnp.any(jnp.isnan(leaf))
    return is_recorded & is_known


def _telling_leaves(tree: Tree) -> list[jax.Array]:
    """A few small leaves that show whether a gradient was computed, so that reading them costs almost nothing.

    Reading the whole gradient would be one of about twelve transfers of the parameters' size in a PREDICT step.
    """
    by_size = sorted((leaf for leaf in jax.tree.leaves(tree) if leaf.size), key=lambda leaf: leaf.size)
    small = [leaf for leaf in by_size if leaf.size <= _LOOKED_AT]
    return small[-_NUM_LOOKED_AT:] or by_size[:1]


def _looked_over(updates: optax.Updates, is_predict: jax.Array, axes: frozenset[str]) -> tuple[jax.Array, jax.Array]:
    """Whether gradients are finite, which does not matter in PREDICT, and whether they are ignored."""
    if axes:
        return lax.cond(is_predict, *_agreed_looks(axes), updates)
    return is_predict | all_finite(updates), is_predict & any_nonzero(_telling_leaves(updates))


@functools.cache
def _agreed_looks(axes: frozenset[str]) -> tuple[Callable[[Tree], tuple[jax.Array, jax.Array]], ...]:
    """The same if devices along ``axes`` must agree, which they do not do in PREDICT."""

    def in_predict(updates: optax.Updates) -> tuple[jax.Array, jax.Array]:
        del updates
        return jnp.array(True), jnp.array(False)

    def in_true_phases(updates: optax.Updates) -> tuple[jax.Array, jax.Array]:
        return all_finite_over(axes)(updates), jnp.array(False)

    return in_predict, in_true_phases


def _check_same_everywhere(target: optax.Updates, axes: frozenset[str]) -> None:
    """``ValueError`` if the target differs between devices along ``axes``, which decide together."""
    differing = varying_axes(target) & axes
    if differing:
        raise ValueError(
            f"gradients differ between the devices along {sorted(differing)}, and so would their records: average them "
            "before (jax.lax.pmean), or inside opt (compressed_pmean) with predictor=Window(...), which predicts "
            "updates; if the parameters themselves are sharded, leave that to jax.jit"
        )
