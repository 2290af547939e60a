import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import check_names_itself

from vsa_optax import trits

SHAPES = [(0,), (2, 0), (1,), (4,), (5,), (2, 6), (3, 2, 24), (26,), (1001,)]  # Few, since each is compiled.
RULES = ["mean", "lloyd_max"]
pack, unpack = jax.jit(trits.pack), jax.jit(trits.unpack, static_argnums=1)
deterministic = jax.jit(trits.quantize_deterministic, static_argnames=("rule", "axis"))
stochastic = jax.jit(trits.quantize_stochastic, static_argnames="axis")
QUANTIZERS = {
    "mean": deterministic,
    "lloyd_max": functools.partial(deterministic, rule="lloyd_max"),
    "stochastic": lambda x, **kwargs: stochastic(x, jax.random.key(0), **kwargs),
}


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@settings(max_examples=60)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**32 - 1))
def test_unpack_inverts_pack(shape, seed):
    *batch, size = shape
    values = np.random.default_rng(seed).integers(-1, 2, size=shape).astype(np.int8)
    packed = pack(values)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (*batch, -(-size // 5))
    assert not packed.size or packed.max() <= 242
    unpacked = unpack(packed, size)
    assert unpacked.dtype == jnp.int8
    np.testing.assert_array_equal(unpacked, values)
    first = (0,) * len(batch)
    np.testing.assert_array_equal(packed[first], reference.pack_digits(values[first] + 1))


@pytest.mark.parametrize(("num_bytes", "size"), [(2, 5), (2, 11), (2, 0), (0, 1), (1, 0)])
def test_a_size_that_does_not_go_with_the_bytes(num_bytes, size):
    valid = f"from {max(0, 5 * num_bytes - 4)} to {5 * num_bytes}, got {size}"
    with pytest.raises(ValueError, match=f"size must match the {num_bytes} bytes given, so it must be {valid}"):
        trits.unpack(jnp.zeros(num_bytes, jnp.uint8), size)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(TypeError, match="values must be integers, got dtype float32"):
        trits.pack(jnp.ones(3))
    with pytest.raises(TypeError, match="packed must be integers, got dtype float32"):
        trits.unpack(jnp.ones(1), 5)
    with pytest.raises(ValueError, match="values must have at least one axis, got a scalar"):
        trits.pack(jnp.int8(1))
    with pytest.raises(ValueError, match="packed must have at least one axis, got a scalar"):
        trits.unpack(jnp.uint8(1), 5)
    with pytest.raises(ValueError, match=r"size must be an integer >= 0 .* got -1"):
        trits.unpack(jnp.zeros(0, jnp.uint8), -1)


def cut_of(rule, x, threshold=0.7):
    x = np.float64(x)
    return threshold * abs(x).mean() if rule == "mean" else 0.612003 * np.sqrt((x**2).mean())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_deterministic_equals_the_twin(rule, scale):
    x = draw(0, 4, 8) * np.float32(scale)
    values, of_all = deterministic(x, rule=rule)
    assert values.dtype == jnp.int8
    assert of_all.shape == ()
    expected, twin_scale = reference.quantize_trits(x, cut_of(rule, x))
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_allclose(of_all, twin_scale, rtol=1e-5)
    values, of_rows = deterministic(x, rule=rule, axis=1)
    assert of_rows.shape == (4, 1)
    for row, of_row, x_row in zip(values, of_rows, x, strict=True):
        expected, twin_scale = reference.quantize_trits(x_row, cut_of(rule, x_row))
        np.testing.assert_array_equal(row, expected)
        np.testing.assert_allclose(of_row, [twin_scale], rtol=1e-5)


def test_several_axes_share_a_scale():
    x = draw(1, 4, 8)
    values, scale = trits.quantize_deterministic(x.reshape(4, 2, 4), axis=(1, -1))
    of_rows = deterministic(x, axis=1)
    np.testing.assert_array_equal(values.reshape(4, 8), of_rows.values)
    np.testing.assert_allclose(scale, of_rows.scale[..., None], rtol=1e-6)


@pytest.mark.parametrize("threshold", [0, 1.2, 1e9])
def test_the_threshold_multiplies_the_mean(threshold):
    x = draw(1, 100)
    values, scale = jax.jit(functools.partial(trits.quantize_deterministic, threshold=threshold))(x)
    expected, twin_scale = reference.quantize_trits(x, cut_of("mean", x, threshold))
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_allclose(scale, twin_scale, rtol=1e-6)


@given(seed=st.integers(0, 2**32 - 1), rule=st.sampled_from(RULES))
def test_no_other_scale_loses_less(seed, rule):
    x = draw(seed, 4, 8)
    values, scale = map(np.float64, deterministic(x, rule=rule))
    x, values = x.ravel(), values.ravel()
    np.testing.assert_allclose(scale, x @ values / (values @ values), rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_the_documented_error_on_gaussian_numbers(rule):
    x = draw(2, 500_000)
    error = np.mean((trits.dequantize(*deterministic(x, rule=rule)) - x) ** 2)
    np.testing.assert_allclose(error, 0.190, atol=0.002)


def stochastic_draws(x, num, axis=None):
    return jax.vmap(lambda key: stochastic(x, key, axis=axis))(jax.random.split(jax.random.key(0), num))


@pytest.mark.parametrize("axis", [None, 0], ids=["all", "columns"])
def test_stochastic_is_right_on_average(axis):
    x, num = np.append(draw(3, 2, 11), np.zeros((2, 1), np.float32), axis=1), 20_000
    values, scales = stochastic_draws(x, num, axis)
    assert values.dtype == jnp.int8
    assert scales.shape == ((num,) if axis is None else (num, 1, 12))
    peak = abs(x).max(axis=axis, keepdims=True)
    np.testing.assert_array_equal(scales.reshape(num, *peak.shape)[0], peak)
    assert ((np.sign(x) == values) | (values == 0)).all()
    assert (np.asarray(values)[:, abs(x) == peak] != 0).all() or axis == 0
    mean = peak * np.float64(values).mean(axis=0)
    error = np.sqrt(abs(x) * (peak - abs(x)) / num)  # of a Bernoulli variable's mean
    assert (abs(mean - x) <= 4 * error + 1e-6).all()


def test_the_documented_error_of_stochastic_trits():
    x = draw(4, 200, 1000)
    values, scale = stochastic(x, jax.random.key(1), axis=1)
    np.testing.assert_allclose(np.mean((trits.dequantize(values, scale) - x) ** 2), 1.73, atol=0.03)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_zeros_and_numbers_that_are_not_finite(name):
    quantize = QUANTIZERS[name]
    x = draw(5, 4, 8)
    values, scale = quantize(np.zeros_like(x))
    assert scale == 0.0
    assert not np.asarray(trits.dequantize(values, scale)).any()
    whole = quantize(x, axis=1)
    for bad in (np.nan, np.inf, -np.inf):
        broken = x.copy()
        broken[2, 3] = bad
        values, scale = quantize(broken, axis=1)
        decoded = np.asarray(trits.dequantize(values, scale))
        assert np.isnan(scale).ravel().tolist() == [False, False, True, False]
        assert np.isnan(decoded[2]).all()
        others = [0, 1, 3]
        np.testing.assert_array_equal(decoded[others], np.asarray(trits.dequantize(*whole))[others])
        assert np.isnan(quantize(broken).scale)


@pytest.mark.parametrize("name", ["mean", "stochastic"])
def test_what_is_not_finite_is_found_in_a_large_array(name):
    """Where a maximum over 4096 numbers or more may lose a NaN."""
    x = draw(7, 5000)
    for place in (0, 1234, 4999):
        broken = x.copy()
        broken[place] = np.nan
        assert np.isnan(QUANTIZERS[name](broken).scale)


@pytest.mark.parametrize("name", ["mean", "stochastic"])
def test_any_shape_and_real_dtype(name):
    quantize = QUANTIZERS[name]
    for shape in [(), (3, 0), (1, 2, 1, 1, 2)]:
        values, scale = quantize(jnp.ones(shape))
        assert (values.shape, scale.shape, scale.dtype) == (shape, (), jnp.float32)
        np.testing.assert_array_equal(scale * values, np.ones(shape))
    for dtype in (jnp.bfloat16, jnp.float16, np.float64):
        x = draw(6, 4, 8).astype(dtype)
        (values, scale), expected = quantize(x), quantize(x.astype(np.float32))
        np.testing.assert_array_equal(values, expected.values)
        np.testing.assert_allclose(scale, expected.scale, rtol=1e-6)
    for odd in (jnp.arange(3), jnp.ones(2, jnp.complex64), jnp.ones(2, bool)):
        with pytest.raises(TypeError, match=f"x must be real floating point, got dtype {odd.dtype}"):
            quantize(odd)


@pytest.mark.parametrize(
    ("name", "value", "valid"),
    [
        ("rule", "median", "one of 'mean', 'lloyd_max'"),
        ("threshold", -0.1, ">= 0"),
        ("threshold", float("nan"), ">= 0"),
        ("threshold", "0.7", ">= 0"),
    ],
)
def test_bad_arguments_name_themselves(name, value, valid):
    check_names_itself(functools.partial(trits.quantize_deterministic, jnp.ones(3)), name, value, valid)
