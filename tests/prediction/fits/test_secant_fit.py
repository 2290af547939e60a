import jax.numpy as jnp
import numpy as np

from vsa_optax.prediction.fits import secant_fit


def test_no_changes_have_no_coefficients():
    np.testing.assert_array_equal(secant_fit.coefficients(jnp.zeros([3, 3]), jnp.zeros(3)), np.zeros([7, 3]))
    one = jnp.zeros([3, 3]).at[1, 1].set(4.0)
    found = secant_fit.coefficients(one, jnp.array([0.0, 8.0, 0.0]))
    np.testing.assert_allclose(found[:, 1], [2.0 / (1 + ridge) for ridge in secant_fit.RIDGES], rtol=1e-5)
    np.testing.assert_array_equal(found[:, [0, 2]], 0.0)
    broken = secant_fit.coefficients(one.at[0, 0].set(jnp.inf), jnp.array([jnp.nan, 8.0, 0.0]))
    assert np.isfinite(broken).all()
