"""The implementation of `predict_gradients` and `phase_switched` with checked settings: its state and its update."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from vsa_optax.core import checks, kinds
from vsa_optax.core.conditional import warn_of_command_buffers
from vsa_optax.core.kinds import StepKind
from vsa_optax.core.mesh import all_finite_over, axes_in, is_checked, mean_over, varying_axes
from vsa_optax.core.trees import all_finite, both_finite, norm, tree_where, zeros_unless
from vsa_optax.core.types import Tree
from vsa_optax.kernels import numerics
from vsa_optax.prediction import machine as machines
from vsa_optax.prediction import stats, unmeasured, unsuited
from vsa_optax.prediction.forecast import forecast
from vsa_optax.prediction.learning_rate import check_one_rate
from vsa_optax.prediction.machine import Phase
from vsa_optax.prediction.machine_state import Machine, PhaseMachineState
from vsa_optax.prediction.phases import AdaptiveCycle, Cycle, Guarded
from vsa_optax.prediction.predictors.base import (
    Experience,
    HistoryState,
    Predictor,
    check_history,
    check_settings,
)
from vsa_optax.prediction.step import PhaseStep, StepResult

_THE_OTHER_WAY_ROUND = (
    "predictions would also be emitted between its own emissions. Wrap the other way round, "
    "ternary_multi_steps(phase_switched(...), k) or optax.MultiSteps(phase_switched(...), k)"
)


class PhaseSwitchedState(NamedTuple):
    """State of `predict_gradients` and `phase_switched`.

    Attributes:
        machine: `PhaseMachineState`, the machine's scalars in a few arrays.
        history: `SecantHistoryState`, `WindowHistoryState`, `CodedWindowHistoryState`, `RecursiveHistoryState` or
            `MomentumHistoryState`; None if no step is ever predicted.
        residual: tree of ``[*shape]`` in the history's dtype, the averaged prediction error, or a codec's payload of
            it; None if it is switched off.
        inner_state: the wrapped optimizer's state.
    """

    machine: PhaseMachineState
    history: HistoryState
    residual: Tree
    inner_state: Tree


def switched(
    opt: optax.GradientTransformationExtraArgs,
    phases: Guarded | Cycle,
    predictor: Predictor,
    *,
    predicts_updates: bool,
    learning_rate: optax.ScalarOrSchedule | None,
    emits_moves: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Runs ``opt`` in true steps, and the predictor in PREDICT.

    Args:
        opt: the optimizer.
        phases: the settings that decide when to predict.
        predictor: the predictor of gradients or updates.
        predicts_updates: whether the updates of ``opt`` are recorded and predicted; otherwise the gradients are.
        learning_rate: a factor of the emitted updates in every phase: a number, a schedule over all steps, or None.
        emits_moves: whether the emitted updates are the moves of the parameters; otherwise later links change them.
    """
    _refuse_rare_emissions(opt)
    ever_predicts = machines.ever_predicts(phases)
    is_adaptive = isinstance(phases, AdaptiveCycle)
    run = PhaseStep(opt if predicts_updates else None, predictor)

    def init_fn(params: optax.Params) -> PhaseSwitchedState:
        warn_of_command_buffers()
        checks.check_inexact_leaves(params)
        inner_state = opt.init(params)
        _check_inner_state(inner_state, predicts_updates=predicts_updates)
        _check_domain(inner_state, predicts_updates, predictor)
        rests = predicts_updates and ever_predicts
        check_one_rate(inner_state, learning_rate, rests=rests)
        if not ever_predicts:
            return PhaseSwitchedState(machines.init(phases).packed(), None, None, inner_state)
        experience = predictor.init_experience(params)
        return PhaseSwitchedState(
            machine=machines.init(phases, experience.calibration).packed(),
            history=predictor.history.init(params),
            residual=experience.residual,
            inner_state=inner_state,
        )

    def update_fn(
        updates: optax.Updates,
        state: PhaseSwitchedState,
        params: optax.Params | None = None,
        **extra_args: object,
    ) -> tuple[optax.Updates, PhaseSwitchedState]:
        value = None
        if extra_args.get("value") is not None:
            value = extra_args["value"] = checks.check_scalar("value", extra_args["value"])
        elif is_adaptive:
            name = type(phases).__name__
            raise ValueError(f"{name} needs the loss at every step: update(..., value=loss), got value=None")
        machine = _checked_machine(state, phases, predictor)
        _check_trees(updates, params, state, predictor)
        history, residual = state.history, state.residual
        if machines.repeats_loss(machine):
            if value is None:
                unmeasured.warn_without_value()
            if not predicts_updates:
                unmeasured.check_no_reader(state.inner_state)

        assumption = kinds.assumption_for(stats.unwrapped(state.machine).marks())
        kind = None if assumption is None else assumption.kind
        axes = _axes_to_agree_over(updates, state)
        if value is not None:
            # A transformation that follows the loss, in an optimizer that runs in PREDICT, needs measured losses there.
            follows = not predicts_updates and unmeasured.contains_reader(state.inner_state)
            axes_of_value = _axes_to_agree_over(value, state)
            value = _agreed_value(value, machine, axes_of_value, in_all_phases=is_adaptive or follows)
            extra_args["value"] = value
        count = machines.total_steps(machine)
        recorded_state = state.inner_state if predicts_updates else optax.EmptyState()
        given = updates, recorded_state, params, extra_args
        known = Experience(residual, machine.calibration)
        if not ever_predicts:
            result = StepResult(updates, recorded_state, all_finite_over(axes)(updates), jnp.array(False))
        elif kind is None:
            result = run(*given, machine, history, known, count, axes)
        else:
            result = run.straight(kind, *given, machine, history, known, count, axes)

        is_finite = result.is_finite
        if predicts_updates and ever_predicts:
            new_updates, inner_state = result.target, result.inner_state
        else:
            new_updates, inner_state = opt.update(result.target, state.inner_state, params, **extra_args)
        if ever_predicts:  # Otherwise opt's updates pass unchanged: a select would change their last bits.
            if not predicts_updates:
                # A PLAIN step need not know earlier whether gradients are finite: one pass checks both trees.
                asks_once = kind is StepKind.PLAIN and not axes
                is_finite = both_finite(updates, new_updates) if asks_once else is_finite & all_finite(new_updates)
                inner_state = tree_where(is_finite, inner_state, state.inner_state)
            new_updates = zeros_unless(is_finite, new_updates)
        if learning_rate is not None:
            rate = learning_rate(count) if callable(learning_rate) else learning_rate
            new_updates = jax.tree.map(lambda u: jnp.asarray(rate, u.dtype) * u, new_updates)
        moved = result.moved
        # While the guard sleeps, it does not add up the norms of updates.
        if emits_moves and machine.guard is not None and kind is not StepKind.PLAIN:
            assert moved is not None
            moved = moved._replace(emitted=norm(new_updates))
        machine = machines.advance(
            phases,
            machine,
            is_finite=is_finite,
            is_ignored=result.is_ignored,
            value=value,
            moved=moved,
            comparison=result.comparison,
        )
        if result.comparison is not None:
            residual = result.comparison.experience.residual
        packed = machine.packed()
        if assumption is not None:
            assumption.forecast, assumption.marks_after = forecast(phases, machine), packed.marks()
        return new_updates, PhaseSwitchedState(packed, result.history, residual, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _axes_to_agree_over(tree: Tree, state: PhaseSwitchedState) -> frozenset[str]:
    """The mesh axes along which devices share the machine but not ``tree``."""
    averaged = axes_in(state.inner_state)
    may_vary = frozenset() if is_checked(averaged) else averaged
    return (varying_axes(tree) | may_vary) - varying_axes(state.machine.phase)


def _agreed_value(value: jax.Array, machine: Machine, axes: frozenset[str], *, in_all_phases: bool) -> jax.Array:
    """The loss, averaged over the ``axes`` along which it differs between devices.

    Devices do not communicate in PREDICT; there it is the last known loss, unless the value counts ``in_all_phases``.
    """
    if not axes:
        return value
    value = value.astype(numerics.promoted(value.dtype, jnp.float32))
    if in_all_phases:
        return mean_over(value, axes)
    last = machines.last_value(machine).astype(value.dtype)
    return lax.cond(
        machine.phase == Phase.PREDICT,
        lambda value, last: last,
        lambda value, last: mean_over(value, axes),
        value,
        last,
    )


def _check_domain(inner_state: optax.OptState, predicts_updates: bool, predictor: Predictor) -> None:
    axes = axes_in(inner_state)
    if axes and not predicts_updates:
        which = "secants predict gradients" if predictor.reads_params else "predicts='gradient' predicts gradients"
        raise ValueError(
            f"predictor must predict updates where opt averages gradients over devices, along {sorted(axes)}: {which}, "
            "which differ between devices here: use predictor=Window(...), whose updates are the same on all devices"
        )


def _check_inner_state(inner_state: optax.OptState, *, predicts_updates: bool) -> None:
    if stats.contains_machine(inner_state):
        raise ValueError(
            "opt must not contain a phase machine of its own: use predict_gradients or phase_switched once"
        )
    unsuited.check_no_line_search(inner_state)
    for name in unsuited.rare_emitters(inner_state):
        raise ValueError(f"opt must not contain {name}, which emits rarely: {_THE_OTHER_WAY_ROUND}")
    if predicts_updates and _find(inner_state, lambda node: isinstance(node, optax.ConditionallyMaskState)):
        raise ValueError(
            "opt must not contain optax.transforms.conditionally_mask where its updates are predicted: predictions "
            "would also be emitted in the steps that it masks. Mask the updates of phase_switched, or predict gradients"
        )


def _find(state: Tree, is_meant: Callable[[object], bool]) -> list[Tree]:
    return [node for node in jax.tree.leaves(state, is_leaf=is_meant) if is_meant(node)]


def _refuse_rare_emissions(opt: optax.GradientTransformation) -> None:
    """``ValueError`` for an ``opt`` with ``has_updated``, which emits rarely; ``init`` checks the state of ``opt``."""
    if hasattr(opt, "has_updated"):
        raise ValueError(f"opt must not be {type(opt).__name__}, which emits rarely: {_THE_OTHER_WAY_ROUND}")


def _check_trees(
    updates: optax.Updates, params: optax.Params | None, state: PhaseSwitchedState, predictor: Predictor
) -> None:
    """``ValueError`` if gradients or parameters do not match those that the state was made for."""
    if state.history is None:
        if params is not None:
            checks.check_same_tree(params, updates, what="gradients")
        return
    tree, leading = predictor.history.example(state.history)
    checks.check_same_tree(tree, updates, what="gradients", leading_axes=leading)
    if predictor.reads_params:
        if params is None and tree is not None:
            raise ValueError(
                "params must be given with predictor=Secants(), the default: update(updates, state, params); got None. "
                "A Window or Recursive does not need them"
            )
        checks.check_same_tree(tree, params, what="params", leading_axes=leading)


def _checked_machine(state: optax.OptState, phases: Guarded | Cycle, predictor: Predictor) -> Machine:
    """The machine's scalars; ``ValueError`` if the state was made by a transformation with other settings."""
    if not isinstance(state, PhaseSwitchedState):
        raise ValueError(f"state must be what init returned, a PhaseSwitchedState, got {type(state).__name__}")
    machine, ever_predicts = stats.unwrapped(state.machine).unpacked(), machines.ever_predicts(phases)
    wanted = next(kind.__name__ for kind in (Guarded, AdaptiveCycle, Cycle) if isinstance(phases, kind))
    check_settings(phases=(_phases_of(machine), wanted if ever_predicts else None))
    if not ever_predicts:
        check_history(state.history, None)
        return machine
    predictor.history.check_state(state.history)
    check_settings(calibrate=(machine.calibration is not None, predictor.calibrates))
    if predictor.history.example(state.history)[0] is not None:  # The tree itself may be None.
        had = None if state.residual is None else "a number"
        check_settings(residual_decay=(had, "a number" if predictor.has_residual else None))
    return machine


def _phases_of(machine: Machine) -> str | None:
    """The class of the settings that the machine was made with; None if it never predicts."""
    if machine.errors is None:
        return None
    if machine.guard is not None:
        return Guarded.__name__
    return Cycle.__name__ if machine.adaptive is None else AdaptiveCycle.__name__
