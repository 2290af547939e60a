"""Rows become bytes and averages again, by trits in place and by payloads of any codec, alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import draw

from vsa_optax import HypervectorCodec, TritCodec
from vsa_optax.compression import row_coding
from vsa_optax.compression.row_coding import PayloadRows, TritRows

TRITS = TritCodec(2, block_size=32, unbiased=True)
STEPS = jnp.arange(3, 6, dtype=jnp.int32)
WIDTH = 500


class Doubled(TritCodec):
    """A codec of the user's own that changes what an inherited method returns."""

    def decode(self, payload):
        return 2 * super().decode(payload)


CODECS = {
    "trits": (TRITS, TritRows),
    "one": (TritCodec(1, block_size=32), TritRows),
    "uncoded": (TritCodec(2, block_size=1024), PayloadRows),
    "subclass": (Doubled(2, block_size=32), PayloadRows),
    "ternary": (HypervectorCodec(0.5, use_ternary=True), PayloadRows),
}
either = pytest.mark.parametrize("kind", [TritRows, PayloadRows])


@functools.cache
def of_kind(kind):
    """Functions of arrays, compiled: the bytes of rows, an average, and what bytes decode to."""
    coding = kind(TRITS, WIDTH)
    return coding.encode, jax.jit(coding.average), jax.jit(coding.decode)


def wire_of(kind, rows, *, is_last=True):
    """The bytes of each row, encoded with a step of its own."""
    encode = jax.jit(functools.partial(of_kind(kind)[0], is_last=is_last))
    return jnp.concatenate(
        [encode(rows, jnp.array([i]), step) for i, step in zip(range(len(rows)), STEPS, strict=False)]
    )


@pytest.mark.parametrize(
    ("codec", "kind"),
    [
        pytest.param(*case, id=name, marks=pytest.mark.slow if name == "ternary" else ())
        for name, case in CODECS.items()
    ],
)
@pytest.mark.parametrize("num", [2, 3])
def test_rows_decode_to_what_the_codec_decodes(codec, kind, num):
    coding, rows, own = row_coding.coding_of(codec, WIDTH), jnp.asarray(draw(0, num, WIDTH)), jnp.int32(1)
    assert type(coding) is kind
    wire = jnp.concatenate([coding.encode(rows, jnp.array([i]), STEPS[i]) for i in range(num)])
    assert wire.dtype == jnp.uint8
    several = coding.encode(rows, jnp.array([num - 1, 0]), STEPS[0])
    np.testing.assert_array_equal(several[1], wire[0])
    expected = [codec.decode(codec.encode(row, step)) for row, step in zip(rows, STEPS, strict=False)]
    decoded, is_finite = coding.decode(wire, STEPS[:num])
    assert is_finite
    np.testing.assert_allclose(decoded, jnp.stack(expected), atol=1e-6)
    average = coding.average(wire, STEPS[:num], rows, own)
    whole = rows[own] + sum(x for i, x in enumerate(expected) if i != own)
    np.testing.assert_allclose(average, whole / num, atol=1e-6)
    relayed = coding.relay(wire, STEPS[:num], rows, own, STEPS[2] + 1)
    np.testing.assert_array_equal(relayed, row_coding.encode_vector(coding, average, STEPS[2] + 1))


@either
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_seen_by_all_who_decode_it(kind, bad):
    _, average, decode = of_kind(kind)
    rows = draw(0, 3, WIDTH)
    for magnitude in (0.0, 1.0, 1e35):
        decoded, is_finite = decode(wire_of(kind, np.float32(magnitude) * rows), STEPS)
        assert is_finite
        assert np.isfinite(decoded).all()
    rows[2, 499] = bad
    wire = wire_of(kind, rows)
    decoded, is_finite = decode(wire, STEPS)
    assert not is_finite
    assert not np.any(decoded)
    assert not np.isfinite(average(wire, STEPS, rows[::-1].copy(), jnp.int32(1))).all()  # As the other's.
    assert not np.isfinite(average(wire, STEPS, rows, jnp.int32(2))).all()  # As its own.


@either
def test_finite_scales_that_decode_to_infinity_are_seen(kind):
    """Of blocks with one coordinate close to the largest number, which is decoded with an error."""
    rows = np.float32(3e37) * draw(0, 1, WIDTH)
    rows[0, np.arange(0, 480, 32)] = 3.35e38
    payload = TRITS.encode(rows[0], STEPS[0])
    assert np.isfinite(np.float32(payload.leaves.scales)).all()
    assert not np.isfinite(TRITS.decode(payload)).all()
    decoded, is_finite = of_kind(kind)[2](wire_of(kind, rows), STEPS[:1])
    assert not is_finite
    assert not np.any(decoded)
