"""Real inner products in at least f32 of one array with another or with a stack of records.

Axes: W records; ``*shape`` of one leaf.
"""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from vsa_optax.kernels import numerics


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """``[] float32``: ``<x, y>``; not finite if it exceeds f32's range."""
    wide = numerics.promoted(x.dtype, y.dtype, jnp.float32)
    return jnp.sum((x.conj().astype(wide) * y.astype(wide)).real).astype(jnp.float32)


def inner_of_records(records: jax.Array, x: jax.Array) -> jax.Array:
    """``[W] float32``: ``<r_i, x>`` of ``[W, *shape]`` with ``[*shape]``.

    It is a matrix-vector product in the records' precision, which reads each record once.
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

    It is one matrix product, whose terms are exact in the precision of the sum. An accelerator multiplies narrow
    records directly. On a CPU, which has no fast product of narrow numbers, the records are widened first.
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

    On a CPU it is a matrix product, or for narrower records a product of vectors for each; elsewhere it is a sum. For
    one product XLA would write all records in the wider dtype: 16 records of 2^20 coordinates in float16 took 91 ms,
    and now take 6.
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
    """The replicated sharding of a contraction's result, which a mesh with explicit axes requires; else None."""
    mesh = jax.typeof(x).sharding.mesh
    return NamedSharding(mesh, PartitionSpec(*[None] * num_axes)) if mesh.explicit_axes else None
