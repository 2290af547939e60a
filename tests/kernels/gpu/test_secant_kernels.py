"""The kernels beside NumPy: compiled where there is a GPU, interpreted elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import draw

from vsa_optax.kernels.gpu import secant_kernels

EPSILON = 1e-3
ON_GPU = jax.default_backend() == "gpu"


def operands(window, size, dtype="float32"):
    """In the order of the kernels, a few magnitudes among the columns."""
    scales = 10 ** draw(7, size)
    vectors = [np.abs(draw(0, size)), draw(3, size) * scales, draw(4, size) / scales]
    rms, gradient, base = (jnp.asarray(x, dtype) for x in vectors)
    records = [jnp.asarray(draw(seed, window, size) * scales, jnp.bfloat16) for seed in (1, 2)]
    return rms, *records, gradient, base


def wide(arrays):
    return [np.asarray(x, np.float64) for x in arrays]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("window", "size"), [(1, 1024), (3, 2048), (8, 5120), (16, 2048), (17, 1024)])
def test_products_are_those_of_numpy(window, size, dtype):
    given = operands(window, size, dtype)
    gram, cross, of_gradient, of_step = secant_kernels.products(*given, epsilon=EPSILON, interpret=not ON_GPU)
    rms, s, y, g, b = wide(given)
    metric = rms + EPSILON
    lengths = np.sqrt(np.sum(s**2 * metric, axis=1))
    # Each factor is rounded to bfloat16, as the records are; the sums are not.
    np.testing.assert_allclose(
        gram / np.outer(lengths, lengths), (s * metric) @ s.T / np.outer(lengths, lengths), atol=0.004
    )
    for found, expected, sizes in (
        (cross, s @ y.T, np.abs(s) @ np.abs(y).T),
        (of_gradient, s @ g, np.abs(s) @ np.abs(g)),
        (of_step, s @ (metric * b), np.abs(s) @ np.abs(metric * b)),
    ):
        assert (found.shape, found.dtype) == (expected.shape, np.float32)
        np.testing.assert_allclose(found / sizes, expected / sizes, atol=2e-5)


def test_more_blocks_than_programs_are_taken_in_turns(monkeypatch):
    """Also where the last turn is not for all of them."""
    given = operands(4, 5 * 1024)
    expected = secant_kernels.products(*given, epsilon=EPSILON, interpret=not ON_GPU)
    monkeypatch.setattr(secant_kernels, "_PROGRAMS", 3)
    for found, once in zip(
        secant_kernels.products(*given, epsilon=EPSILON, interpret=not ON_GPU), expected, strict=True
    ):
        np.testing.assert_allclose(found, once, rtol=1e-4, atol=1e-4 * np.max(np.abs(once)))


@pytest.mark.parametrize(("window", "size"), [(1, 1024), (3, 4096), (16, 2048), (17, 1024)])
def test_a_step_is_that_of_numpy(window, size):
    given = operands(window, size)
    coefficients, numbers = draw(5, 4, window), np.array([0.3, 0.7, 0.0], np.float32)
    run = functools.partial(secant_kernels.step, *given, coefficients, epsilon=EPSILON, interpret=not ON_GPU)
    found, squared = run(numbers)
    rms, s, y, g, b = wide(given)
    metric = rms + EPSILON
    inside, change, of_gradient, of_step = coefficients.astype(np.float64)
    outside = 0.3 * (b - of_step @ s) - 0.7 * ((g + change @ y) / metric - of_gradient @ s)
    assert (found.shape, found.dtype, squared.shape) == ((size,), np.float32, ())
    np.testing.assert_allclose(found, inside @ s + outside, rtol=1e-3, atol=1e-4 * np.max(np.abs(outside)))
    np.testing.assert_allclose(squared, np.sum(outside**2 * metric), rtol=1e-4)
    found, _ = run(numbers + np.array([0, 0, 1], np.float32))
    np.testing.assert_array_equal(found, given[-1])


@pytest.mark.parametrize(("window", "size"), [(1, 1024), (3, 4096), (17, 1024)])
def test_what_was_missed_is_that_of_numpy(window, size):
    rms, _, y, new, old = operands(window, size)
    change = draw(5, window)
    found = secant_kernels.missed(rms, y, new, old, change, epsilon=EPSILON, interpret=not ON_GPU)
    of_rms, records, after, before = wide([rms, y, new, old])
    expected = np.sum((after - before - change @ records) ** 2 / (of_rms + EPSILON))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
