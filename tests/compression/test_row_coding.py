"""What a codec does with a row of a vector is what it does with a copy of the row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import draw

from vsa_optax import HypervectorCodec, TritCodec
from vsa_optax.compression import row_coding

TRITS = TritCodec(2, block_size=32)
STEP, INDEX = jnp.int32(5), jnp.int32(1)


class Doubled(TritCodec):
    """A codec of the user's own that changes what an inherited method returns."""

    def decode(self, payload):
        return 2 * super().decode(payload)


CODECS = {
    "trits": TRITS,
    "unbiased": TritCodec(1, block_size=32, unbiased=True),
    "uncoded": TritCodec(2, block_size=1024),
    "subclass": Doubled(2, block_size=32),
    "ternary": HypervectorCodec(0.5, use_ternary=True),
}


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize("num", [2, 3])
def test_rows_are_those_of_the_codec(codec, num):
    rows = jnp.asarray(draw(0, num, 500))
    payload = row_coding.encode_row(codec, rows, INDEX, STEP)
    expected = codec.encode(rows[INDEX], STEP)
    assert jax.tree.structure(payload) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, payload, expected)
    payloads = jax.tree.map(lambda *x: jnp.stack(x), *[codec.encode(rows[0] + i, STEP + i) for i in range(num - 1)])
    average = row_coding.average_with_row(codec, payloads, rows, INDEX)
    whole = rows[INDEX] + sum(codec.decode(codec.encode(rows[0] + i, STEP + i)) for i in range(num - 1))
    np.testing.assert_allclose(average, whole / num, atol=1e-6)


@pytest.mark.parametrize("name", ["trits", "unbiased", "uncoded"])
def test_scales_show_what_is_not_finite(name):
    codec, rows = CODECS[name], draw(0, 2, 500)
    encode = jax.vmap(lambda row: codec.encode(row, STEP))
    for magnitude in (0.0, 1.0, 1e35):
        assert row_coding.finite_by_scales(codec, encode(np.float32(magnitude) * rows))
    for bad in (np.nan, np.inf, -np.inf):
        broken = rows.copy()
        broken[1, 499] = bad
        assert not row_coding.finite_by_scales(codec, encode(broken))


def test_finite_scales_that_decode_to_infinity_are_seen():
    payload = TRITS.encode(draw(0, 500), STEP)
    scales = payload.leaves.scales
    payload = payload._replace(leaves=payload.leaves._replace(scales=scales.at[3].set(2e38)))
    assert np.isfinite(np.float32(payload.leaves.scales)).all()
    assert not np.isfinite(TRITS.decode(payload)).all()
    assert not row_coding.finite_by_scales(TRITS, payload)


@pytest.mark.parametrize("name", ["subclass", "ternary"])
def test_other_payloads_do_not_show_it(name):
    assert row_coding.finite_by_scales(CODECS[name], CODECS[name].encode(draw(0, 500))) is None
