"""The kind of a step, where it is known while a program is traced: then there is nothing to decide on the device.

`jit_by_phase` traces a training step once for each kind, and says by `assumed` which one it is. A transformation and
`value_and_grad_by_phase` ask by `kind_of`, each for its own machine. The machine is known by its arrays, which are the
same Python objects from the arguments to the update: behind an update, in the body of a loop, or inside
``jax.shard_map`` they are others, and nothing is known.
"""

import contextlib
import contextvars
import dataclasses
import enum
from collections.abc import Iterator

import jax

from vsa_optax.prediction.machine import PhaseMachineState


class StepKind(enum.IntEnum):
    """What a step has to do.

    Attributes:
        PLAIN: a true step of which nothing is recorded: the guard is asleep, or nothing is ever predicted.
        RECORDED: a true step, recorded.
        WATCHED: a true step, recorded, and compared with its prediction.
        PREDICTED: a step of PREDICT.
    """

    PLAIN = 0
    RECORDED = 1
    WATCHED = 2
    PREDICTED = 3


@dataclasses.dataclass
class Assumption:
    """What a program is traced for.

    Attributes:
        kind: of the step.
        machine: before the step.
        forecast: what the update found of the steps behind this one, as `forecast.forecast` gives it; None before.
        after: the machine behind the step.
    """

    kind: StepKind
    machine: PhaseMachineState
    forecast: jax.Array | None = None
    after: PhaseMachineState | None = None


_assumption: contextvars.ContextVar[Assumption | None] = contextvars.ContextVar("assumption", default=None)


@contextlib.contextmanager
def assumed(assumption: Assumption) -> Iterator[None]:
    """As long as this lasts, the machine's step is of that kind."""
    token = _assumption.set(assumption)
    try:
        yield
    finally:
        _assumption.reset(token)


def assumption_for(machine: PhaseMachineState) -> Assumption | None:
    """What is known of this machine's step; None if nothing is."""
    assumption = _assumption.get()
    if assumption is None or assumption.machine.phase is not machine.phase:
        return None
    return assumption


def kind_of(machine: PhaseMachineState) -> StepKind | None:
    """The kind of this machine's coming step, if it is known."""
    assumption = assumption_for(machine)
    return None if assumption is None else assumption.kind
