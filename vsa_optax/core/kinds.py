"""The kind of a step, if it is known while a program is traced; the device then has nothing to decide.

`vsa_optax.jit_by_phase` traces a training step once for each kind, and sets the kind with `assumed`. The kind belongs
to one owner in the optimizer's state: a phase machine, or a window of micro-batches. A transformation and
`vsa_optax.value_and_grad_by_phase` query it with `kind_of`, each for its own owner. The owner is recognized by a scalar
of its state, ``phase`` or ``mini_step``, which is the same Python object from the arguments to the update. After an
update, in the body of a loop, or inside ``jax.shard_map`` it is a different object, and the kind is unknown.
"""

import contextlib
import contextvars
import dataclasses
import enum
from collections.abc import Iterator

import jax
import jax.numpy as jnp


class StepKind(enum.IntEnum):
    """The kind of a step; the first four belong to a phase machine, the others to a window of micro-batches.

    Attributes:
        PLAIN: a true step that is not recorded: the guard is asleep, or nothing is ever predicted.
        RECORDED: a true step that is recorded.
        WATCHED: a true step that is recorded and compared with its prediction.
        PREDICTED: a PREDICT step.
        ACCUMULATED: a micro-batch that certainly does not complete its window.
        DECIDED: a micro-batch that may complete its window; the device decides.
    """

    PLAIN = 0
    RECORDED = 1
    WATCHED = 2
    PREDICTED = 3
    ACCUMULATED = 4
    DECIDED = 5


@dataclasses.dataclass
class Assumption:
    """The assumption under which a program is traced.

    Attributes:
        kind: the kind of the step.
        scalar: the scalar by which the owner is recognized, before the step.
        forecast: the kinds of the following steps, as `runs` returns them; None before the update.
        after: the scalar after the step; None before the update.
    """

    kind: StepKind
    scalar: jax.Array
    forecast: jax.Array | None = None
    after: jax.Array | None = None


_assumption: contextvars.ContextVar[Assumption | None] = contextvars.ContextVar("assumption", default=None)


@contextlib.contextmanager
def assumed(assumption: Assumption) -> Iterator[None]:
    """Within this context, the owner's step is of the assumed kind."""
    token = _assumption.set(assumption)
    try:
        yield
    finally:
        _assumption.reset(token)


def assumption_for(scalar: jax.Array) -> Assumption | None:
    """The assumption for the step of the owner with this scalar; None if there is none."""
    assumption = _assumption.get()
    return None if assumption is None or assumption.scalar is not scalar else assumption


def kind_of(scalar: jax.Array) -> StepKind | None:
    """The kind of the coming step of the owner with this scalar; None if it is unknown."""
    assumption = assumption_for(scalar)
    return None if assumption is None else assumption.kind


def runs(*pairs: tuple[StepKind, int | jax.Array]) -> jax.Array:
    """``[n, 2] int32``: a forecast, each kind with the number of steps of it that are certain to come, possibly 0."""
    return jnp.stack([jnp.stack([jnp.int32(kind), jnp.asarray(count, jnp.int32)]) for kind, count in pairs])
