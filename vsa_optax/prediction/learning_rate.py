"""Checks of learning rates: their type, and that only one rate applies and counts all steps."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vsa_optax.core import checks

_NAMES = ("learning_rate", "lr", "step_size")  # The names that optimizer factories use for it.
_SCHEDULES = (optax.ScaleByScheduleState,)
_INJECTED = (optax.InjectHyperparamsState, optax.InjectStatefulHyperparamsState)


class _Own(NamedTuple):
    """A factor inside an optimizer, as its state shows it.

    Attributes:
        name: its name in an error.
        is_schedule: whether it counts steps.
        is_rate: whether it multiplies updates.
    """

    name: str
    is_schedule: bool
    is_rate: bool


def check_learning_rate(learning_rate: optax.ScalarOrSchedule | None) -> None:
    """``ValueError`` unless ``learning_rate`` is None, a schedule, a number ``>= 0`` or such an array."""
    if learning_rate is None or callable(learning_rate):
        return
    if isinstance(learning_rate, jax.Array | np.ndarray | np.generic):
        if jnp.shape(learning_rate) != () or not jnp.issubdtype(learning_rate.dtype, jnp.floating):
            raise ValueError(
                "learning_rate must be a schedule, a number >= 0 or a floating-point scalar array, got an array of "
                f"shape {jnp.shape(learning_rate)} and dtype {learning_rate.dtype}"
            )
        if isinstance(learning_rate, jax.core.Tracer):  # The value is unknown, e.g. from inject_hyperparams.
            return
        learning_rate = float(learning_rate)
    checks.check_real("learning_rate", learning_rate, low=0.0, high=float(np.finfo(np.float32).max))


def check_one_rate(inner_state: optax.OptState, learning_rate: optax.ScalarOrSchedule | None, *, rests: bool) -> None:
    """``ValueError`` if rates would multiply, or if the optimizer's own schedule would not count all steps.

    Args:
        inner_state: the optimizer's state. It does not show a plain number, as in ``optax.adamw(0.1)``.
        learning_rate: the wrapper's learning rate, or None.
        rests: whether the optimizer does not run in PREDICT.
    """
    for own in _own_factors(inner_state):
        if learning_rate is not None and own.is_rate:
            raise ValueError(
                f"learning_rate must be None where opt scales by a rate of its own, here {own.name}: the two would "
                "multiply. Keep one of them: leave out learning_rate=, or build opt at rate 1, such as "
                f"optax.adamw(1.0); got {learning_rate!r}"
            )
        if rests and learning_rate is None and own.is_schedule:
            raise ValueError(
                f"learning_rate must be given where updates are predicted and opt has a schedule, here {own.name}: "
                "opt does not run in PREDICT, so that its schedule counts true steps only and falls behind. Build opt "
                "at rate 1, such as optax.adamw(1.0), and give the schedule as learning_rate=; or let gradients be "
                "predicted, predictor=Secants() or predicts='gradient', where opt runs at every step; got None"
            )


def _own_factors(state: optax.OptState) -> Iterator[_Own]:
    kinds = (*_SCHEDULES, *_INJECTED)
    for node in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(node, _SCHEDULES):
            yield _Own("a schedule (ScaleByScheduleState)", is_schedule=True, is_rate=True)
        elif isinstance(node, _INJECTED):
            scheduled = getattr(node, "hyperparams_states", {})
            for name in node.hyperparams:
                yield _Own(f"inject_hyperparams' {name}", name in scheduled, name in _NAMES)
            yield from _own_factors(node.inner_state)
