"""Agreement between devices inside ``jax.shard_map``; without it, some would wait for the others forever.

JAX knows for each array over which mesh axes it varies, as long as ``shard_map`` checks replication, which is the
default. Without the check, every array looks the same on all devices. A `MeshAxes` in a state then names the axes over
which a transformation averages.
"""

import functools
import threading
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from vsa_optax.core import versions
from vsa_optax.core.trees import all_finite
from vsa_optax.core.types import Tree

# Operations that name an axis, but send nothing along it.
_SILENT = frozenset(["axis_index", "pcast", "pvary"])
_noted = threading.local()


@jax.tree_util.register_static
class MeshAxes(NamedTuple):
    """Names of mesh axes inside a state: a pytree node without children."""

    names: tuple[str, ...]


@runtime_checkable
class OfEachDevice(Protocol):
    """A state with fields that differ between devices; their arrays have a leading axis for the devices."""

    def fields_of_each_device(self) -> tuple[str, ...]:
        """The names of these fields. Other fields are the same on all devices, or have this protocol themselves."""


def axes_in(state: Tree) -> frozenset[str]:
    """The axes over which the transformations average whose states are in ``state``."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, MeshAxes))
    return frozenset(name for node in nodes if isinstance(node, MeshAxes) for name in node.names)


def varying_axes(tree: Tree) -> frozenset[str]:
    """The axes over which at least one leaf of ``tree`` varies, as far as JAX knows; none outside ``shard_map``."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return frozenset()
    return frozenset[str]().union(*map(versions.varying_axes, jax.tree.leaves(tree)))


def with_axis_in_front(tree: Tree) -> Tree:
    """Adds the leading axis of `OfEachDevice` to the arrays of this device."""
    return jax.tree.map(lambda x: jnp.asarray(x)[None], tree)


def of_this_device(name: str, tree: Tree) -> Tree:
    """The inverse of `with_axis_in_front`; ``ValueError`` if the arrays belong to more than one device."""
    for leaf in jax.tree.leaves(tree):
        if jnp.shape(leaf)[:1] != (1,):
            raise ValueError(
                f"{name} in the state must be that of this device alone, with shape (1, ...), got {jnp.shape(leaf)}: "
                "the state was made for another number of devices, or its sharding is not that of state_specs. The "
                "docstring of compressed_pmean shows how to restore a state on another number of devices"
            )
    return jax.tree.map(lambda x: jnp.reshape(x, jnp.shape(x)[1:]), tree)


def axis_size(axes: tuple[str, ...]) -> int:
    """The number of devices along ``axes``; ``ValueError`` outside a ``shard_map`` over them."""
    try:
        return int(lax.psum(1, axes))
    except NameError:
        raise ValueError(f"axis_name must name axes of the jax.shard_map around the update, got {axes}") from None


def is_checked(axes: frozenset[str]) -> bool:
    """Whether JAX tracks variation over ``axes``; then the index of a device along an axis varies over it."""
    axis_size(tuple(axes))
    return all(varying_axes(lax.axis_index(name)) for name in axes)


def is_mapped(axes: tuple[str, ...]) -> bool:
    """Whether the trace is inside a ``shard_map`` over ``axes``."""
    try:
        axis_size(axes)
    except ValueError:
        return False
    return True


def as_varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """``x``, marked as varying over ``axes`` as well."""
    more = tuple(sorted(axes - varying_axes(x)))
    return lax.pcast(x, more, to="varying") if more else x


def varying_like(tree: Tree, like: Tree) -> Tree:
    """``tree``, with each part marked as varying over the axes of the corresponding leaf of ``like`` as well."""
    if not varying_axes(like):
        return tree

    def part_like(leaf: jax.Array, part: Tree) -> Tree:
        axes = varying_axes(leaf)
        return jax.tree.map(lambda x: as_varying(x, axes), part)

    return jax.tree.map(part_like, like, tree)


def all_devices_agree(flag: jax.Array, axes: frozenset[str]) -> jax.Array:
    """``[] bool``: whether ``flag`` is true on all devices along ``axes``."""
    return lax.pmin(flag.astype(jnp.int32), tuple(sorted(axes))) > 0 if axes else flag


def mean_over(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """``x``, averaged over the devices along ``axes``."""
    return lax.pmean(x, tuple(sorted(axes))) if axes else x


@functools.cache
def all_finite_over(axes: frozenset[str]) -> Callable[[Tree], jax.Array]:
    """Returns `all_finite` over all devices along ``axes``; the same axes give the same function object."""
    return lambda tree: all_devices_agree(all_finite(tree), axes)


def axes_communicated_over(program: versions.Program) -> frozenset[str]:
    """The axes of the enclosing ``shard_map`` or ``pmap`` over which a program communicates, at any depth.

    A device that runs such a program while another device does not waits forever.
    """
    return frozenset(name for name in _axes_named_in(program) if is_mapped((name,)))


def _axes_named_in(program: versions.Program) -> set[str]:
    found: set[str] = set()
    for eqn in program.eqns:
        if eqn.primitive.name not in _SILENT:
            axes = eqn.params.get("axes", ()), eqn.params.get("axis_name", ())
            found |= {name for name in jax.tree.leaves(axes) if isinstance(name, str)}
        for value in eqn.params.values():  # The branches of a conditional are in a tuple.
            for part in value if isinstance(value, tuple | list) else (value,):
                if isinstance(part, versions.Program):
                    found |= _axes_named_in(part)
    return found


def note_window(updates: Tree) -> None:
    """Remembers, while a program is traced, that gradients which may differ between devices have entered a window.

    They must not be averaged after the window, which completes later on a device that has skipped something. But the
    links of a chain do not see each other, and without a replication check such gradients look like averaged ones,
    which may enter any window. So the averaging link calls `follows_window`, and raises an error.
    """
    around = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    is_known_as_same = around and is_checked(around) and not varying_axes(updates)
    if not is_known_as_same:
        _noted.window = versions.present_trace(), _kind_of(updates)


def follows_window(updates: Tree, link: object) -> bool:
    """Whether the traced program noted such gradients before they first reached this link.

    If a program has several steps, a link before a window sees the gradients noted in the previous step.
    """
    place = versions.present_trace(), _kind_of(updates)
    if getattr(_noted, "first", None) == (place, link):
        return False
    if getattr(_noted, "window", None) == place:
        return True
    _noted.first = place, link
    return False


def _kind_of(tree: Tree) -> tuple[object, ...]:
    return jax.tree.structure(tree), *map(jnp.shape, jax.tree.leaves(tree))
