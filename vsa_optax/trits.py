"""Balanced-ternary quantisation, and packing of trits, five per byte.

A quantiser turns real numbers into trits -1, 0, 1 and a scale; `dequantize` multiplies both. These quantisers do not
rotate their input; `vsa_optax.TritCodec` does, and has a smaller error.
"""

from typing import Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from vsa_optax.core import checks
from vsa_optax.kernels import lloyd_max, packing

_Rule: TypeAlias = Literal["mean", "lloyd_max"]

# Halfway between 0 and the outer level of the best three-level quantiser of a unit Gaussian.
_LLOYD_MAX_CUT = float(lloyd_max.levels(1)[-1]) / 2


class Trits(NamedTuple):
    """Quantised numbers.

    Attributes:
        values: ``[*shape] int8``, -1, 0 or 1.
        scale: float32, ``[]`` or with the reduced axes kept as 1; NaN if a number was not finite.
    """

    values: jax.Array
    scale: jax.Array


def quantize_deterministic(
    x: jax.Array,
    *,
    rule: _Rule = "mean",
    threshold: float = 0.7,
    axis: int | tuple[int, ...] | None = None,
) -> Trits:
    """Quantises by a threshold, with the scale of least squared error.

        values = sign(x) where |x| > cut, else 0,      scale = mean of |x| where values != 0

    The result is biased towards zero. On Gaussian numbers the mean squared error is 0.192 of the variance, 0.190 with
    ``rule="lloyd_max"``.

    Args:
        x: ``[*shape]`` real.
        rule: ``"mean"`` means ``cut = threshold * mean |x|``; ``"lloyd_max"`` means ``cut = 0.612 * rms(x)``, which is
            best for Gaussian numbers.
        threshold: the factor in ``"mean"``, ``>= 0``.
        axis: the axes that share a scale; None for all.

    Returns:
        `Trits`. Zeros have scale 0; a NaN or an infinity makes the scale NaN.

    Raises:
        ValueError: if an argument is outside its range.
        TypeError: if ``x`` is not real floating point.

    Example:
        >>> values, scale = quantize_deterministic(jnp.array([0.1, -2.0, 0.0, 4.0]))
        >>> values.tolist(), float(scale)
        ([0, -1, 0, 1], 3.0)

    References:
        Li et al., "Ternary weight networks" (arXiv 1605.04711), equations 5 and 6, whose factor is 0.7. Max,
        "Quantizing for minimum distortion" (1960).
    """
    checks.check_choice("rule", rule, get_args(_Rule))
    factor = checks.check_real("threshold", threshold, low=0.0, high=float("inf"))
    magnitude, peak = _magnitude(x, axis)
    unit = magnitude / jnp.where(peak > 0, peak, 1.0)
    if rule == "mean":
        cut = factor * jnp.mean(unit, axis=axis, keepdims=True)
    else:
        cut = _LLOYD_MAX_CUT * jnp.sqrt(jnp.mean(unit**2, axis=axis, keepdims=True))
    is_kept = unit > cut
    num_kept = jnp.sum(is_kept, axis=axis, keepdims=True)
    mean = jnp.sum(jnp.where(is_kept, unit, 0.0), axis=axis, keepdims=True) / jnp.maximum(num_kept, 1).astype(
        jnp.float32
    )
    return _trits(jnp.where(is_kept, jnp.sign(x), 0), mean * peak, axis)


