import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from vsa_optax.kernels import platforms


def twice(x):
    return platforms.on_gpu_or_anywhere(lambda x: jnp.tanh(2 * x), lambda x: 2 * x, x)


def lowered(platform, function=twice):
    """Whether the program takes the GPU's way on a platform."""
    text = jax.jit(lambda x: function(x)).trace(jnp.ones(8)).lower(lowering_platforms=(platform,)).as_text()
    return "tanh" in text


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.usefixtures("one_device")
def test_on_one_device_each_platform_has_its_way():
    if jax.default_backend() == "cpu":
        assert twice(jnp.float32(3)) == 6
    assert not lowered("cpu")
    assert lowered("cuda")


def test_on_several_devices_xla_divides_the_work(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert not lowered("cuda")


@pytest.mark.usefixtures("one_device")
def test_inside_shard_map_it_is_xlas_too():
    mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(twice, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    assert not lowered("cuda", mapped)
    assert mapped(jnp.ones(8)).tolist() == [2] * 8


def twice_on_each(x):
    return platforms.on_each_gpu_or_anywhere(lambda x: jnp.tanh(2 * x), lambda x: 2 * x, x)


@pytest.mark.usefixtures("one_device")
def test_what_each_gpu_does_for_itself_it_does_inside_shard_map_too():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(twice_on_each, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    assert lowered("cuda", mapped)
    assert not lowered("cpu", mapped)
    assert lowered("cuda", twice_on_each)


def test_but_not_on_several_devices_outside(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert not lowered("cuda", twice_on_each)


@pytest.mark.usefixtures("one_device")
def test_without_pallas_it_is_xlas(monkeypatch):
    monkeypatch.setattr(platforms, "has_kernels", lambda: False)
    assert not lowered("cuda", twice_on_each)


@pytest.mark.parametrize(
    ("capability", "has_kernels"), [("7.5", False), ("8.0", True), ("10.0", True), ("gfx90a", True), (None, True)]
)
def test_gpus_without_bfloat16_have_no_kernels(capability, has_kernels, monkeypatch):
    device = types.SimpleNamespace() if capability is None else types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert platforms.has_kernels.__wrapped__() == has_kernels


@pytest.mark.parametrize("is_checked", [True, False])
def test_a_kernels_result_varies_as_its_operands_do(is_checked):
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    found = []

    def note(x, y):
        found.append([platforms.shape_like((3,), jnp.bfloat16, operands) for operands in ([x, y], [y])])
        return x

    jax.eval_shape(
        jax.shard_map(note, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"), check_vma=is_checked),
        jnp.ones(2),
        jnp.ones(2),
    )
    varying, same = found[0]
    assert (varying.shape, varying.dtype) == (same.shape, same.dtype) == ((3,), jnp.bfloat16)
    assert (varying == same) == (not is_checked)
