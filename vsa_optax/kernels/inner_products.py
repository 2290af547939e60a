"""Real inner products in at least f32, of one array with another or with a stack of records.

Axes: W records; ``*shape`` of one leaf.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from vsa_optax.kernels import numerics


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """``[] float32``: ``<x, y>``; not finite where it leaves f32's range."""
    wide = jnp.promote_types(jnp.promote_types(x.dtype, y.dtype), jnp.float32)
    return jnp.sum((x.conj().astype(wide) * y.astype(wide)).real).astype(jnp.float32)


def inner_of_records(records: jax.Array, x: jax.Array) -> jax.Array:
    """``[W] float32``: ``<r_i, x>`` of ``[W, *shape]`` with ``[*shape]``.

    A product of a matrix with a vector, in the records' precision, which reads each record once.
    """
    x = numerics.saturating_cast(x, records.dtype)
    wide = jnp.promote_types(records.dtype, jnp.float32)
    products = jnp.tensordot(
        records.conj(), x, axes=x.ndim, precision="highest", preferred_element_type=wide, **_where_it_goes(x)
    )
    return products.real.astype(jnp.float32)


def _where_it_goes(x: jax.Array) -> dict[str, NamedSharding]:
    """On a mesh with explicit axes a contraction must be told how its result is laid out: whole, on every device."""
    mesh: Any = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None) if hasattr(jax, "typeof") else None
    if not getattr(mesh, "explicit_axes", ()):
        return {}
    return {"out_sharding": NamedSharding(mesh, PartitionSpec(None))}
