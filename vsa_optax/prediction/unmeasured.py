"""Detects misuse of the loss that PREDICT repeats: ``update`` does not receive it, or something reads it as new.

Both are detected while a training step is traced, by an update whose machine's loss is known to be repeated
(`machine.repeats_loss`).
"""

import sys
import warnings

import jax
import optax

from vsa_optax.core.types import Tree
from vsa_optax.prediction.stats import contains_machine

_LIBRARIES = ("vsa_optax", "optax", "jax", "flax")
# The states of Optax transformations that follow the loss from step to step.
READERS = tuple(
    getattr(optax.contrib, name)
    for name in ("ReduceLROnPlateauState", "MomoState", "MomoAdamState")
    if hasattr(optax.contrib, name)
)


def warn_without_value() -> None:
    """Warns with the line to write; like other Python warnings, once for each calling line."""
    warnings.warn(
        "value= was not given to update, so value_and_grad_by_phase returns NaN for the loss of PREDICT steps: write "
        "opt.update(grads, state, params, value=value) (with Flax nnx, optimizer.update(model, grads, value=value); a "
        "linen TrainState's apply_gradients does not forward it), or let a forward pass run there, "
        "value_and_grad_by_phase(loss, value_in_predict=True)",
        UserWarning,
        stacklevel=_levels_to_the_caller(),
    )


def check_no_reader(states: Tree) -> None:
    """``ValueError`` if something in ``states`` follows the loss, since it would read a repeated loss as a new one."""
    for node in _readers(states):
        raise ValueError(
            f"the optimizer follows the loss ({type(node).__name__}), but value_and_grad_by_phase repeats the last "
            "loss in PREDICT, which would count as a new one (e.g. as no progress): let a forward pass measure it, "
            "value_and_grad_by_phase(loss, value_in_predict=True)"
        )


def is_reader(node: object) -> bool:
    """Whether a node is the state of a transformation that follows the loss but cannot see which losses are repeated.

    `track_loss` is recognized by its state's name, since it imports this package. It sees the machine that it wraps.
    """
    if type(node).__name__ == "TrackLossState":
        return not contains_machine(node)
    return isinstance(node, READERS)


def contains_reader(state: Tree) -> bool:
    """Whether something in ``state`` follows the loss."""
    return bool(_readers(state))


def _readers(state: Tree) -> list[Tree]:
    nodes = jax.tree.leaves(state, is_leaf=is_reader)
    return [node for node in nodes if is_reader(node)]


def _levels_to_the_caller() -> int:
    """The ``stacklevel`` of the first frame outside the libraries, for a warning in the calling function."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    return level
