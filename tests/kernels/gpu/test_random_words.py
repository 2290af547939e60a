import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsa_optax.kernels import signs
from vsa_optax.kernels.gpu import random_words

ON_GPU = jax.default_backend() == "gpu"


@pytest.mark.parametrize("size", [2048, 3000])
def test_they_are_those_of_jax(size):
    key = signs.stream(3, 4)
    found = random_words.draw(jax.random.key_data(key), size, interpret=not ON_GPU)
    np.testing.assert_array_equal(found, jax.random.bits(key, (size,), jnp.uint32))


def test_they_lower_for_cuda():
    draw = jax.jit(lambda key: random_words.draw(key, 3000))
    assert "triton" in draw.trace(jnp.zeros(2, jnp.uint32)).lower(lowering_platforms=("cuda",)).as_text()
