"""Among others, numbers at which code that is nearly right goes wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsa_optax.kernels import numerics


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
def test_is_finite(bad, dtype):
    x = jnp.ones((3, 5), dtype)
    assert numerics.is_finite(x)
    assert not numerics.is_finite(x.at[1, 2].set(bad))
    assert numerics.is_finite(jnp.zeros((0, 3), dtype))


def test_saturating_cast():
    x = jnp.array([1e30, -1e30, jnp.inf, -jnp.inf, jnp.nan, 1.5])
    np.testing.assert_array_equal(
        numerics.saturating_cast(x, jnp.float16), np.array([65504, -65504, 65504, -65504, 0, 1.5], np.float16)
    )
    z = numerics.saturating_cast(jax.lax.complex(jnp.float32(jnp.inf), jnp.float32(-2)), jnp.complex64)
    assert z == np.complex64(complex(np.finfo(np.float32).max, -2))


@pytest.mark.parametrize("scale", [1e-34, 1e-30, 1.0, 1e30, 1e38])
def test_relative_distance_at_any_magnitude(scale):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 40)).astype(np.float32) * 0.3
    expected = np.linalg.norm(x - y) / np.linalg.norm(x)
    scaled = [jnp.asarray(v * np.float32(scale)) for v in (x, y)]
    distance, is_defined = numerics.relative_distance([scaled[0][:7], scaled[0][7:]], [scaled[1][:7], scaled[1][7:]])
    assert is_defined
    np.testing.assert_allclose(distance, expected, rtol=2e-5)


def test_relative_distance_from_zero_is_not_defined():
    distance, is_defined = numerics.relative_distance([jnp.zeros(3)], [jnp.ones(3)])
    assert not is_defined
    assert distance == 0.0
    assert not numerics.relative_distance([], [])[1]
    distance, is_defined = numerics.relative_distance([jnp.float32(1e-30)], [jnp.float32(1e30)])
    assert is_defined
    assert np.isfinite(distance)


@pytest.mark.parametrize("magnitude", [1.5e-38, 3e38])
def test_relative_distance_where_the_scale_itself_would_overflow(magnitude):
    """Unclipped, the power of two that scales a number at the edge of its range is infinite, or itself beyond it."""
    x = jnp.asarray(np.array([magnitude, magnitude / 2], np.float32))
    distance, is_defined = numerics.relative_distance([x], [jnp.zeros(2)])
    assert is_defined
    np.testing.assert_allclose(distance, 1.0, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [2048, 4096, 5000, 1 << 16])
def test_is_finite_of_large_arrays(size, bad):
    """A maximum over 4096 numbers or more loses a NaN on some CPUs."""
    is_finite = jax.jit(numerics.is_finite)
    x = np.linspace(-1, 1, size, dtype=np.float32)
    assert is_finite(x)
    for place in range(0, size, size // 13):
        spoiled = x.copy()
        spoiled[place] = bad
        assert not is_finite(spoiled), place


@pytest.mark.parametrize("source", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("target", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_saturating_cast_between_any_two_dtypes(source, target):
    """float16's largest number, 65504, is 65536 in bfloat16, which float16 does not hold."""
    largest, top = float(jnp.finfo(source).max), float(jnp.finfo(target).max)
    x = jnp.array([largest, -largest, np.inf, -np.inf, np.nan, 1.5], source)
    out = np.asarray(numerics.saturating_cast(x, target)).astype(np.float64)
    assert np.isfinite(out).all()
    assert (np.abs(out) <= top).all()
    np.testing.assert_array_equal(out[4:], [0.0, 1.5])
    np.testing.assert_array_equal(np.sign(out[:4]), [1, -1, 1, -1])
    if largest >= top:
        np.testing.assert_array_equal(out[:4], [top, -top, top, -top])
