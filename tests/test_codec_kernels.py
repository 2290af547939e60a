import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from vsa_optax.kernels import blocks, lloyd_max, rotation, signs, trit_blocks

TRITS = [1, 2, 3]
DISTORTIONS = {False: {1: 0.1902, 2: 0.02785, 3: 0.00348}, True: {1: 0.2348, 2: 0.02865, 3: 0.00349}}
POWERS = [1 << i for i in range(1, 13)]
walsh_hadamard = jax.jit(rotation.walsh_hadamard)
quantize = jax.jit(lloyd_max.quantize, static_argnames=("trits", "unbiased"))


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def sylvester(order):
    return reference.sylvester(order)


@pytest.mark.parametrize("order", POWERS)
def test_the_hadamard_transform_is_a_product_with_the_matrix(order):
    """On random rows and, up to 64, on the unit vectors, so that each entry of the matrix is seen."""
    x = draw(order, 2, 3, order)
    y = walsh_hadamard(x)
    np.testing.assert_allclose(y, x @ sylvester(order) / math.sqrt(order), atol=5e-6)
    np.testing.assert_allclose(walsh_hadamard(y), x, atol=5e-6)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)
    if order <= 64:
        rows = rotation.walsh_hadamard(jnp.eye(order)) * math.sqrt(order)
        np.testing.assert_allclose(rows, sylvester(order), atol=1e-5)


