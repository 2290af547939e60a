import jax
import jax.numpy as jnp
import numpy as np
import reference
from jax.experimental import pallas as pl
from samples import draw

from vsa_optax.kernels.gpu import tiles


def test_the_transform_is_that_of_numpy_but_for_rounding_to_bfloat16():
    x = draw(0, 32, 32)
    found = np.asarray(tiles.transformed(jnp.asarray(x), tiles.hadamard()), np.float64)
    expected = reference.sylvester(1024) @ x.reshape(-1) / 32
    assert 2e-6 < np.sum((found.reshape(-1) - expected) ** 2) / np.sum(expected**2) < 7e-6
    np.testing.assert_allclose(
        tiles.transformed(jnp.asarray(np.sign(x)), tiles.hadamard())[0, 0], np.sign(x).sum() / 32
    )


def test_signs_are_those_of_the_words():
    words = jax.random.bits(jax.random.key(0), (2, 3 * 32), jnp.uint32)
    x = draw(1, 32, 32)

    def kernel(words, x, flipped):
        flipped[...] = tiles.flip(x[...], tiles.sign_bits(words, 1, 2))

    shape = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    found = pl.pallas_call(kernel, out_shape=shape, interpret=True)(words, x)
    expected = reference.signs_of(np.asarray(words)[1, 64:], 1024) * x.reshape(-1)
    np.testing.assert_array_equal(np.ravel(found), np.float32(expected))


def test_sums_and_largest():
    x = draw(2, 32, 32)
    np.testing.assert_allclose(tiles.total(x), x.sum(), rtol=1e-4)
    assert tiles.largest(x) == np.abs(x).max()
