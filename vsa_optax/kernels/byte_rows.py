"""Arrays of any types as rows of bytes and back, so that a whole payload crosses a link in one piece.

Axes: n rows, m bytes.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def to_bytes(arrays: Sequence[jax.Array]) -> jax.Array:
    """``[n, m] uint8``: of each row of the arrays ``[n, ...]`` its bits, one array behind the other."""
    rows = []
    for array in arrays:
        parts = array if array.dtype == jnp.uint8 else lax.bitcast_convert_type(array, jnp.uint8)
        rows.append(parts.reshape(parts.shape[0], -1))
    return jnp.concatenate(rows, axis=1)


def from_bytes(rows: jax.Array, like: Sequence[jax.Array]) -> list[jax.Array]:
    """The inverse of `to_bytes`, for any n.

    Args:
        rows: ``[n, m] uint8``.
        like: arrays with the shapes, but for the leading axis, and dtypes of those that were turned into bytes.
    """
    arrays, start = [], 0
    for array in like:
        size, width = math.prod(array.shape[1:]), array.dtype.itemsize
        parts = rows[:, start : start + size * width]
        start += size * width
        if array.dtype == jnp.uint8:
            arrays.append(parts.reshape(-1, *array.shape[1:]))
        else:
            parts = parts.reshape(-1, *array.shape[1:], *([width] if width > 1 else []))
            arrays.append(lax.bitcast_convert_type(parts, array.dtype))
    return arrays
