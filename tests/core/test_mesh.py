"""The queries of a mesh; ``test_collective_phases.py`` tests how devices decide together."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vsa_optax.core import mesh

DATA = frozenset(["data"])


def test_outside_shard_map_there_are_no_axes():
    with pytest.raises(ValueError, match=r"axis_name must name axes of the jax\.shard_map .* got \('data',\)"):
        mesh.axis_size(("data",))
    assert not mesh.is_mapped(("data",))
    assert not mesh.varying_axes({"a": jnp.ones(3), "b": 1.0})
    x = jnp.array([1.0, np.nan])
    assert mesh.as_varying(x, frozenset()) is x
    assert mesh.mean_over(x, frozenset()) is x
    assert not mesh.all_finite_over(frozenset())({"x": x})


def test_axes_are_found_wherever_they_are_in_a_state():
    assert mesh.axes_in({"count": jnp.int32(0)}) == frozenset()
    state = (jnp.ones(2), {"a": mesh.MeshAxes(("data",)), "b": [mesh.MeshAxes(("x", "data")), None]})
    assert mesh.axes_in(state) == {"data", "x"}
    assert len(jax.tree.leaves(state)) == 1


def test_devices_agree_on_a_flag_and_a_mean():
    num = 4

    def decide(flags, values):
        assert mesh.is_mapped(("data",))
        assert mesh.axis_size(("data",)) == num
        finite = mesh.all_finite_over(DATA)({"x": values})
        return mesh.all_devices_agree(flags[0], DATA), mesh.mean_over(values[0], DATA), finite

    devices = Mesh(np.array(jax.devices()[:num]), ("data",))
    run = jax.jit(
        jax.shard_map(decide, mesh=devices, in_specs=(P("data"), P("data")), out_specs=P(), **{"check_vma": True})
    )
    values = np.float32([1.0, 2.0, 4.0, 9.0])
    assert [float(x) for x in run(np.full(num, True), values)] == [1.0, 4.0, 1.0]
    for device in range(num):
        agreed, _, finite = run(np.arange(num) != device, np.where(np.arange(num) == device, np.nan, values))
        assert not agreed
        assert not finite


def test_what_a_device_has_for_itself_has_an_axis_in_front():
    tree = {"a": jnp.ones((2, 3)), "b": jnp.float32(4.0)}
    kept = mesh.with_axis_in_front(tree)
    assert [x.shape for x in jax.tree.leaves(kept)] == [(1, 2, 3), (1,)]
    jax.tree.map(np.testing.assert_array_equal, mesh.of_this_device("sum", kept), tree)
    for shape in ((2, 3), (0, 3), ()):
        with pytest.raises(ValueError, match=rf"sum in the state must .* \(1, \.\.\.\), got {re.escape(str(shape))}"):
            mesh.of_this_device("sum", {"a": jnp.ones(shape)})


@pytest.mark.parametrize("is_checked", [True, False], ids=["checked", "unchecked"])
def test_what_a_program_communicates_over_is_found_wherever_it_does(is_checked):
    def in_a_branch(x):
        def branch(x):
            return jax.lax.scan(lambda carry, _: (jax.lax.all_gather(carry, "data").sum(0), None), x, length=2)[0]

        return jax.lax.cond(x[0] > 0, branch, branch, x)

    def place(x):
        return x * jax.lax.axis_index("data"), jnp.sum(x, axis=0)

    def step(x):
        for fun, found in ((in_a_branch, DATA), (jax.jit(jnp.cos), frozenset()), (place, frozenset())):
            assert mesh.axes_communicated_over(jax.make_jaxpr(fun)(x)) == found
        return x

    devices = Mesh(np.array(jax.devices()[:2]), ("data",))
    run = jax.shard_map(step, mesh=devices, in_specs=P("data"), out_specs=P("data"), check_vma=is_checked)
    jax.eval_shape(run, jnp.ones(4))


def test_a_window_is_remembered_for_one_program_only():
    def step(x):
        assert not mesh.follows_window({"x": x}, "before")
        mesh.note_window({"x": x})
        assert not mesh.follows_window({"x": x}, "before")
        assert mesh.follows_window({"x": 2 * x}, "link")
        assert not mesh.follows_window({"x": x[None]}, "link")
        assert not mesh.follows_window([x], "link")
        return x

    for _ in range(2):
        jax.eval_shape(step, jnp.ones(3))
    assert not mesh.follows_window({"x": jnp.ones(3)}, "link")
