"""A block of 1024 coordinates in the registers of a GPU's program: its random signs, and its rotation.

A block is a tile ``[32, 32]``, row after row. Its Walsh-Hadamard transform of order 1024 is a product with the matrix
H of order 32 from either side, since the matrix of order 1024 is the Kronecker product of H with itself. Tensor cores
take operands in bfloat16 and sum in f32. To round the operands of both products costs 5e-6 of the block's energy; H has
entries of ±1 / 32 and ±1, which bfloat16 holds exactly.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from vsa_optax.kernels import rotation

Ref = Any  # Memory of the GPU; Pallas has no public type for it.

SIDE = 32
WIDTH = SIDE * SIDE  # Coordinates of a block.
_SIGN = np.uint32(1 << 31)


def hadamard() -> jax.Array:
    """``[2, 32, 32] bfloat16``: H / 32, for the left of a tile, and H, for its right."""
    matrix = rotation.hadamard_matrix(SIDE)
    return jnp.asarray(np.stack([matrix / SIDE, matrix]), jnp.bfloat16)


def sign_bits(words: Ref, turn: int, block: jax.Array, first_word: int | jax.Array = 0) -> jax.Array:
    """``[32, 32] uint32``: a block's random signs in the highest bits, as in `signs.sign_bits`."""
    of_rows = words[turn, pl.ds(first_word + block * SIDE, SIDE)]
    return (of_rows[:, None] << lax.broadcasted_iota(jnp.uint32, (SIDE, SIDE), 1)) & _SIGN


def flip(x: jax.Array, bits: jax.Array) -> jax.Array:
    """``[32, 32] f32``: ``x`` with its sign changed where the highest bit is set."""
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) ^ bits, jnp.float32)


def transformed(x: jax.Array, matrices: Ref) -> jax.Array:
    """``[32, 32] f32``: the orthonormal Walsh-Hadamard transform of a block, in Sylvester's order; its own inverse."""
    left = jnp.dot(matrices[0], x.astype(jnp.bfloat16), preferred_element_type=jnp.float32)
    return jnp.dot(left.astype(jnp.bfloat16), matrices[1], preferred_element_type=jnp.float32)


def total(x: jax.Array) -> jax.Array:
    """``[] f32``, the sum over a block."""
    return jnp.sum(x.reshape(WIDTH))


def largest(x: jax.Array) -> jax.Array:
    """``[] f32``, the largest magnitude in a block."""
    return jnp.max(jnp.abs(x).reshape(WIDTH))
