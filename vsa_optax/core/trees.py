"""Trees of arrays: finiteness, selection, and sums and inner products leaf by leaf.

Axes: L leaves.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from vsa_optax.core.types import Tree
from vsa_optax.kernels import inner_products, numerics

Alike = TypeVar("Alike")


def all_finite(tree: Tree) -> jax.Array:
    """``[] bool``: whether no leaf holds a NaN or an infinity; true for an empty tree."""
    finite = jnp.array(True)
    for leaf in jax.tree.leaves(tree):
        finite &= numerics.is_finite(leaf)
    return finite


def both_finite(tree: Tree, other: Tree) -> jax.Array:
    """`all_finite` of two trees, in one pass if their leaves have the same shapes."""
    leaves, others = jax.tree.leaves(tree), jax.tree.leaves(other)
    if [jnp.shape(x) for x in leaves] != [jnp.shape(y) for y in others]:
        return all_finite(tree) & all_finite(other)
    finite = jnp.array(True)
    for x, y in zip(leaves, others, strict=True):
        finite &= numerics.is_finite(x, y)
    return finite


def any_nonzero(tree: Tree) -> jax.Array:
    """``[] bool``: whether any number in any leaf is non-zero, including NaN; false for an empty tree."""
    found = jnp.array(False)
    for leaf in jax.tree.leaves(tree):
        # A sum of magnitudes takes one pass; on a CPU, ``any`` writes a mask first.
        found |= jnp.sum(jnp.abs(leaf)) != 0
    return found


def tree_where(condition: jax.Array, new: Alike, old: Alike) -> Alike:
    """``new`` if ``condition``, else ``old``, in the dtypes of ``old``; one ``[] bool`` for all leaves.

    This takes one pass over the trees; a conditional would cost additional copies.
    """

    def pick(n: ArrayLike, o: ArrayLike) -> jax.Array:
        chosen = jnp.where(condition, n, o)
        dtype = jnp.asarray(o).dtype
        return chosen if chosen.dtype == dtype else chosen.astype(dtype)

    return jax.tree.map(pick, new, old)


def zeros_unless(condition: jax.Array, tree: Alike) -> Alike:
    """``tree`` if ``condition``, else zeros.

    The zero is no constant to XLA. The backward pass of a ``lax.scan`` over stacked layers starts from arrays of zeros.
    XLA would make these zeros together with those, and keep an array as large as each stack until the end of the step.
    That was 4 bytes per parameter in a program for an H100.
    """
    zero = lax.optimization_barrier(jnp.zeros([], jnp.float32))
    return jax.tree.map(lambda x: jnp.where(condition, x, zero.astype(x.dtype)), tree)


def map_leaves(fun: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """Applies ``fun`` to each leaf of ``tree`` and the corresponding leaves of the others.

    The result has the containers of ``tree``. Unlike ``jax.tree.map``, this only requires that all trees have the same
    number of leaves. A library that keeps a state may replace its nodes, and the boxes of parameters may have axis
    names that those of a state lack.
    """
    leaves, treedef = jax.tree.flatten(tree)
    rows = zip(leaves, *map(jax.tree.leaves, others), strict=True)
    return jax.tree.unflatten(treedef, [fun(*row) for row in rows])


def num_bytes(tree: Tree) -> int:
    """The bytes of all leaves; of a sharded one, on all devices."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def is_placeholder(params: Tree) -> bool:
    """Whether ``optax.tree.map_params`` called ``init`` with its placeholder, to find arrays like the parameters.

    A field of the state that has no such arrays must then be a single array.
    """
    return type(params).__name__ == "_ParamsPlaceholder"


def combine_trees(weights: jax.Array, trees: list[Tree]) -> Tree:
    """The weighted sum of trees in at least f32, with weights ``[L, trees]``."""
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
    """``[] float32``: the norm of all leaves together."""
    return jnp.sqrt(sum((inner_products.inner(x, x) for x in jax.tree.leaves(tree)), jnp.zeros([], jnp.float32)))


def squared_norms(tree: Tree) -> jax.Array:
    """``[L] float32``: the squared norm of each leaf."""
    return jnp.stack([inner_products.inner(x, x) for x in jax.tree.leaves(tree)])