def test_factors_are_few_and_small():
    for bits in range(1, 17):
        factors = rotation.factors(1 << bits)
        assert math.prod(factors) == 1 << bits
        assert len(factors) == -(-bits // 5)
        assert max(factors) <= min(32, 2 * min(factors))


def gaussian_integrals(low, high):
    """Probability, first and second moment of a unit Gaussian from ``low`` to ``high``."""
    density = [0.0 if math.isinf(x) else math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in (low, high)]
    ends = [0.0 if math.isinf(x) else x * d for x, d in zip((low, high), density, strict=True)]
    probability = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2
    return probability, density[0] - density[1], probability + ends[0] - ends[1]


@pytest.mark.parametrize("trits", TRITS)
def test_levels_meet_lloyds_conditions(trits):
    """Each is the mean of its cell, cells part halfway; and what is lost then is what the table says."""
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
        else:  # Least squares: what is lost is orthogonal to what was kept.
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


@pytest.mark.parametrize("size", [1, 32, 100])
def test_a_word_holds_the_signs_of_32_neighbours(size):
    words = signs.random_words(jax.random.key(size), (2, size))
    assert words.shape == (2, -(-size // 32))
    x = draw(size, 2, size)
    x[0, 0] = np.nan
    flipped = signs.flip(x, signs.sign_bits(words, size))
    expected = [reference.signs_of(np.asarray(row), size) for row in words]
    np.testing.assert_array_equal(flipped, np.float32(expected) * x)
    np.testing.assert_array_equal(signs.flip(flipped, signs.sign_bits(words, size)), x)


def test_signs_are_fair_and_unlike_each_other():
    """Over keys and neighbours; another seed, step or leaf gives others."""
    keys = [signs.stream(*place) for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]]
    bits = np.stack([np.asarray(signs.random_sign_bits(key, (64, 512))) for key in keys])
    assert set(np.unique(bits)) == {0, 1 << 31}
    x = np.where(bits.reshape(5, -1) > 0, -1.0, 1.0)
    n = x.shape[1]
    assert (abs(x.mean(axis=1)) < 4.5 / math.sqrt(n)).all()
    assert abs((x @ x.T / n)[np.triu_indices(5, 1)]).max() < 4.5 / math.sqrt(n)
    columns = x[0].reshape(-1, 32).T  # Bits of one word are independent of each other.
    correlation = columns @ columns.T / columns.shape[1]
    assert abs(correlation[np.triu_indices(32, 1)]).max() < 4.5 / math.sqrt(columns.shape[1])


def test_each_block_and_round_has_words_of_its_own():
    runs = blocks.split_into_blocks(5 * 64 + 32, 64)
    of_runs = trit_blocks.random_words(signs.stream(0, 1, 2), runs, rounds=2)
    assert [[words.shape for words in of_run] for of_run in of_runs] == [[(5, 2)] * 2, [(1, 1)] * 2]
    words = np.concatenate([np.ravel(words) for of_run in of_runs for words in of_run])
    assert len(set(words.tolist())) == 2 * (5 * 2 + 1)


@pytest.mark.parametrize("rounds", [1, 2])
def test_rotations_equal_the_twin(rounds):
    x = draw(11, 128)
    words = [np.asarray(signs.random_words(jax.random.key(i), (128,))) for i in range(rounds)]
    y = jax.jit(rotation.rotate)(x, words)
    np.testing.assert_allclose(y, reference.rotate(x, words), atol=2e-6)
    np.testing.assert_allclose(jax.jit(rotation.rotate_back)(y, words), x, atol=2e-6)
    np.testing.assert_allclose(reference.rotate_back(reference.rotate(x, words), words), x, atol=1e-12)


def bits_of(widths):
    return sum(8 * width // 5 + 16 for width in widths)


@functools.cache
def fewest_bits(rest, smallest):
    """Over every way to cut ``rest`` coordinates into powers of two, of which the last is padded."""
    if rest == 0:
        return 0
    choices, width = [], smallest
    while True:
        choices.append(bits_of([width]) + (fewest_bits(rest - width, smallest) if width < rest else 0))
        if width >= rest:
            return min(choices)
        width *= 2


@settings(max_examples=500)
@given(size=st.integers(1, 20_000), block_size=st.sampled_from([2, 8, 32, 64, 256, 1024, 4096, 65536]))
def test_blocks_cover_a_vector_at_the_least_cost(size, block_size):
    runs = blocks.split_into_blocks(size, block_size)
    widths = [width for num, width in runs for _ in range(num)]
    assert all(num > 0 for num, _ in runs)
    assert all(width & (width - 1) == 0 and width <= block_size for width in widths)
    assert widths == sorted(widths, reverse=True)
    assert widths.count(block_size) >= size // block_size
    smallest = min(32, block_size)
    assert min(widths) >= smallest
    assert blocks.padded_size(runs) == sum(widths) >= size
    assert sum(run.num for run in runs) == len(widths)
    assert sum(widths) - widths[-1] < size  # Only the last block is padded,
    rest = size % block_size
    assert sum(widths) - size < max(smallest, rest)  # and never to twice what was left, unless to the smallest.
    whole_blocks = -(-size // block_size)
    assert bits_of(widths) <= bits_of([block_size] * whole_blocks)
    if rest:
        tail = widths[size // block_size :]
        assert bits_of(tail) == fewest_bits(rest, smallest)


@pytest.mark.parametrize(
    ("size", "block_size", "runs"),
    [
        (1024, 1024, [(1, 1024)]),
        (3048, 1024, [(3, 1024)]),
        (2600, 1024, [(2, 1024), (1, 512), (1, 64)]),
        (1025, 1024, [(1, 1024), (1, 32)]),
        (5, 1024, [(1, 32)]),
        (7, 2, [(4, 2)]),
    ],
)
def test_how_some_vectors_are_cut(size, block_size, runs):
    assert list(blocks.split_into_blocks(size, block_size)) == runs


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
@pytest.mark.parametrize("size", [1, 64, 200])
def test_mapping_the_identity_inverts_cut(size, batch):
    runs = blocks.split_into_blocks(size, 64)
    x = draw(size, *batch, size)
    pieces = blocks.cut(x, runs)
    assert [piece.shape for piece in pieces] == [(*batch, num, width) for num, width in runs]
    if not batch:
        joined = np.asarray(blocks.map_runs(lambda block: block, [(piece,) for piece in pieces], runs))
        np.testing.assert_array_equal(joined[:size], x)
        assert not joined[size:].any()
    flat = np.concatenate([np.reshape(piece, (*batch, -1)) for piece in pieces], axis=-1)
    np.testing.assert_array_equal(flat[..., :size], x)
    numbers = draw(0, *batch, sum(run.num for run in runs))
    scales = blocks.cut_scales(numbers, runs)
    assert [scale.shape for scale in scales] == [(*batch, num) for num, _ in runs]
    np.testing.assert_array_equal(np.concatenate(scales, axis=-1), numbers)


def test_piece_by_piece_the_bits_are_those_of_the_whole():
    """Above 2^18 coordinates, and with a last piece that is not full."""
    num, width = 300, 1024
    assert num * width > 1 << 18
    x = draw(12, num, width)
    words = [signs.random_words(jax.random.key(i), (num, width)) for i in range(2)]

    def encode_block(block, words):
        return lloyd_max.quantize(rotation.rotate(block, words), 2, unbiased=True)

    runs = [blocks.BlockRun(num, width)]
    piecewise = jax.jit(lambda *arrays: blocks.map_runs(encode_block, [arrays], runs))(x, words)
    whole = jax.jit(jax.vmap(encode_block))(x, words)
    for a, b in zip(piecewise, whole, strict=True):
        np.testing.assert_array_equal(a, b.reshape(-1))
