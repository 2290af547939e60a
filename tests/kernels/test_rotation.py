import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from samples import draw

from vsa_optax.kernels import rotation, signs

POWERS = [1 << i for i in range(1, 13)]
walsh_hadamard = jax.jit(rotation.walsh_hadamard)


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


@pytest.mark.parametrize("rounds", [1, 2])
def test_rotations_equal_the_twin(rounds):
    x = draw(11, 128)
    words = [np.asarray(signs.random_words(jax.random.key(i), (128,))) for i in range(rounds)]
    y = jax.jit(rotation.rotate)(x, words)
    np.testing.assert_allclose(y, reference.rotate(x, words), atol=2e-6)
    np.testing.assert_allclose(jax.jit(rotation.rotate_back)(y, words), x, atol=2e-6)
    np.testing.assert_allclose(reference.rotate_back(reference.rotate(x, words), words), x, atol=1e-12)
