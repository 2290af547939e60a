"""Quantisers with the least error on Gaussian data: 3, 9 or 27 levels, which one, two or three trits number.

Lloyd's conditions determine the levels for a unit Gaussian: each is the mean of its cell, and the cells are separated
halfway between levels. A block is scaled to rms 1, quantised, and gets its own scale:

    mmse       <y, q> / <q, q>      least error for the levels chosen
    unbiased   <y, y> / <y, q>      E[scale q] = y over random rotations of y

The distortions ``E|x - decoded|^2 / E|x|^2`` of a Gaussian are

    levels             3        9        27
    mmse          0.1902   0.02785   0.00348
    unbiased      0.2348   0.02865   0.00349

References:
    Lloyd, "Least squares quantization in PCM" (1982); Max, "Quantizing for minimum distortion" (1960). Vargaftik et
    al., "DRIVE" (arXiv 2105.08339), theorem 2: the unbiased scale.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vsa_optax.kernels import numerics

_POSITIVE_LEVELS = {
    1: (1.224006,),
    2: (0.443639, 0.918796, 1.476392, 2.254664),
    3: (
        *(0.155561, 0.312389, 0.471823, 0.635364, 0.804782, 0.982281, 1.170756),
        *(1.374235, 1.598704, 1.853829, 2.157094, 2.546247, 3.135707),
    ),
}


def levels(trits: int) -> np.ndarray:
    """The levels, ``[3**trits] f32``, ascending and symmetric around 0."""
    positive = np.array(_POSITIVE_LEVELS[trits], np.float32)
    return np.concatenate([-positive[::-1], np.zeros(1, np.float32), positive])


def decode(numbers: jax.Array, trits: int) -> jax.Array:
    """``[...] f32``, the levels of ``[...] uint8`` level numbers: ``levels(trits)[numbers]``.

    It uses comparisons. A lookup would prevent vectorization on a CPU, and would be repeated in each loop that it is
    fused into.
    """
    table = levels(trits)
    middle = len(table) // 2
    value = jnp.zeros(numbers.shape, jnp.float32)
    for i in range(1, middle + 1):
        value = jnp.where(numbers >= middle + i, table[middle + i], value)
        value = jnp.where(numbers <= middle - i, table[middle - i], value)
    return value


def quantize(y: jax.Array, trits: int, *, unbiased: bool) -> tuple[jax.Array, jax.Array]:
    """Computes the level numbers and scales of blocks.

    Args:
        y: ``[..., B] f32``.
        trits: the number of trits per coordinate, 1, 2 or 3.
        unbiased: whether to use the unbiased scale instead of the mmse scale.

    Returns:
        ``(numbers, scales)``: ``[..., B] uint8`` below ``3**trits``, and ``[...] f32``. The decoded block is
        ``scale * levels[number]``. A block of zeros has scale 0; a block with a NaN or an infinity has scale NaN.
    """
    table = levels(trits)
    cuts = (table[1:] + table[:-1]) / 2
    middle = np.uint8(len(table) // 2)
    peak = jnp.max(jnp.abs(y), axis=-1)
    exponent = numerics.power_of_two(peak)  # A power of two changes no digit.
    shrunk = y * jnp.ldexp(jnp.ones_like(peak), -exponent)[..., None]
    rms = jnp.sqrt(jnp.mean(shrunk**2, axis=-1))  # It is not finite if y is not; a maximum may lose a NaN.
    is_usable = (rms > 0) & (rms < jnp.inf)
    unit = shrunk * jnp.where(is_usable, 1.0 / rms, 0.0)[..., None]
    magnitude = jnp.abs(unit)
    distance, chosen = jnp.zeros(y.shape, jnp.uint8), jnp.zeros(y.shape, jnp.float32)
    for i, cut in enumerate(cuts[middle:]):
        distance = jnp.where(magnitude > cut, np.uint8(i + 1), distance)
        chosen = jnp.where(magnitude > cut, table[middle + i + 1], chosen)
    numbers = jnp.where(unit < 0, middle - distance, middle + distance)
    alignment = jnp.mean(magnitude * chosen, axis=-1)
    gain = 1.0 / alignment if unbiased else alignment / jnp.mean(chosen**2, axis=-1)
    scales = jnp.ldexp(gain * rms, exponent)
    return numbers, jnp.where(rms == 0, 0.0, jnp.where(is_usable, scales, jnp.nan))


def round_stochastically(x: jax.Array, random_bits: jax.Array) -> jax.Array:
    """Rounds ``x`` f32 to bfloat16 up or down at random without bias; ``random_bits`` uint32 of the same shape."""
    largest = float(jnp.finfo(jnp.bfloat16).max)
    raised = lax.bitcast_convert_type(jnp.clip(x, -largest, largest), jnp.uint32) + (random_bits >> 16)
    return lax.bitcast_convert_type((raised >> 16).astype(jnp.uint16), jnp.bfloat16)
