"""Parameters whose axes have names, in Flax's containers: a state's arrays lie as the documentation says."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from transformations import TRANSFORMATIONS, states_of

from vsa_optax.core import axis_names

NAMED = ["secants", "window", "recursive", "window in trits", "window of hypervectors", "ternary_multi_steps"]
SHAPE, NAMES = (8, 16), ("data", None)
by_name = pytest.mark.parametrize("name", NAMED)


def mesh_of(kind):
    return Mesh(jax.devices(), ("data",), axis_types=(kind,))


def layout_of(shape):
    """Of a state's array: as the parameter's, with what is in front of that unsplit; of any other, whole."""
    return P(*[None] * (len(shape) - len(SHAPE)), *NAMES) if shape[-2:] == SHAPE else P()


def boxed_params():
    return {"w": nn.Partitioned(jnp.ones(SHAPE), NAMES)}


@by_name
def test_flax_partitions_what_was_made_of_boxes(name):
    """The layouts that it finds serve to make the state."""
    shapes = jax.eval_shape(TRANSFORMATIONS[name].init, boxed_params())
    layouts = nn.get_sharding(shapes, mesh_of(AxisType.Auto))
    state = jax.eval_shape(jax.jit(TRANSFORMATIONS[name].init, out_shardings=layouts), boxed_params())
    assert jax.tree.structure(state) == jax.tree.structure(shapes)
    whole = jax.tree.broadcast(layouts, nn.meta.unbox(shapes), is_leaf=lambda x: isinstance(x, NamedSharding))
    for shape, layout in zip(jax.tree.leaves(shapes), jax.tree.leaves(whole), strict=True):
        assert layout.spec == layout_of(shape.shape), shape.shape


@by_name
def test_boxes_with_names_are_updated(name):
    first, second = jax.eval_shape(lambda: states_of(name, boxed_params(), 2, is_jitted=True))
    assert jax.tree.structure(first) == jax.tree.structure(second)


@by_name
def test_optax_maps_what_is_like_the_parameters(name):
    """With their layouts beside them; the axes in front are the caller's to see, and codes are nothing like them."""
    opt, params = TRANSFORMATIONS[name], {"w": jnp.ones(SHAPE)}
    state = jax.eval_shape(opt.init, params)

    def like(leaf, spec):
        assert leaf.shape[-2:] == SHAPE
        return P(*[None] * (leaf.ndim - len(spec)), *spec)

    layouts = optax.tree.map_params(opt, like, state, {"w": P(*NAMES)}, transform_non_params=lambda _: P())
    whole = jax.tree.broadcast(layouts, state, is_leaf=lambda x: isinstance(x, P))
    for shape, layout in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
        assert layout == layout_of(shape.shape)
    assert jax.tree.structure(optax.tree.map_params(opt, lambda x: x, state)) == jax.tree.structure(state)


ALIKE = {
    "tuple": lambda *names: names,
    "PartitionSpec": P,
    "NamedSharding": lambda *names: NamedSharding(mesh_of(AxisType.Auto), P(*names)),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_an_axis_in_front_is_named_none_in_whatever_has_the_names(kind):
    """The variable that was given is left as it was."""
    variable = nnx.Param(jnp.ones(SHAPE))
    variable.set_metadata("out_sharding", ALIKE[kind](*NAMES))
    renamed = axis_names.with_axis_in_front({"w": variable})["w"]
    assert renamed.get_metadata()["out_sharding"] == ALIKE[kind](None, *NAMES)
    assert variable.get_metadata()["out_sharding"] == ALIKE[kind](*NAMES)


class Named(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.ones(SHAPE), out_sharding=NAMES)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, AxisType.Explicit) for name in ("secants", "window in trits", "ternary_multi_steps")]
    + [(name, AxisType.Auto) for name in ("window", "window in trits")],
)
def test_an_optimizer_of_nnx_takes_variables_with_names(name, kind):
    """Flax shards the state by the names at once, and refuses names that do not fit."""
    with jax.set_mesh(mesh_of(kind)):
        model = Named()
        spec = model.w[...].sharding.spec  # The oldest Flax heeds no names here.
        optimizer = nnx.Optimizer(model, TRANSFORMATIONS[name], wrt=nnx.Param)
        found = 0
        for leaf in jax.tree.leaves(nnx.state(optimizer)):
            if leaf.shape[-2:] == SHAPE:
                wanted = NamedSharding(mesh_of(kind), P(*[None] * (leaf.ndim - 2), *spec))
                assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
                found += 1
        assert found == {"secants": 5, "window": 1, "window in trits": 0, "ternary_multi_steps": 1}[name]
        states = jax.eval_shape(lambda: states_of(name, nnx.state(Named(), nnx.Param), 2))
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
