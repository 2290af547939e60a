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
