"""Random signs that are generated where they are used and never stored.

A counter-based generator (threefry, whatever generator JAX is set to) makes one 32-bit word for 32 coordinates; each
bit becomes the sign bit of one. The words are 1/32 of the data, and the rest fuses into the loop that uses the signs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_SIGN = np.uint32(1 << 31)


def stream(seed: int, *counters: int | jax.Array) -> jax.Array:
    """The generator's key for a seed and a place in it: a step, the index of a leaf."""
    key = jax.random.key(seed, impl="threefry2x32")
    for counter in counters:
        key = jax.random.fold_in(key, counter)
    return key


def random_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``[..., ceil(d / 32)] uint32``: random bits for arrays ``[..., d]`` of the given shape."""
    *batch, size = shape
    return jax.random.bits(key, (*batch, -(-size // 32)), jnp.uint32)


def sign_bits(words: jax.Array, size: int) -> jax.Array:
    """``[..., size] uint32``: one bit of the words in the highest place, 0 elsewhere; 32 neighbours share a word."""
    bits = (words[..., None] << jnp.arange(32, dtype=jnp.uint32).reshape(*[1] * words.ndim, 32)) & _SIGN
    return bits.reshape(*words.shape[:-1], -1)[..., :size]


def random_sign_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``[*shape] uint32``: the highest bit random, the others 0."""
    return sign_bits(random_words(key, shape), shape[-1])


def flip(x: jax.Array, bits: jax.Array) -> jax.Array:
    """``[*shape] f32``: ``x`` with its sign changed where the highest bit is set; its own inverse."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) ^ bits, jnp.float32)
