"""Trees of arrays: are they finite, which of two to keep, and sums and inner products leaf by leaf.

Axes: L leaves.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from vsa_optax.core.types import Tree
from vsa_optax.kernels import inner_products, numerics

Alike = TypeVar("Alike")


def all_finite(tree: Tree) -> jax.Array:
    """``[] bool``: no NaN and no infinity in any leaf; true for an empty tree."""
    finite = jnp.array(True)
    for leaf in jax.tree.leaves(tree):
        finite &= numerics.is_finite(leaf)
    return finite


def both_finite(tree: Tree, other: Tree) -> jax.Array:
    """`all_finite` of two trees, which takes one pass where their leaves have the same shapes."""
    leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
    if [jnp.shape(x) for x in leaves] != [jnp.shape(y) for y in others]:
        return all_finite(tree) & all_finite(other)
    finite = jnp.array(True)
    for x, y in zip(leaves, others, strict=True):
        finite &= numerics.is_finite(x, y)
    return finite


def any_nonzero(tree: Tree) -> jax.Array:
    """``[] bool``: some number in some leaf is not zero, a NaN included; false for an empty tree."""
    found = jnp.array(False)
    for leaf in jax.tree.leaves(tree):
        # A sum of magnitudes is one pass; ``any`` writes a mask first on a CPU.
        found |= jnp.sum(jnp.abs(leaf)) != 0
    return found


def tree_where(condition: jax.Array, new: Alike, old: Alike) -> Alike:
    """``new`` where ``condition``, else ``old``, in the dtypes of ``old``; one ``[] bool`` for all leaves.

    One pass over the trees; a conditional would cost copies besides.
    """

    def pick(n: ArrayLike, o: ArrayLike) -> jax.Array:
        chosen = jnp.where(condition, n, o)
        dtype = jnp.asarray(o).dtype
        return chosen if chosen.dtype == dtype else chosen.astype(dtype)

    return jax.tree.map(pick, new, old)


def map_leaves(fun: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """``fun`` of each leaf of ``tree`` and those in its place in the others, in the containers of ``tree``.

    Unlike ``jax.tree.map`` it asks of the others the same number of leaves only. What keeps a state may put nodes of
    its own in the place of ours, and parameters may be in boxes that say of which axes they have what a state has not.
    """
    leaves, treedef = jax.tree.flatten(tree)
    rows = zip(leaves, *map(jax.tree.leaves, others), strict=True)
    return jax.tree.unflatten(treedef, [fun(*row) for row in rows])


def is_placeholder(params: Tree) -> bool:
    """Whether ``optax.tree.map_params`` asks what of a state is like the parameters, with a node of Optax's for them.

    Where a state has nothing like them it must answer with one array, for all that stands in its place.
    """
    return type(params).__name__ == "_ParamsPlaceholder"


def combine_trees(weights: jax.Array, trees: list[Tree]) -> Tree:
    """The trees' sum with weights ``[L, trees]``, in at least f32."""
    leaves = [jax.tree.leaves(tree) for tree in trees]
    sums = [
        numerics.linear_combination([weights[leaf, i] for i in range(len(trees))], list(arrays))
        for leaf, arrays in enumerate(zip(*leaves, strict=True))
    ]
    return jax.tree.unflatten(jax.tree.structure(trees[0]), sums)


def products_of_trees(trees: list[Tree], other: Tree) -> tuple[jax.Array, jax.Array]:
    """Inner products of the trees with each other and with another one: ``[L, trees, trees]`` and ``[L, trees]``."""
    leaves = list(zip(*(jax.tree.leaves(tree) for tree in [*trees, other]), strict=True))
    num = len(trees)
    table = jnp.stack(
        [jnp.stack([jnp.stack([inner_products.inner(x, y) for y in xs]) for x in xs[:num]]) for xs in leaves]
    )
    return table[:, :, :num], table[:, :, num]


def norm(tree: Tree) -> jax.Array:
    """``[] float32``: that of all leaves together."""
    return jnp.sqrt(sum((inner_products.inner(x, x) for x in jax.tree.leaves(tree)), jnp.zeros([], jnp.float32)))


def squared_norms(tree: Tree) -> jax.Array:
    """``[L] float32``: the leaves' squared norms."""
    return jnp.stack([inner_products.inner(x, x) for x in jax.tree.leaves(tree)])
