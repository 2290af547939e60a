"""Every state survives every container that users keep states in, and training continues with it.

Containers take the nodes of a state apart and build others from the arrays, in their own ways. The tests show this
without running anything: updates are traced, and states are filled with numbers, not trained.
"""

import functools
import io
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from transformations import TRANSFORMATIONS, params_of, states_of, traced

every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)
X = np.ones((2, 8), np.float32)


@functools.cache
def filled(name):
    """A state in which every array has other numbers."""
    shapes = jax.eval_shape(TRANSFORMATIONS[name].init, params_of(jnp.bfloat16))
    leaves, treedef = jax.tree.flatten(shapes)
    numbers = [i + np.arange(max(1, x.size))[: x.size].reshape(x.shape) % 100 for i, x in enumerate(leaves)]
    return jax.tree.unflatten(treedef, [jnp.asarray(n, x.dtype) for n, x in zip(numbers, leaves, strict=True)])


def assert_same(actual, expected):
    """Structure, what is static included, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype, np.asarray(a).tobytes()) == (e.shape, e.dtype, np.asarray(e).tobytes())


def through_bytes(state):
    return serialization.from_bytes(jax.tree.map(jnp.zeros_like, state), serialization.to_bytes(state))


def through_a_state_dict(state):
    return serialization.from_state_dict(jax.tree.map(jnp.zeros_like, state), serialization.to_state_dict(state))


def through_pickle(state):
    return pickle.loads(pickle.dumps(state))


def through_npz(state):
    """By the paths of the arrays, as bytes, since the format has no bfloat16."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(state)
    file = io.BytesIO()
    np.savez(
        file, **{jax.tree_util.keystr(path): np.frombuffer(np.asarray(x).tobytes(), np.uint8) for path, x in paths}
    )
    file.seek(0)
    with np.load(file) as data:
        found = [np.frombuffer(data[jax.tree_util.keystr(path)], x.dtype).reshape(x.shape) for path, x in paths]
    return jax.tree.unflatten(treedef, found)


@pytest.mark.parametrize("keep", [through_bytes, through_a_state_dict, through_pickle, through_npz])
@every_transformation
def test_it_comes_back(name, keep):
    assert_same(keep(filled(name)), filled(name))


def pytree_checkpointer(folder, tree):
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder / "it", tree)
        return checkpointer.restore(folder / "it", item=tree)


def standard_checkpointer(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "it", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "it", jax.eval_shape(lambda: tree))


def checkpoint_manager(folder, tree):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(1, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
        return manager.restore(1, args=ocp.args.StandardRestore(tree))


@pytest.mark.filterwarnings("ignore")  # Orbax's own.
@pytest.mark.parametrize("keep", [pytree_checkpointer, standard_checkpointer, checkpoint_manager])
def test_orbax_brings_all_back(keep, tmp_path):
    states = {name: filled(name) for name in TRANSFORMATIONS}
    for name, state in keep(tmp_path, states).items():
        assert_same(state, states[name])


class Adapted(nnx.Module):
    """A layer, and what is trained beside it."""

    def __init__(self):
        self.layer = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
        self.adapter = nnx.LoRA(8, 6, 6, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.layer(x) + self.adapter(x)


def loss(model):
    return jnp.sum(model(X) ** 2)


def optimizer_run(name, wrt):
    model = Adapted()
    optimizer = nnx.Optimizer(model, TRANSFORMATIONS[name], wrt=wrt)
    states = []
    for _ in range(2):
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model)
        optimizer.update(model, grads, value=value)
        states.append(nnx.state(optimizer))
    return states


def model_and_optimizer_run(name, wrt):
    optimizer = nnx.ModelAndOptimizer(Adapted(), TRANSFORMATIONS[name], wrt=wrt)
    states = []
    for _ in range(2):
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(optimizer.model)
        optimizer.update(grads, value=value)
        states.append(nnx.state(optimizer))
    return states


def raw_state_run(name, wrt):
    """Without an object of Flax's that would hold the state."""
    return states_of(name, nnx.state(Adapted(), wrt), 2)


NNX = {
    "Optimizer": (optimizer_run, nnx.Param),
    "ModelAndOptimizer": (model_and_optimizer_run, nnx.Param),
    "adapters only": (optimizer_run, nnx.LoRAParam),
    "raw state": (raw_state_run, nnx.Param),
}


@pytest.mark.parametrize("container", NNX)
@every_transformation
def test_nnx_updates_it_again_and_again(name, container):
    """The first update writes to the state from `init`, the second to a restored one, as all others would."""
    run, wrt = NNX[container]
    first, second = traced(lambda: run(name, wrt), name)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert jax.tree.leaves(first) == jax.tree.leaves(second)


@every_transformation
def test_boxes_of_linen(name):
    """Around each parameter, and around what a state has of it."""

    def run():
        return states_of(
            name, jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), params_of()), 2, is_jitted=True
        )

    first, second = traced(run, name)
    assert jax.tree.structure(first) == jax.tree.structure(second)
