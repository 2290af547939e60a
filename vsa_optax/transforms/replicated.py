"""What devices must agree on inside ``jax.shard_map``, or some would wait for the others for ever.

JAX knows of each array over which axes of the mesh it varies, as long as ``shard_map`` checks replication, which it
does by default. Without the check every array looks as if it were the same everywhere.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def varying_axes(tree: Any) -> frozenset[str]:
    """The mesh axes over which some leaf of ``tree`` varies; none outside ``shard_map``."""
    found: frozenset[str] = frozenset()
    for leaf in jax.tree.leaves(tree):
        aval = jax.typeof(leaf)
        kind = getattr(aval, "manual_axis_type", None)  # In older versions the array's type has the axes itself.
        found |= aval.vma if kind is None else kind.varying
    return found


def all_devices_agree(flag: jax.Array, axes: frozenset[str]) -> jax.Array:
    """``[] bool``: whether ``flag`` is true on all devices along ``axes``."""
    return lax.pmin(flag.astype(jnp.int32), tuple(sorted(axes))) > 0 if axes else flag
