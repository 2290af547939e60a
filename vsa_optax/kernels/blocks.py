"""Cut a vector into blocks, and run what is done to a block over all of them."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp
from jax import lax

from vsa_optax.kernels import packing

# What is done to a block takes and gives the same kinds of trees as what is done to all blocks.
Arrays = TypeVarTuple("Arrays")
Result = TypeVar("Result")

SMALLEST_BLOCK = 32
# Blocks of a row, whose trits share bytes: digit j of byte i belongs to coordinate i of block j.
BLOCKS_IN_ROW = packing.DIGITS_PER_BYTE
# A vector of so many coordinates is padded to whole rows, by at most four in a hundred.
_LARGE = 1 << 17
_COORDINATES_AT_ONCE = 1 << 18


class BlockRun(NamedTuple):
    """Blocks of one width that lie one after the other.

    Attributes:
        num: how many.
        width: coordinates in each, a power of two.
    """

    num: int
    width: int


@functools.cache
def split_into_blocks(size: int, block_size: int) -> tuple[BlockRun, ...]:
    """Blocks for ``size`` coordinates: as many of ``block_size`` as fit, then narrower ones for what is left.

    Each block costs a scale, and padding costs trits. What is left is cut into powers of two, or padded to the next
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
    """Whether a vector is padded to whole rows of blocks: from 2^17 coordinates and 25 rows on."""
    return size >= max(_LARGE, 25 * BLOCKS_IN_ROW * block_size)


def _tail(rest: int, block_size: int) -> tuple[int, tuple[int, ...]]:
    """Bits, at one trit a coordinate and 16 a scale, and the widths of the best cut of ``rest < block_size``."""
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
    """Coordinates in the runs, padding included."""
    return sum(run.num * run.width for run in runs)


def cut(x: jax.Array, runs: Sequence[BlockRun]) -> list[jax.Array]:
    """``[..., n]``, n up to the padded size, to an array ``[..., num, width]`` for each run, zeros behind n."""
    *batch, size = x.shape
    x = jnp.pad(x, [(0, 0)] * len(batch) + [(0, padded_size(runs) - size)])
    pieces, start = [], 0
    for num, width in runs:
        pieces.append(x[..., start : start + num * width].reshape(*batch, num, width))
        start += num * width
    return pieces


def cut_scales(x: jax.Array, runs: Sequence[BlockRun]) -> list[jax.Array]:
    """``[..., blocks]``, one number a block, to an array ``[..., num]`` for each run."""
    pieces, start = [], 0
    for num, _ in runs:
        pieces.append(x[..., start : start + num])
        start += num
    return pieces


def map_runs(fun: Callable[[*Arrays], Result], operands: Sequence[tuple[*Arrays]], runs: Sequence[BlockRun]) -> Result:
    """What ``fun`` makes of each block, one behind the other, flat.

    Args:
        fun: of one block of each array; a pytree of arrays.
        operands: for each run a tuple of trees of arrays ``[num, ...]``.
        runs: the blocks.
    """
    results = [_map_blocks(fun, arrays, run.width) for arrays, run in zip(operands, runs, strict=True)]
    return jax.tree.map(lambda *pieces: jnp.concatenate([piece.reshape(-1) for piece in pieces]), *results)


def _map_blocks(fun: Callable[[*Arrays], Result], arrays: tuple[*Arrays], width: int) -> Result:
    """``jax.vmap(fun)(*arrays)`` over the leading axis, on a CPU a quarter of a million coordinates at a time.

    All of a large array at once would send each intermediate result through memory that the system has to provide
    anew at each call. The values are the same.

    Args:
        fun: of one block of each array; any pytree of arrays.
        arrays: tuple of trees of arrays ``[num, ...]``.
        width: coordinates in a block, the unit of the work.
    """
    at_once = max(1, _COORDINATES_AT_ONCE // width)

    def whole(*operands: *Arrays) -> Result:
        return jax.vmap(fun)(*operands)

    def piecewise(*operands: *Arrays) -> Result:
        return lax.map(lambda block: fun(*block), operands, batch_size=at_once)

    if jax.tree.leaves(arrays)[0].shape[0] <= at_once:
        return whole(*arrays)
    return lax.platform_dependent(*arrays, cpu=piecewise, default=whole)
