"""Packs five base-three digits per byte: 1.6 bits per digit, compared to 1.585 bits of information.

The layout is planar: digit j of byte i is element ``j * m + i`` of ``n``, for ``m = ceil(n / 5)`` bytes. Packing and
unpacking are therefore whole-array operations on five contiguous pieces.
"""

import jax
import jax.numpy as jnp
import numpy as np

DIGITS_PER_BYTE = 5


def packed_size(size: int) -> int:
    """The number of bytes for ``size`` digits."""
    return -(-size // DIGITS_PER_BYTE)


def digits_of(numbers: jax.Array, num: int) -> jax.Array:
    """``[num, ...] uint32``, the base-three digits, lowest first, of ``[...]`` integers below 256."""
    # A product computes number // 3**j, exact for 8 bits: the factor is too large by less than 3**j / 2**16.
    factors = np.array([-(-(1 << 16) // 3**j) for j in range(num)], np.uint32)
    quotients = (numbers.astype(jnp.uint32)[None] * factors.reshape(num, *[1] * numbers.ndim)) >> 16
    return quotients - 3 * ((quotients * 171) >> 9)  # The remainder modulo 3, also exact below 256.


def pack_digits(digits: jax.Array) -> jax.Array:
    """Packs ``[..., n]`` integers 0, 1, 2 into ``[..., ceil(n / 5)] uint8``."""
    *batch, size = digits.shape
    num_bytes = packed_size(size)
    padded = jnp.pad(digits, [(0, 0)] * len(batch) + [(0, num_bytes * DIGITS_PER_BYTE - size)])
    planes = padded.reshape(*batch, DIGITS_PER_BYTE, num_bytes).astype(jnp.uint32)
    powers = np.array([3**j for j in range(DIGITS_PER_BYTE)], np.uint32)
    powers = powers.reshape(*[1] * len(batch), DIGITS_PER_BYTE, 1)
    return jnp.sum(planes * powers, axis=-2, dtype=jnp.uint32).astype(jnp.uint8)


def unpack_digits(packed: jax.Array, size: int) -> jax.Array:
    """The inverse of `pack_digits`: ``[..., size] uint8``."""
    rest = packed.astype(jnp.uint16)
    planes = []
    for _ in range(DIGITS_PER_BYTE):
        quotient = (rest * 171) >> 9
        planes.append((rest - 3 * quotient).astype(jnp.uint8))
        rest = quotient
    return jnp.concatenate(planes, axis=-1)[..., :size]
