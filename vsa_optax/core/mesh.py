"""What devices must agree on inside ``jax.shard_map``, or some would wait for the others for ever.

JAX knows of each array over which axes of the mesh it varies, as long as ``shard_map`` checks replication, which it
does by default. Without the check every array looks as if it were the same everywhere; a state then says by `MeshAxes`
over which axes a transformation in it averages.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from vsa_optax.core import versions
from vsa_optax.core.trees import all_finite
from vsa_optax.core.types import Tree


@jax.tree_util.register_static
class MeshAxes(NamedTuple):
    """Names of mesh axes, in their place in a state: a pytree node without children."""

    names: tuple[str, ...]


def axes_in(state: Tree) -> frozenset[str]:
    """The axes over which a transformation averages whose state is somewhere in ``state``."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, MeshAxes))
    return frozenset(name for node in nodes if isinstance(node, MeshAxes) for name in node.names)


def varying_axes(tree: Tree) -> frozenset[str]:
    """The axes over which some leaf of ``tree`` varies, as far as JAX knows; none outside ``shard_map``."""
    return frozenset[str]().union(*map(versions.varying_axes, jax.tree.leaves(tree)))


def axis_size(axes: tuple[str, ...]) -> int:
    """How many devices there are along ``axes``; ``ValueError`` outside a ``shard_map`` over them."""
    try:
        return int(lax.psum(1, axes))
    except NameError:
        raise ValueError(f"axis_name must name axes of the jax.shard_map around the update, got {axes}") from None


def is_checked(axes: frozenset[str]) -> bool:
    """Whether JAX knows what varies over ``axes``, as the place of a device along an axis does."""
    axis_size(tuple(axes))
    return all(varying_axes(lax.axis_index(name)) for name in axes)


def is_mapped(axes: tuple[str, ...]) -> bool:
    """Whether this is inside a ``shard_map`` over ``axes``."""
    try:
        axis_size(axes)
    except ValueError:
        return False
    return True


def as_varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """``x``, taken to vary over ``axes``, too."""
    more = tuple(sorted(axes - varying_axes(x)))
    return lax.pcast(x, more, to="varying") if more else x


def all_devices_agree(flag: jax.Array, axes: frozenset[str]) -> jax.Array:
    """``[] bool``: whether ``flag`` is true on all devices along ``axes``."""
    return lax.pmin(flag.astype(jnp.int32), tuple(sorted(axes))) > 0 if axes else flag


def mean_over(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """``x``, averaged over the devices along ``axes``."""
    return lax.pmean(x, tuple(sorted(axes))) if axes else x


@functools.cache
def all_finite_over(axes: frozenset[str]) -> Callable[[Tree], jax.Array]:
    """`all_finite`, of the trees of all devices along ``axes`` together; one function object for the same axes."""
    return lambda tree: all_devices_agree(all_finite(tree), axes)
