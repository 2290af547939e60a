"""The kind of a step, if it is known while a program is traced; the device then has nothing to decide.

`vsa_optax.jit_by_phase` traces a training step once for each kind, and sets the kind with `assumed`. The kind belongs
to one owner in the optimizer's state: a phase machine, or a window of micro-batches. A transformation and
`vsa_optax.value_and_grad_by_phase` query it with `kind_of`, each for its own owner. The owner is recognized by its
marks, the arrays of its state on which the coming kinds depend. They are the same Python objects from the arguments to
the update. After an update, or inside a loop, ``jax.jit``, ``jax.vmap`` or ``jax.shard_map``, they are different
objects, and the kind is unknown.
"""

import contextlib
import contextvars
import dataclasses
import enum
from collections.abc import Iterator
from typing import TypeAlias

import jax
import jax.numpy as jnp

# Arrays of a state, or None for those that it lacks.
Marks: TypeAlias = tuple[jax.Array | None, ...]


class StepKind(enum.IntEnum):
    """The kind of a step; the first four belong to a phase machine, the others to a window of micro-batches.

    Attributes:
        PLAIN: a true step that is not recorded: the guard is asleep, or nothing is ever predicted.
        RECORDED: a true step that is recorded.
        WATCHED: a true step that is recorded and compared with its prediction.
        PREDICTED: a PREDICT step.
        ACCUMULATED: a micro-batch that certainly does not complete its window.
        UNDECIDED: a micro-batch that may complete its window; the device decides.
    """

    PLAIN = 0
    RECORDED = 1
    WATCHED = 2
    PREDICTED = 3
    ACCUMULATED = 4
    UNDECIDED = 5


@dataclasses.dataclass
class Assumption:
    """The assumption under which a program is traced.

    Attributes:
        kind: the kind of the step.
        marks: the owner's marks before the step.
        forecast: the kinds of the following steps, as `runs` returns them; None before the update.
        marks_after: its marks after the step; None before the update.
    """

    kind: StepKind
    marks: Marks
    forecast: jax.Array | None = None
    marks_after: Marks | None = None


_assumption: contextvars.ContextVar[Assumption | None] = contextvars.ContextVar("assumption", default=None)


@contextlib.contextmanager
def assumed(assumption: Assumption) -> Iterator[None]:
    """Within this context, the owner's step is of the assumed kind."""
    token = _assumption.set(assumption)
    try:
        yield
    finally:
        _assumption.reset(token)


def assumption_for(marks: Marks) -> Assumption | None:
    """The assumption for the step of the owner with these marks; None if there is none."""
    assumption = _assumption.get()
    return None if assumption is None or not are_same(assumption.marks, marks) else assumption


def kind_of(marks: Marks) -> StepKind | None:
    """The kind of the coming step of the owner with these marks; None if it is unknown."""
    assumption = assumption_for(marks)
    return None if assumption is None else assumption.kind


def are_same(marks: Marks, others: Marks) -> bool:
    """Whether both are the same Python objects."""
    return len(marks) == len(others) and all(x is y for x, y in zip(marks, others, strict=True))


def runs(*pairs: tuple[StepKind, int | jax.Array]) -> jax.Array:
    """``[n, 2] int32``: a forecast, each kind with the number of steps of it that are certain to come, possibly 0."""
    return jnp.stack([jnp.stack([jnp.int32(kind), jnp.asarray(count, jnp.int32)]) for kind, count in pairs])
