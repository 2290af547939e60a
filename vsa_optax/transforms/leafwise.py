"""Sums and inner products of trees, leaf by leaf.

Axes: L leaves.
"""

from typing import Any

import jax
import jax.numpy as jnp

from vsa_optax.kernels import inner_products, wls


def combine_trees(weights: jax.Array, trees: list[Any]) -> Any:
    """The trees' sum with weights ``[L, trees]``, in at least f32."""
    leaves = [jax.tree.leaves(tree) for tree in trees]
    sums = [
        wls.combine([weights[leaf, i] for i in range(len(trees))], list(arrays))
        for leaf, arrays in enumerate(zip(*leaves, strict=True))
    ]
    return jax.tree.unflatten(jax.tree.structure(trees[0]), sums)


def products_of_trees(trees: list[Any], other: Any) -> tuple[jax.Array, jax.Array]:
    """Of the trees with each other and with another one: ``[L, trees, trees]`` and ``[L, trees]``."""
    leaves = list(zip(*(jax.tree.leaves(tree) for tree in [*trees, other]), strict=True))
    num = len(trees)
    table = jnp.stack(
        [jnp.stack([jnp.stack([inner_products.inner(x, y) for y in xs]) for x in xs[:num]]) for xs in leaves]
    )
    return table[:, :, :num], table[:, :, num]


def energies(tree: Any) -> jax.Array:
    """``[L] float32``: the leaves' squared norms."""
    return jnp.stack([inner_products.inner(x, x) for x in jax.tree.leaves(tree)])
