"""Encodes a vector as packed trits with one scale per block, and decodes weighted sums of such vectors.

A vector of at least 2^17 coordinates and 25 rows is padded to whole rows of blocks. A row is five blocks, which share
its bytes: digit ``j`` of byte ``i`` belongs to coordinate ``i`` of block ``j``. In a smaller vector, all digits share
bytes as in `packing`.

On an NVIDIA GPU, `kernels.gpu.trit_kernels` code vectors that are padded in this way, in blocks of 1024. XLA codes all
others and, on several devices, those outside ``jax.shard_map``.

Axes: n coordinates, t trits, m bytes, b blocks, k vectors.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vsa_optax.kernels import blocks, lloyd_max, packing, platforms, rotation, signs
from vsa_optax.kernels.blocks import BlockRun

_BLOCK_ON_GPU = 1024


@functools.partial(jax.jit, static_argnames=("trits", "block_size", "unbiased", "room"))
def encode(
    x: jax.Array,
    key: jax.Array,
    which: jax.Array | None = None,
    *,
    trits: int,
    block_size: int,
    unbiased: bool,
    room: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Rotates, quantises and packs.

    Args:
        x: ``[n] f32``, n at least 1; or ``[k, n] f32`` with ``which``.
        key: the key of the rotation.
        which: ``[] int32``, the row of ``[k, n]`` to encode, which the GPU kernel reads without a copy.
        trits: the number of trits per coordinate, 1, 2 or 3.
        block_size: the number of coordinates in a block, a power of two.
        unbiased: whether to use two rounds, the unbiased scale and its stochastic rounding, instead of the least error.
        room: the bytes to leave behind the codes for the caller to write.

    Returns:
        ``(codes, scales)``: ``[t, m] uint8``, the digits of the level numbers, lowest first, or ``[t * m + room]`` with
        room; ``[b] bfloat16``.
    """
    size = x.shape[-1]
    runs, row = blocks.split_into_blocks(size, block_size), _row(size, block_size)
    words = random_words(key, runs, rounds=2 if unbiased else 1)

    def anywhere(x: jax.Array, which: jax.Array | None, words: list[list[jax.Array]]) -> tuple[jax.Array, jax.Array]:
        def encode_block(block: jax.Array, words: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
            return lloyd_max.quantize(rotation.rotate(block, words), trits, unbiased=unbiased)

        operands = list(zip(blocks.cut(row_of(x, which), runs), words, strict=True))
        numbers, scales = blocks.map_runs(encode_block, operands, runs)
        codes = _pack(numbers, trits, row)
        codes = jnp.pad(codes.reshape(-1), (0, room)) if room else codes
        return codes, scales if unbiased else scales.astype(jnp.bfloat16)

    def on_gpu(x: jax.Array, which: jax.Array | None, words: list[list[jax.Array]]) -> tuple[jax.Array, jax.Array]:
        from vsa_optax.kernels.gpu import trit_kernels  # It imports Pallas, which few users need.

        return trit_kernels.encode(x, as_rounds(words), trits=trits, unbiased=unbiased, which=which, room=room)

    if suits_gpu(size, block_size, x.size):
        codes, scales = platforms.on_each_gpu_or_anywhere(on_gpu, anywhere, x, which, words)
    else:
        codes, scales = anywhere(x, which, words)
    return codes, rounded_scales(scales, key, runs) if unbiased else scales


@functools.partial(jax.jit, static_argnames=("size", "block_size", "unbiased", "trits"))
def decode_sum(
    codes: jax.Array,
    scales: jax.Array,
    coefficients: jax.Array,
    key: jax.Array,
    *,
    size: int,
    block_size: int,
    unbiased: bool,
    trits: int | None = None,
) -> jax.Array:
    """The weighted sum of k vectors that were encoded with one key, at the cost of one rotation.

    Args:
        codes: ``[k, t, m] uint8``; with ``trits``, vectors that begin with these bytes, which are not copied on a GPU.
        scales: ``[k, b] bfloat16``.
        coefficients: ``[k] f32``.
        key: the key of the rotation.
        size: n, the number of coordinates.
        block_size: the number of coordinates in a block.
        unbiased: whether the vectors were encoded with ``unbiased=True``.
        trits: t, for flat codes.

    Returns:
        ``[n] f32``.
    """
    words = random_words(key, blocks.split_into_blocks(size, block_size), rounds=2 if unbiased else 1)
    weights = coefficients[:, None] * scales.astype(jnp.float32)

    def anywhere(codes: jax.Array, weights: jax.Array, words: list[list[jax.Array]]) -> jax.Array:
        return decode_anywhere(by_trits(codes, trits, size, block_size), weights, words, size, block_size)

    def on_gpu(codes: jax.Array, weights: jax.Array, words: list[list[jax.Array]]) -> jax.Array:
        from vsa_optax.kernels.gpu import trit_kernels  # It imports Pallas, which few users need.

        shares, factors = (weights, weights[0]) if len(weights) == 1 else _shares_of(weights)
        return trit_kernels.decode_sum(codes, shares, factors, as_rounds(words), size=size, trits=trits)

    if suits_gpu(size, block_size):
        return platforms.on_each_gpu_or_anywhere(on_gpu, anywhere, codes, weights, words)
    return anywhere(codes, weights, words)


def decode_anywhere(
    codes: jax.Array, weights: jax.Array, words: list[list[jax.Array]], size: int, block_size: int
) -> jax.Array:
    """`decode_sum` without a GPU kernel; ``weights`` are ``[k, b] f32``."""
    runs, row = blocks.split_into_blocks(size, block_size), _row(size, block_size)
    levels = jnp.asarray(lloyd_max.levels(codes.shape[1]))
    numbers = _unpack(codes.swapaxes(0, 1), blocks.padded_size(runs), row)

    def decode_block(numbers: jax.Array, weights: jax.Array, words: list[jax.Array]) -> jax.Array:
        shares, largest = _shares_of(weights)
        total = shares[0] * levels[numbers[0]]
        for i in range(1, weights.size):
            total = total + shares[i] * levels[numbers[i]]
        return largest * rotation.rotate_back(total, words)

    of_runs = zip(blocks.cut(numbers, runs), blocks.cut_scales(weights, runs), words, strict=True)
    operands = [(in_run.swapaxes(0, 1), of_blocks.T, of_words) for in_run, of_blocks, of_words in of_runs]
    return blocks.map_runs(decode_block, operands, runs)[:size]


def coded_sizes(size: int, trits: int, block_size: int) -> tuple[int, int]:
    """The bytes of the codes of a vector of ``size`` coordinates, and the number of its scales."""
    runs, row = blocks.split_into_blocks(size, block_size), _row(size, block_size)
    padded = blocks.padded_size(runs)
    of_trit = packing.packed_size(padded) if row is None else padded // row * packing.packed_size(row)
    return trits * of_trit, sum(run.num for run in runs)


def by_trits(codes: jax.Array, trits: int | None, size: int, block_size: int) -> jax.Array:
    """``[k, t, m] uint8``, of flat codes if ``trits`` is given."""
    if trits is None:
        return codes
    return codes[:, : coded_sizes(size, trits, block_size)[0]].reshape(len(codes), trits, -1)


def largest_scale(trits: int, block_size: int) -> float:
    """A scale up to which blocks decode to finite numbers.

    No coordinate exceeds the norm of a block in which all levels are the highest one. Half of what would fit into f32
    leaves room for rounding.
    """
    highest = float(lloyd_max.levels(trits)[-1])
    return float(np.finfo(np.float32).max) / (2 * highest * math.sqrt(block_size))


def suits_gpu(size: int, block_size: int, all_rows: int = 0) -> bool:
    """Whether vectors of this size, in an array of size ``all_rows``, are in whole rows of blocks for GPU kernels."""
    is_small = size < platforms.MOST // 2 and all_rows < platforms.MOST
    return block_size == _BLOCK_ON_GPU and blocks.fills_rows(size, block_size) and is_small


def rounded_scales(scales: jax.Array, key: jax.Array, runs: Sequence[BlockRun]) -> jax.Array:
    """``[b] bfloat16`` of ``[b] f32``: the scales, rounded without bias."""
    random_bits = signs.random_bits(jax.random.fold_in(key, 2 * len(runs)), scales.shape)
    return lloyd_max.round_stochastically(scales, random_bits)


def row_of(x: jax.Array, which: jax.Array | None) -> jax.Array:
    """``x``, or ``x[which]``."""
    return x if which is None else lax.dynamic_index_in_dim(x, which, keepdims=False)


def _shares_of(weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``[k, ...]`` weights over the largest, and the largest, so that no sum of weighted levels overflows."""
    largest = jnp.max(jnp.abs(weights), axis=0)
    return weights / jnp.where(largest > 0, largest, 1.0), largest


def as_rounds(words: list[list[jax.Array]]) -> jax.Array:
    """``[rounds, words] uint32``: the words of a vector that is one run."""
    return jnp.stack([of_round.reshape(-1) for of_round in words[0]])


def _row(size: int, block_size: int) -> int | None:
    """The number of coordinates whose trits share bytes; None if those of the whole vector do."""
    return blocks.BLOCKS_IN_ROW * block_size if blocks.fills_rows(size, block_size) else None


def _pack(numbers: jax.Array, trits: int, row: int | None) -> jax.Array:
    """Packs ``[n] uint8`` level numbers into ``[t, m] uint8``, row by row."""
    return pack_numbers(numbers if row is None else numbers.reshape(-1, row), trits).reshape(trits, -1)


def _unpack(codes: jax.Array, size: int, row: int | None) -> jax.Array:
    """The inverse of `_pack`: ``[..., size] uint8`` from ``[t, ..., m] uint8``."""
    if row is None:
        return unpack_numbers(codes, size)
    of_rows = codes.reshape(*codes.shape[:-1], -1, packing.packed_size(row))
    return unpack_numbers(of_rows, row).reshape(*codes.shape[1:-1], size)


def pack_numbers(numbers: jax.Array, trits: int) -> jax.Array:
    """Packs the digits of ``[..., n] uint8`` level numbers below ``3**t`` into ``[t, ..., m] uint8``, lowest first."""
    return packing.pack_digits(packing.digits_of(numbers, trits))


def unpack_numbers(codes: jax.Array, size: int) -> jax.Array:
    """The inverse of `pack_numbers`: ``[..., size] uint8`` from ``[t, ..., m] uint8``."""
    return numbers_of(packing.unpack_digits(codes, size))


def numbers_of(digits: jax.Array) -> jax.Array:
    """The level numbers ``[...] uint8`` with these digits ``[t, ...]``, lowest first."""
    powers = np.array([3**i for i in range(len(digits))], np.uint32)
    weighted = digits.astype(jnp.uint32) * powers.reshape(-1, *[1] * (digits.ndim - 1))
    return jnp.sum(weighted, axis=0, dtype=jnp.uint32).astype(jnp.uint8)


def random_words(key: jax.Array, runs: Sequence[BlockRun], *, rounds: int) -> list[list[jax.Array]]:
    """The words of each round of a rotation, for each run."""
    return [
        [signs.random_words(jax.random.fold_in(key, 2 * i + turn), run) for turn in range(rounds)]
        for i, run in enumerate(runs)
    ]
