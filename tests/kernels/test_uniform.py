import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import CHEAP

from vsa_optax.kernels import uniform


def vectors(num, size, seed=0):
    return jax.random.normal(jax.random.key(seed), (num, size))


@pytest.mark.parametrize("trits", [1, 2, 3])
def test_stochastic_rounding_is_right_on_average(trits):
    y = jnp.concatenate([vectors(1, 48)[0], jnp.zeros(16)])
    keys = jax.random.split(jax.random.key(2), 4000)
    numbers, scales = jax.jit(jax.vmap(lambda key: uniform.quantize_stochastically(y, trits, key)), **CHEAP)(keys)
    decoded = np.asarray(scales, np.float64)[:, None] * np.asarray(uniform.decode(numbers, trits), np.float64)
    standard_error = decoded.std(axis=0) / np.sqrt(len(keys))
    assert np.all(abs(decoded.mean(axis=0) - np.asarray(y)) <= 4.5 * standard_error + 1e-6)
    assert np.all(decoded[:, 48:] == 0)
    assert np.abs(decoded).max() >= float(jnp.abs(y).max())


def test_stochastic_rounding_lies_between_neighbouring_levels():
    y = vectors(1, 256)[0]
    numbers, scale = uniform.quantize_stochastically(y, 2, jax.random.key(0))
    decoded = np.float32(scale) * np.asarray(uniform.decode(numbers, 2))
    assert np.abs(decoded - np.asarray(y)).max() <= float(scale) / 4
