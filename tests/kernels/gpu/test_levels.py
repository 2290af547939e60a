"""The work of a kernel on a block in registers, done outside of a kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import draw

from vsa_optax.kernels import lloyd_max, packing
from vsa_optax.kernels.gpu import levels


def digits_of(numbers, trits):
    """The sum that stands for the balanced digits of numbers from the middle."""
    from_lowest = numbers + (3**trits - 1) // 2
    return sum((from_lowest // 3**i % 3 - 1) << 8 * i for i in range(trits))


@pytest.mark.parametrize("unbiased", [False, True], ids=["mmse", "unbiased"])
@pytest.mark.parametrize("trits", [1, 2, 3])
def test_nearest_levels_are_those_of_lloyd_max(trits, unbiased):
    find = jax.jit(lambda y: levels.nearest_levels(y, trits, levels.table(trits), unbiased=unbiased))
    for seed, magnitude in enumerate([1.0, 1e-35, 1e-17, 1e17, 1e35, 0.0]):
        y = np.float32(magnitude) * draw(seed, 32, 32)
        y[3] *= 8  # Beyond the last cut.
        digits, scale = find(y)
        numbers, expected = lloyd_max.quantize(y.reshape(-1), trits, unbiased=unbiased)
        numbers = np.asarray(numbers, np.int64).reshape(32, 32) - (3**trits - 1) // 2
        assert np.mean(np.asarray(digits) != digits_of(numbers, trits)) < 2e-3
        np.testing.assert_allclose(scale, expected, rtol=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_scale(bad):
    y = draw(0, 32, 32)
    y[1, 2] = bad
    assert np.isnan(levels.nearest_levels(y, 2, levels.table(2), unbiased=False)[1])


@pytest.mark.parametrize("trits", [1, 2, 3])
def test_bytes_of_digits_and_back(trits):
    highest = (3**trits - 1) // 2
    numbers = np.random.default_rng(trits).integers(-highest, highest + 1, (5, 32, 32))
    sums = sum(np.float32(digits_of(block, trits)) * 3**j for j, block in enumerate(numbers))
    codes = levels.bytes_of(sums, trits)
    stored = packing.digits_of(jnp.asarray(numbers + highest), trits)  # [trits, 5, 32, 32]
    for of_trit, digits in zip(codes, np.asarray(stored), strict=True):
        np.testing.assert_array_equal(of_trit, np.tensordot(3 ** np.arange(5), digits, 1).reshape(-1))
    rest = [levels.centred(of_trit.reshape(32, 32)) for of_trit in codes]
    for block in numbers:
        found, rest = levels.first_numbers(rest)
        np.testing.assert_array_equal(found, block)
        values = levels.values_of(found, levels.table(trits), trits, nearest=True) * levels.unit(trits, nearest=True)
        np.testing.assert_allclose(values, lloyd_max.levels(trits)[block + highest], rtol=1e-5)
        values = levels.values_of(found, levels.table(trits), trits, nearest=False) * levels.unit(trits, nearest=False)
        np.testing.assert_allclose(values, block / highest, rtol=1e-6)
