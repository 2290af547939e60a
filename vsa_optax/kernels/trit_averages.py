"""The mean of a vector of packed trits and of a row: in f32, or as packed trits again.

On an NVIDIA GPU, each is one pass over memory for the vectors that `trit_blocks` codes there.

Axes: n coordinates, t trits, m bytes, b blocks, k rows.
"""

import functools

import jax
import jax.numpy as jnp

from vsa_optax.kernels import blocks, platforms, trit_blocks


@functools.partial(jax.jit, static_argnames=("trits", "block_size", "unbiased"))
def average_of_two(
    codes: jax.Array,
    scales: jax.Array,
    x: jax.Array,
    which: tuple[jax.Array, jax.Array],
    key: jax.Array,
    *,
    trits: int,
    block_size: int,
    unbiased: bool,
) -> jax.Array:
    """``[n] f32``: the mean of a coded vector and of a row, in one pass over memory on a GPU.

    Args:
        codes: ``[k, bytes] uint8``, of which those of ``[t, m]`` are the first.
        scales: ``[b] bfloat16`` of the coded vector.
        x: ``[k, n] f32``.
        which: ``[] int32`` each, the row of ``codes`` and the row of ``x``.
        key: the key of the rotation.
        trits: the number of trits per coordinate.
        block_size: the number of coordinates in a block.
        unbiased: whether the vector was encoded with ``unbiased=True``.
    """
    size = x.shape[-1]
    words = trit_blocks.random_words(key, blocks.split_into_blocks(size, block_size), rounds=2 if unbiased else 1)

    def anywhere(
        codes: jax.Array,
        scales: jax.Array,
        x: jax.Array,
        which: tuple[jax.Array, jax.Array],
        words: list[list[jax.Array]],
    ) -> jax.Array:
        of_vector = trit_blocks.by_trits(trit_blocks.row_of(codes, which[0])[None], trits, size, block_size)
        decoded = trit_blocks.decode_anywhere(of_vector, scales[None].astype(jnp.float32), words, size, block_size)
        return trit_blocks.row_of(x, which[1]) / 2 + decoded / 2

    def on_gpu(
        codes: jax.Array,
        scales: jax.Array,
        x: jax.Array,
        which: tuple[jax.Array, jax.Array],
        words: list[list[jax.Array]],
    ) -> jax.Array:
        from vsa_optax.kernels.gpu import trit_kernels  # It imports Pallas, which few users need.

        given, divisor = (codes, scales, x, trit_blocks.as_rounds(words)), jnp.float32(2)
        return trit_kernels.finish(*given, divisor, nearest=True, trits=trits, which=which)

    operands = codes, scales, x, which, words
    if trit_blocks.suits_gpu(size, block_size, x.size):
        return platforms.on_each_gpu_or_anywhere(on_gpu, anywhere, *operands)
    return anywhere(*operands)


@functools.partial(jax.jit, static_argnames=("trits", "block_size", "unbiased", "room"))
def relay(
    codes: jax.Array,
    scales: jax.Array,
    x: jax.Array,
    which: tuple[jax.Array, jax.Array],
    key: jax.Array,
    new_key: jax.Array,
    *,
    trits: int,
    block_size: int,
    unbiased: bool,
    room: int,
) -> tuple[jax.Array, jax.Array]:
    """`trit_blocks.encode`, with room, of `average_of_two`, which a GPU does not store.

    Args:
        codes: as in `average_of_two`.
        scales: as there.
        x: as there.
        which: as there.
        key: as there.
        new_key: the key of the rotation of the average.
        trits: as there.
        block_size: as there.
        unbiased: as there, also for the average.
        room: the bytes to leave behind the new codes, at least 1.
    """
    size, settings = x.shape[-1], {"trits": trits, "block_size": block_size, "unbiased": unbiased}
    runs = blocks.split_into_blocks(size, block_size)

    def anywhere(
        codes: jax.Array, scales: jax.Array, x: jax.Array, which: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        average = average_of_two(codes, scales, x, which, key, **settings)
        return trit_blocks.encode(average, new_key, room=room, **settings)

    def on_gpu(
        codes: jax.Array, scales: jax.Array, x: jax.Array, which: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        from vsa_optax.kernels.gpu import relay_kernel  # It imports Pallas, which few users need.

        rounds = 2 if unbiased else 1
        old, new = (trit_blocks.as_rounds(trit_blocks.random_words(k, runs, rounds=rounds)) for k in (key, new_key))
        new_codes, new_scales = relay_kernel.relay(
            codes, scales, x, which, old, new, trits=trits, unbiased=unbiased, room=room
        )
        return new_codes, trit_blocks.rounded_scales(new_scales, new_key, runs) if unbiased else new_scales

    if trit_blocks.suits_gpu(size, block_size, x.size):
        return platforms.on_each_gpu_or_anywhere(on_gpu, anywhere, codes, scales, x, which)
    return anywhere(codes, scales, x, which)
