"""The work of `kernels.trit_blocks` and `accumulation.packed_rows` on large vectors, in one pass over memory; for GPUs.

    encode       Q(R x)
    decode_sum   R^-1 sum_k c_k deQ(S_k)
    add          Q(deQ(S) + R x)
    finish       (R^-1 deQ(S) + x) / divisor

for a random rotation R of each block of 1024 and a quantiser Q. A program takes a row: five blocks of the vector, which
share their bytes, so that nothing but the vector, its trits, and a scale a block crosses memory. Positions after
the vector's end in the last row count as zeros.

Levels are those of `lloyd_max` and `uniform` but where a coordinate is close to a tie; the rotation rounds to bfloat16
(`tiles`), which costs 5e-6 of a block's energy.

Axes: n coordinates, r rows, t trits, b = 5 r blocks, k vectors.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from vsa_optax.kernels.gpu import levels, rows, tiles
from vsa_optax.kernels.gpu.levels import BLOCKS
from vsa_optax.kernels.gpu.rows import Bytes, Sums, Tuning, num_rows
from vsa_optax.kernels.gpu.tiles import SIDE, WIDTH, Ref

# By the number of trits; the table of what was tried is in `benchmarks/trit_kernels_tuning.log`.
ENCODE = {1: Tuning(1), 2: Tuning(1), 3: Tuning(2)}
DECODE = {1: Tuning(1), 2: Tuning(1), 3: Tuning(1)}
ADD = {1: Tuning(2), 2: Tuning(1), 3: Tuning(2)}
FINISH = {1: Tuning(1), 2: Tuning(2), 3: Tuning(1)}


def encode(
    x: jax.Array,
    words: jax.Array,
    *,
    trits: int,
    unbiased: bool,
    which: jax.Array | None = None,
    room: int = 0,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Rotates, quantises and packs.

    Args:
        x: ``[n]``, or ``[k, n]`` with ``which``.
        words: ``[rounds, 32 b] uint32``, random, of which each bit is a sign.
        trits: 1, 2 or 3.
        unbiased: which scale.
        which: ``[] int32``, the vector of ``[k, n]`` to encode, which is read where it lies.
        room: bytes left behind the codes for the caller to write.
        tuning: how it is compiled, if otherwise than was measured to be best.
        interpret: to run without a GPU, for tests.

    Returns:
        ``[t, 1024 r] uint8``, or ``[1024 t r + room]`` with room, and ``[b]``, in float32 if unbiased, to be rounded,
        and else in bfloat16.
    """
    count = num_rows(x.shape[-1])
    tuning = tuning or ENCODE[trits]
    kernel = functools.partial(
        _encode_kernel, trits=trits, count=count, unbiased=unbiased, is_unrolled=tuning.is_unrolled
    )
    operands = [x, _one(0 if which is None else which), words, tiles.hadamard(), levels.table(trits)]
    of_codes, of_scales = (trits * count * WIDTH + room,), (BLOCKS * count,)
    outputs = [(of_codes, jnp.uint8), (of_scales, jnp.float32 if unbiased else jnp.bfloat16)]
    codes, scales = rows.call("trit_encode", kernel, operands, outputs, count, tuning, interpret)
    return codes if room else codes.reshape(trits, -1), scales