def quantize_stochastic(x: jax.Array, key: jax.Array, *, axis: int | tuple[int, ...] | None = None) -> Trits:
    """Quantises at random without bias.

        P(values = sign(x)) = |x| / scale, else 0,     scale = max |x|

    ``E[dequantize(values, scale)] = x`` holds exactly. On 2^20 Gaussian numbers the mean squared error is 2.9 times the
    variance, fifteen times that of `quantize_deterministic`. It grows with the largest number.

    Args:
        x: ``[*shape]`` real.
        key: a JAX random key.
        axis: the axes that share a scale; None for all.

    Returns:
        `Trits`. Zeros have scale 0; a NaN or an infinity makes the scale NaN.

    Raises:
        TypeError: if ``x`` is not real floating point.

    Example:
        >>> x = jnp.array([0.5, -1.0, 0.0])
        >>> values, scale = jax.vmap(lambda k: quantize_stochastic(x, k))(jax.random.split(jax.random.key(0), 10_000))
        >>> jnp.round(jnp.mean(values * scale[:, None], axis=0), 1).tolist()
        [0.5, -1.0, 0.0]

    References:
        Wen et al., "TernGrad" (arXiv 1705.07878), equations 2 and 3.
    """
    magnitude, peak = _magnitude(x, axis)
    odds = magnitude / jnp.where(peak > 0, peak, 1.0)
    drawn = jax.random.uniform(key, jnp.shape(x))
    is_kept = drawn < odds.astype(drawn.dtype)
    return _trits(jnp.where(is_kept, jnp.sign(x), 0), peak, axis)


def dequantize(values: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiplies trits by their scale.

    Args:
        values: ``[*shape] int8``.
        scale: float, of a shape that broadcasts to that of the values.

    Returns:
        ``[*shape] f32``.

    Example:
        >>> dequantize(jnp.array([1, 0, -1], jnp.int8), jnp.float32(0.5)).tolist()
        [0.5, 0.0, -0.5]
    """
    return jnp.asarray(scale).astype(jnp.float32) * jnp.asarray(values).astype(jnp.float32)


def pack(values: jax.Array) -> jax.Array:
    """Packs five trits per byte: trit j of byte i is element ``j * ceil(n / 5) + i``.

    Args:
        values: ``[..., n]`` integers -1, 0 or 1. The result for other integers is undefined.

    Returns:
        ``[..., ceil(n / 5)] uint8``: 1.6 bits per trit.

    Raises:
        ValueError: if ``values`` has no axis.
        TypeError: if ``values`` are not integers.

    Example:
        >>> trits = jnp.array([1, 0, -1, 1, 1, 0, 0], jnp.int8)
        >>> pack(trits).shape, unpack(pack(trits), 7).tolist()
        ((2,), [1, 0, -1, 1, 1, 0, 0])
    """
    array = _integers("values", values)
    return packing.pack_digits((array + 1).astype(jnp.uint8))


def unpack(packed: jax.Array, size: int) -> jax.Array:
    """Unpacks the result of `pack`.

    Args:
        packed: ``[..., ceil(size / 5)] uint8``.
        size: n, the number of trits, ``>= 0``, static.

    Returns:
        ``[..., size] int8``.

    Raises:
        ValueError: if ``size`` does not match the number of bytes.
        TypeError: if ``packed`` are not integers.
    """
    array = _integers("packed", packed)
    checks.check_integer("size", size, 0)
    if array.shape[-1] != packing.packed_size(size):
        raise ValueError(
            f"size must match the {array.shape[-1]} bytes given, so it must be from "
            f"{max(0, 5 * array.shape[-1] - 4)} to {5 * array.shape[-1]}, got {size!r}"
        )
    return packing.unpack_digits(array.astype(jnp.uint8), size).astype(jnp.int8) - jnp.int8(1)


def _magnitude(x: ArrayLike, axis: int | tuple[int, ...] | None) -> tuple[jax.Array, jax.Array]:
    """``|x|`` in f32, and its maximum along ``axis`` with the axes kept; NaN if a number is not finite."""
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"x must be real floating point, got dtype {array.dtype}")
    magnitude = jnp.abs(array.astype(jnp.float32))
    peak = jnp.max(magnitude, axis=axis, keepdims=True, initial=0.0)
    is_finite = jnp.all(jnp.isfinite(magnitude), axis=axis, keepdims=True)  # A maximum may lose a NaN.
    return magnitude, jnp.where(is_finite, peak, jnp.nan)


def _trits(values: jax.Array, scale: jax.Array, axis: int | tuple[int, ...] | None) -> Trits:
    return Trits(values.astype(jnp.int8), scale.reshape(()) if axis is None else scale)


def _integers(name: str, x: ArrayLike) -> jax.Array:
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got dtype {array.dtype}")
    if array.ndim == 0:
        raise ValueError(f"{name} must have at least one axis, got a scalar")
    return array
