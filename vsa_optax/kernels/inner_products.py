"""Real inner products in at least f32, of one array with another or with a stack of records.

Axes: W records; ``*shape`` of one leaf.
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from vsa_optax.kernels import numerics


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """``[] float32``: ``<x, y>``; not finite where it leaves f32's range."""
    wide = numerics.promoted(x.dtype, y.dtype, jnp.float32)
    return jnp.sum((x.conj().astype(wide) * y.astype(wide)).real).astype(jnp.float32)


def inner_of_records(records: jax.Array, x: jax.Array) -> jax.Array:
    """``[W] float32``: ``<r_i, x>`` of ``[W, *shape]`` with ``[*shape]``.

    A product of a matrix with a vector, in the records' precision, which reads each record once.
    """
    x = numerics.saturating_cast(x, records.dtype)
    wide = records.dtype if records.dtype.itemsize >= 4 else jnp.float32
    products = jnp.tensordot(
        records.conj(),
        x,
        axes=x.ndim,
        precision="highest",
        preferred_element_type=wide,
        out_sharding=_whole_on_every_device(x),
    )
    return products.real.astype(jnp.float32)


def inner_of_all_records(records: jax.Array, others: jax.Array) -> jax.Array:
    """``[W, V]``: ``<r_i, o_j>`` of ``[W, *shape]`` with ``[V, *shape]``, in at least f32; one matrix product."""
    dtype = numerics.promoted(records.dtype, others.dtype)
    wide = numerics.promoted(dtype, jnp.float32)
    shape = tuple(range(1, records.ndim))
    products = jnp.tensordot(
        records.conj().astype(dtype),
        others.astype(dtype),
        axes=(shape, shape),
        precision="highest",
        preferred_element_type=wide,
        out_sharding=_whole_on_every_device(records, num_axes=2),
    )
    return products.real


def _whole_on_every_device(x: jax.Array, num_axes: int = 1) -> NamedSharding | None:
    """How a contraction's result is laid out, which a mesh with explicit axes has to be told; None without one."""
    mesh = jax.typeof(x).sharding.mesh
    return NamedSharding(mesh, PartitionSpec(*[None] * num_axes)) if mesh.explicit_axes else None
