"""Names that Flax's containers give to the axes of parameters, where an array of a state has other axes.

A box of linen (``nn.Partitioned``) and a Variable of nnx say over which axes of a mesh their array is to be split. A
state is made of the parameters' own containers, so that it takes their names, too. An array with an axis more in front
needs one more, None: that axis is not split. What a codec made has other axes altogether, and is whole everywhere.

Flax need not be installed: as long as nobody imported it there is no such container.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from vsa_optax.core.types import Tree

# Under which nnx has names in a Variable's metadata, in releases up to 0.12.
_IN_METADATA = ("out_sharding", "optimizer_sharding", "sharding_names", "sharding")


def with_axis_in_front(tree: Tree) -> Tree:
    """The tree of arrays ``[n, *shape]``, whose first axis is named None."""
    return _renamed(tree, lambda box: box.add_axis(0, {"partition_name": None}), _one_more)


def without_names(tree: Tree) -> Tree:
    """The tree in containers that say nothing of axes."""
    return _renamed(tree, lambda box: box.replace(names=()) if hasattr(box, "names") else box, lambda names: None)


def _one_more(names: Any) -> Any:  # noqa: ANN401 # Flax takes several kinds.
    if isinstance(names, NamedSharding):
        return names.update(spec=PartitionSpec(None, *names.spec))
    return PartitionSpec(None, *names) if isinstance(names, PartitionSpec) else (None, *names)


def _renamed(tree: Tree, of_box: Callable[[Any], Any], of_names: Callable[[Any], Any]) -> Tree:
    meta, nnx = sys.modules.get("flax.core.meta"), sys.modules.get("flax.nnx")

    def is_box(node: object) -> bool:
        return meta is not None and isinstance(node, meta.AxisMetadata)

    def is_variable(node: object) -> bool:
        return nnx is not None and isinstance(node, nnx.Variable)

    def renamed(node: Tree) -> Tree:
        if is_box(node):
            return of_box(node)
        if not is_variable(node):
            return node
        variable = jax.tree.map(lambda x: x, node)  # One of our own, to be changed.
        for name in _IN_METADATA:
            names = variable.get_metadata().get(name)
            if names is not None:
                variable.set_metadata(name, of_names(names))
        return variable

    if meta is None and nnx is None:
        return tree
    return jax.tree.map(renamed, tree, is_leaf=lambda node: is_box(node) or is_variable(node))
