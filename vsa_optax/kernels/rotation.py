"""Turn a block by a random rotation, after which its coordinates look Gaussian whatever they were.

One round is ``y = H (s * x) / sqrt(B)``: bind the block with a random ±1 key ``s``, and mix its coordinates by the
Walsh-Hadamard transform. Both are their own inverses, need no stored matrix, and cost O(log B) a coordinate.

After one round the coordinates of a dense block are close to Gaussian. Those of a very sparse one are not: two non-zero
coordinates give four values, whatever the signs. A second round, with new signs, repairs that.

The transform is done as products with small Hadamard matrices. One of order B = r_1 r_2 ... is the Kronecker product of
those of orders r_i, so a block is seen as an array ``[r_1, r_2, ...]`` and each axis multiplied by a matrix of its own.
With factors of at most 32 that is 64 multiply-adds a coordinate for blocks of 1024: more than butterflies take, but in
matrix products that every backend does well.

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
    """``[..., B] f32``, turned by one round for each ``[..., ceil(B / 32)] uint32`` of `signs.random_words`."""
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
    """``[order, order] f32`` of ±1 in Sylvester's order; ``order`` is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def factors(order: int) -> tuple[int, ...]:
    """Powers of two with product ``order``, as few and as equal as can be, none above 32."""
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
    for factor in reversed(digits):  # Each turn takes the last axis and puts what becomes of it in front of the others.
        matrix = jnp.asarray(hadamard_matrix(factor) / np.float32(math.sqrt(factor)))
        y = jnp.moveaxis(jnp.matmul(y, matrix, precision=jax.lax.Precision.HIGHEST), -1, 1)
    return y.reshape(shape)
