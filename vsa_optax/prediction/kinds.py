"""The kind of a step, if it is known while a program is traced; the device then has nothing to decide.

`jit_by_phase` traces a training step once for each kind, and sets the kind with `assumed`. A transformation and
`value_and_grad_by_phase` query it with `kind_of`, each for its own machine. The machine is recognized by its arrays,
which are the same Python objects from the arguments to the update. After an update, in the body of a loop, or inside
``jax.shard_map`` they are different objects, and the kind is unknown.
"""

import contextlib
import contextvars
import dataclasses
import enum
from collections.abc import Iterator

import jax

from vsa_optax.prediction.machine_state import Machine


class StepKind(enum.IntEnum):
    """The kind of a step.

    Attributes:
        PLAIN: a true step that is not recorded: the guard is asleep, or nothing is ever predicted.
        RECORDED: a true step that is recorded.
        WATCHED: a true step that is recorded and compared with its prediction.
        PREDICTED: a PREDICT step.
    """

    PLAIN = 0
    RECORDED = 1
    WATCHED = 2
    PREDICTED = 3


@dataclasses.dataclass
class Assumption:
    """The assumption under which a program is traced.

    Attributes:
        kind: the kind of the step.
        machine: the machine before the step.
        forecast: the kinds of the following steps, as `forecast.forecast` returns them; None before the update.
        after: the machine after the step; None before the update.
    """

    kind: StepKind
    machine: Machine
    forecast: jax.Array | None = None
    after: Machine | None = None


_assumption: contextvars.ContextVar[Assumption | None] = contextvars.ContextVar("assumption", default=None)


@contextlib.contextmanager
def assumed(assumption: Assumption) -> Iterator[None]:
    """Within this context, the machine's step is of the assumed kind."""
    token = _assumption.set(assumption)
    try:
        yield
    finally:
        _assumption.reset(token)


def assumption_for(machine: Machine) -> Assumption | None:
    """The assumption for this machine's step; None if there is none."""
    assumption = _assumption.get()
    if assumption is None or assumption.machine.phase is not machine.phase:
        return None
    return assumption


def kind_of(machine: Machine) -> StepKind | None:
    """The kind of this machine's coming step; None if it is unknown."""
    assumption = assumption_for(machine)
    return None if assumption is None else assumption.kind
