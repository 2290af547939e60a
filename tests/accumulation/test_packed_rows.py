"""The running sum in trits against a twin in NumPy, whatever the vector's size and however it is cut for work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from samples import CHEAP

from vsa_optax.accumulation import packed_rows
from vsa_optax.kernels import blocks, lloyd_max


def vectors(num, size, seed=0):
    return jax.random.normal(jax.random.key(seed), (num, size))


def words_for(size, block_size, seed=1):
    return jax.random.bits(jax.random.key(seed), (packed_rows.num_words(size, block_size),), jnp.uint32)


def compiled():
    """`add` and `finish`, to be compiled anew, and in little time."""

    def add(*args, block_size):
        return packed_rows.add.__wrapped__(*args, block_size=block_size)

    def finish(*args, block_size, nearest):
        return packed_rows.finish.__wrapped__(*args, block_size=block_size, nearest=nearest)

    return (
        jax.jit(add, static_argnames="block_size", **CHEAP),
        jax.jit(finish, static_argnames=("block_size", "nearest"), **CHEAP),
    )


COMPILED = compiled()


def summed(x, trits, block_size, rounding_key=None, functions=COMPILED):
    """The sum of all but the last vector, and with it."""
    add, finish = functions
    num, size = x.shape
    words = words_for(size, block_size)
    total = packed_rows.zeros(size, trits=trits, block_size=block_size)
    for i in range(num - 1):
        key = None if rounding_key is None else jax.random.fold_in(rounding_key, i)
        total = add(total, x[i], words, key, block_size=block_size)
    nearest = rounding_key is None
    return total, finish(total, x[-1], words, jnp.float32(num), block_size=block_size, nearest=nearest)


def places_of(size, block_size):
    """For each block its slice of the padded vector and its number in the row."""
    begin, out = 0, []
    for rows in packed_rows.rows_of(size, block_size):
        for block in range(rows.num_blocks):
            out.append((slice(begin, begin + rows.width), block % 5))
            begin += rows.width
    return out, begin


def twin(x, trits, block_size):
    """The sum of each block in float64: its rotated coordinates, quantised after each addition."""
    num, size = x.shape
    levels = lloyd_max.levels(trits).astype(np.float64)
    places, padded = places_of(size, block_size)
    whole = np.zeros((num, padded))
    whole[:, :size] = x
    words = np.asarray(words_for(size, block_size))
    numbers, out, begin = [], np.zeros(padded), 0
    for place, _ in places:
        width = place.stop - place.start
        of_block = [words[begin : begin + max(1, width // 32)]]
        begin += max(1, width // 32)
        decoded = np.zeros(width)
        number = np.full(width, len(levels) // 2)
        for vector in whole[:-1]:
            number, scale = reference.quantize(decoded + reference.rotate(vector[place], of_block), levels, False)
            decoded = levels[number] * float(jnp.bfloat16(scale))
        numbers.append(number)
        out[place] = (reference.rotate_back(decoded, of_block) + whole[-1][place]) / num
    return numbers, out[:size]


@pytest.mark.parametrize(
    ("trits", "size", "block_size"), [(1, 500, 32), (2, 500, 32), (3, 500, 32), (2, 64, 8), (3, 5 * 64, 64)]
)
def test_sums_are_those_of_the_twin(trits, size, block_size):
    x = vectors(4, size)
    total, mean = summed(x, trits, block_size)
    numbers, expected = twin(np.asarray(x, np.float64), trits, block_size)
    begin = 0
    for (place, block), number in zip(places_of(size, block_size)[0], numbers, strict=True):
        width = place.stop - place.start
        of_row = np.asarray(total.codes[:, begin : begin + width], np.int64)
        begin += width if block == 4 else 0
        digits = of_row // 3**block % 3
        decoded = sum(3**i * digits[i] for i in range(trits))
        assert np.mean(decoded != number) < 0.05  # Close to a tie they fall either way.
    assert np.mean((mean - expected) ** 2) < 1e-3 * np.mean(expected**2)


def test_a_sum_of_one_vector_passes_it_on():
    x = vectors(1, 300)
    np.testing.assert_array_equal(summed(x, 1, 32)[1], x[0])


def test_however_few_rows_are_done_at_once_the_sum_is_the_same(monkeypatch):
    x = vectors(3, 11 * 5 * 32 + 40)
    expected, expected_mean = summed(x, 2, 32)
    for at_once in (1, 7):
        monkeypatch.setattr(packed_rows, "_AT_ONCE_ON_CPU", at_once * 5 * 32)
        total, mean = summed(x, 2, 32, functions=compiled())
        np.testing.assert_array_equal(total.codes, expected.codes)
        np.testing.assert_array_equal(total.scales, expected.scales)
        np.testing.assert_allclose(mean, expected_mean, rtol=1e-5, atol=1e-6)


@given(size=st.integers(1, 3000), block_size=st.sampled_from([2, 8, 32, 64, 1024]))
def test_rows_hold_every_coordinate_and_not_twice_as_many(size, block_size):
    whole, last = packed_rows.rows_of(size, block_size)
    assert whole.size + last.size >= size
    assert whole.size <= size
    assert last.size < 2 * (size - whole.size) or not last.size or last.width <= 32
    assert last.width <= block_size


def test_a_large_vector_lies_in_whole_rows():
    """As in the codec, so that one kernel reads both."""
    size = 26 * 5 * 1024 + 100
    whole, last = packed_rows.rows_of(size, 1024)
    assert (whole, last) == (packed_rows.Rows(26, 1024), packed_rows.Rows(1, 1024))
    assert packed_rows.rows_of(26 * 5 * 1024, 1024) == (packed_rows.Rows(26, 1024), packed_rows.Rows(0, 1024))
    runs = blocks.split_into_blocks(size, 1024)
    assert runs == (blocks.BlockRun(whole.num_blocks + last.num_blocks, 1024),)
    x, words = vectors(1, size)[0], words_for(size, 1024)
    zeros = packed_rows.zeros(size, trits=1, block_size=1024)
    total = COMPILED[0](zeros, x, words, None, block_size=1024)
    error = COMPILED[1](total, jnp.zeros(size), words, jnp.float32(1), block_size=1024, nearest=True) - x
    assert jnp.sum(error**2) < 0.2 * jnp.sum(x**2)


@pytest.mark.parametrize("rounding_key", [None, 0], ids=["nearest", "stochastic"])
def test_what_is_not_finite_is_never_a_level(rounding_key):
    key = None if rounding_key is None else jax.random.key(rounding_key)
    for bad in (jnp.nan, jnp.inf):
        _, mean = summed(vectors(2, 320).at[0, 7].set(bad), 2, 32, key)
        assert np.isnan(mean[:32]).all()
        assert np.isfinite(mean[32:]).all()


def test_magnitudes_survive():
    x = vectors(3, 320)
    _, expected = summed(x, 2, 32)
    for magnitude in (1e-30, 1e30):
        _, mean = summed(magnitude * x, 2, 32)
        errors = [float(jnp.mean((m - x.mean(axis=0)) ** 2)) for m in (mean / magnitude, expected)]
        assert errors[0] == pytest.approx(errors[1], rel=0.1)
