"""Keep a NaN or an infinity out of every state: test a tree, and choose between the new and the old."""

from typing import Any

import jax
import jax.numpy as jnp

from vsa_optax.kernels import numerics


def all_finite(tree: Any) -> jax.Array:
    """``[] bool``: no NaN and no infinity in any leaf; true for an empty tree."""
    finite = jnp.array(True)
    for leaf in jax.tree.leaves(tree):
        finite &= numerics.is_finite(leaf)
    return finite


def select(take_new: jax.Array, new: Any, old: Any) -> Any:
    """``new`` where ``take_new``, else ``old``, in the dtypes of ``old``.

    One pass over the tree; a conditional would cost copies besides.
    """

    def pick(n: Any, o: Any) -> jax.Array:
        chosen = jnp.where(take_new, n, o)
        dtype = jnp.asarray(o).dtype
        return chosen if chosen.dtype == dtype else chosen.astype(dtype)

    return jax.tree.map(pick, new, old)
