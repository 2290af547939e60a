import math

import jax
import numpy as np
import pytest
import reference
from samples import draw

from vsa_optax.kernels import signs


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
