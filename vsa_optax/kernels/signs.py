"""Random signs that are generated where they are used and never stored.

A counter-based generator (threefry, whatever generator JAX is set to) makes one 32-bit word for 32 coordinates. Each
bit becomes the sign bit of one coordinate. The words are 1/32 of the data, and all else fuses into the loop that uses
the signs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vsa_optax.kernels import platforms

_SIGN = np.uint32(1 << 31)
_THREEFRY = "threefry2x32"
_WORTH_A_KERNEL = 1 << 12


def stream(seed: int, *counters: int | jax.Array) -> jax.Array:
    """The generator's key for a seed and counters, such as a step and the index of a leaf."""
    key = jax.random.key(seed, impl=_THREEFRY)
    for counter in counters:
        key = jax.random.fold_in(key, counter)
    return key


def random_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``[..., ceil(d / 32)] uint32``: random bits for arrays ``[..., d]`` of the given shape."""
    *batch, size = shape
    return random_bits(key, (*batch, -(-size // 32)))


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``[*shape] uint32``, equal to ``jax.random.bits``; a GPU kernel draws large arrays from a threefry key."""

    def anywhere(key: jax.Array) -> jax.Array:
        return jax.random.bits(key, shape, jnp.uint32)

    def on_gpu(key: jax.Array) -> jax.Array:
        from vsa_optax.kernels.gpu import random_words  # It imports Pallas, which few users need.

        return random_words.draw(jax.random.key_data(key), math.prod(shape)).reshape(shape)

    is_large = _WORTH_A_KERNEL <= math.prod(shape) < platforms.MOST
    is_threefry = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and str(jax.random.key_impl(key)) == _THREEFRY
    # The flag determines the numbers that belong to a key.
    is_split = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined] # Made at run time.
    if is_large and is_threefry and is_split:
        return platforms.on_each_gpu_or_anywhere(on_gpu, anywhere, key)
    return anywhere(key)


def sign_bits(words: jax.Array, size: int) -> jax.Array:
    """``[..., size] uint32``: each has one bit of the words as its highest bit; 32 neighbours share a word."""
    bits = (words[..., None] << jnp.arange(32, dtype=jnp.uint32).reshape(*[1] * words.ndim, 32)) & _SIGN
    return bits.reshape(*words.shape[:-1], -1)[..., :size]


def random_sign_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """``[*shape] uint32``: the highest bit is random, the others are 0."""
    return sign_bits(random_words(key, shape), shape[-1])


def flip(x: jax.Array, bits: jax.Array) -> jax.Array:
    """``[*shape] f32``: ``x`` with its sign changed where the highest bit is set; its own inverse."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) ^ bits, jnp.float32)
