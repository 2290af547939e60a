"""A program for each row of a coded vector: what it loads, keeps and stores, and how it is compiled.

A row is five blocks, whose digits share bytes. Behind the vector's end nothing is loaded or stored.
"""

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


def num_rows(size: int) -> int:
    """Rows for ``size`` coordinates."""
    return -(-size // ROW)


def call(
    name: str,
    kernel: Callable[..., None],
    operands: Sequence[jax.Array],
    outputs: Sequence[tuple[tuple[int, ...], jax.typing.DTypeLike]],
    rows: int,
    tuning: Tuning,
    interpret: bool,
    in_place: dict[int, int] | None = None,
) -> Sequence[jax.Array]:
    """The kernel, whose first argument is the row, for each row.

    ``in_place`` has the index of an operand, and of the output that takes its place in memory.
    """

    def program(*refs: Ref) -> None:
        first = pl.program_id(0) * tuning.rows
        if tuning.rows == 1:
            return kernel(first, *refs)
        return lax.fori_loop(first, jnp.minimum(first + tuning.rows, rows), lambda row, _: kernel(row, *refs), None)

    return pl.pallas_call(
        program,
        grid=(pl.cdiv(rows, tuning.rows),),
        out_shape=[platforms.shape_like(shape, dtype, operands) for shape, dtype in outputs],
        name=name,
        compiler_params=triton.CompilerParams(num_warps=tuning.num_warps, num_stages=tuning.num_stages),
        interpret=interpret,
        input_output_aliases=in_place or {},
    )(*operands)


def rotated(x: jax.Array, words: Ref, matrices: Ref, block: jax.Array, first_word: int | jax.Array = 0) -> jax.Array:
    """``[32, 32] f32``: a block after a round for each row of the words; the vector's begin at ``first_word``."""
    for turn in range(words.shape[0]):
        x = tiles.transformed(tiles.flip(x, tiles.sign_bits(words, turn, block, first_word)), matrices)
    return x


def rotated_back(
    y: jax.Array, words: Ref, matrices: Ref, block: jax.Array, first_word: int | jax.Array = 0
) -> jax.Array:
    """The inverse of `rotated`."""
    for turn in reversed(range(words.shape[0])):
        y = tiles.flip(tiles.transformed(y, matrices), tiles.sign_bits(words, turn, block, first_word))
    return y


def over_blocks(fun: Callable[[int | jax.Array, Carry], Carry], carry: Carry, *, is_unrolled: bool) -> Carry:
    """``fun(i, carry)`` for one block of a row after the other."""
    if not is_unrolled:
        return lax.fori_loop(0, BLOCKS, fun, carry)
    for i in range(BLOCKS):
        carry = fun(i, carry)
    return carry


def within(x: Ref, block: jax.Array, *vector: jax.Array) -> tuple[Ref, jax.Array | None]:
    """A block of a vector, and which of its places are before the vector's end; None if all are."""
    start, size = block * WIDTH, x.shape[-1]
    inside = None if size % ROW == 0 else start + lax.iota(jnp.int32, WIDTH) < size
    return x.at[(*vector, pl.ds(start, WIDTH))], inside


def coordinates(x: Ref, block: jax.Array, *vector: jax.Array) -> jax.Array:
    """``[32, 32] f32`` of a vector, or of one of ``[k, n]``; zeros behind the end."""
    part, inside = within(x, block, *vector)
    loaded = triton.load(part, mask=inside, other=None if inside is None else 0.0)
    return loaded.astype(jnp.float32).reshape(SIDE, SIDE)


def put_coordinates(x: Ref, block: jax.Array, new: jax.Array) -> None:
    """Stores ``[32, 32] f32``, without the part after the end."""
    part, inside = within(x, block)
    triton.store(part, new.reshape(WIDTH), mask=inside)


def codes(codes: Ref, row: jax.Array, trits: int, count: int, *vector: int | jax.Array) -> Bytes:
    """For each trit ``[32, 32] f32``, a row's bytes, from -121 to 121, of a vector with ``count`` rows.

    A vector's codes are flat, one trit's bytes behind the other's. More bytes may follow.
    """
    parts = [pl.ds((i * count + row) * WIDTH, WIDTH) for i in range(trits)]
    return [levels.centred(codes[(*vector, part)].reshape(SIDE, SIDE)) for part in parts]


def no_sums() -> Sums:
    """The sums of no blocks."""
    return jnp.zeros((SIDE, SIDE), jnp.float32), jnp.ones([], jnp.float32)


def put_codes(codes: Ref, row: jax.Array, sums: jax.Array, trits: int, count: int) -> None:
    """Stores a row's bytes, of its sums of digits, where `codes` finds them."""
    for i, of_trit in enumerate(levels.bytes_of(sums, trits)):
        codes[pl.ds((i * count + row) * WIDTH, WIDTH)] = of_trit
