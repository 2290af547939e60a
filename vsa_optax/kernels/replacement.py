"""Replaces many arrays by others, or none of them, by one condition."""

from collections.abc import Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from vsa_optax.kernels import alike, platforms

# Arrays that belong together, such as a leaf's codes and scales.
Arrays: TypeAlias = tuple[jax.Array, ...]

_MOST_AT_ONCE = 16


@jax.jit
def replace_if(replaces: jax.Array, new: Sequence[Arrays], old: Sequence[Arrays]) -> list[Arrays]:
    """``new`` if ``[] bool`` ``replaces``, else ``old``; all tuples have the same length.

    On an NVIDIA GPU, up to 16 tuples of the same types share a launch, and the old arrays are replaced in place.
    """
    return platforms.on_each_gpu_or_anywhere(_on_gpu, _anywhere, replaces, list(new), list(old))


def _on_gpu(replaces: jax.Array, new: list[Arrays], old: list[Arrays]) -> list[Arrays]:
    from vsa_optax.kernels.gpu import replacement_kernel  # It imports Pallas, which few users need.

    kept = list(old)
    # Batches of the same types and size share a compiled kernel.
    for batch in alike.numbers_of_alike(*zip(*old, strict=True), most=_MOST_AT_ONCE):
        becomes = jax.tree.leaves([new[i] for i in batch])
        was, treedef = jax.tree.flatten([old[i] for i in batch])
        of_batch = jax.tree.unflatten(treedef, replacement_kernel.replace_if(replaces, becomes, was))
        for i, arrays in zip(batch, of_batch, strict=True):
            kept[i] = arrays
    return kept


def _anywhere(replaces: jax.Array, new: list[Arrays], old: list[Arrays]) -> list[Arrays]:
    return jax.tree.map(lambda b, a: jnp.where(replaces, b, a), new, old)
