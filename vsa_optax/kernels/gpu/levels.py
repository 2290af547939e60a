"""Levels and digits of a block in the registers of a GPU's program, as in `lloyd_max`, `uniform` and `packing`.

A level has a number from the middle, which is 0, and that number balanced digits -1, 0 and 1: each is one less than the
digit that is stored. All are kept as f32, in which a GPU does most at once, and which holds these integers exactly. The
digits of one number travel as the sum ``d_0 + 2^8 d_1 + 2^16 d_2``; added up with powers of three they are the bytes of
five blocks, less 121 each, since no byte overflows into the next.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vsa_optax.kernels import lloyd_max
from vsa_optax.kernels.gpu import random_words, tiles
from vsa_optax.kernels.gpu.tiles import Ref

BLOCKS = 5  # In a row, whose digits share bytes.
_MIDDLE = (3**BLOCKS - 1) // 2  # The middle of a byte's values.
# Added to a small number, it leaves the nearest integer in the last bits.
_ROUNDING = float(3 << 22)
_ROUNDING_BITS = int(np.float32(_ROUNDING).view(np.int32))
_ORDINARY = 1e-30, 1e30  # Mean squares of blocks whose sums need no scaling.
_LARGEST_EXPONENT = 253  # 2^-126 is the smallest normal number: beyond this one the inverse is none.
_MANTISSA = 1 << 23
_SIGN = np.int32(-(1 << 31))
_TABLE = 32  # Entries of a part of a table; a power of two, as Triton wants.
_EIGHTHS = 8


def table(trits: int) -> jax.Array:
    """``[64] f32``: the levels of `lloyd_max`, from the lowest, and, from 32 on, how to find them.

    Around each multiple of an eighth of the rms there is at most one of the cuts between levels. For each multiple
    there is its cut, or an infinity, in eighths, and in the last four bits how many cuts are below.
    """
    levels = lloyd_max.levels(trits)
    cuts = _EIGHTHS * _cuts(trits)
    num_below = np.searchsorted(cuts, np.arange(_TABLE) - 0.5)
    padded = np.append(cuts, np.inf)
    own = np.where(padded[num_below] < np.arange(_TABLE) + 0.5, padded[num_below], np.inf).astype(np.float32)
    bits = (own.view(np.uint32) & ~np.uint32(15)) | num_below.astype(np.uint32)
    return jnp.asarray(np.concatenate([np.pad(levels, (0, _TABLE - len(levels))), bits.view(np.float32)]))


def unit(trits: int, *, nearest: bool) -> float:
    """The unit of `values_of`, in units of the scale."""
    if not nearest:
        return 1 / _highest(trits)
    return float(lloyd_max.levels(1)[-1]) if trits == 1 else 1.0


def values_of(numbers: jax.Array, table: Ref, trits: int, *, nearest: bool) -> jax.Array:
    """``[32, 32] f32``: what numbers stand for, in units of `unit`."""
    if trits == 1 or not nearest:
        return numbers
    if trits == 2:  # Four positive levels, an odd polynomial through them.
        square = numbers * numbers
        value = jnp.full_like(numbers, _POLYNOMIAL[-1])
        for coefficient in _POLYNOMIAL[-2::-1]:
            value = value * square + coefficient
        return value * numbers
    return table[_integers(numbers + _highest(trits))]


def nearest_levels(y: jax.Array, trits: int, table: Ref, *, unbiased: bool) -> tuple[jax.Array, jax.Array]:
    """`lloyd_max.quantize` of a block: ``[32, 32] f32`` sums of digits, and ``[] f32``."""
    mean_square = tiles.total(y * y) * (1 / tiles.WIDTH)
    is_ordinary = (mean_square > _ORDINARY[0]) & (mean_square < _ORDINARY[1])
    # The branch of a kernel cannot give back a constant.
    y, mean_square, power = lax.cond(is_ordinary, lambda: (y, mean_square, mean_square), lambda: _shrunk(y))
    power = jnp.where(is_ordinary, 1.0, power)
    is_usable = (mean_square > 0) & (mean_square < jnp.inf)  # It is not finite if y is not.
    rms, magnitude = jnp.sqrt(mean_square), jnp.abs(y)
    if trits == 3:
        digits, chosen = _by_table(magnitude * jnp.where(is_usable, _EIGHTHS / rms, 0.0), table)
    else:
        digits, chosen = _by_comparisons(magnitude, rms, trits)
    if trits == 1:  # The digit is chosen, in units of the only positive level.
        highest = float(lloyd_max.levels(1)[-1])
        alignment, length = highest * tiles.total(magnitude * digits), highest * highest * tiles.total(digits)
    else:
        alignment, length = tiles.total(magnitude * chosen), tiles.total(chosen * chosen)
    gain = tiles.WIDTH * mean_square / alignment if unbiased else alignment / length
    scale = jnp.where(is_usable, gain * power, jnp.nan)
    return _with_sign_of(y, digits), jnp.where(mean_square == 0, 0.0, scale)


def _by_comparisons(magnitude: jax.Array, rms: jax.Array, trits: int) -> tuple[jax.Array, jax.Array]:
    """Sums of digits of the positive levels nearest to magnitudes, and the levels."""
    digits = chosen = jnp.zeros_like(magnitude)
    for i, (cut, level) in enumerate(zip(_cuts(trits), lloyd_max.levels(trits)[_highest(trits) + 1 :], strict=True)):
        is_beyond = magnitude > float(cut) * rms
        digits = jnp.where(is_beyond, float(_digits_of(i + 1, trits)), digits)
        chosen = jnp.where(is_beyond, float(level), chosen)
    return digits, chosen


def _by_table(eighths: jax.Array, table: Ref) -> tuple[jax.Array, jax.Array]:
    """As `_by_comparisons`, for 27 levels, of which those would be 13; of magnitudes in eighths of an rms."""
    eighths = jnp.minimum(eighths, float(_TABLE - 1))
    cut = table[_TABLE + _integers(eighths)]
    num_below = lax.bitcast_convert_type(lax.bitcast_convert_type(cut, jnp.int32) & 15 | _ROUNDING_BITS, jnp.float32)
    number = jnp.where(eighths > cut, 1.0, 0.0) + (num_below - _ROUNDING)
    # The balanced digits are number - 3 thirds, thirds - 3 ninths, and ninths.
    thirds, ninths = (jnp.floor(number * float(np.float32(1 / n)) + 0.5) for n in (3, 9))
    digits = number + 253 * thirds + (65536 - 3 * 256) * ninths
    return digits, table[_integers(number + _highest(3))]


def _integers(x: jax.Array) -> jax.Array:
    """``[32, 32] int32``, the nearest integers of numbers from -0.5 to 31."""
    return lax.bitcast_convert_type(x + _ROUNDING, jnp.int32) & (_TABLE - 1)


def _cuts(trits: int) -> np.ndarray:
    """Where positive levels meet, in units of the rms."""
    levels = lloyd_max.levels(trits)
    return ((levels[1:] + levels[:-1]) / 2)[len(levels) // 2 :]


def _shrunk(y: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A block over a power of two near its largest coordinate, its mean square, and the power."""
    exponent = lax.bitcast_convert_type(tiles.largest(y), jnp.int32) // _MANTISSA
    exponent = jnp.minimum(jnp.maximum(exponent, 1), _LARGEST_EXPONENT)
    power = lax.bitcast_convert_type(exponent * _MANTISSA, jnp.float32)
    y = y * lax.bitcast_convert_type((254 - exponent) * _MANTISSA, jnp.float32)
    return y, tiles.total(y * y) * (1 / tiles.WIDTH), power


