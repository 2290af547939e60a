"""Queries of the phase machine in an optimizer's state, at any depth."""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from vsa_optax.core.types import Tree
from vsa_optax.prediction.guard import GuardState
from vsa_optax.prediction.machine import Phase, total_steps
from vsa_optax.prediction.machine_state import Machine, PhaseMachineState
from vsa_optax.prediction.predictors.base import PredictionQuality

Wrapped = TypeVar("Wrapped")


class GuardStats(NamedTuple):
    """The guard's last action and the quantities that decided it.

    Attributes:
        action: ``[] int32``, the last `vsa_optax.GuardAction`.
        predict_length: ``[] float32``, the planned number of predictions in the next leap; 0 for no leap.
        constant: ``[] float32``, κ of `prediction.guard`, which determines the length: the worst recent squared
            relative error at a distance of one step.
        asleep: ``[] int32``, the number of coming true steps that are neither recorded nor compared.
    """

    action: jax.Array
    predict_length: jax.Array
    constant: jax.Array
    asleep: jax.Array


class PhaseStats(NamedTuple):
    """Counts and errors of a run so far; all fields but the last two are scalar arrays.

    Attributes:
        phase: int32, the `Phase` of the coming step.
        total_steps: int32, the number of steps taken.
        warmup_steps: int32, the number of steps taken in WARMUP.
        full_steps: int32, the number of steps taken in FULL.
        predict_steps: int32, the number of steps taken in PREDICT, which need no backward pass.
        correct_steps: int32, the number of CORRECT steps taken.
        cycles: int32, the number of PREDICT phases completed.
        steps_per_backward: float32, the number of steps divided by the number that needed a backward pass; 1 before
            any step. It is not a ratio of times: time is saved only if ``ignored_gradients`` is 0. Passes that an
            optimizer runs inside its own update are not counted (``optax.contrib.sophia``, ``sam`` with
            ``opaque_mode=True``). They run in PREDICT if gradients are predicted, and do not if updates are.
        nonfinite_count: int32, the number of steps skipped because of a NaN or an infinity.
        ignored_gradients: int32, the number of PREDICT steps that received a non-zero gradient. Its backward pass was
            wasted: use `vsa_optax.value_and_grad_by_phase` instead of ``jax.value_and_grad``. To keep the check cheap,
            it reads only the four largest leaves of at most 65536 coordinates, or the smallest leaf if all have more.
            Terms that an earlier link of a chain adds to the zeros of a skipped step (weight decay, noise) count as
            well. Inside ``jax.shard_map``, gradients that differ between devices are not counted, since devices do not
            communicate in PREDICT.
        mean_prediction_error: float32, the mean of ``||x - x̂|| / ||x||`` over CORRECT steps, where x is the predicted
            gradient or update; 0 before the first. With the guard or calibration, the mean is over all true steps that
            follow a prediction.
        last_prediction_error: float32, the same error at the latest such step.
        quality: `vsa_optax.PredictionQuality`, or None without calibration.
        guard: `vsa_optax.GuardStats` with `vsa_optax.Guarded`, else None.
    """

    phase: jax.Array
    total_steps: jax.Array
    warmup_steps: jax.Array
    full_steps: jax.Array
    predict_steps: jax.Array
    correct_steps: jax.Array
    cycles: jax.Array
    steps_per_backward: jax.Array
    nonfinite_count: jax.Array
    ignored_gradients: jax.Array
    mean_prediction_error: jax.Array
    last_prediction_error: jax.Array
    quality: PredictionQuality | None = None
    guard: GuardStats | None = None


def contains_machine(state: Tree) -> bool:
    """Whether a phase machine is anywhere in ``state``."""
    return bool(_machines(state))


def find_machine_state(state: Tree) -> PhaseMachineState:
    """The one phase machine in ``state``; its arrays are unwrapped from the Variables of a Flax nnx optimizer.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = _machines(state)
    if len(found) != 1:
        raise ValueError(
            f"expected one phase machine in the optimizer state, found {len(found)}: pass the state of an optimizer "
            "made with predict_gradients or phase_switched, and use only one of them, once. For several groups of "
            "parameters, wrap one around all of them: phase_switched(optax.multi_transform({...}, labels))"
        )
    return unwrapped(found[0])


def find_machine(state: Tree) -> Machine:
    """The scalars of the one phase machine in ``state``; the same errors."""
    return find_machine_state(state).unpacked()


def needs_backward(opt_state: Tree) -> jax.Array:
    """Whether the coming step needs a true gradient, as ``[] bool``; traced under jit.

    Args:
        opt_state: an optimizer state that contains exactly one phase machine, at any depth.

    Example:
        >>> import jax.numpy as jnp, optax, vsa_optax
        >>> opt = optax.chain(vsa_optax.predict_gradients(), optax.adam(1e-3))
        >>> bool(vsa_optax.needs_backward(opt.init({"w": jnp.ones(3)})))
        True
    """
    return find_machine_state(opt_state).phase != Phase.PREDICT


def phase_stats(opt_state: Tree) -> PhaseStats:
    """Returns counts and errors of the run so far as `PhaseStats`; traced under jit.

    Args:
        opt_state: an optimizer state that contains exactly one phase machine, at any depth.

    Example:
        >>> import jax.numpy as jnp, optax, vsa_optax
        >>> opt = vsa_optax.phase_switched(optax.adamw(1e-3))
        >>> stats = vsa_optax.phase_stats(opt.init({"w": jnp.ones(3)}))
        >>> vsa_optax.Phase(int(stats.phase)).name, float(stats.steps_per_backward)
        ('WARMUP', 1.0)
    """
    machine = find_machine(opt_state)
    total = total_steps(machine)
    backward = total - machine.predict_steps
    errors = machine.errors
    return PhaseStats(
        phase=machine.phase,
        total_steps=total,
        warmup_steps=machine.warmup_steps,
        full_steps=machine.full_steps,
        predict_steps=machine.predict_steps,
        correct_steps=machine.correct_steps,
        cycles=machine.cycles,
        steps_per_backward=jnp.where(total > 0, total / jnp.maximum(backward, 1), 1.0).astype(jnp.float32),
        nonfinite_count=machine.nonfinite_count,
        ignored_gradients=machine.ignored_gradients,
        mean_prediction_error=jnp.zeros([], jnp.float32) if errors is None else errors.mean,
        last_prediction_error=jnp.zeros([], jnp.float32) if errors is None else errors.last,
        quality=None if machine.calibration is None else machine.calibration.quality(),
        guard=None if machine.guard is None else _guard_stats(machine.guard),
    )


def _guard_stats(state: GuardState) -> GuardStats:
    return GuardStats(action=state.action, predict_length=state.length, constant=state.constant, asleep=state.asleep)


def _machines(state: Tree) -> list[PhaseMachineState]:
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, PhaseMachineState))
    return [leaf for leaf in leaves if isinstance(leaf, PhaseMachineState)]


def unwrapped(state: Wrapped) -> Wrapped:
    """The state with its arrays taken out of the Variables of a Flax nnx optimizer."""

    def is_wrapped(leaf: object) -> bool:
        # A Flax nnx Variable is recognized by its method, so that Flax need not be imported.
        return hasattr(leaf, "get_value")

    return jax.tree.map(lambda leaf: leaf.get_value() if is_wrapped(leaf) else leaf, state, is_leaf=is_wrapped)
