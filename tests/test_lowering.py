"""Every public transformation lowers for GPU and TPU, on a machine that has neither.

Errors at compilation or at run time there are not detected. No TPU has ever run any of it.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P
from transformations import TRANSFORMATIONS, params_of

import vsa_optax
from vsa_optax import HypervectorCodec, TritCodec

PLATFORMS = "tpu", "cuda"
LARGE = {"kernel": jax.ShapeDtypeStruct((512, 300), jnp.float32), "bias": jax.ShapeDtypeStruct((300,), jnp.float32)}
KERNELS = "trit_encode", "trit_decode_sum", "trit_add", "trit_finish", "trit_relay", "random_words", "replace_if"


def texts(function, *arguments, platforms=PLATFORMS):
    traced = jax.jit(lambda *given: function(*given)).trace(*arguments)
    return {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in platforms}


def kernels_in(text):
    """Names of Triton's programs."""
    return {name for name in KERNELS if f'"{name}"' in text}


def stepped(opt):
    """An update from the first state."""

    def step(params):
        return opt.update(params, opt.init(params), params, value=jnp.ones([], jnp.float32))

    return step


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.parametrize("name", [name for name in TRANSFORMATIONS if name != "compressed_pmean"])
def test_every_transformation_lowers(name):
    step = stepped(optax.with_extra_args_support(TRANSFORMATIONS[name]))
    for text in texts(step, params_of()).values():
        assert not kernels_in(text)  # Leaves are small.


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        (TritCodec(3, unbiased=True), {"trit_encode", "trit_decode_sum", "random_words"}),
        (TritCodec(3, block_size=512), {"random_words"}),
        (HypervectorCodec(0.1), {"random_words"}),
    ],
    ids=["1024", "512", "hypervector"],
)
@pytest.mark.usefixtures("one_device")
def test_a_codec_has_kernels_on_a_gpu(codec, expected):
    found = texts(lambda tree, step: codec.decode(codec.encode(tree, step)), LARGE, jnp.int32(3))
    assert {platform: kernels_in(text) for platform, text in found.items()} == {"tpu": set(), "cuda": expected}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.usefixtures("one_device")
def test_a_sum_has_kernels_on_a_gpu(rounding):
    opt = vsa_optax.ternary_multi_steps(optax.adam(1e-3), 4, rounding=rounding)
    found = texts(stepped(opt), LARGE)
    expected = {"trit_add", "trit_finish", "random_words", "replace_if"}
    assert {platform: kernels_in(text) for platform, text in found.items()} == {"tpu": set(), "cuda": expected}


def test_over_several_devices_xla_divides_the_work():
    codec = TritCodec()
    assert not kernels_in(texts(codec.encode, LARGE, platforms=("cuda",))["cuda"])


@pytest.mark.parametrize("is_checked", [True, False], ids=["checked", "unchecked"])
def test_inside_shard_map_each_gpu_has_kernels_for_what_it_holds(is_checked):
    """In the all-reduce the codec is mapped over shards, too."""
    opt = optax.chain(vsa_optax.compressed_pmean("d", TritCodec()), optax.sgd(0.1))
    opt = vsa_optax.ternary_multi_steps(opt, 2)
    mesh = jax.make_mesh((2,), ("d",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))

    def step(gradients):
        updates, state = opt.update(gradients, opt.init(gradients), gradients)
        return updates, state.acc_grads

    mapped = jax.shard_map(step, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=is_checked)
    found = texts(mapped, jax.ShapeDtypeStruct((2 * 1024, 300), jnp.float32))
    assert kernels_in(found["cuda"]) == set(KERNELS)
    assert not kernels_in(found["tpu"])


def test_where_only_some_axes_are_mapped_xla_divides_the_work():
    codec = TritCodec()
    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("d", "m"), devices=jax.devices()[:4], axis_types=types)
    mapped = jax.shard_map(
        lambda x: codec.decode(codec.encode(x)), mesh=mesh, in_specs=P("d"), out_specs=P("d"), axis_names={"d"}
    )
    text = texts(mapped, jax.ShapeDtypeStruct((1024, 300), jnp.float32), platforms=("cuda",))["cuda"]
    assert not kernels_in(text)
