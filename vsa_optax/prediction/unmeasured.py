"""What happens to a loss that comes back unmeasured in PREDICT: nobody keeps it, or somebody takes it for news.

Both are noticed while a training step is traced, by an update that knows of its machine that the loss is repeated
(`machine.repeats_loss`).
"""

import abc
import sys
import warnings

import jax
import optax

from vsa_optax.core.types import Tree
from vsa_optax.prediction.stats import contains_machine

_LIBRARIES = ("vsa_optax", "optax", "jax", "flax")


class LossReader(abc.ABC):  # noqa: B024 # States are tuples, which are registered and do not inherit.
    """States of transformations that follow the loss from step to step, and so mistake a repeated loss for a new one.

    A class of states is registered: ``@LossReader.register``. One that holds a phase machine sees what is repeated.
    """


for _name in ("ReduceLROnPlateauState", "MomoState", "MomoAdamState"):
    if hasattr(optax.contrib, _name):
        LossReader.register(getattr(optax.contrib, _name))


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


def check_no_reader(states: Tree) -> None:
    """``ValueError`` if something in ``states`` follows the loss, which would take a repeated one for news."""
    for node in _readers(states):
        raise ValueError(
            f"the optimizer follows the loss ({type(node).__name__}), but value_and_grad_by_phase repeats the last "
            "one in PREDICT, which would be taken for news (no progress, say): let a forward pass measure it, "
            "value_and_grad_by_phase(loss, value_in_predict=True)"
        )


def is_reader(node: object) -> bool:
    """Whether it is a `LossReader` that cannot see which losses are repeated."""
    return isinstance(node, LossReader) and not contains_machine(node)


def contains_reader(state: Tree) -> bool:
    """Whether something in ``state`` follows the loss."""
    return bool(_readers(state))


def _readers(state: Tree) -> list[Tree]:
    nodes = jax.tree.leaves(state, is_leaf=is_reader)
    return [node for node in nodes if is_reader(node)]


def _levels_to_the_caller() -> int:
    """The ``stacklevel``, for a warning in the function that calls this, of the first frame outside the libraries."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    return level
