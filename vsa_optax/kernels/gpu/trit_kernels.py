"""What `kernels.trit_blocks` and `accumulation.packed_rows` do with large vectors, in one pass over memory; for GPUs.

    encode       Q(R x)
    decode_sum   R^-1 sum_k c_k deQ(S_k)
    add          S <- Q(deQ(S) + R x), in place
    finish       (R^-1 deQ(S) + x) / divisor

for a random rotation R of each block of 1024 and a quantiser Q. A program takes a row: five blocks of the vector, which
share their bytes, so that nothing but the vector, its trits, and a scale a block crosses memory. What is behind the
vector's end in the last row counts as zeros.

Levels are those of `lloyd_max` and `uniform` but where a coordinate is close to a tie; the rotation rounds to bfloat16
(`tiles`), which costs 5e-6 of a block's energy.

Axes: n coordinates, r rows, t trits, b = 5 r blocks, k vectors.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from vsa_optax.kernels import platforms
from vsa_optax.kernels.gpu import levels, tiles
from vsa_optax.kernels.gpu.levels import BLOCKS
from vsa_optax.kernels.gpu.tiles import SIDE, WIDTH, Ref

ROW = BLOCKS * WIDTH  # Coordinates.

# Digits of the blocks so far, times powers of three, and the next power.
Sums: TypeAlias = tuple[jax.Array, jax.Array]
# A row's bytes, for each trit.
Bytes: TypeAlias = list[jax.Array]
Carry = TypeVar("Carry")


class Tuning(NamedTuple):
    """How a kernel is compiled.

    Attributes:
        num_warps: that share a row.
        is_unrolled: whether its five blocks are written one behind the other, and not as a loop.
        rows: of a program, one after the other.
        num_stages: of a loop's loads that are under way at once.
    """

    num_warps: int
    is_unrolled: bool = False
    rows: int = 1
    num_stages: int = 1


# By the number of trits; the table of what was tried is in `benchmarks/trit_kernels_tuning.log`.
ENCODE = {1: Tuning(1), 2: Tuning(1), 3: Tuning(2)}
DECODE = {1: Tuning(1), 2: Tuning(1), 3: Tuning(1)}
ADD = {1: Tuning(2), 2: Tuning(1), 3: Tuning(2)}
FINISH = {1: Tuning(1), 2: Tuning(2), 3: Tuning(1)}


def num_rows(size: int) -> int:
    """Rows for ``size`` coordinates."""
    return -(-size // ROW)


def encode(
    x: jax.Array,
    words: jax.Array,
    *,
    trits: int,
    unbiased: bool,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Rotates, quantises and packs.

    Args:
        x: ``[n]``.
        words: ``[rounds, 32 b] uint32``, random, of which each bit is a sign.
        trits: 1, 2 or 3.
        unbiased: which scale.
        tuning: how it is compiled, if otherwise than was measured to be best.
        interpret: to run without a GPU, for tests.

    Returns:
        ``[t, 1024 r] uint8`` and ``[b]``, in float32 if unbiased, to be rounded, and else in bfloat16.
    """
    rows, tuning = num_rows(x.size), tuning or ENCODE[trits]
    kernel = functools.partial(_encode_kernel, trits=trits, unbiased=unbiased, is_unrolled=tuning.is_unrolled)
    operands = [x, words, tiles.hadamard(), levels.table(trits)]
    outputs = [((trits, rows * WIDTH), jnp.uint8), ((BLOCKS * rows,), jnp.float32 if unbiased else jnp.bfloat16)]
    codes, scales = _call("trit_encode", kernel, operands, outputs, rows, tuning, interpret)
    return codes, scales


def _encode_kernel(
    row: jax.Array,
    x: Ref,
    words: Ref,
    matrices: Ref,
    table: Ref,
    codes: Ref,
    scales: Ref,
    *,
    trits: int,
    unbiased: bool,
    is_unrolled: bool,
) -> None:
    def encode_block(i: int | jax.Array, carry: Sums) -> Sums:
        sums, power = carry
        block = row * BLOCKS + i
        y = _rotated(_coordinates(x, block), words, matrices, block)
        digits, scale = levels.nearest_levels(y, trits, table, unbiased=unbiased)
        scales[block] = scale.astype(scales.dtype)
        return sums + digits * power, 3 * power

    _put_codes(codes, row, _over_blocks(encode_block, _no_sums(), is_unrolled=is_unrolled)[0])


