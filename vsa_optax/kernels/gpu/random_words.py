"""The numbers of ``jax.random.bits`` in one pass at the speed of a GPU's memory, without XLA's intermediate results.

A number is the exclusive or of the two words that threefry computes from a key and the number's place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from vsa_optax.kernels import platforms

Ref = Any  # Memory of the GPU; Pallas has no public type for it.

_AT_ONCE = 1024
_WARPS = 4
_TURNS = ((13, 15, 26, 6), (17, 29, 16, 24))  # The rotations of threefry-2x32, which alternate.
_PARITY = np.uint32(0x1BD11BDA)


def draw(key: jax.Array, size: int, *, interpret: bool = False) -> jax.Array:
    """Draws ``[size] uint32``.

    Args:
        key: ``[2] uint32``, the words of a threefry key.
        size: the number of words, below 2^31.
        interpret: whether to run without a GPU, for tests.
    """
    return pl.pallas_call(
        functools.partial(_kernel, size=size),
        grid=(pl.cdiv(size, _AT_ONCE),),
        out_shape=platforms.shape_like((size,), jnp.uint32, [key]),
        name="random_words",
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        interpret=interpret,
    )(key)


def _kernel(key: Ref, words: Ref, *, size: int) -> None:
    start = pl.program_id(0) * _AT_ONCE
    place = start + lax.iota(jnp.int32, _AT_ONCE)
    inside = None if size % _AT_ONCE == 0 else place < size
    triton.store(words.at[pl.ds(start, _AT_ONCE)], bits(key, place), mask=inside)


def bits(key: Ref, place: jax.Array) -> jax.Array:
    """``[*shape] uint32``: the numbers at ``[*shape] int32`` places of a vector."""
    x, y = _threefry(key[0], key[1], place.astype(jnp.uint32))
    return x ^ y


def _threefry(first: jax.Array, second: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 in 20 rounds with the counter ``(0, place)``."""
    keys = first, second, first ^ second ^ _PARITY
    x, y = jnp.zeros_like(place) + keys[0], place + keys[1]
    for i in range(5):
        for turn in _TURNS[i % 2]:
            x = x + y
            y = ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn))) ^ x
        x, y = x + keys[(i + 1) % 3], y + (keys[(i + 2) % 3] + np.uint32(i + 1))
    return x, y
