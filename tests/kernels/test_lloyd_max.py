import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from samples import draw

from vsa_optax.kernels import lloyd_max

TRITS = [1, 2, 3]
DISTORTIONS = {False: {1: 0.1902, 2: 0.02785, 3: 0.00348}, True: {1: 0.2348, 2: 0.02865, 3: 0.00349}}
quantize = jax.jit(lloyd_max.quantize, static_argnames=("trits", "unbiased"))


def gaussian_integrals(low, high):
    """Probability, first and second moment of a unit Gaussian from ``low`` to ``high``."""
    density = [0.0 if math.isinf(x) else math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (low, high)]
    ends = [0.0 if math.isinf(x) else x * d for x, d in zip((low, high), density, strict=True)]
    probability = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
    return probability, density[0] - density[1], probability + ends[0] - ends[1]


@pytest.mark.parametrize("trits", TRITS)
def test_levels_meet_lloyds_conditions(trits):
    """Each is the mean of its cell, cells are separated halfway, and the distortion is that of the table."""
    levels = np.float64(lloyd_max.levels(trits))
    assert len(levels) == 3**trits
    assert (np.diff(levels) > 0).all()
    np.testing.assert_array_equal(levels, -levels[::-1])
    edges = [-math.inf, *(levels[1:] + levels[:-1]) / 2, math.inf]
    cells = [gaussian_integrals(*edge) for edge in itertools.pairwise(edges)]
    means = [first / probability for probability, first, _ in cells]
    np.testing.assert_allclose(levels, means, atol=1e-5)
    alignment = sum(level * first for level, (_, first, _) in zip(levels, cells, strict=True))
    energy = sum(level**2 * probability for level, (probability, _, _) in zip(levels, cells, strict=True))
    assert 1 - alignment**2 / energy == pytest.approx(DISTORTIONS[False][trits], abs=6e-5 if trits == 1 else 6e-6)
    assert energy / alignment**2 - 1 == pytest.approx(DISTORTIONS[True][trits], abs=6e-5 if trits == 1 else 6e-6)


@pytest.mark.parametrize("unbiased", [False, True], ids=["mmse", "unbiased"])
@pytest.mark.parametrize("trits", TRITS)
def test_quantize_equals_the_twin(trits, unbiased):
    y = draw(trits, 5, 256) * np.float32([[1.0], [1e-30], [1e30], [0.0], [-7.0]])
    levels = np.float64(lloyd_max.levels(trits))
    numbers, scales = quantize(y, trits=trits, unbiased=unbiased)
    assert (numbers.dtype, scales.dtype) == (jnp.uint8, jnp.float32)
    for row, row_numbers, scale in zip(np.float64(y), numbers, scales, strict=True):
        expected, twin_scale = reference.quantize(row, levels, unbiased)
        np.testing.assert_array_equal(row_numbers, expected)
        np.testing.assert_allclose(scale, twin_scale, rtol=1e-5)
        decoded = np.float64(scale) * levels[np.asarray(row_numbers)]
        if unbiased:
            np.testing.assert_allclose(decoded @ row, row @ row, rtol=1e-5)
        else:  # Least squares: the error is orthogonal to the decoded block.
            np.testing.assert_allclose(decoded @ row, decoded @ decoded, rtol=1e-5)


@pytest.mark.parametrize("trits", TRITS)
def test_powers_of_two_pass_through_exactly(trits):
    y = draw(7, 4, 64)
    y[1] = 0.75  # Constant, and with one large number: both ends of the range of the levels.
    y[2, 5] = 1e4
    exponents = np.arange(-90, 100, 10)
    scaled = y * np.exp2(exponents, dtype=np.float32)[:, None, None]
    numbers, scales = quantize(scaled, trits=trits, unbiased=False)
    np.testing.assert_array_equal(numbers, np.broadcast_to(numbers[9], numbers.shape))
    assert exponents[9] == 0
    np.testing.assert_array_equal(scales, scales[9] * np.exp2(exponents, dtype=np.float32)[:, None])


@pytest.mark.parametrize("unbiased", [False, True], ids=["mmse", "unbiased"])
def test_blocks_of_zeros_and_of_what_is_not_finite(unbiased):
    y = draw(8, 5, 256)
    whole = quantize(y, trits=2, unbiased=unbiased)
    y[1], y[2, 7], y[3, 0], y[4, 255] = 0, np.nan, np.inf, -np.inf
    numbers, scales = quantize(y, trits=2, unbiased=unbiased)
    np.testing.assert_array_equal(numbers[0], whole[0][0])
    np.testing.assert_array_equal(scales[:2], [whole[1][0], 0.0])
    assert np.isnan(scales[2:]).all()
    assert numbers.max() < 9


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_found_in_a_wide_block(bad):
    """Where a maximum over 4096 numbers or more may lose a NaN."""
    y = draw(8, 3, 8192)
    y[0, 0], y[1, 5000], y[2, 8191] = bad, bad, bad
    assert np.isnan(quantize(y, trits=1, unbiased=False)[1]).all()


def test_rounding_picks_a_neighbour_and_keeps_the_mean():
    x = np.append(draw(9, 200), np.float32([1e-30, -1e30, 3.3e38, -3.3e38]))
    num = 20_000
    bits = jax.random.bits(jax.random.key(0), (num, x.size), jnp.uint32)
    rounded = np.asarray(lloyd_max.round_stochastically(x, bits)).astype(np.float64)
    below = (x.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)  # Towards 0.
    above = below + np.sign(x) * np.exp2(np.frexp(below)[1] - 8.0)
    assert ((rounded == below) | (rounded == above)).all()
    share = (x - below) / (above - below)
    error = abs(above - below) * np.sqrt(share * (1 - share) / num)
    assert (abs(rounded.mean(axis=0) - x) <= 4 * error).all()


def test_what_bfloat16_holds_is_rounded_to_itself():
    x = np.append(draw(10, 50).astype(jnp.bfloat16).astype(np.float32), np.float32([0.0, -0.0, 2.0**-126, 1e38]))
    x = x.astype(jnp.bfloat16)
    bits = np.uint32([[0], [1], [1 << 16], [1 << 31], [2**32 - 1]]) + np.zeros(x.size, np.uint32)
    rounded = np.asarray(lloyd_max.round_stochastically(x.astype(np.float32), bits))
    np.testing.assert_array_equal(rounded.view(np.uint16), np.broadcast_to(x.view(np.uint16), rounded.shape))
    largest = float(jnp.finfo(jnp.bfloat16).max)
    beyond = np.float32([3.4e38, -3.4e38, np.inf, -np.inf, np.nan])
    rounded = np.asarray(lloyd_max.round_stochastically(beyond, np.full(5, 2**32 - 1, np.uint32)))
    np.testing.assert_array_equal(rounded.astype(np.float64), [largest, -largest, largest, -largest, np.nan])
