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
    """``[W, V]``: ``<r_i, o_j>`` of ``[W, *shape]`` with ``[V, *shape]`` of the same dtype, in at least f32.

    One matrix product, whose terms are exact in the precision of the sum. On a CPU the records are widened before: it
    has no fast product of narrower numbers, which an accelerator reads as they are.
    """
    wide = numerics.promoted(records.dtype, jnp.float32)
    axes = tuple(range(1, records.ndim))

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.tensordot(
            x.conj(),
            y,
            axes=(axes, axes),
            precision="highest",
            preferred_element_type=wide,
            out_sharding=_whole_on_every_device(records, num_axes=2),
        ).real

    def widened(x: jax.Array, y: jax.Array) -> jax.Array:
        return product(x.astype(wide), y.astype(wide))

    if records.dtype == wide:
        return product(records, others)
    return jax.lax.platform_dependent(records, others, cpu=widened, default=product)


def inner_of_each(records: jax.Array, x: jax.Array) -> jax.Array:
    """``[W]``: ``<r_i, x>`` of ``[W, *shape]`` with ``[*shape]``, in at least f32; x is not rounded to the records.

    A matrix product on a CPU, or one of vectors for each narrower record; elsewhere a sum. XLA would write all of the
    records in the wider dtype for one product: 16 records of 2^20 coordinates in float16 took 91 ms, and now take 6.
    """
    wide = numerics.promoted(records.dtype, x.dtype, jnp.float32)

    def product(records: jax.Array, x: jax.Array) -> jax.Array:
        layout = _whole_on_every_device(x, records.ndim - x.ndim)
        products = jnp.tensordot(
            records.conj().astype(wide), x.astype(wide), axes=x.ndim, precision="highest", out_sharding=layout
        )
        return products.real

    def product_or_products(records: jax.Array, x: jax.Array) -> jax.Array:
        if records.dtype == wide:
            return product(records, x)
        return jax.lax.map(lambda record: product(record, x), records)

    def summed(records: jax.Array, x: jax.Array) -> jax.Array:
        products = records.conj().astype(wide) * x.astype(wide)[None]
        return jnp.sum(products.real, axis=tuple(range(1, records.ndim)))

    return jax.lax.platform_dependent(records, x, cpu=product_or_products, default=summed)


def _whole_on_every_device(x: jax.Array, num_axes: int = 1) -> NamedSharding | None:
    """How a contraction's result is laid out, which a mesh with explicit axes has to be told; None without one."""
    mesh = jax.typeof(x).sharding.mesh
    return NamedSharding(mesh, PartitionSpec(*[None] * num_axes)) if mesh.explicit_axes else None
