"""A coded vector, averaged with another one and coded again, in one pass over memory; for GPUs.

    relay    Q(R' (R^-1 deQ(S) + x) / 2)

for random rotations R and R' of each block of 1024 and the quantiser Q of `trit_kernels`. The average is never stored.
"""

import functools

import jax
import jax.numpy as jnp

from vsa_optax.kernels.gpu import levels, rows, tiles
from vsa_optax.kernels.gpu.levels import BLOCKS
from vsa_optax.kernels.gpu.rows import Bytes, Sums, Tuning, num_rows
from vsa_optax.kernels.gpu.tiles import WIDTH, Ref

# By the number of trits, as `trit_kernels.ADD`, whose program holds as much.
RELAY = {1: Tuning(2), 2: Tuning(1), 3: Tuning(2)}


def relay(
    codes: jax.Array,
    scales: jax.Array,
    x: jax.Array,
    which: tuple[jax.Array, jax.Array],
    words: jax.Array,
    new_words: jax.Array,
    *,
    trits: int,
    unbiased: bool,
    room: int,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Codes of the average of a coded vector and of one of several others.

    Args:
        codes: ``[k, m] uint8``, of whose m bytes ``1024 t r`` are the codes.
        scales: ``[b] bfloat16`` of the coded vector.
        x: ``[k, n]``.
        which: ``[] int32`` each, the row of ``codes`` and the row of ``x``, which are read where they lie.
        words: ``[rounds, 32 b] uint32``, with which the vector was encoded.
        new_words: ``[rounds, 32 b] uint32``, with which the average is encoded.
        trits: t.
        unbiased: which scale.
        room: bytes left behind the new codes for the caller to write, at least 1.
        tuning: how it is compiled, if otherwise than by `RELAY`.
        interpret: to run without a GPU, for tests.

    Returns:
        As `trit_kernels.encode` with room.
    """
    tuning, count = tuning or RELAY[trits], num_rows(x.shape[-1])
    kernel = functools.partial(
        _relay_kernel, trits=trits, count=count, unbiased=unbiased, is_unrolled=tuning.is_unrolled
    )
    places = jnp.stack([jnp.asarray(place, jnp.int32) for place in which])
    operands = [codes, scales, x, places, words, new_words, tiles.hadamard(), levels.table(trits)]
    of_codes, of_scales = (trits * count * WIDTH + room,), (BLOCKS * count,)
    outputs = [(of_codes, jnp.uint8), (of_scales, jnp.float32 if unbiased else jnp.bfloat16)]
    new = rows.call("trit_relay", kernel, operands, outputs, count, tuning, interpret)
    return new[0], new[1]


def _relay_kernel(
    row: jax.Array,
    old_codes: Ref,
    old_scales: Ref,
    x: Ref,
    places: Ref,
    words: Ref,
    new_words: Ref,
    matrices: Ref,
    table: Ref,
    codes: Ref,
    scales: Ref,
    *,
    trits: int,
    count: int,
    unbiased: bool,
    is_unrolled: bool,
) -> None:
    unit = levels.unit(trits, nearest=True)

    def relay_block(i: int | jax.Array, carry: tuple[Sums, Bytes]) -> tuple[Sums, Bytes]:
        (sums, power), rest = carry
        block = row * BLOCKS + i
        numbers, rest = levels.first_numbers(rest)
        values = levels.values_of(numbers, table, trits, nearest=True)
        back = rows.rotated_back(values, words, matrices, block)
        whole = back * (old_scales[block].astype(jnp.float32) * unit) + rows.coordinates(x, block, places[1])
        y = rows.rotated(whole * 0.5, new_words, matrices, block)
        digits, scale = levels.nearest_levels(y, trits, table, unbiased=unbiased)
        scales[block] = scale.astype(scales.dtype)
        return (sums + digits * power, 3 * power), rest

    first = rows.no_sums(), rows.codes(old_codes, row, trits, count, places[0])
    (sums, _), _ = rows.over_blocks(relay_block, first, is_unrolled=is_unrolled)
    rows.put_codes(codes, row, sums, trits, count)
