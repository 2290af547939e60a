"""Numbers at which code that is nearly right goes wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vsa_optax.kernels import numerics
from vsa_optax.prediction import machine
from vsa_optax.prediction.fits import line_fit


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


def test_no_records_have_no_coefficients():
    for coefficients in line_fit.line_weights(jnp.zeros(4), jnp.zeros(4), jnp.int32(2))[:2]:
        np.testing.assert_array_equal(coefficients, np.zeros(4))


def test_a_cycle_is_counted_when_its_predict_phase_ends():
    """WW, then FPPC over and over: nothing is counted for the warm-up, nor before the correction is done."""
    schedule = machine.PhaseSchedule(2, 1, 2, 2, adaptive=False, loss_threshold=0.1)

    def step(state, _):
        state = machine.advance(schedule, None, state, is_finite=jnp.array(True), value=None)
        return state, state.cycles

    _, cycles = jax.lax.scan(step, machine.init(schedule), None, length=15)
    assert cycles.tolist() == [0, 0, *[0, 0, 0, 1], *[1, 1, 1, 2], *[2, 2, 2, 3], 3]