def _encode_kernel(
    row: jax.Array,
    x: Ref,
    which: Ref,
    words: Ref,
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
    def encode_block(i: int | jax.Array, carry: Sums) -> Sums:
        sums, power = carry
        block = row * BLOCKS + i
        y = rows.rotated(rows.coordinates(x, block, *_vector(x, which)), words, matrices, block)
        digits, scale = levels.nearest_levels(y, trits, table, unbiased=unbiased)
        scales[block] = scale.astype(scales.dtype)
        return sums + digits * power, 3 * power

    sums, _ = rows.over_blocks(encode_block, rows.no_sums(), is_unrolled=is_unrolled)
    rows.put_codes(codes, row, sums, trits, count)


def decode_sum(
    codes: jax.Array,
    shares: jax.Array,
    factors: jax.Array,
    words: jax.Array,
    *,
    size: int,
    trits: int | None = None,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The weighted sum of k vectors that were encoded with one rotation.

    Args:
        codes: ``[k, t, 1024 r] uint8``, or ``[k, m]`` of m bytes, of which these are the first.
        shares: ``[k, b] f32``, of each block in the sum, at most 1; not read if k is 1.
        factors: ``[b] f32``, of the sum.
        words: as in `encode`.
        size: n.
        trits: t, for ``[k, m]``.
        tuning: how it is compiled, if otherwise than was measured to be best.
        interpret: to run without a GPU, for tests.

    Returns:
        ``[n] f32``.
    """
    trits, num, count = trits or codes.shape[1], len(codes), num_rows(size)
    tuning = tuning or DECODE[trits]
    kernel = functools.partial(_decode_sum_kernel, num=num, trits=trits, count=count, is_unrolled=tuning.is_unrolled)
    factors = factors * levels.unit(trits, nearest=True)
    operands = [codes.reshape(num, -1), shares, factors, words, tiles.hadamard(), levels.table(trits)]
    outputs = [((size,), jnp.float32)]
    (decoded,) = rows.call("trit_decode_sum", kernel, operands, outputs, count, tuning, interpret)
    return decoded


def _decode_sum_kernel(
    row: jax.Array,
    codes: Ref,
    shares: Ref,
    factors: Ref,
    words: Ref,
    matrices: Ref,
    table: Ref,
    decoded: Ref,
    *,
    num: int,
    trits: int,
    count: int,
    is_unrolled: bool,
) -> None:
    def put(i: int | jax.Array, values: jax.Array) -> None:
        block = row * BLOCKS + i
        rows.put_coordinates(decoded, block, factors[block] * rows.rotated_back(values, words, matrices, block))

    def decode_block(i: int | jax.Array, rest: Bytes) -> Bytes:
        numbers, rest = levels.first_numbers(rest)
        put(i, levels.values_of(numbers, table, trits, nearest=True))
        return rest

    def with_vector(k: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rest, more = rows.codes(codes, row, trits, count, k), []
        for i, of_block in enumerate(sums):
            numbers, rest = levels.first_numbers(rest)
            values = levels.values_of(numbers, table, trits, nearest=True)
            more.append(of_block + shares[k, row * BLOCKS + i] * values)
        return tuple(more)

    if num == 1:
        rows.over_blocks(decode_block, rows.codes(codes, row, trits, count, 0), is_unrolled=is_unrolled)
        return
    nothing = (jnp.zeros((SIDE, SIDE), jnp.float32),) * BLOCKS
    for i, of_block in enumerate(lax.fori_loop(0, num, with_vector, nothing)):
        put(i, of_block)


def add(
    x: jax.Array,
    words: jax.Array,
    rounding: jax.Array | None,
    codes: jax.Array,
    scales: jax.Array,
    *,
    first_word: int | jax.Array = 0,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """A coded sum with one more vector, beside the old sum.

    Args:
        x: ``[n]``.
        words: ``[1, ...] uint32``, as in `encode` the vector's among others.
        rounding: ``[2] uint32``, the key of the random numbers for stochastic rounding to `uniform` levels; with None,
            the nearest one of `lloyd_max`.
        codes: ``[t, 1024 r] uint8``.
        scales: ``[b] bfloat16``.
        first_word: ``[] int32``, where the vector's words begin.
        tuning: how it is compiled, if otherwise than was measured to be best.
        interpret: to run without a GPU, for tests.

    Returns:
        New codes and scales.
    """
    trits, is_nearest = codes.shape[0], rounding is None
    count = num_rows(x.size)
    tuning = tuning or ADD[trits]
    kernel = functools.partial(
        _add_kernel, trits=trits, count=count, is_nearest=is_nearest, is_unrolled=tuning.is_unrolled
    )
    operands = [x, words, _one(first_word), words if rounding is None else rounding, tiles.hadamard()]
    operands = [*operands, levels.table(trits), codes.reshape(-1), scales]
    outputs = [((codes.size,), codes.dtype), (scales.shape, scales.dtype)]
    new = rows.call("trit_add", kernel, operands, outputs, count, tuning, interpret)
    return new[0].reshape(codes.shape), new[1]


def _add_kernel(
    row: jax.Array,
    x: Ref,
    words: Ref,
    first_word: Ref,
    rounding: Ref,
    matrices: Ref,
    table: Ref,
    old_codes: Ref,
    old_scales: Ref,
    codes: Ref,
    scales: Ref,
    *,
    trits: int,
    count: int,
    is_nearest: bool,
    is_unrolled: bool,
) -> None:
    unit = levels.unit(trits, nearest=is_nearest)

    def add_block(i: int | jax.Array, carry: tuple[Sums, Bytes]) -> tuple[Sums, Bytes]:
        (sums, power), rest = carry
        block = row * BLOCKS + i
        numbers, rest = levels.first_numbers(rest)
        old = levels.values_of(numbers, table, trits, nearest=is_nearest)
        grown = old * (old_scales[block].astype(jnp.float32) * unit)
        grown += rows.rotated(rows.coordinates(x, block), words, matrices, block, first_word[0])
        if is_nearest:
            digits, scale = levels.nearest_levels(grown, trits, table, unbiased=False)
        else:
            digits, scale = levels.random_levels(grown, trits, rounding, block)
        scales[block] = scale.astype(scales.dtype)
        return (sums + digits * power, 3 * power), rest

    first = rows.no_sums(), rows.codes(old_codes, row, trits, count)
    (sums, _), _ = rows.over_blocks(add_block, first, is_unrolled=is_unrolled)
    rows.put_codes(codes, row, sums, trits, count)


def finish(
    codes: jax.Array,
    scales: jax.Array,
    x: jax.Array,
    words: jax.Array,
    divisor: jax.Array,
    *,
    nearest: bool,
    trits: int | None = None,
    first_word: int | jax.Array = 0,
    which: tuple[jax.Array, jax.Array] | None = None,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> jax.Array:
    """``[n] f32``: the sum, turned back, plus ``x``, over ``divisor``.

    Args:
        codes: ``[t, 1024 r] uint8``; with ``which`` ``[k, m]``, of whose m bytes these are the first.
        scales: ``[b] bfloat16``.
        x: ``[n]``; ``[k, n]`` with ``which``.
        words: as in `encode`, the vector's among others.
        divisor: ``[] f32``.
        nearest: as it was rounded.
        trits: t, for ``[k, m]``.
        first_word: as in `add`.
        which: ``[] int32`` each, the codes and the vector that are read, where they lie.
        tuning: how it is compiled, if otherwise than was measured to be best.
        interpret: to run without a GPU, for tests.
    """
    trits, count = trits or len(codes), num_rows(x.shape[-1])
    tuning = tuning or FINISH[trits]
    kernel = functools.partial(
        _finish_kernel, trits=trits, count=count, nearest=nearest, is_unrolled=tuning.is_unrolled
    )
    share = (1 / divisor).reshape(1)
    codes, places = (codes.reshape(-1), (0, 0)) if which is None else (codes, which)
    operands = [codes, _one(places[0]), scales, x, _one(places[1]), words, _one(first_word), share]
    operands = [*operands, tiles.hadamard(), levels.table(trits)]
    outputs = [(x.shape[-1:], jnp.float32)]
    # A gradient that is not read again becomes the mean in place; otherwise XLA copies it first.
    in_place = {3: 0} if which is None and x.dtype == jnp.float32 else None
    (finished,) = rows.call("trit_finish", kernel, operands, outputs, count, tuning, interpret, in_place)
    return finished


def _finish_kernel(
    row: jax.Array,
    codes: Ref,
    which_codes: Ref,
    scales: Ref,
    x: Ref,
    which: Ref,
    words: Ref,
    first_word: Ref,
    share: Ref,
    matrices: Ref,
    table: Ref,
    finished: Ref,
    *,
    trits: int,
    count: int,
    nearest: bool,
    is_unrolled: bool,
) -> None:
    unit = levels.unit(trits, nearest=nearest)

    def finish_block(i: int | jax.Array, rest: Bytes) -> Bytes:
        block = row * BLOCKS + i
        numbers, rest = levels.first_numbers(rest)
        values = levels.values_of(numbers, table, trits, nearest=nearest)
        back = rows.rotated_back(values, words, matrices, block, first_word[0])
        whole = back * (scales[block].astype(jnp.float32) * unit) + rows.coordinates(x, block, *_vector(x, which))
        rows.put_coordinates(finished, block, whole * share[0])
        return rest

    own = rows.codes(codes, row, trits, count, *_vector(codes, which_codes))
    rows.over_blocks(finish_block, own, is_unrolled=is_unrolled)


def _vector(x: Ref, which: Ref) -> tuple[jax.Array, ...]:
    """The first index of one of several vectors; a single vector needs none."""
    return () if len(x.shape) == 1 else (which[0],)


def _one(number: int | jax.Array) -> jax.Array:
    return jnp.asarray(number, jnp.int32).reshape(1)
