"""Cuts a vector into blocks, and maps a function over all blocks."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp
from jax import lax

from vsa_optax.kernels import packing

# A function of one block has the same types of arguments and result as its map over all blocks.
Arrays = TypeVarTuple("Arrays")
Result = TypeVar("Result")

SMALLEST_BLOCK = 32
# The number of blocks in a row, whose trits share bytes: digit j of byte i belongs to coordinate i of block j.
BLOCKS_IN_ROW = packing.DIGITS_PER_BYTE
# A vector of at least this many coordinates is padded to whole rows, by at most 4 %.
_LARGE = 1 << 17
_COORDINATES_AT_ONCE = 1 << 18


class BlockRun(NamedTuple):
    """Consecutive blocks of the same width.

    Attributes:
        num: the number of blocks.
        width: the number of coordinates in each, a power of two.
    """

    num: int
    width: int


@functools.cache
def split_into_blocks(size: int, block_size: int) -> tuple[BlockRun, ...]:
    """Blocks for ``size`` coordinates: as many of ``block_size`` as fit, then narrower ones for the remainder.

    Each block costs a scale, and padding costs trits. The remainder is cut into powers of two, or padded to the next
    one, whichever takes fewer bits; the last block is padded to at least 32. A vector that fills rows gets whole rows.
    """
    if fills_rows(size, block_size):
        return (BlockRun(BLOCKS_IN_ROW * -(-size // (BLOCKS_IN_ROW * block_size)), block_size),)
    num, rest = divmod(size, block_size)
    widths = _tail(rest, block_size)[1]
    if widths and widths[0] == block_size:
        num, widths = num + 1, widths[1:]
    runs = [BlockRun(num, block_size)] if num else []
    return (*runs, *(BlockRun(1, width) for width in widths))


def fills_rows(size: int, block_size: int) -> bool:
    """Whether a vector is padded to whole rows of blocks: it has at least 2^17 coordinates and 25 rows."""
    return size >= max(_LARGE, 25 * BLOCKS_IN_ROW * block_size)


def _tail(rest: int, block_size: int) -> tuple[int, tuple[int, ...]]:
    """The bits, with one trit per coordinate and 16 bits per scale, and widths of the best cut of the remainder."""
    if rest == 0:
        return 0, ()
    smallest = min(SMALLEST_BLOCK, block_size)
    padded = max(1 << (rest - 1).bit_length(), smallest)
    whole = (_bits(padded), (padded,))
    if padded in (rest, smallest):
        return whole
    bits, widths = _tail(rest - padded // 2, block_size)
    return min(whole, (_bits(padded // 2) + bits, (padded // 2, *widths)))


def _bits(width: int) -> int:
    return 8 * width // 5 + 16


def padded_size(runs: Sequence[BlockRun]) -> int:
    """The number of coordinates in the runs, including padding."""
    return sum(run.num * run.width for run in runs)


def cut(x: jax.Array, runs: Sequence[BlockRun]) -> list[jax.Array]:
    """Cuts ``[..., n]``, n up to the padded size, into ``[..., num, width]`` for each run; pads with zeros."""
    *batch, size = x.shape
    x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, padded_size(runs) - size)])
    pieces, start = [], 0
    for num, width in runs:
        pieces.append(x[..., start : start + num * width].reshape(*batch, num, width))
        start += num * width
    return pieces


def cut_scales(x: jax.Array, runs: Sequence[BlockRun]) -> list[jax.Array]:
    """Cuts ``[..., blocks]``, one number per block, into ``[..., num]`` for each run."""
    pieces, start = [], 0
    for num, _ in runs:
        pieces.append(x[..., start : start + num])
        start += num
    return pieces


def map_runs(fun: Callable[[*Arrays], Result], operands: Sequence[tuple[*Arrays]], runs: Sequence[BlockRun]) -> Result:
    """Applies ``fun`` to each block, and joins the flattened results.

    Args:
        fun: a function of one block of each array that returns a pytree of arrays.
        operands: for each run, a tuple of trees of arrays ``[num, ...]``.
        runs: the blocks.
    """
    results = [_map_blocks(fun, arrays, run.width) for arrays, run in zip(operands, runs, strict=True)]
    return jax.tree.map(lambda *pieces: jnp.concatenate([piece.reshape(-1) for piece in pieces]), *results)


def _map_blocks(fun: Callable[[*Arrays], Result], arrays: tuple[*Arrays], width: int) -> Result:
    """``jax.vmap(fun)(*arrays)`` over the leading axis, on a CPU a quarter of a million coordinates at a time.

    With a large array at once, each intermediate result would go through memory that the system has to allocate at each
    call. The values are the same.

    Args:
        fun: a function of one block of each array that returns a pytree of arrays.
        arrays: a tuple of trees of arrays ``[num, ...]``.
        width: the number of coordinates in a block.
    """
    at_once = max(1, _COORDINATES_AT_ONCE // width)

    def whole(*operands: *Arrays) -> Result:
        return jax.vmap(fun)(*operands)

    def piecewise(*operands: *Arrays) -> Result:
        return lax.map(lambda block: fun(*block), operands, batch_size=at_once)

    if jax.tree.leaves(arrays)[0].shape[0] <= at_once:
        return whole(*arrays)
    return lax.platform_dependent(*arrays, cpu=piecewise, default=whole)
