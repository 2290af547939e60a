"""Stochastic rounding to equidistant levels up to a block's largest coordinate, without bias.

References:
    Wen et al., "TernGrad" (arXiv 1705.07878), section 3, for three levels; Alistarh et al., "QSGD" (arXiv 1610.02132),
    section 3, for more.
"""

import jax
import jax.numpy as jnp
from jax import lax


def decode(numbers: jax.Array, trits: int) -> jax.Array:
    """The levels ``[...] f32`` in [-1, 1], in units of the scale, of ``[...] uint8`` numbers below ``3**trits``."""
    highest = _highest(trits)
    return (numbers.astype(jnp.float32) - highest) / highest


def quantize_stochastically(y: jax.Array, trits: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes level numbers and scales of blocks; rounds to a neighbouring level at random without bias.

    Args:
        y: ``[..., B] f32``.
        trits: the number of trits per coordinate, 1, 2 or 3.
        key: the key of the random numbers.

    Returns:
        ``(numbers, scales)``: ``[..., B] uint8`` and ``[...] bfloat16``; NaN for a block with a NaN or an infinity.
    """
    highest = _highest(trits)
    peak = jnp.max(jnp.abs(y), axis=-1)
    # The smallest bfloat16 that is not below the peak, so that every coordinate is between two levels.
    scale = jnp.where(jnp.all(jnp.isfinite(y), axis=-1), _round_up(peak), jnp.nan)
    position = y / jnp.where(peak > 0, scale, 1.0)[..., None] * highest
    odds = jax.random.uniform(key, y.shape)
    number = jnp.floor(position.astype(odds.dtype) + odds) + highest
    return jnp.clip(number, 0, 2 * highest).astype(jnp.uint8), scale.astype(jnp.bfloat16)


def _highest(trits: int) -> int:
    return (3**trits - 1) // 2


def _round_up(x: jax.Array) -> jax.Array:
    """The smallest bfloat16 that is at least ``x >= 0``, as f32."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    raised = ((bits + 0xFFFF) >> 16) << 16
    return lax.bitcast_convert_type(raised, jnp.float32)
