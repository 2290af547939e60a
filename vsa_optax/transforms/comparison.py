"""What a prediction is made of, and what a true step tells of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Memory(NamedTuple):
    """What a prediction is made of.

    Attributes:
        history: the history's state.
        residual: tree or None, the averaged error of past predictions.
        calibration: what past predictions were worth, or None.
    """

    history: Any
    residual: Any
    calibration: Any


class Comparison(NamedTuple):
    """One prediction beside what came.

    Attributes:
        residual: as in `Memory`, with it, and so is the next.
        calibration: None if there is none.
        error: ``[] float32``, ``||g - ĝ|| / ||g||`` over the whole tree.
        is_defined: ``[] bool``, whether there was a prediction, of what does not vanish.
    """

    residual: Any
    calibration: Any
    error: jax.Array
    is_defined: jax.Array


def num_rows(params: Any) -> int:
    """Rows of what is kept for each leaf; one where there is none, since some cannot save an array of no size.

    Never nothing at all: what maps a function over an optimizer's state compares it with the state of other parameters.
    """
    return max(1, len(jax.tree.leaves(params)))


def no_comparison(memory: Memory) -> Comparison:
    """Of a tree without leaves."""
    return Comparison(memory.residual, memory.calibration, jnp.zeros([], jnp.float32), jnp.array(False))
