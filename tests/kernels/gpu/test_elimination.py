"""The kernel beside NumPy: compiled where there is a GPU, interpreted elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import draw

from vsa_optax.kernels.gpu import elimination

ON_GPU = jax.default_backend() == "gpu"


@pytest.mark.parametrize(("num", "size"), [(1, 1), (6, 3), (6, 16), (2, 17), (3, 40)])
def test_solutions_are_those_of_numpy(num, size):
    rows = draw(0, num, size, size + 4)
    ridges = np.array([1e-3, 1e-1, 1.0, 1e-2, 10.0, 1e-3])[:num, None, None]
    matrices = rows @ rows.swapaxes(1, 2) / size + ridges * np.eye(size)
    right = draw(1, num, size)
    found = elimination.solve(*(jnp.asarray(x, jnp.float32) for x in (matrices, right)), interpret=not ON_GPU)
    assert (found.shape, found.dtype) == ((num, size), jnp.float32)
    missed = np.einsum("bij,bj->bi", matrices, np.asarray(found, np.float64)) - right
    np.testing.assert_allclose(missed / np.abs(right).max(), 0, atol=2e-4)


def test_parallel_directions_with_a_small_ridge():
    """The cosines of changes along one line: the condition number is a million."""
    matrix = np.ones([16, 16]) + 1e-5 * np.eye(16)
    found = elimination.solve(jnp.asarray(matrix[None], jnp.float32), jnp.ones([1, 16]), interpret=not ON_GPU)
    np.testing.assert_allclose(np.sum(found), 1, rtol=1e-4)
