"""Sums and steps beside NumPy, whatever the shapes and dtypes; and the kernels in their place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import draw

from vsa_optax.kernels import platforms, secants
from vsa_optax.kernels.gpu import secant_kernels
from vsa_optax.kernels.secants import Coefficients, Evaluated, Secants

WINDOW = 5


def of_dtype(seed, dtype, *shape):
    x = draw(seed, *shape)
    return jnp.asarray(x + 1j * draw(seed + 1, *shape) if dtype == "complex64" else x).astype(dtype)


def leaf_of(shape, dtype="float32", history="bfloat16"):
    return Secants(
        rms=jnp.abs(of_dtype(0, history, *shape)).astype("float32" if history == "complex64" else history),
        diff_params=of_dtype(2, history, WINDOW, *shape),
        diff_gradients=of_dtype(4, history, WINDOW, *shape),
        gradient=of_dtype(6, dtype, *shape),
        base=of_dtype(8, dtype, *shape),
    )


def coefficients(*, is_base=False):
    rows = [jnp.asarray(draw(seed, WINDOW)) for seed in range(20, 24)]
    return Coefficients(*rows, of_base=jnp.float32(0.3), of_gradient=jnp.float32(0.7), is_base=jnp.bool(is_base))


def wide(x):
    return np.asarray(x).astype(np.complex128)


def flat(leaf):
    """Metric, and the others, in one dimension, two of records."""
    s, y = (wide(x).reshape(WINDOW, -1) for x in (leaf.diff_params, leaf.diff_gradients))
    return wide(leaf.rms).ravel().real + secants.EPSILON, s, y, wide(leaf.gradient).ravel(), wide(leaf.base).ravel()


KINDS = [("float32", "bfloat16"), ("float32", "float32"), ("bfloat16", "bfloat16"), ("complex64", "complex64")]


@pytest.mark.parametrize(("dtype", "history"), KINDS)
@pytest.mark.parametrize("shape", [(), (3, 4, 5), (0, 2)], ids=str)
def test_products_are_those_of_numpy(shape, dtype, history):
    leaf = leaf_of(shape, dtype, history)
    metric, s, y, g, b = flat(leaf)
    expected = (s.conj() * metric) @ s.T, s.conj() @ y.T, s.conj() @ g, s.conj() @ (metric * b)
    tolerance = 0.02 if history == "bfloat16" else 1e-5
    for found, wanted in zip(secants.products(leaf), expected, strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, wanted.real, atol=tolerance * (1 + np.max(np.abs(wanted), initial=0)))


@pytest.mark.parametrize(("dtype", "history"), KINDS)
@pytest.mark.parametrize("shape", [(), (3, 4, 5), (0, 2)], ids=str)
def test_a_step_is_that_of_numpy(shape, dtype, history):
    leaf, of = leaf_of(shape, dtype, history), coefficients()
    metric, s, y, g, b = flat(leaf)
    inside, change, of_gradient, of_step = (wide(x) for x in of[:4])
    outside = 0.3 * (b - of_step @ s) - 0.7 * ((g + change @ y) / metric - of_gradient @ s)
    found, squared = secants.step(leaf, of)
    assert (found.shape, found.dtype) == (shape, jnp.promote_types(dtype, jnp.float32))
    np.testing.assert_allclose(
        np.ravel(found), inside @ s + outside, rtol=1e-4, atol=1e-4 * np.max(np.abs(outside), initial=1)
    )
    np.testing.assert_allclose(squared, np.sum(np.abs(outside) ** 2 * metric), rtol=1e-4)
    found, _ = secants.step(leaf, coefficients(is_base=True))
    np.testing.assert_array_equal(found, leaf.base)


@pytest.mark.parametrize(("dtype", "history"), KINDS)
@pytest.mark.parametrize("shape", [(), (3, 4, 5), (0, 2)], ids=str)
def test_what_was_missed_is_that_of_numpy(shape, dtype, history):
    leaf, change = leaf_of(shape, dtype, history), draw(20, WINDOW)
    metric, _, y, old, new = flat(leaf)
    found = secants.missed(Evaluated(leaf.rms, leaf.diff_gradients, leaf.base, leaf.gradient), jnp.asarray(change))
    np.testing.assert_allclose(found, np.sum(np.abs(new - old - change @ y) ** 2 / metric), rtol=1e-4)


@pytest.fixture
def interpreted(monkeypatch):
    for name in ("products", "step", "missed"):
        kernel = functools.partial(getattr(secant_kernels, name), interpret=jax.default_backend() != "gpu")
        monkeypatch.setattr(secant_kernels, name, kernel)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("shape", [(4, 512), (3, 700)], ids=str)
def test_in_one_pass_they_are_the_same(shape):
    """The coordinates beyond a multiple of the kernel's columns are computed beside it."""
    leaf, of = leaf_of(shape), coefficients()
    for found, expected in zip(secants._products_in_one_pass(leaf), secants._products(leaf), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-3 * np.max(np.abs(expected)))
    (found, squared), (expected, its_squared) = secants._step_in_one_pass(leaf, of), secants._step(leaf, of)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3 * np.max(np.abs(expected)))
    np.testing.assert_allclose(squared, its_squared, rtol=1e-4)
    evaluated = Evaluated(leaf.rms, leaf.diff_gradients, leaf.base, leaf.gradient)
    found, expected = (way(evaluated, of.change) for way in (secants._missed_in_one_pass, secants._missed))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_kernel_is_taken_for_large_leaves_of_bfloat16_records(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def has_kernel(shape, dtype="float32", history="bfloat16"):
        leaf = jax.eval_shape(lambda: leaf_of(shape, dtype, history))
        texts = [
            jax.jit(lambda *x, f=function: f(*x)).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
            for function, operands in (
                (secants.products, (leaf,)),
                (secants.step, (leaf, coefficients())),
                (secants.missed, (Evaluated(leaf.rms, leaf.diff_gradients, leaf.base, leaf.gradient), draw(0, WINDOW))),
            )
        ]
        assert len({"triton" in text for text in texts}) == 1
        return "triton" in texts[0]

    assert has_kernel((300, 256))
    assert has_kernel((300, 256), "bfloat16")
    assert not has_kernel((100, 256))
    assert not has_kernel((300, 256), history="float32")
    assert not has_kernel((300, 256), "complex64", "complex64")
    monkeypatch.setattr(platforms, "has_kernels", lambda: False)
    assert not has_kernel((300, 256))
