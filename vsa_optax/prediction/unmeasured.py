"""Whose loss comes back unmeasured in PREDICT, as far as it can be known while a training step is traced.

`value_and_grad_by_phase` and `update` see the same machine, and its arrays are the same Python objects as long as both
are called in one trace. So the one notes them for the other. Nothing depends on it but warnings and errors.
"""

import sys
import warnings
import weakref

import jax
import optax

from vsa_optax.core.types import Tree
from vsa_optax.prediction.machine import PhaseMachineState

_noted: weakref.WeakValueDictionary[int, jax.Array] = weakref.WeakValueDictionary()
_LIBRARIES = ("vsa_optax", "optax", "jax", "flax")
# States of Optax's that follow the loss from step to step.
READERS = tuple(
    getattr(optax.contrib, name)
    for name in ("ReduceLROnPlateauState", "MomoState", "MomoAdamState")
    if hasattr(optax.contrib, name)
)


def note(machine: PhaseMachineState) -> None:
    """Remembers, as long as the trace lasts, that no forward pass runs in this machine's PREDICT steps."""
    _noted[id(machine.phase)] = machine.phase


def is_noted(machine: PhaseMachineState) -> bool:
    """Whether it is known that this machine's PREDICT steps have no loss of their own."""
    return _noted.get(id(machine.phase)) is machine.phase


def warn_without_value() -> None:
    """Names the line to write; shown once for each line of the caller that updates, as Python's warnings are."""
    warnings.warn(
        "value= was not given to update, so value_and_grad_by_phase returns NaN for the loss of PREDICT steps: write "
        "opt.update(grads, state, params, value=value) (with Flax nnx, optimizer.update(model, grads, value=value); a "
        "linen TrainState's apply_gradients does not forward it), or let a forward pass run there, "
        "value_and_grad_by_phase(loss, value_in_predict=True)",
        UserWarning,
        stacklevel=_levels_to_the_caller(),
    )


def check_no_reader(states: list[Tree]) -> None:
    """``ValueError`` if something in ``states`` follows the loss, which would take a repeated one for news."""
    for node in jax.tree.leaves(states, is_leaf=lambda x: isinstance(x, READERS)):
        if isinstance(node, READERS):
            raise ValueError(
                f"the optimizer follows the loss ({type(node).__name__}), but value_and_grad_by_phase repeats the last "
                "one in PREDICT, which would be taken for news (no progress, say): let a forward pass measure it, "
                "value_and_grad_by_phase(loss, value_in_predict=True)"
            )


def _levels_to_the_caller() -> int:
    """The ``stacklevel``, for a warning in the function that calls this, of the first frame outside the libraries."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    return level