def decode_sum(
    codes: jax.Array,
    shares: jax.Array,
    factors: jax.Array,
    words: jax.Array,
    *,
    size: int,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> jax.Array:
    """The weighted sum of k vectors that were encoded with one rotation.

    Args:
        codes: ``[k, t, 1024 r] uint8``.
        shares: ``[k, b] f32``, of each block in the sum, at most 1; not read if k is 1.
        factors: ``[b] f32``, of the sum.
        words: as in `encode`.
        size: n.
        tuning: how it is compiled, if otherwise than was measured to be best.
        interpret: to run without a GPU, for tests.

    Returns:
        ``[n] f32``.
    """
    num, trits, _ = codes.shape
    tuning = tuning or DECODE[trits]
    kernel = functools.partial(_decode_sum_kernel, num=num, trits=trits, is_unrolled=tuning.is_unrolled)
    factors = factors * levels.unit(trits, nearest=True)
    operands = [codes, shares, factors, words, tiles.hadamard(), levels.table(trits)]
    rows = num_rows(size)
    (decoded,) = _call("trit_decode_sum", kernel, operands, [((size,), jnp.float32)], rows, tuning, interpret)
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
    is_unrolled: bool,
) -> None:
    def put(i: int | jax.Array, values: jax.Array) -> None:
        block = row * BLOCKS + i
        _put_coordinates(decoded, block, factors[block] * _rotated_back(values, words, matrices, block))

    def decode_block(i: int | jax.Array, rest: Bytes) -> Bytes:
        numbers, rest = levels.first_numbers(rest)
        put(i, levels.values_of(numbers, table, trits, nearest=True))
        return rest

    def with_vector(k: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        rest, more = _codes(codes, row, k), []
        for i, of_block in enumerate(sums):
            numbers, rest = levels.first_numbers(rest)
            values = levels.values_of(numbers, table, trits, nearest=True)
            more.append(of_block + shares[k, row * BLOCKS + i] * values)
        return tuple(more)

    if num == 1:
        _over_blocks(decode_block, _codes(codes, row, 0), is_unrolled=is_unrolled)
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
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """A coded sum with one more vector, in the sum's place.

    Args:
        x: ``[n]``.
        words: as in `encode`, of one round.
        rounding: ``[2] uint32``, the key of the random numbers for stochastic rounding to `uniform` levels; with None,
            the nearest one of `lloyd_max`.
        codes: ``[t, 1024 r] uint8``.
        scales: ``[b] bfloat16``.
        tuning: how it is compiled, if otherwise than was measured to be best.
        interpret: to run without a GPU, for tests.

    Returns:
        New codes and scales.
    """
    trits, is_nearest = codes.shape[0], rounding is None
    tuning = tuning or ADD[trits]
    kernel = functools.partial(_add_kernel, trits=trits, is_nearest=is_nearest, is_unrolled=tuning.is_unrolled)
    operands = [x, words, words if rounding is None else rounding, tiles.hadamard()]
    operands = [*operands, levels.table(trits), codes, scales]
    outputs = [(codes.shape, codes.dtype), (scales.shape, scales.dtype)]
    in_place = {len(operands) - 2: 0, len(operands) - 1: 1}
    new = _call("trit_add", kernel, operands, outputs, num_rows(x.size), tuning, interpret, in_place)
    return new[0], new[1]


def _add_kernel(
    row: jax.Array,
    x: Ref,
    words: Ref,
    rounding: Ref,
    matrices: Ref,
    table: Ref,
    old_codes: Ref,
    old_scales: Ref,
    codes: Ref,
    scales: Ref,
    *,
    trits: int,
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
        grown += _rotated(_coordinates(x, block), words, matrices, block)
        if is_nearest:
            digits, scale = levels.nearest_levels(grown, trits, table, unbiased=False)
        else:
            digits, scale = levels.random_levels(grown, trits, rounding, block)
        scales[block] = scale.astype(scales.dtype)
        return (sums + digits * power, 3 * power), rest

    (sums, _), _ = _over_blocks(add_block, (_no_sums(), _codes(old_codes, row)), is_unrolled=is_unrolled)
    _put_codes(codes, row, sums)


def finish(
    codes: jax.Array,
    scales: jax.Array,
    x: jax.Array,
    words: jax.Array,
    divisor: jax.Array,
    *,
    nearest: bool,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> jax.Array:
    """``[n] f32``: the sum, turned back, plus ``x``, over ``divisor``.

    Args:
        codes: ``[t, 1024 r] uint8``.
        scales: ``[b] bfloat16``.
        x: ``[n]``.
        words: as in `add`.
        divisor: ``[] f32``.
        nearest: as it was rounded.
        tuning: how it is compiled, if otherwise than was measured to be best.
        interpret: to run without a GPU, for tests.
    """
    tuning = tuning or FINISH[len(codes)]
    kernel = functools.partial(_finish_kernel, trits=codes.shape[0], nearest=nearest, is_unrolled=tuning.is_unrolled)
    share = (1 / divisor).reshape(1)
    operands = [codes, scales, x, words, share, tiles.hadamard(), levels.table(codes.shape[0])]
    outputs = [(x.shape, jnp.float32)]
    (finished,) = _call("trit_finish", kernel, operands, outputs, num_rows(x.size), tuning, interpret)
    return finished


def _finish_kernel(
    row: jax.Array,
    codes: Ref,
    scales: Ref,
    x: Ref,
    words: Ref,
    share: Ref,
    matrices: Ref,
    table: Ref,
    finished: Ref,
    *,
    trits: int,
    nearest: bool,
    is_unrolled: bool,
) -> None:
    unit = levels.unit(trits, nearest=nearest)

    def finish_block(i: int | jax.Array, rest: Bytes) -> Bytes:
        block = row * BLOCKS + i
        numbers, rest = levels.first_numbers(rest)
        values = levels.values_of(numbers, table, trits, nearest=nearest)
        back = _rotated_back(values, words, matrices, block)
        whole = back * (scales[block].astype(jnp.float32) * unit) + _coordinates(x, block)
        _put_coordinates(finished, block, whole * share[0])
        return rest

    _over_blocks(finish_block, _codes(codes, row), is_unrolled=is_unrolled)


def _call(
    name: str,
    kernel: Callable[..., None],
    operands: Sequence[jax.Array],
    outputs: Sequence[tuple[tuple[int, ...], jax.typing.DTypeLike]],
    rows: int,
    tuning: Tuning,
    interpret: bool,
    in_place: dict[int, int] | None = None,
) -> Sequence[jax.Array]:
    """The kernel, whose first argument is the row, for each row."""

    def program(*refs: Ref) -> None:
        first = pl.program_id(0) * tuning.rows
        if tuning.rows == 1:
            return kernel(first, *refs)
        return lax.fori_loop(first, jnp.minimum(first + tuning.rows, rows), lambda row, _: kernel(row, *refs), None)

    return pl.pallas_call(
        program,
        grid=(pl.cdiv(rows, tuning.rows),),
        out_shape=[platforms.shape_like(shape, dtype, operands) for shape, dtype in outputs],
        input_output_aliases=in_place or {},
        name=name,
        compiler_params=triton.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages),
        interpret=interpret,
    )(*operands)


def _rotated(x: jax.Array, words: Ref, matrices: Ref, block: jax.Array) -> jax.Array:
    for turn in range(words.shape[0]):
        x = tiles.transformed(tiles.flip(x, tiles.sign_bits(words, turn, block)), matrices)
    return x


def _rotated_back(y: jax.Array, words: Ref, matrices: Ref, block: jax.Array) -> jax.Array:
    for turn in reversed(range(words.shape[0])):
        y = tiles.flip(tiles.transformed(y, matrices), tiles.sign_bits(words, turn, block))
    return y


def _over_blocks(fun: Callable[[int | jax.Array, Carry], Carry], carry: Carry, *, is_unrolled: bool) -> Carry:
    """``fun(i, carry)`` for one block of a row after the other."""
    if not is_unrolled:
        return lax.fori_loop(0, BLOCKS, fun, carry)
    for i in range(BLOCKS):
        carry = fun(i, carry)
    return carry


def _within(x: Ref, block: jax.Array) -> tuple[Ref, jax.Array | None]:
    """A block of a vector, and which of its places are before the vector's end; None if all are."""
    start = block * WIDTH
    inside = None if x.size % ROW == 0 else start + lax.iota(jnp.int32, WIDTH) < x.size
    return x.at[pl.ds(start, WIDTH)], inside


def _coordinates(x: Ref, block: jax.Array) -> jax.Array:
    """``[32, 32] f32``, zeros behind the end."""
    part, inside = _within(x, block)
    loaded = triton.load(part, mask=inside, other=None if inside is None else 0.0)
    return loaded.astype(jnp.float32).reshape(SIDE, SIDE)


def _put_coordinates(x: Ref, block: jax.Array, new: jax.Array) -> None:
    part, inside = _within(x, block)
    triton.store(part, new.reshape(WIDTH), mask=inside)


def _codes(codes: Ref, row: jax.Array, *vector: int | jax.Array) -> Bytes:
    """For each trit ``[32, 32] f32``, a row's bytes, from -121 to 121."""
    of_row = pl.ds(row * WIDTH, WIDTH)
    trits = codes.shape[-2]
    return [levels.centred(codes[(*vector, i, of_row)].reshape(SIDE, SIDE)) for i in range(trits)]


def _no_sums() -> Sums:
    return jnp.zeros((SIDE, SIDE), jnp.float32), jnp.ones([], jnp.float32)


def _put_codes(codes: Ref, row: jax.Array, sums: jax.Array) -> None:
    for i, of_trit in enumerate(levels.bytes_of(sums, codes.shape[0])):
        codes[i, pl.ds(row * WIDTH, WIDTH)] = of_trit
