import jax.numpy as jnp
import numpy as np
import pytest
from samples import draw

from vsa_optax.kernels import inner_products

DTYPES = ["float16", "bfloat16", "float32", "complex64"]


def of_dtype(seed, dtype, *shape):
    x = draw(seed, *shape)
    return jnp.asarray(x + 1j * draw(seed + 1, *shape) if dtype == "complex64" else x).astype(dtype)


def wide(x):
    return np.asarray(x).astype(np.complex128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5), (0, 2)], ids=str)
def test_inner_products_are_those_of_numpy(dtype, shape):
    """The real part, with the first factor conjugated; each record's is its own."""
    x, records = of_dtype(0, dtype, *shape), of_dtype(2, dtype, 5, *shape)
    product = inner_products.inner(records[0], x)
    products = inner_products.inner_of_records(records, x)
    assert (product.dtype, products.dtype) == (jnp.float32, jnp.float32)
    expected = np.sum((wide(records).conj() * wide(x)).reshape(5, -1), axis=1).real
    np.testing.assert_allclose(product, expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(products, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtypes", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("complex64", "complex64")], ids=str
)
@pytest.mark.parametrize("shape", [(), (3, 4, 5), (0, 2)], ids=str)
def test_of_all_records_with_all_others_they_are_those_of_numpy(dtypes, shape):
    records, others = of_dtype(0, dtypes[0], 5, *shape), of_dtype(2, dtypes[1], 2, *shape)
    products = inner_products.inner_of_all_records(records, others)
    assert products.dtype == jnp.float32
    expected = wide(records).reshape(5, -1).conj() @ wide(others).reshape(2, -1).T
    np.testing.assert_allclose(products, expected.real, rtol=1e-5, atol=1e-5)


def test_halves_are_summed_in_single_precision():
    """4096 ones are more than bfloat16 can count, and the squares of 300 more than float16 can hold."""
    ones = jnp.ones((2, 4096), jnp.bfloat16)
    assert inner_products.inner(ones[0], ones[1]) == 4096
    np.testing.assert_array_equal(inner_products.inner_of_records(ones, ones[0]), [4096, 4096])
    np.testing.assert_array_equal(inner_products.inner_of_all_records(ones, ones[:1]), [[4096], [4096]])
    large = jnp.full((1, 8), 300, jnp.float16)
    assert inner_products.inner(large, large) == 720_000
    np.testing.assert_array_equal(inner_products.inner_of_records(large, large[0]), [720_000])


def test_a_target_that_the_records_cannot_hold_is_taken_at_their_largest():
    records, x = jnp.ones((2, 3), jnp.float16), jnp.array([1e6, 1.0, 0.0])
    np.testing.assert_array_equal(inner_products.inner_of_records(records, x), [65505, 65505])
