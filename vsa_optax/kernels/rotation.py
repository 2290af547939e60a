"""Turn a block by a random rotation, after which its coordinates look Gaussian whatever they were.

One round is ``y = H (s * x) / sqrt(B)``: bind the block with a random ±1 key ``s``, and mix its coordinates by the
Walsh-Hadamard transform. Both are their own inverses, need no stored matrix, and cost O(log B) a coordinate.

After one round the coordinates of a dense block are close to Gaussian. Those of a very sparse one are not: two non-zero
coordinates give four values, whatever the signs. A second round, with new signs, repairs that.

References:
    Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform" (2009); Suresh et al., "Distributed mean estimation
    with limited communication" (arXiv 1611.00429), section 3.
"""

from collections.abc import Sequence

import jax

from vsa_optax.kernels import signs
from vsa_optax.kernels.hadamard import walsh_hadamard


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
