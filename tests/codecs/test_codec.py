"""The inputs that both codecs refuse, and their errors."""

import io
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from refusals import check_names_itself

from vsa_optax import HypervectorCodec, TritCodec

BAD = [
    (TritCodec, "trits", 0, "1, 2 or 3"),
    (TritCodec, "trits", 4, "1, 2 or 3"),
    (TritCodec, "trits", 2.0, "1, 2 or 3"),
    (TritCodec, "trits", True, "1, 2 or 3"),
    (TritCodec, "block_size", 1, "a power of two from 2 to 65536"),
    (TritCodec, "block_size", 1000, "a power of two from 2 to 65536"),
    (TritCodec, "block_size", 131072, "a power of two from 2 to 65536"),
    (TritCodec, "block_size", None, "a power of two from 2 to 65536"),
    (TritCodec, "unbiased", 1, "True or False"),
    (TritCodec, "seed", -1, "an integer >= 0"),
    (TritCodec, "seed", 0.5, "an integer >= 0"),
    (HypervectorCodec, "compression_ratio", 0, "> 0 and <= 1"),
    (HypervectorCodec, "compression_ratio", 1.5, "> 0 and <= 1"),
    (HypervectorCodec, "compression_ratio", float("nan"), "> 0 and <= 1"),
    (HypervectorCodec, "compression_ratio", "0.1", "> 0 and <= 1"),
    (HypervectorCodec, "dimension", 0, "an integer >= 1"),
    (HypervectorCodec, "dimension", 2.0, "an integer >= 1"),
    (HypervectorCodec, "dimension", True, "an integer >= 1"),
    (HypervectorCodec, "use_ternary", 1, "True or False"),
    (HypervectorCodec, "shrink", None, "True or False"),
    (HypervectorCodec, "seed", -1, "an integer >= 0"),
]
both_codecs = pytest.mark.parametrize("codec", [TritCodec(), HypervectorCodec()], ids=["trits", "hypervector"])


@pytest.mark.parametrize(("make", "name", "value", "valid"), BAD)
def test_bad_arguments_name_themselves(make, name, value, valid):
    check_names_itself(make, name, value, valid)


@both_codecs
@pytest.mark.parametrize("step", [1.0, np.arange(2), True], ids=["float", "array", "bool"])
def test_a_step_that_is_no_integer(codec, step):
    with pytest.raises(ValueError, match="step must be one integer, got shape"):
        codec.encode({"x": jnp.ones(3)}, step)


@both_codecs
def test_a_step_of_more_than_32_bits(codec):
    with pytest.raises(ValueError, match=r"step must be an integer .* got 2147483648"):
        codec.encode({"x": jnp.ones(3)}, 2**31)


@both_codecs
@pytest.mark.parametrize("leaf", [np.arange(3), np.ones(2, bool), "text"], ids=["int", "bool", "text"])
def test_leaves_that_are_no_floats_name_themselves(codec, leaf):
    for use in (codec.encode, codec.nbytes):
        with pytest.raises(
            TypeError, match=r"only floating-point or complex leaves can be encoded: leaf \['odd'\] has"
        ):
            use({"w": jnp.ones(2), "odd": leaf})


TERNARY = HypervectorCodec(1.0, use_ternary=True)


@pytest.mark.parametrize(("codec", "name"), [(TritCodec(2, block_size=32), r"\['k'\].scales"), (TERNARY, r".scales")])
def test_a_payload_that_went_through_npz_is_refused_by_the_array(codec, name):
    """Whose dtype is lost; as bits it is kept, and by pickle."""
    payload = jax.device_get(codec.encode({"k": np.ones(64, np.float32)}))
    leaves, treedef = jax.tree.flatten(payload)

    def loaded(arrays):
        file = io.BytesIO()
        np.savez(file, *arrays)
        file.seek(0)
        with np.load(file) as data:
            return list(data.values())

    with pytest.raises(ValueError, match=rf"payload .*{name} has dtype V2: npz loses bfloat16; .*checkpoint or pickle"):
        codec.decode(jax.tree.unflatten(treedef, loaded(leaves)))
    kept = [
        x.view(like.dtype) for x, like in zip(loaded(x.view(np.uint8) for x in leaves[1:]), leaves[1:], strict=True)
    ]
    kept = [leaves[0], *(x.reshape(like.shape) for x, like in zip(kept, leaves[1:], strict=True))]
    for again in (jax.tree.unflatten(treedef, kept), pickle.loads(pickle.dumps(payload))):
        np.testing.assert_array_equal(codec.decode(again)["k"], codec.decode(payload)["k"])


@both_codecs
def test_a_payload_knows_its_codec(codec):
    payload = codec.encode({"k": np.ones(3, np.float32)})
    assert payload.codec == codec
    assert hash(payload.settings) == hash(codec.encode({}).settings)
