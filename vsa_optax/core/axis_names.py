"""Adapts the axis names in Flax's containers to the arrays of a state, whose axes may differ from the parameters'.

A linen box (``nn.Partitioned``) and an nnx Variable name the mesh axes over which their array is sharded. A state
reuses the parameters' containers, and thus their names. An array with one more leading axis needs one more name, None,
since that axis is not sharded. The arrays of a codec have entirely different axes and are replicated.

Flax need not be installed: no such container exists unless Flax has been imported.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from vsa_optax.core.types import Tree

# The metadata keys under which an nnx Variable keeps axis names, in releases up to 0.12.
_IN_METADATA = ("out_sharding", "optimizer_sharding", "sharding_names", "sharding")


def with_axis_in_front(tree: Tree) -> Tree:
    """The tree of arrays ``[n, *shape]`` with the name None for the first axis."""
    return _renamed(tree, lambda box: box.add_axis(0, {"partition_name": None}), _one_more)


def without_names(tree: Tree) -> Tree:
    """The tree in containers without axis names."""
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
        variable = jax.tree.map(lambda x: x, node)  # A copy, which may be changed.
        for name in _IN_METADATA:
            names = variable.get_metadata().get(name)
            if names is not None:
                variable.set_metadata(name, of_names(names))
        return variable

    if meta is None and nnx is None:
        return tree
    return jax.tree.map(renamed, tree, is_leaf=lambda node: is_box(node) or is_variable(node))
