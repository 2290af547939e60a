"""Finiteness, saturating casts, linear combinations, and norms that neither overflow nor vanish."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp


@functools.cache
def promoted(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """The promotion of these dtypes by JAX's standard rules, even if ``jax_numpy_dtype_promotion`` is strict."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes[1:], jnp.dtype(dtypes[0]))


def is_finite(*arrays: jax.Array) -> jax.Array:
    """``[] bool``: whether arrays of one shape hold no NaN and no infinity, in one pass; true for zero-size arrays.

    ``x - x`` is NaN for a non-finite x, and a sum keeps the NaN. On a CPU, ``all(isfinite(x))`` writes a mask first,
    and a sum of ``x * 0`` may need memory for the product. The largest magnitude is not a test: JAX 0.10 loses a NaN
    among 4096 numbers or more.
    """
    zeros = (x - x for x in map(jnp.asarray, arrays))  # NumPy would warn about the NaN.
    return jnp.isfinite(jnp.sum(functools.reduce(jnp.add, zeros)))


def power_of_two(largest: jax.Array) -> jax.Array:
    """``[...] int32``: the exponent e for which ``largest * 2^-e`` is in [0.5, 1), so that squares stay in range.

    The exponent is clipped, so that 2^e and 2^-e stay in the range of the dtype; it is 0 for 0.
    """
    limit = jnp.finfo(largest.dtype).maxexp - 8
    return jnp.clip(jnp.frexp(largest)[1], -limit, limit)


def stored_dtype(x: jax.Array, dtype: jax.typing.DTypeLike | None) -> jax.typing.DTypeLike | None:
    """The dtype to store ``x`` in if ``dtype`` is requested; a complex type of that precision for a complex ``x``."""
    is_complex = jnp.issubdtype(jnp.result_type(x), jnp.complexfloating)
    return promoted(jnp.dtype(dtype), jnp.complex64) if dtype is not None and is_complex else dtype


def saturating_cast(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Casts ``x`` to ``dtype``. Values beyond its range become its largest finite value, and NaN becomes 0."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        part = jnp.finfo(dtype).dtype
        return jax.lax.complex(saturating_cast(x.real, part), saturating_cast(x.imag, part))
    return jnp.nan_to_num(x.astype(dtype), nan=0.0)


def linear_combination(coefficients: Sequence[jax.Array], arrays: Sequence[jax.Array]) -> jax.Array:
    """``sum_i coefficients_i * arrays_i`` in at least f32, in one pass over the arrays.

    XLA fuses this chain of multiply-adds into a single loop that reads each array once. A reduction over a leading axis
    of length 8 took 1500 times as long on a CPU.
    """
    dtype = promoted(arrays[0].dtype, jnp.float32)
    total = jnp.zeros(arrays[0].shape, dtype)
    for coefficient, array in zip(coefficients, arrays, strict=True):
        total = total + coefficient.astype(dtype) * array.astype(dtype)
    return total


def relative_distance(xs: Sequence[jax.Array], ys: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """``||x - y|| / ||x||`` over all arrays together, in f32.

    All arrays are scaled by one power of two before they are squared, so that 1e-30 and 1e30 do no harm.

    Returns:
        ``(distance, is_defined)``: ``[] f32`` and ``[] bool``. The distance is not defined if x is zero; it is then 0.
    """
    dtype = promoted(jnp.float32, *(jnp.finfo(x.dtype).dtype for x in xs))
    wide = [(_wide(x), _wide(y)) for x, y in zip(xs, ys, strict=True) if x.size]
    largest = jnp.zeros([], dtype)
    for x, _ in wide:
        largest = jnp.maximum(largest, jnp.max(jnp.abs(x)).astype(dtype))
    factor = jnp.ldexp(jnp.ones([], dtype), -power_of_two(largest))
    of_x = of_error = jnp.zeros([], dtype)
    for x, y in wide:
        kind = promoted(x.dtype, dtype)  # The leaves may be of several dtypes.
        x, y, scale = x.astype(kind), y.astype(kind), factor.astype(kind)
        of_x = of_x + jnp.sum(jnp.abs(x * scale) ** 2).astype(dtype)
        of_error = of_error + jnp.sum(jnp.abs(x * scale - y * scale) ** 2).astype(dtype)
    is_defined = of_x > 0
    ratio = jnp.sqrt(of_error / jnp.where(is_defined, of_x, 1))
    return jnp.where(is_defined, saturating_cast(ratio, jnp.float32), 0.0), is_defined


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(promoted(x.dtype, jnp.float32))
