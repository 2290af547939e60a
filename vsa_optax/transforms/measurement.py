"""What one true step tells of the predictions."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Measurement(NamedTuple):
    """One prediction beside what came.

    Attributes:
        state: the calibration with it.
        error: ``[] float32``, ``||g - ĝ|| / ||g||`` over the whole tree.
        is_defined: ``[] bool``, whether the tree does not vanish.
    """

    state: Any
    error: jax.Array
    is_defined: jax.Array


def num_rows(params: Any) -> int:
    """Rows of what is kept for each leaf; one where there is none, since some cannot save an array of no size.

    Never nothing at all: what maps a function over an optimizer's state compares it with the state of other parameters.
    """
    return max(1, len(jax.tree.leaves(params)))


def nothing_measured(state: Any) -> Measurement:
    """Of a tree without leaves."""
    return Measurement(state, jnp.zeros([], jnp.float32), jnp.array(False))