def random_levels(y: jax.Array, trits: int, key: Ref, block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`uniform.quantize_stochastically` of a block: ``[32, 32] f32`` sums of digits, and ``[] f32``."""
    highest = _highest(trits)
    peak = tiles.largest(y)
    # The next bfloat16 that is no smaller.
    raised = (lax.bitcast_convert_type(peak, jnp.int32) + 0xFFFF) & ~0xFFFF
    is_finite = tiles.total(y * 0.0) == 0
    scale = jnp.where(is_finite, lax.bitcast_convert_type(raised, jnp.float32), jnp.nan)
    place = block * tiles.WIDTH + lax.iota(jnp.int32, tiles.WIDTH).reshape(tiles.SIDE, tiles.SIDE)
    odds = (random_words.bits(key, place) >> 8).astype(jnp.int32).astype(jnp.float32) * float(2.0**-24)
    position = y / jnp.where(peak > 0, scale, 1.0) * highest
    rest = jnp.minimum(jnp.maximum(jnp.floor(position + odds), -highest), highest)
    digits = jnp.zeros_like(y)
    for i in range(trits):
        digit, rest = _divided(rest)
        digits = digits + digit * float(1 << 8 * i)
    return jnp.where(is_finite, digits, 0.0), scale


def bytes_of(sums: jax.Array, trits: int) -> list[jax.Array]:
    """For each trit ``[1024] uint8``, of ``[32, 32] f32`` sums over blocks of digits times powers of three."""
    packed = sums.astype(jnp.int32) + sum(_MIDDLE << 8 * i for i in range(trits))
    return [((packed >> (8 * i)) & 0xFF).astype(jnp.uint8).reshape(tiles.WIDTH) for i in range(trits)]


def centred(codes: jax.Array) -> jax.Array:
    """``[32, 32] f32``, from -121 to 121, of ``[32, 32] uint8``."""
    return codes.astype(jnp.int32).astype(jnp.float32) - float(_MIDDLE)


def first_numbers(codes: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    """The levels' numbers ``[32, 32] f32`` that the first digit of each byte makes, and the rest of the bytes."""
    digits, rests = zip(*map(_divided, codes), strict=True)
    number = digits[-1]
    for digit in digits[-2::-1]:
        number = 3 * number + digit
    return number, list(rests)


def _divided(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The lowest balanced digit of integers, and the integers less it, over three."""
    rest = jnp.floor(x * float(np.float32(1 / 3)) + 0.5)
    return x - 3 * rest, rest


def _with_sign_of(x: jax.Array, magnitude: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(magnitude, jnp.int32) | (lax.bitcast_convert_type(x, jnp.int32) & _SIGN)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _highest(trits: int) -> int:
    return (3**trits - 1) // 2


def _digits_of(number: int, trits: int) -> int:
    """The sum of a number's digits, from the middle on."""
    from_lowest, middle = number + _highest(trits), _highest(trits)
    return sum((from_lowest // 3**i % 3 - middle // 3**i % 3) << 8 * i for i in range(trits))


def _odd_polynomial(values: np.ndarray) -> list[float]:
    """Coefficients of x, x^3, ... of the polynomial that has these values at 1, 2, ..."""
    places = np.arange(1, len(values) + 1, dtype=np.float64)
    powers = places[:, None] ** (2 * np.arange(len(values)) + 1)
    return [float(c) for c in np.linalg.solve(powers, values.astype(np.float64))]


_POLYNOMIAL = _odd_polynomial(lloyd_max.levels(2)[-4:])
