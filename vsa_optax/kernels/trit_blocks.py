"""A vector as packed trits and a scale a block, and weighted sums of such vectors back.

Axes: n coordinates, t trits, m bytes, b blocks, k vectors.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vsa_optax.kernels import blocks, lloyd_max, packing, rotation, signs
from vsa_optax.kernels.blocks import BlockRun


@functools.partial(jax.jit, static_argnames=("trits", "block_size", "unbiased"))
def encode(x: jax.Array, key: jax.Array, *, trits: int, block_size: int, unbiased: bool) -> tuple[jax.Array, jax.Array]:
    """Rotates, quantises and packs.

    Args:
        x: ``[n] f32``, n at least 1.
        key: of the rotation.
        trits: 1, 2 or 3.
        block_size: a power of two.
        unbiased: two rounds, the unbiased scale and its stochastic rounding, instead of what loses least.

    Returns:
        ``(codes, scales)``: ``[t, m] uint8``, the digits of the level numbers, lowest first; ``[b] bfloat16``.
    """
    runs = blocks.split_into_blocks(x.size, block_size)
    words = random_words(key, runs, rounds=2 if unbiased else 1)

    def encode_block(block: jax.Array, words: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        return lloyd_max.quantize(rotation.rotate(block, words), trits, unbiased=unbiased)

    operands = list(zip(blocks.cut(x, runs), words, strict=True))
    numbers, scales = blocks.map_runs(encode_block, operands, runs)
    codes = pack_numbers(numbers, trits)
    if unbiased:
        random_bits = jax.random.bits(jax.random.fold_in(key, 2 * len(runs)), scales.shape, jnp.uint32)
        return codes, lloyd_max.round_stochastically(scales, random_bits)
    return codes, scales.astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnames=("size", "block_size", "unbiased"))
def decode_sum(
    codes: jax.Array,
    scales: jax.Array,
    coefficients: jax.Array,
    key: jax.Array,
    *,
    size: int,
    block_size: int,
    unbiased: bool,
) -> jax.Array:
    """The weighted sum of k vectors that were encoded with one key, for one rotation.

    Args:
        codes: ``[k, t, m] uint8``.
        scales: ``[k, b] bfloat16``.
        coefficients: ``[k] f32``.
        key: of the rotation.
        size: n.
        block_size: as in `encode`.
        unbiased: as in `encode`.

    Returns:
        ``[n] f32``.
    """
    runs = blocks.split_into_blocks(size, block_size)
    words = random_words(key, runs, rounds=2 if unbiased else 1)
    levels = jnp.asarray(lloyd_max.levels(codes.shape[1]))
    numbers = unpack_numbers(codes.swapaxes(0, 1), blocks.padded_size(runs))

    def decode_block(numbers: jax.Array, weights: jax.Array, words: list[jax.Array]) -> jax.Array:
        # The largest weight is taken out and put back at the end, so that no sum on the way overflows.
        largest = jnp.max(jnp.abs(weights))
        shares = weights / jnp.where(largest > 0, largest, 1.0)
        total = shares[0] * levels[numbers[0]]
        for i in range(1, weights.size):
            total = total + shares[i] * levels[numbers[i]]
        return largest * rotation.rotate_back(total, words)

    weights = coefficients[:, None] * scales.astype(jnp.float32)
    of_runs = zip(blocks.cut(numbers, runs), blocks.cut_scales(weights, runs), words, strict=True)
    operands = [(in_run.swapaxes(0, 1), of_blocks.T, of_words) for in_run, of_blocks, of_words in of_runs]
    return blocks.map_runs(decode_block, operands, runs)[:size]


def pack_numbers(numbers: jax.Array, trits: int) -> jax.Array:
    """``[t, ..., m] uint8`` from ``[..., n] uint8`` level numbers below ``3**t``: packed digits, lowest first."""
    return packing.pack_digits(packing.digits_of(numbers, trits))


def unpack_numbers(codes: jax.Array, size: int) -> jax.Array:
    """``[..., size] uint8`` from ``[t, ..., m] uint8``, the inverse of `pack_numbers`."""
    return numbers_of(packing.unpack_digits(codes, size))


def numbers_of(digits: jax.Array) -> jax.Array:
    """``[...] uint8`` from ``[t, ...]`` digits, lowest first."""
    powers = np.array([3**i for i in range(len(digits))], np.uint32)
    weighted = digits.astype(jnp.uint32) * powers.reshape(-1, *[1] * (digits.ndim - 1))
    return jnp.sum(weighted, axis=0, dtype=jnp.uint32).astype(jnp.uint8)


def random_words(key: jax.Array, runs: Sequence[BlockRun], *, rounds: int) -> list[list[jax.Array]]:
    """For each run, the words of each round of a rotation."""
    return [
        [signs.random_words(jax.random.fold_in(key, 2 * i + turn), run) for turn in range(rounds)]
        for i, run in enumerate(runs)
    ]
