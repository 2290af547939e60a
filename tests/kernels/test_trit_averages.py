import jax.numpy as jnp
import numpy as np
import pytest
from samples import draw

from vsa_optax.kernels import signs, trit_averages, trit_blocks

KEY, NEW_KEY = signs.stream(0, 1, 2), signs.stream(0, 1, 3)
ROOM = 16


@pytest.mark.parametrize("unbiased", [False, True])
def test_a_coded_vector_is_averaged_with_a_row(unbiased):
    rows, settings = draw(1, 3, 300), {"trits": 2, "block_size": 64, "unbiased": unbiased}
    codes, scales = trit_blocks.encode(draw(2, 300), KEY, room=ROOM, **settings)
    decoded = trit_blocks.decode_sum(codes[None], scales[None], np.ones(1, np.float32), KEY, size=300, **settings)
    given = jnp.stack([~codes, codes]), scales, rows, (np.int32(1), np.int32(2)), KEY
    average = trit_averages.average_of_two(*given, **settings)
    np.testing.assert_allclose(average, (rows[2] + decoded) / 2, atol=1e-6)
    found = trit_averages.relay(*given, NEW_KEY, room=ROOM, **settings)
    expected = trit_blocks.encode(average, NEW_KEY, room=ROOM, **settings)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
