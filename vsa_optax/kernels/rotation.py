"""Rotates a block at random, after which its coordinates look Gaussian whatever they were.

One round is ``y = H (s * x) / sqrt(B)``: bind the block with a random ±1 key ``s``, and mix its coordinates by the
Walsh-Hadamard transform. Both are their own inverses, need no stored matrix, and cost O(log B) per coordinate.

After one round, the coordinates of a dense block are close to Gaussian. Those of a very sparse block are not: two
non-zero coordinates give four values, whatever the signs. A second round with new signs corrects that.

The transform is computed by products with small Hadamard matrices. The matrix of order B = r_1 r_2 ... is the Kronecker
product of those of orders r_i. So a block is reshaped to ``[r_1, r_2, ...]``, and each axis is multiplied by its own
matrix. With factors of at most 32 this takes 64 multiply-adds per coordinate for blocks of 1024: more than butterflies,
but matrix products are fast on every backend.

References:
    Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform" (2009); Suresh et al., "Distributed mean estimation
    with limited communication" (arXiv 1611.00429), section 3.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vsa_optax.kernels import signs

_LARGEST_FACTOR_BITS = 5


def rotate(x: jax.Array, words: Sequence[jax.Array]) -> jax.Array:
    """Rotates ``[..., B] f32`` by one round for each ``[..., ceil(B / 32)] uint32`` of `signs.random_words`."""
    for of_round in words:
        x = walsh_hadamard(signs.flip(x, signs.sign_bits(of_round, x.shape[-1])))
    return x


def rotate_back(y: jax.Array, words: Sequence[jax.Array]) -> jax.Array:
    """The inverse of `rotate`."""
    for of_round in reversed(words):
        y = signs.flip(walsh_hadamard(y), signs.sign_bits(of_round, y.shape[-1]))
    return y


@functools.cache
def hadamard_matrix(order: int) -> np.ndarray:
    """The Hadamard matrix ``[order, order] f32`` of ±1 in Sylvester's order; ``order`` is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def factors(order: int) -> tuple[int, ...]:
    """Powers of two with product ``order`` and at most 32, as few and as equal as possible."""
    bits = order.bit_length() - 1
    num = max(1, -(-bits // _LARGEST_FACTOR_BITS))
    return tuple(1 << (bits // num + (i < bits % num)) for i in range(num))


def walsh_hadamard(x: jax.Array) -> jax.Array:
    """The orthonormal transform along the last axis, in Sylvester's order; its own inverse.

    Args:
        x: ``[..., B] f32``, B a power of two.

    Returns:
        ``[..., B] f32``, ``x @ H / sqrt(B)``.
    """
    shape = x.shape
    digits = factors(shape[-1])
    y = x.reshape(-1, *digits)
    for factor in reversed(digits):  # Each iteration transforms the last axis and moves it in front of the others.
        matrix = jnp.asarray(hadamard_matrix(factor) / np.float32(math.sqrt(factor)))
        y = jnp.moveaxis(jnp.matmul(y, matrix, precision=jax.lax.Precision.HIGHEST), -1, 1)
    return y.reshape(shape)
