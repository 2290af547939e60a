"""A running sum of vectors as packed trits: add a vector to it, and finish it with the last one.

    S <- Q(deQ(S) + R x)            add
    (R^-1 deQ(S) + x) / divisor     finish

for a random rotation R of each block and a quantiser Q.
"""

import functools

import jax
import jax.numpy as jnp

from vsa_optax.kernels import lloyd_max, packing, rotation, trit_blocks, trit_rows, uniform
from vsa_optax.kernels.trit_rows import Coded, Piece, Rows, Stage


@functools.partial(jax.jit, static_argnames=("block_size",))
def add(total: Coded, x: jax.Array, words: jax.Array, rounding_key: jax.Array | None, *, block_size: int) -> Coded:
    """Turns ``x``, adds the decoded sum, and quantises again.

    Args:
        total: the sum.
        x: ``[n] f32``.
        words: ``[num_words] uint32``, the rotation, the same for all that is added.
        rounding_key: for stochastic rounding to the levels of `uniform`; with None, the nearest one of `lloyd_max`.
        block_size: a power of two.
    """
    trits = total.codes.shape[0]

    def grow(x: jax.Array, words: jax.Array, old: Coded, rows: Rows) -> jax.Array:
        blocks, of_blocks = x.reshape(rows.num_blocks, -1), words.reshape(rows.num_blocks, -1)
        return rotation.rotate(blocks, [of_blocks]) + _decode(old, rows, nearest=rounding_key is None)

    def quantize(grown: jax.Array, first: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        if rounding_key is None:
            numbers, scales = lloyd_max.quantize(grown, trits, unbiased=False)
            return numbers, scales.astype(jnp.bfloat16)
        return uniform.quantize_stochastically(grown, trits, jax.random.fold_in(rounding_key, first))

    def add_piece(piece: Piece, stage: Stage) -> tuple[None, Coded]:
        grown = stage(functools.partial(grow, rows=piece.rows), piece.x, piece.words, piece.coded)
        numbers, scales = stage(quantize, grown, jnp.asarray(piece.first))
        codes = trit_blocks.pack_numbers(numbers.reshape(piece.rows.num, -1), trits)
        return None, Coded(codes.reshape(trits, -1), scales)

    return trit_rows.by_rows(add_piece, x, words, total, block_size)[1]


@functools.partial(jax.jit, static_argnames=("block_size", "nearest"))
def finish(
    total: Coded, x: jax.Array, words: jax.Array, divisor: jax.Array, *, block_size: int, nearest: bool
) -> jax.Array:
    """``[n] f32``: the sum, turned back, plus ``x``, over ``divisor``; ``nearest`` as it was rounded."""

    def finish_piece(piece: Piece, stage: Stage) -> tuple[jax.Array, None]:
        rows = piece.rows
        decoded = stage(functools.partial(_decode, rows=rows, nearest=nearest), piece.coded)
        turned = rotation.rotate_back(decoded, [piece.words.reshape(rows.num_blocks, -1)])
        return (turned.reshape(-1) + piece.x) / divisor, None

    return trit_rows.by_rows(finish_piece, x, words, total, block_size)[0]


def _decode(total: Coded, rows: Rows, *, nearest: bool) -> jax.Array:
    """``[b, width] f32``."""
    trits = total.codes.shape[0]
    # Of a block's width each, the digits of a byte need no concatenation here, in which XLA would do them one by one.
    planes = packing.digits_of(total.codes.reshape(trits, rows.num, -1), trit_rows.BLOCKS).swapaxes(0, 1)
    of_blocks = trit_blocks.numbers_of(planes).swapaxes(0, 1).reshape(rows.num_blocks, -1)
    decoded = lloyd_max.decode(of_blocks, trits) if nearest else uniform.decode(of_blocks, trits)
    return total.scales[:, None].astype(jnp.float32) * decoded
