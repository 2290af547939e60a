"""Five base-three digits in a byte: 1.6 bits each, against the 1.585 that they hold.

Planar: digit j of byte i is element ``j * m + i`` of ``n``, for ``m = ceil(n / 5)`` bytes, so that packing and
unpacking are whole-array operations on five contiguous pieces.
"""

import jax
import jax.numpy as jnp

DIGITS_PER_BYTE = 5


def packed_size(size: int) -> int:
    """Bytes for ``size`` digits."""
    return -(-size // DIGITS_PER_BYTE)


def pack_digits(digits: jax.Array) -> jax.Array:
    """``[..., ceil(n / 5)] uint8`` from ``[..., n] uint8`` digits 0, 1, 2."""
    *batch, size = digits.shape
    num_bytes = packed_size(size)
    padded = jnp.pad(digits, [(0, 0)] * len(batch) + [(0, num_bytes * DIGITS_PER_BYTE - size)])
    planes = padded.reshape(*batch, DIGITS_PER_BYTE, num_bytes)
    packed = planes[..., 0, :]
    for j in range(1, DIGITS_PER_BYTE):
        packed = packed + planes[..., j, :] * jnp.uint8(3**j)
    return packed


def unpack_digits(packed: jax.Array, size: int) -> jax.Array:
    """``[..., size] uint8``, what `pack_digits` packed."""
    rest = packed.astype(jnp.uint16)
    planes = []
    for _ in range(DIGITS_PER_BYTE):
        quotient = (rest * 171) >> 9  # rest // 3, exactly for rest below 256.
        planes.append((rest - 3 * quotient).astype(jnp.uint8))
        rest = quotient
    return jnp.concatenate(planes, axis=-1)[..., :size]
