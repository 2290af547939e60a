import numpy as np

from vsa_optax.kernels import packing


def test_every_byte_unpacks_to_its_digits():
    """All 243, of which the division by multiplication must be exact."""
    every = np.arange(243, dtype=np.uint8)
    digits = np.asarray(packing.unpack_digits(every, 5 * 243)).reshape(5, 243)
    np.testing.assert_array_equal(digits, [every // 3**j % 3 for j in range(5)])
    np.testing.assert_array_equal(packing.pack_digits(digits.reshape(-1)), every)


def test_every_number_of_8_bits_has_its_digits():
    every = np.arange(256)
    digits = packing.digits_of(every.astype(np.uint8), 6)
    np.testing.assert_array_equal(digits, [every // 3**j % 3 for j in range(6)])
