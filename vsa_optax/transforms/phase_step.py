"""One step of a transformation, or its prediction, chosen by the phase without copying anybody's state."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from vsa_optax.kernels import numerics
from vsa_optax.transforms.comparison import Memory
from vsa_optax.transforms.conditional import split_extra_args, when
from vsa_optax.transforms.finite import all_finite, select
from vsa_optax.transforms.phases import Phase
from vsa_optax.transforms.predictor import Predictor
from vsa_optax.transforms.replicated import all_finite_over, varying_axes
from vsa_optax.transforms.step_result import StepResult


class PhaseStep:
    """One step of ``recorded``, or its prediction if the phase is PREDICT.

    Outside jit, JAX compiles a loop or a conditional anew for each new function object: `_functions` makes them once.
    """

    def __init__(self, recorded: optax.GradientTransformationExtraArgs, predictor: Predictor) -> None:
        self._recorded = recorded
        self._predictor = predictor
        self._functions_for = functools.lru_cache(maxsize=16)(self._functions)

    def __call__(
        self,
        updates: Any,
        inner_state: Any,
        params: Any,
        extra_args: dict[str, Any],
        phase: jax.Array,
        memory: Memory,
        scalars: Any,
        watches: jax.Array | None = None,
        axes: frozenset[str] = frozenset(),
    ) -> StepResult:
        """One step in a true phase, the prediction in PREDICT; ``scalars`` are what the step is to the history.

        A true step is compared with its prediction in CORRECT; calibrated, always; and where ``watches`` is given, if
        that is true. Devices along ``axes`` decide together: what is not finite on one is skipped on all.
        """
        traced_args, static_args = split_extra_args(extra_args)

        def emitted(updates: Any, inner_state: Any, params: Any, extra_args: Any) -> Any:
            target, _ = self._recorded.update(updates, inner_state, params, **extra_args, **static_args)
            _check_same_everywhere(target, axes)
            return target

        leaves, treedef = jax.tree.flatten(jax.eval_shape(emitted, updates, inner_state, params, traced_args))
        predict_if, step, step_when = self._functions_for(treedef, tuple(leaves))
        is_predict = phase == Phase.PREDICT
        weights = self._predictor.weights(memory.calibration, scalars)
        has_gradient = lax.cond(is_predict, _true, all_finite_over(axes), updates)
        result = StepResult(
            target=predict_if(is_predict, memory.history, memory.residual, scalars, weights),
            inner_state=inner_state,
            is_finite=has_gradient,
            residual=memory.residual,
            calibration=memory.calibration,
            error=jnp.zeros([], jnp.float32),
            is_measured=jnp.array(False),
        )
        if static_args:
            step_when = when(functools.partial(step, **static_args))
        runs = ~is_predict & has_gradient
        if watches is None:
            watches = jnp.array(True) if memory.calibration is not None else phase == Phase.CORRECT
        return step_when(runs, result, updates, params, traced_args, watches, memory.history, scalars)

    def _functions(self, treedef: Any, avals: tuple[Any, ...]) -> tuple[Callable[..., Any], ...]:
        """Prediction, true step and conditional true step of a transformation that emits leaves like ``avals``."""

        def predicted(history: Any, residual: Any, scalars: Any, weights: jax.Array | None) -> Any:
            leaves = jax.tree.leaves(self._predictor.predict(history, residual, scalars, weights))
            cast = [numerics.saturating_cast(x, aval.dtype) for x, aval in zip(leaves, avals, strict=True)]
            return jax.tree.unflatten(treedef, cast)

        def nothing(history: Any, residual: Any, scalars: Any, weights: jax.Array | None) -> Any:
            del history, residual, scalars, weights
            return jax.tree.unflatten(treedef, [jnp.zeros_like(aval, dtype=aval.dtype) for aval in avals])

        def predict_if(pred: jax.Array, history: Any, residual: Any, scalars: Any, weights: jax.Array | None) -> Any:
            return lax.cond(pred, predicted, nothing, history, residual, scalars, weights)

        def compare(result: StepResult, is_due: jax.Array, history: Any, scalars: Any) -> StepResult:
            def prediction() -> Any:
                # ``is_due`` is always true here. But a conditional's result is one array: without it XLA copies each
                # record on the way.
                return predict_if(is_due, history, result.residual, scalars, None)

            memory = Memory(history, result.residual, result.calibration)
            found = self._predictor.compare(memory, scalars, result.target, prediction)
            return result._replace(
                residual=found.residual,
                calibration=found.calibration,
                error=found.error,
                is_measured=found.is_defined,
            )

        compare_when = when(compare)

        def step(
            result: StepResult,
            updates: Any,
            params: Any,
            extra_args: dict[str, Any],
            watches: jax.Array,
            history: Any,
            scalars: Any,
            **static_args: Any,
        ) -> StepResult:
            target, inner_state = self._recorded.update(
                updates, result.inner_state, params, **extra_args, **static_args
            )
            is_finite = all_finite(target)
            inner_state = select(is_finite, inner_state, result.inner_state)
            result = result._replace(target=target, inner_state=inner_state, is_finite=is_finite)
            is_due = watches & is_finite
            return compare_when(is_due, result, is_due, history, scalars)

        return predict_if, step, when(step)


def _true(updates: Any) -> jax.Array:
    del updates
    return jnp.array(True)


def _check_same_everywhere(target: Any, axes: frozenset[str]) -> None:
    """``ValueError`` if what is to be recorded differs between devices along ``axes``, which decide together."""
    differing = varying_axes(target) & axes
    if differing:
        raise ValueError(
            f"gradients differ between the devices along {sorted(differing)}, and so would what is recorded of them: "
            "average them before (jax.lax.pmean), or inside opt (compressed_pmean) with predict_in='update'; if the "
            "parameters themselves are sharded, leave that to jax.jit"
        )
